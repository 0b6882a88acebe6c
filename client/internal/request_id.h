// Ids of changing calls.
#ifndef NORMD_CLIENT_INTERNAL_REQUEST_ID_H_
#define NORMD_CLIENT_INTERNAL_REQUEST_ID_H_

#include <string>

namespace normd::inline client::internal {

// A random UUID (RFC 4122, version 4) from the system's generator, so that forked
// processes do not share ids.
std::string NewRequestId();

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_REQUEST_ID_H_
