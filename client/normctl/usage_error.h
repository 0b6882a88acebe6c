// Errors that the user can mend at the prompt: exit code 2.
#ifndef NORMD_CLIENT_NORMCTL_USAGE_ERROR_H_
#define NORMD_CLIENT_NORMCTL_USAGE_ERROR_H_

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/string_view.h"

namespace normd::normctl {

inline constexpr char kUsageErrorUrl[] = "normctl/usage";

inline absl::Status UsageError(absl::string_view message) {
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kUsageErrorUrl, absl::Cord());
  return status;
}

// Whether it was made here, and not by the server.
inline bool IsUsageError(const absl::Status& status) {
  return status.GetPayload(kUsageErrorUrl).has_value();
}

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_USAGE_ERROR_H_
