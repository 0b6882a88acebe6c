// Names of instances.
#ifndef NORMD_SERVER_INSTANCE_INSTANCE_NAME_H_
#define NORMD_SERVER_INSTANCE_INSTANCE_NAME_H_

#include <cstddef>
#include <string_view>

namespace normd {

inline constexpr size_t kMaxInstanceNameBytes = 255;

// Whether `name` may name an instance: 1 to 255 of [A-Za-z0-9._/-], where no
// segment between slashes is empty, "." or "..".
bool ValidInstanceName(std::string_view name);

}  // namespace normd

#endif  // NORMD_SERVER_INSTANCE_INSTANCE_NAME_H_
