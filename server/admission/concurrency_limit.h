// ConcurrencyLimit: how many requests with tensors may be under way at once.
#ifndef NORMD_SERVER_ADMISSION_CONCURRENCY_LIMIT_H_
#define NORMD_SERVER_ADMISSION_CONCURRENCY_LIMIT_H_

#include <atomic>
#include <cstdint>
#include <utility>

#include "absl/status/statusor.h"
#include "server/admission/release_listener.h"

namespace normd {

class ConcurrencyLimit;

// A request's place among those under way, for as long as this lives. Move-only.
class ConcurrencySlot {
 public:
  ConcurrencySlot() = default;
  ConcurrencySlot(ConcurrencySlot&& other) noexcept
      : limit_(std::exchange(other.limit_, nullptr)) {}
  ConcurrencySlot& operator=(ConcurrencySlot&& other) noexcept {
    std::swap(limit_, other.limit_);
    return *this;
  }
  ~ConcurrencySlot();

 private:
  friend class ConcurrencyLimit;
  explicit ConcurrencySlot(ConcurrencyLimit* limit) : limit_(limit) {}

  ConcurrencyLimit* limit_ = nullptr;
};

// Thread-safe; must outlive its slots.
class ConcurrencyLimit {
 public:
  // At most `most` at once; 0: any number.
  explicit ConcurrencyLimit(int64_t most) : most_(most) {}

  // RESOURCE_EXHAUSTED, with a retry delay, when all places are taken.
  absl::StatusOr<ConcurrencySlot> Enter();
  bool has_room() const { return most_ == 0 || under_way_.load() < most_; }

  // Before anyone enters.
  void NotifyOnRelease(ReleaseListener* listener) { listener_ = listener; }

 private:
  friend class ConcurrencySlot;

  const int64_t most_;
  ReleaseListener* listener_ = nullptr;
  std::atomic<int64_t> under_way_ = 0;
};

}  // namespace normd

#endif  // NORMD_SERVER_ADMISSION_CONCURRENCY_LIMIT_H_
