#include "client/internal/retry.h"

#include <algorithm>
#include <cmath>

#include "absl/random/random.h"
#include "absl/time/clock.h"

namespace normd::inline client::internal {

std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, const absl::Status& status,
                                         int attempt, double jitter) {
  if (policy.max_attempts > 0 && attempt + 1 >= policy.max_attempts) return std::nullopt;
  const absl::Duration asked = DetailOf(status).retry_delay;
  // Nobody here cancels a call: it was the server, that gave up waiting for it to finish
  // before it stopped.
  const bool worth = absl::IsUnavailable(status) || absl::IsCancelled(status) ||
                     (absl::IsResourceExhausted(status) && asked > absl::ZeroDuration());
  if (!worth) return std::nullopt;
  const absl::Duration backoff =
      std::min(policy.max_backoff, policy.initial_backoff * std::exp2(attempt));
  return std::max(asked, backoff * (1 - jitter / 2));
}

absl::Status CallWithRetries(const RetryPolicy& policy, absl::Time deadline,
                             absl::FunctionRef<absl::Status()> attempt) {
  thread_local absl::InsecureBitGen random;
  for (int i = 0;; ++i) {
    absl::Status status = attempt();
    if (status.ok()) return status;
    const auto delay = RetryDelay(policy, status, i, absl::Uniform(random, 0.0, 1.0));
    if (!delay || absl::Now() + *delay >= deadline) return status;
    absl::SleepFor(*delay);
  }
}

}  // namespace normd::inline client::internal
