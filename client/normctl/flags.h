// Flags that several commands share, and values as people write them.
#ifndef NORMD_CLIENT_NORMCTL_FLAGS_H_
#define NORMD_CLIENT_NORMCTL_FLAGS_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "client/normd_client.h"

namespace normd::normctl {

// A value that the parser fills and the action reads.
template <class T>
std::shared_ptr<T> Shared(T value = {}) {
  return std::make_shared<T>(std::move(value));
}

// The NAME of an instance.
std::shared_ptr<std::string> AddName(CLI::App& app);

// --expected_version and --request_id, of every change.
std::shared_ptr<CallOptions> AddChangeFlags(CLI::App& app);

// --mode=train|eval.
std::shared_ptr<std::optional<Mode>> AddMode(CLI::App& app, const std::string& help);

// A flag whose values are these dtypes.
std::shared_ptr<std::optional<DataType>> AddDataType(CLI::App& app, const std::string& flag,
                                                     std::vector<DataType> allowed,
                                                     const std::string& help);

// The dtypes that inputs may have.
std::vector<DataType> InputTypes();

// --memory_format=contiguous|channels_last.
std::shared_ptr<MemoryFormat> AddMemoryFormat(CLI::App& app);

// A duration as Abseil writes it: 500ms, 1m30s.
CLI::Option* AddDuration(CLI::App& app, const std::string& flag, absl::Duration* value,
                         const std::string& help);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_FLAGS_H_
