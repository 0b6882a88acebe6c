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
};

// A change that was applied.
struct AppliedRequest {
  absl::uint128 id = 0;  // the request_id, a UUID
  Method method = Method::kForward;
  uint64_t version = 0;             // that the change made
  int64_t num_batches_tracked = 0;  // then
  absl::Time time;

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
  // Forgets changes past `version`: they were taken back.
  void DropAfter(uint64_t version);

  // Oldest first.
  std::vector<AppliedRequest> entries() const { return {entries_.begin(), entries_.end()}; }

 private:
  std::vector<AppliedRequest> entries_;
};

}  // namespace normd

#endif  // NORMD_SERVER_INSTANCE_REQUEST_LOG_H_
