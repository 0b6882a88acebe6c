// A device that is not there: the CUDA backend's Device on the host's memory and the
// emulated GPU, with faults on demand.
#ifndef NORMD_TESTS_UNIT_KERNELS_EMULATED_DEVICE_H_
#define NORMD_TESTS_UNIT_KERNELS_EMULATED_DEVICE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "kernels/cuda/device.h"

namespace normd {

// What a test may ask of it, and see; shared with the device, which the backend owns.
struct EmulatedState {
  std::atomic<int64_t> memory_bytes = int64_t{1} << 40;  // that there are
  std::atomic<int64_t> bytes_in_use = 0;                 // of the device's
  std::atomic<int64_t> pinned_bytes = 0;
  std::atomic<int64_t> bytes_in = 0;  // copied to the device so far
  std::atomic<int> streams = 0;
  std::atomic<int> launches = 0;  // of whole calls
  std::atomic<int> kernels = 0;
  std::atomic<bool> fail = false;  // every launch from now on
  std::atomic<int> shared_open = 0;

  // Called by each launch, if set. Not changed while calls are under way, but by itself.
  std::function<void()> on_launch;

  // Memory of "another process", as many bytes as it has, by a handle; what is not here
  // cannot be opened. Not changed while calls are under way.
  std::map<DeviceHandle, std::vector<char>> shared;
};

std::unique_ptr<cuda::Device> MakeEmulatedDevice(std::shared_ptr<EmulatedState> state);

}  // namespace normd

#endif  // NORMD_TESTS_UNIT_KERNELS_EMULATED_DEVICE_H_
