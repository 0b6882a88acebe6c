// Errors as normctl tells them: what happened, and what to do next.
#ifndef NORMD_CLIENT_NORMCTL_ERRORS_H_
#define NORMD_CLIENT_NORMCTL_ERRORS_H_

#include <string>

#include "absl/status/status.h"
#include "client/normctl/command.h"

namespace normd::normctl {

// Lines for people; `server` is the address that was called.
std::string HumanError(const absl::Status& status, const std::string& server);

// {"error": {"code": "NOT_FOUND", "message": ..., "field": ..., ...}}, of the
// detail only what the server filled.
Json JsonError(const absl::Status& status);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_ERRORS_H_
