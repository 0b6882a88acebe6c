// MemoryBudget: every byte that a request needs is claimed here before it is
// allocated.
#ifndef NORMD_SERVER_ADMISSION_MEMORY_BUDGET_H_
#define NORMD_SERVER_ADMISSION_MEMORY_BUDGET_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/admission/release_listener.h"

namespace normd {

class MemoryBudget;

// Bytes that are claimed from a budget for as long as this lives. Move-only.
class MemoryClaim {
 public:
  MemoryClaim() = default;
  MemoryClaim(MemoryClaim&& other) noexcept
      : budget_(std::exchange(other.budget_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  MemoryClaim& operator=(MemoryClaim&& other) noexcept {
    std::swap(budget_, other.budget_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~MemoryClaim();

  int64_t bytes() const { return bytes_; }

  // Takes `bytes` of them, 0 to bytes(), into a claim of their own.
  MemoryClaim Split(int64_t bytes) {
    bytes_ -= bytes;
    return MemoryClaim(budget_, bytes);
  }
  // Takes all of another claim from the same budget.
  void Merge(MemoryClaim other) {
    if (budget_ == nullptr) budget_ = other.budget_;
    bytes_ += std::exchange(other.bytes_, 0);
  }

 private:
  friend class MemoryBudget;
  MemoryClaim(MemoryBudget* budget, int64_t bytes) : budget_(budget), bytes_(bytes) {}

  MemoryBudget* budget_ = nullptr;
  int64_t bytes_ = 0;
};

// Thread-safe; must outlive its claims.
class MemoryBudget {
 public:
  // `flag` sets the limit and is named in errors: "--memory_budget".
  MemoryBudget(int64_t limit, absl::string_view flag) : limit_(limit), flag_(flag) {}

  // RESOURCE_EXHAUSTED when `bytes` (0 or more) do not fit: with a retry delay
  // where they would fit an idle server, without one where they never do.
  absl::StatusOr<MemoryClaim> Claim(int64_t bytes);

  // Whether `bytes` fit, for now.
  bool HasRoom(int64_t bytes);

  // Both before anything is claimed. `reclaim` is called, on any thread, where there is no
  // room: it gives back what may be claimed again later.
  void NotifyOnRelease(ReleaseListener* listener) { listener_ = listener; }
  void ReclaimBy(std::function<void()> reclaim) { reclaim_ = std::move(reclaim); }

  int64_t in_use() const { return in_use_.load(); }
  int64_t limit() const { return limit_; }

 private:
  friend class MemoryClaim;

  const int64_t limit_;
  const std::string flag_;
  ReleaseListener* listener_ = nullptr;
  std::function<void()> reclaim_;
  std::atomic<int64_t> in_use_ = 0;
};

// Bytes of memory that this process may use: the smaller of the machine's and of
// its control group's limit.
int64_t MachineMemoryBytes();

}  // namespace normd

#endif  // NORMD_SERVER_ADMISSION_MEMORY_BUDGET_H_
