// ChunkedForward: a large forward by given statistics, for which no element needs another,
// so that it need never be on the device as a whole.
#ifndef NORMD_KERNELS_CUDA_CHUNKED_FORWARD_H_
#define NORMD_KERNELS_CUDA_CHUNKED_FORWARD_H_

#include <cstddef>
#include <cstdint>
#include <stop_token>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/lane.h"

namespace normd::cuda {

// Of work by given statistics, only the samples that its range touches, and their statistics.
void KeepTouchedSamples(ForwardWork& work);

class ChunkedForward {
 public:
  // Tensors of `work` are in host memory. y may be x or the residual.
  explicit ChunkedForward(const ForwardWork& work);

  // Whether there is more than one.
  bool has_chunks() const { return chunk_ < host_.count; }

  // That Run() needs, however large the tensors are.
  size_t DeviceBytes(const Device& device) const;

  // A chunk is copied in while the one before is normalized and the one before that copied
  // out. `on_device`: the work with parameters and statistics there, and DeviceBytes() of
  // scratch. kStopped between chunks.
  Outcome Run(Lane& lane, const ForwardWork& on_device, const std::stop_token& stop) const;

 private:
  static constexpr size_t kSlots = Lane::kSlots;

  // Where a chunk's residual, x and then y, and mask lie, on the device and in staging alike.
  size_t TensorBytes() const;
  size_t XAt() const { return host_.epilogue.residual == nullptr ? 0 : TensorBytes(); }
  size_t MaskAt() const { return XAt() + TensorBytes(); }
  size_t SlotBytes() const;
  size_t ScratchBytes(const Device& device) const;

  int64_t CountOf(int64_t first) const;
  Outcome Start(Lane& lane, size_t slot, int64_t first, const ForwardWork& on_device,
                size_t scratch_bytes) const;
  Outcome Finish(Lane& lane, size_t slot, int64_t first) const;

  ForwardWork host_;
  size_t element_;
  int64_t chunk_;  // elements of all but the last; a multiple of a mask's word
};

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_CHUNKED_FORWARD_H_
