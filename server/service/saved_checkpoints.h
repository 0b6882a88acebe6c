// SavedCheckpoints: which SaveCheckpoint made which generation, so that a repeated
// request_id answers the one that it made.
#ifndef NORMD_SERVER_SERVICE_SAVED_CHECKPOINTS_H_
#define NORMD_SERVER_SERVICE_SAVED_CHECKPOINTS_H_

#include <deque>
#include <optional>
#include <string>
#include <utility>

#include "absl/numeric/int128.h"

namespace normd {

// Not thread-safe: the background thread alone uses it.
class SavedCheckpoints {
 public:
  // None for id 0, which stands for no id.
  std::optional<std::string> Find(absl::uint128 request_id) const {
    for (const auto& [id, checkpoint] : made_) {
      if (request_id != 0 && id == request_id) return checkpoint;
    }
    return std::nullopt;
  }
  void Add(absl::uint128 request_id, std::string checkpoint) {
    if (request_id == 0) return;
    made_.emplace_back(request_id, std::move(checkpoint));
    if (made_.size() > kRemembered) made_.pop_front();
  }

 private:
  static constexpr size_t kRemembered = 1024;
  std::deque<std::pair<absl::uint128, std::string>> made_;
};

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_SAVED_CHECKPOINTS_H_
