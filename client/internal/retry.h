// When a failed call is worth another try, and when to make it.
#ifndef NORMD_CLIENT_INTERNAL_RETRY_H_
#define NORMD_CLIENT_INTERNAL_RETRY_H_

#include <optional>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/normd_client.h"

namespace normd::inline client::internal {

// How long to wait after `status` ended attempt number `attempt` (0: the first);
// nothing when it should not be tried again. `jitter` in [0, 1] takes up to half
// of the wait away.
std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, const absl::Status& status,
                                         int attempt, double jitter);

// Repeats `attempt` as the policy says while the next one would begin before
// `deadline`, and answers the last one's status.
absl::Status CallWithRetries(const RetryPolicy& policy, absl::Time deadline,
                             absl::FunctionRef<absl::Status()> attempt);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_RETRY_H_
