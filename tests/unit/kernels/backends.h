// Every backend that this build has, for tests that hold all of them to the same.
#ifndef NORMD_TESTS_UNIT_KERNELS_BACKENDS_H_
#define NORMD_TESTS_UNIT_KERNELS_BACKENDS_H_

#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/backend.h"

namespace normd {

// The CPU's instruction sets, the best first ("AVX3"); "CudaEmulated", the CUDA backend and
// its kernels on an emulated GPU; "Cuda", on this machine's.
std::vector<std::string> BackendNames();

// A test that is run once for each backend. Skipped, and says why, where "Cuda" has no
// device.
class BackendTest : public ::testing::TestWithParam<std::string> {
 protected:
  BackendTest();
  ~BackendTest() override;
  void SetUp() override;

  // Slower ones take part of the problems.
  bool is_best() const { return GetParam() == BackendNames().front() || GetParam() == "Cuda"; }
  bool is_cpu() const { return GetParam().find("Cuda") == std::string::npos; }

  struct Threads;
  std::unique_ptr<Threads> threads_;
  std::unique_ptr<Backend> backend_;
};

#define NORMD_FOR_EVERY_BACKEND(suite)                                                 \
  INSTANTIATE_TEST_SUITE_P(Every, suite, ::testing::ValuesIn(::normd::BackendNames()), \
                           [](const auto& info) { return info.param; })

}  // namespace normd

#endif  // NORMD_TESTS_UNIT_KERNELS_BACKENDS_H_
