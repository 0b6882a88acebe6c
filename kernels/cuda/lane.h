// Lane: what one call at a time needs of a device, kept from call to call.
#ifndef NORMD_KERNELS_CUDA_LANE_H_
#define NORMD_KERNELS_CUDA_LANE_H_

#include <cstddef>
#include <memory>
#include <stop_token>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"

namespace normd::cuda {

// Memory of the host, or of the device elsewhere, that travels to or from a lane's: segments
// that lie one behind the other there, so that many small ones of the host are one copy.
class Parcel {
 public:
  struct Segment {
    void* host;  // read or written by the copies
    size_t bytes;
    size_t offset;
  };

  // Its offset from the parcel's begin in the lane's memory: a multiple of 256.
  size_t Add(const void* host, size_t bytes) {
    const size_t offset = bytes_;
    segments_.push_back({const_cast<void*>(host), bytes, offset});
    bytes_ += (bytes + 255) / 256 * 256;
    return offset;
  }
  const std::vector<Segment>& segments() const { return segments_; }
  size_t bytes() const { return bytes_; }

 private:
  std::vector<Segment> segments_;
  size_t bytes_ = 0;
};

// Of one thread at a time.
class Lane {
 public:
  explicit Lane(Device& device) : device_(device) {}
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  // Ready for a call with `device_bytes` in all.
  Outcome Prepare(size_t device_bytes);
  // Gives the device memory back.
  void Release();

  // Of Prepare(), 256-byte aligned.
  std::byte* memory() const { return static_cast<std::byte*>(memory_); }
  size_t memory_bytes() const { return memory_bytes_; }
  Stream& stream() { return *streams_[0]; }

  const Device& device() const { return device_; }

  // Copies of whole parcels, in chunks: one is gathered or scattered by this thread
  // while the device copies another. In() may return before its last chunk is copied,
  // but the host's memory may be changed then; Out() when all is there. kStopped
  // between chunks, with the stream idle.
  Outcome In(const Parcel& parcel, std::byte* device, const std::stop_token& stop);
  Outcome Out(const Parcel& parcel, const std::byte* device, const std::stop_token& stop);

  static constexpr size_t kChunkBytes = size_t{4} << 20;

  // For who copies by himself: staging of kChunkBytes each, and a stream for each of them,
  // the first of which is stream(). Null where the device refuses.
  static constexpr size_t kSlots = Stream::kMarks;
  std::byte* staging(size_t slot) const {
    return static_cast<std::byte*>(pinned_) + slot * kChunkBytes;
  }
  Stream* stream(size_t slot);
  // For everything on all of them; whether that went well.
  bool WaitForAll();

 private:
  std::byte* chunk(size_t number) const { return staging(number % kSlots); }
  Outcome Stopped();

  Device& device_;
  std::unique_ptr<Stream> streams_[kSlots];
  void* pinned_ = nullptr;  // kSlots chunks
  void* memory_ = nullptr;
  size_t memory_bytes_ = 0;
};

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_LANE_H_
