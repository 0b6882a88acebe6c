// Problems, random tensors and the comparison with the reference, for tests of any
// backend.
#ifndef NORMD_TESTS_UNIT_KERNELS_PROBLEM_CASES_H_
#define NORMD_TESTS_UNIT_KERNELS_PROBLEM_CASES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/problem.h"
#include "kernels/reference.h"

namespace normd {

// A tensor in memory: its bytes, at an address with no more than an element's
// alignment, and no byte to spare at its end.
class TestTensor {
 public:
  // `on_line`: begins with a cache line; else an element further on.
  TestTensor(DType dtype, int64_t count, bool on_line = false);
  TestTensor(DType dtype, const reference::Values& values, bool on_line = false);

  void* data() { return bytes_.data() + offset_; }
  const void* data() const { return bytes_.data() + offset_; }
  int64_t count() const { return count_; }
  reference::Values values() const { return reference::Load(dtype_, data(), count_); }

 private:
  DType dtype_;
  int64_t count_;
  size_t offset_;
  std::vector<std::byte> bytes_;
};

// normal(mean, deviation), rounded to dtype.
reference::Values RandomValues(DType dtype, int64_t count, double mean, double deviation,
                               uint32_t seed);

// What a call is made with.
struct CallOptions {
  bool affine = true;
  bool by_batch = true;
  bool residual = false;
  bool relu = false;
  bool in_place = false;  // y over x, grad_x over grad_y
  bool on_lines = false;  // all tensors begin with a cache line
  double mean = 0.5;      // of x
  double deviation = 1;
};

std::string Describe(const NormProblem& problem);

// All shapes, formats, reductions and data types worth trying.
std::vector<NormProblem> ManyProblems();

// Run the backend beside the reference; failures name the problem.
void ExpectForwardMatches(Backend& backend, const NormProblem& problem, const CallOptions& options);
void ExpectBackwardMatches(Backend& backend, const NormProblem& problem,
                           const CallOptions& options);

}  // namespace normd

#endif  // NORMD_TESTS_UNIT_KERNELS_PROBLEM_CASES_H_
