// In builds without a CUDA compiler.
#include "kernels/cuda/cuda_backend.h"

namespace normd::cuda {

std::vector<std::unique_ptr<Device>> OpenDevices(const std::vector<int>&, std::string* why) {
  *why = "this build has no CUDA backend";
  return {};
}

}  // namespace normd::cuda
