// Device: one GPU as the CUDA backend uses it, so that everything above it, and the
// kernels' own source, run without a GPU too (tests/unit/kernels/emulated_device.h).
#ifndef NORMD_KERNELS_CUDA_DEVICE_H_
#define NORMD_KERNELS_CUDA_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/backend.h"
#include "kernels/problem.h"

namespace normd::cuda {

// Every pointer is to device memory. Null where the call has no such thing.
struct ForwardWork {
  NormProblem problem;  // not empty
  // What is normalized: all of it, or with given statistics a range of elements, which
  // x, y, residual and mask then are.
  int64_t first = 0;
  int64_t count = 0;
  const void* x = nullptr;
  void* y = nullptr;  // null: only the moments are wanted
  const void* weight = nullptr;
  const void* bias = nullptr;
  Moments moments = {};        // to be written, or
  Statistics statistics = {};  // to be used
  bool statistics_of_batch = false;
  Epilogue epilogue = {};
  void* scratch = nullptr;  // Device::ScratchBytes(), 256-byte aligned
};

struct BackwardWork {
  NormProblem problem;  // not empty
  BackwardArgs args = {};
  void* scratch = nullptr;
};

// An order of work: what is enqueued on one stream runs in that order, what is on
// several overlaps.
class Stream {
 public:
  virtual ~Stream() = default;

  // Between device memory and pinned memory, when what was enqueued before is done.
  virtual Outcome CopyIn(void* device, const void* pinned, size_t bytes) = 0;
  virtual Outcome CopyOut(void* pinned, const void* device, size_t bytes) = 0;
  // Between places in device memory, likewise.
  virtual Outcome CopyWithin(void* to, const void* from, size_t bytes) = 0;
  virtual Outcome Forward(const ForwardWork& work) = 0;
  virtual Outcome Backward(const BackwardWork& work) = 0;

  // Marks are numbered 0 to kMarks - 1; each waits for what was enqueued before its
  // latest Mark(), or not at all where there was none.
  static constexpr int kMarks = 4;
  virtual Outcome Mark(int mark) = 0;
  virtual Outcome WaitFor(int mark) = 0;
  // For everything enqueued.
  virtual Outcome Wait() = 0;
};

// Thread-safe. Whatever fails with kDeviceFailed fails again: a CUDA error that is
// not for want of memory leaves the process no use of that device.
class Device {
 public:
  virtual ~Device() = default;

  // `healthy` is the backend's to say.
  virtual DeviceInfo info() const = 0;
  // 256-byte aligned, not initialized; kOutOfMemory where there is no more.
  virtual Outcome Allocate(size_t bytes, void** memory) = 0;
  virtual void Free(void* memory) = 0;
  // Memory of the host that the device copies from and to by itself.
  virtual Outcome AllocatePinned(size_t bytes, void** memory) = 0;
  virtual void FreePinned(void* memory) = 0;
  // Memory that another process of this host has here, which stays its own: where it lies,
  // and the bytes from there to the allocation's end. kRefused: the handle names none. As
  // often as it was opened it must be closed.
  virtual Outcome OpenShared(const DeviceHandle& handle, void** memory, size_t* bytes) = 0;
  virtual void CloseShared(void* memory) = 0;
  // Null where the device refuses. Must not outlive the device.
  virtual std::unique_ptr<Stream> NewStream() = 0;
  // That the kernels of a call need between their passes. Looks at which pointers are
  // null, not at where they point.
  virtual size_t ScratchBytes(const ForwardWork& work) const = 0;
  virtual size_t ScratchBytes(const BackwardWork& work) const = 0;
};

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_DEVICE_H_
