#include "server/admission/concurrency_limit.h"

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/error/error.h"

namespace normd {

ConcurrencySlot::~ConcurrencySlot() {
  if (limit_ == nullptr) return;
  limit_->under_way_.fetch_sub(1);
  if (limit_->listener_ != nullptr) limit_->listener_->Released();
}

absl::StatusOr<ConcurrencySlot> ConcurrencyLimit::Enter() {
  if (most_ == 0) return ConcurrencySlot();
  ConcurrencySlot slot(this);
  const int64_t others = under_way_.fetch_add(1, std::memory_order_relaxed);
  if (others < most_) return slot;
  return LimitExceeded("", absl::StrCat("a request beside the ", most_, " under way"), most_,
                       "--max_concurrent_requests", absl::Milliseconds(100));
}

}  // namespace normd
