// RequestLog: which changes of an instance were already applied, by request_id.
#ifndef NORMD_SERVER_INSTANCE_REQUEST_LOG_H_
#define NORMD_SERVER_INSTANCE_REQUEST_LOG_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/numeric/int128.h"
#include "absl/time/time.h"

namespace normd {

// The calls that change an instance. Numbers are on disk: append only.
enum class Method : uint8_t {
  kCreate = 1,
  kDelete = 2,
  kTrain = 3,
  kEval = 4,
  kForward = 5,
  kBackward = 6,
  kZeroGrad = 7,
  kStep = 8,
  kSetState = 9,
  kResetRunningStats = 10,
  kResetParameters = 11,
  kResetOptimizer = 12,  // a Step that had no gradients, and reset the optimizer
};

// Whether a change of method `applied` is what a call of `called` may have made.
inline bool SameCall(Method applied, Method called) {
  return applied == called || (applied == Method::kResetOptimizer && called == Method::kStep);
}

// A change that was applied.
struct AppliedRequest {
  absl::uint128 id = 0;  // the request_id, a UUID
  Method method = Method::kForward;
  uint64_t version = 0;             // that the change made
  int64_t num_batches_tracked = 0;  // then
  absl::Time time;                  // by SteadyNow()

  bool operator==(const AppliedRequest&) const = default;
};

// The last changes that carried an id. Not thread-safe: the instance's lock
// guards it.
class RequestLog {
 public:
  static constexpr size_t kCapacity = 1024;
  static constexpr absl::Duration kKeep = absl::Minutes(10);

  // The entry of `id`, or none when it is unknown or older than kKeep.
  std::optional<AppliedRequest> Find(absl::uint128 id, absl::Time now) const;
  // Adds, and forgets what is past kCapacity or kKeep.
  void Add(const AppliedRequest& request);
  // Dates what is later than `now` back to it: the clock has been set back since, and
  // nothing is to be kept for longer than kKeep from now.
  void NoneAfter(absl::Time now);
  // Forgets changes past `version`: they were taken back.
  void DropAfter(uint64_t version);

  // Oldest first.
  std::vector<AppliedRequest> entries() const { return {entries_.begin(), entries_.end()}; }

 private:
  std::vector<AppliedRequest> entries_;
};

}  // namespace normd

#endif  // NORMD_SERVER_INSTANCE_REQUEST_LOG_H_
