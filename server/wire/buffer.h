// Buffer: a tensor's memory, pooled from the wire to the kernel and back.
#ifndef NORMD_SERVER_WIRE_BUFFER_H_
#define NORMD_SERVER_WIRE_BUFFER_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/admission/memory_budget.h"

namespace normd {

class BufferPool;

// Memory of `size` bytes, aligned to a cache line at least, not initialized.
// Move-only; gives its memory back to the pool, which must outlive it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept
      : pool_(other.pool_),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }
  ~Buffer();

  // Null for a buffer of size 0.
  char* data() { return data_; }
  const char* data() const { return data_; }
  size_t size() const { return size_; }
  // So many bytes in front of data() are the buffer's, too: for what comes before a tensor in
  // a message. None where that would cost another huge page.
  size_t room_in_front() const { return RoomInFront(capacity_); }

 private:
  friend class BufferPool;
  // Large buffers start on a huge page, which the kernel is asked for: fewer faults
  // and fewer TLB misses.
  static constexpr size_t kHugePage = size_t{2} << 20;
  static constexpr size_t RoomInFront(size_t capacity) { return capacity < kHugePage ? 128 : 0; }

  Buffer(BufferPool* pool, char* data, size_t size, size_t capacity)
      : pool_(pool), data_(data), size_(size), capacity_(capacity) {}

  BufferPool* pool_ = nullptr;
  char* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

// Keeps freed memory for the next request: the page faults of a fresh 100 MB
// buffer cost more than normalizing it. Thread-safe.
class BufferPool {
 public:
  // Keeps at most `max_idle_bytes` that nobody uses, and no more than leave room in
  // `budget`, where one is given, for what is claimed from it.
  explicit BufferPool(size_t max_idle_bytes, const MemoryBudget* budget = nullptr)
      : max_idle_bytes_(max_idle_bytes), budget_(budget) {}
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  // Null data when the system has no memory left.
  Buffer Get(size_t size);
  // Likewise, of memory that nobody has touched: it costs none until it is written to.
  Buffer GetUntouched(size_t size);
  // Likewise, of idle memory alone: null data where there is none of about this size.
  Buffer GetIdle(size_t size);
  // After a claim for memory that comes from elsewhere: gives up what is idle, where the
  // budget leaves no room for it any more.
  void MakeRoom();
  // After a message was freed: has malloc give what it keeps of it back to the system, where
  // more than half of the budget is in use.
  void GiveBackFreed();

 private:
  friend class Buffer;
  Buffer Allocate(size_t size, size_t capacity);
  static void Free(char* data, size_t capacity);
  void Put(char* data, size_t capacity);
  // Null where there is none.
  char* TakeIdle(size_t size_class, size_t capacity);
  size_t MostIdle() const;
  // Frees idle memory, the largest first, until there is no more than MostIdle().
  void Trim() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // Sizes are rounded up to four steps a power of two, so that what comes back
  // serves requests of about the same size and at most a quarter is wasted.
  static constexpr size_t kClasses = 4 * 64;
  static size_t ClassOf(size_t size, size_t* capacity);
  static size_t CapacityOf(size_t size_class);

  const size_t max_idle_bytes_;
  const MemoryBudget* const budget_;
  absl::Mutex mutex_;
  size_t idle_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::array<std::vector<char*>, kClasses> idle_ ABSL_GUARDED_BY(mutex_);
};

// Pooled memory, and its claim to a budget.
struct ClaimedBuffer {
  Buffer buffer;
  MemoryClaim claim;
};

}  // namespace normd

#endif  // NORMD_SERVER_WIRE_BUFFER_H_
