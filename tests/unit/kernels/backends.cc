#include "tests/unit/kernels/backends.h"

#include <utility>

#include "kernels/cuda/cuda_backend.h"
#if NORMD_HAS_CPU_BACKEND
#include "kernels/cpu/simd.h"
//
#include "hwy/targets.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/kernels.h"
#include "kernels/thread_pool.h"
#endif
#if NORMD_HAS_EMULATED_GPU
#include "tests/unit/kernels/emulated_device.h"
#endif

namespace normd {
namespace {

#if NORMD_HAS_CPU_BACKEND
constexpr int64_t kTargets[] = {HWY_AVX3, HWY_AVX2, HWY_SSE4, HWY_NEON, HWY_SCALAR};
#endif

std::vector<std::string> FindBackendNames() {
  std::vector<std::string> names;
#if NORMD_HAS_CPU_BACKEND
  hwy::SetSupportedTargetsForTest(0);
  for (const int64_t target : kTargets) {
    // Every Arm machine of 64 bits has NEON: no plain C++ is compiled there.
    if ((hwy::SupportedTargets() & HWY_TARGETS & target) != 0 ||
        (HWY_ARCH_X86 && target == HWY_SCALAR)) {
      names.emplace_back(hwy::TargetName(target));
    }
  }
#endif
#if NORMD_HAS_EMULATED_GPU
  names.emplace_back("CudaEmulated");
#endif
  names.emplace_back("Cuda");
  return names;
}

}  // namespace

std::vector<std::string> BackendNames() {
  static const std::vector<std::string> names = FindBackendNames();
  return names;
}

struct BackendTest::Threads {
#if NORMD_HAS_CPU_BACKEND
  ThreadPool executor{2};
#endif
};

BackendTest::BackendTest() : threads_(std::make_unique<Threads>()) {}

BackendTest::~BackendTest() {
#if NORMD_HAS_CPU_BACKEND
  hwy::SetSupportedTargetsForTest(0);
#endif
}

void BackendTest::SetUp() {
  if (GetParam() == "Cuda") {
    std::string why;
    backend_ = MakeCudaBackend({}, &why);
    if (backend_ == nullptr) GTEST_SKIP() << why;
    return;
  }
#if NORMD_HAS_EMULATED_GPU
  if (GetParam() == "CudaEmulated") {
    std::vector<std::unique_ptr<cuda::Device>> devices;
    devices.push_back(MakeEmulatedDevice(std::make_shared<EmulatedState>()));
    backend_ = cuda::MakeBackend(std::move(devices));
    return;
  }
#endif
#if NORMD_HAS_CPU_BACKEND
  for (const int64_t target : kTargets) {
    if (GetParam() == hwy::TargetName(target)) hwy::SetSupportedTargetsForTest(target);
  }
  ASSERT_EQ(cpu::InstructionSet(), GetParam());
  backend_ = MakeCpuBackend(threads_->executor, {});
#endif
}

}  // namespace normd
