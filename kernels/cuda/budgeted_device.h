// BudgetedDevice: a device of which this process takes no more than its budgets allow.
#ifndef NORMD_KERNELS_CUDA_BUDGETED_DEVICE_H_
#define NORMD_KERNELS_CUDA_BUDGETED_DEVICE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "kernels/cuda/device.h"

namespace normd::cuda {

// Claims memory of the host that is to be pinned: what it answers is kept as long as that.
// Null: there is no room.
using ClaimPinned = std::function<std::shared_ptr<void>(size_t bytes)>;

class BudgetedDevice final : public Device {
 public:
  // `budget` in bytes of the device's memory; 0: half of it. `claim_pinned` may be empty:
  // then nobody is asked.
  BudgetedDevice(std::unique_ptr<Device> device, int64_t budget, ClaimPinned claim_pinned);

  int64_t budget() const { return budget_; }
  // With budget and what is in use of it.
  DeviceInfo info() const override;
  // kTooLarge: more than the whole budget. kOutOfMemory: more than is left of it, or than
  // the device has.
  Outcome Allocate(size_t bytes, void** memory) override;
  void Free(void* memory) override;
  Outcome AllocatePinned(size_t bytes, void** memory) override;
  void FreePinned(void* memory) override;
  Outcome OpenShared(const DeviceHandle& handle, void** memory, size_t* bytes) override {
    return device_->OpenShared(handle, memory, bytes);
  }
  void CloseShared(void* memory) override { device_->CloseShared(memory); }
  std::unique_ptr<Stream> NewStream() override { return device_->NewStream(); }
  size_t ScratchBytes(const ForwardWork& work) const override {
    return device_->ScratchBytes(work);
  }
  size_t ScratchBytes(const BackwardWork& work) const override {
    return device_->ScratchBytes(work);
  }

 private:
  const std::unique_ptr<Device> device_;
  const int64_t budget_;
  const ClaimPinned claim_pinned_;
  std::atomic<int64_t> in_use_ = 0;
  std::mutex mutex_;
  std::unordered_map<void*, int64_t> sizes_;
  std::unordered_map<void*, std::shared_ptr<void>> claims_;  // of pinned memory
};

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_BUDGETED_DEVICE_H_
