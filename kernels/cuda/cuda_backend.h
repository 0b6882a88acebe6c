// The CUDA backend: the same problems on GPUs.
//
// A call is staged through pinned memory by a lane of its own (a stream, staging and
// device memory, kept for the next call), so that the copies of one call run beside the
// kernels of another, and a large tensor's first chunk is under way while its second is
// gathered; by given statistics, is back before its last. What a Token names stays on the
// device between calls, as long as there is room.
#ifndef NORMD_KERNELS_CUDA_CUDA_BACKEND_H_
#define NORMD_KERNELS_CUDA_CUDA_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"

namespace normd {

struct CudaOptions {
  std::vector<int> devices;  // by CUDA's numbers; empty: all
  // Called once for each device that fails, by the thread whose call found out, with
  // the number of devices that are left. May be empty.
  std::function<void(const DeviceInfo& failed, int left)> on_failure;
  // Bytes of each device's memory that may be taken; 0: half of it.
  int64_t memory_budget = 0;
  // Asked before memory of the host is pinned for staging; its answer is kept as long as
  // that, and null means that there is no room. May be empty.
  std::function<std::shared_ptr<void>(size_t bytes)> claim_pinned = {};
};

// Null, and `why` says so in a sentence, where there is no such device, no driver, or
// no CUDA in this build.
std::unique_ptr<Backend> MakeCudaBackend(const CudaOptions& options, std::string* why);

namespace cuda {

// A backend on these devices, one or more. A call goes to the healthy one with the fewest
// bytes to move, those of calls under way and those of the call's own parameters that are not
// there yet: to where it was before, unless that is busy and another is not. Place::kDevice is
// supported where there is one device alone. options.devices are these, whatever it says.
std::unique_ptr<Backend> MakeBackend(std::vector<std::unique_ptr<Device>> devices,
                                     const CudaOptions& options = {});

// The devices of this machine; empty, and `why` says so, where one cannot be had.
std::vector<std::unique_ptr<Device>> OpenDevices(const std::vector<int>& numbers, std::string* why);

}  // namespace cuda
}  // namespace normd

#endif  // NORMD_KERNELS_CUDA_CUDA_BACKEND_H_
