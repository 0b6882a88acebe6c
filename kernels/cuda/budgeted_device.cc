#include "kernels/cuda/budgeted_device.h"

namespace normd::cuda {

BudgetedDevice::BudgetedDevice(std::unique_ptr<Device> device, int64_t budget,
                               ClaimPinned claim_pinned)
    : device_(std::move(device)),
      budget_(budget > 0 ? budget : device_->info().memory_bytes / 2),
      claim_pinned_(std::move(claim_pinned)) {}

DeviceInfo BudgetedDevice::info() const {
  DeviceInfo info = device_->info();
  info.memory_budget = budget_;
  info.memory_in_use = in_use_;
  return info;
}

Outcome BudgetedDevice::Allocate(size_t bytes, void** memory) {
  const auto wanted = static_cast<int64_t>(bytes);
  if (wanted > budget_) return Outcome::kTooLarge;
  int64_t used = in_use_;
  do {
    if (wanted > budget_ - used) return Outcome::kOutOfMemory;
  } while (!in_use_.compare_exchange_weak(used, used + wanted));
  const Outcome outcome = device_->Allocate(bytes, memory);
  if (outcome != Outcome::kOk) {
    in_use_ -= wanted;
    return outcome;
  }
  const std::lock_guard lock(mutex_);
  sizes_[*memory] = wanted;
  return Outcome::kOk;
}

// Forgotten before it is free: somebody else may be given the same address then.
void BudgetedDevice::Free(void* memory) {
  int64_t bytes = 0;
  {
    const std::lock_guard lock(mutex_);
    bytes = sizes_.extract(memory).mapped();
  }
  device_->Free(memory);
  in_use_ -= bytes;
}

Outcome BudgetedDevice::AllocatePinned(size_t bytes, void** memory) {
  std::shared_ptr<void> claim;
  if (claim_pinned_ != nullptr) {
    claim = claim_pinned_(bytes);
    if (claim == nullptr) return Outcome::kOutOfMemory;
  }
  const Outcome outcome = device_->AllocatePinned(bytes, memory);
  if (outcome != Outcome::kOk) return outcome;
  const std::lock_guard lock(mutex_);
  claims_[*memory] = std::move(claim);
  return Outcome::kOk;
}

void BudgetedDevice::FreePinned(void* memory) {
  std::shared_ptr<void> claim;
  {
    const std::lock_guard lock(mutex_);
    claim = std::move(claims_.extract(memory).mapped());
  }
  device_->FreePinned(memory);
}

}  // namespace normd::cuda
