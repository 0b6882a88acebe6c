// The specification: every norm in plain float64 loops, for people to read and
// tests to trust. Slow, and the only judge of what a backend must answer.
#ifndef NORMD_KERNELS_REFERENCE_H_
#define NORMD_KERNELS_REFERENCE_H_

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/problem.h"

namespace normd::reference {

using Values = std::vector<double>;

// `count` elements of `dtype` as doubles, and doubles rounded to elements.
Values Load(DType dtype, const void* data, int64_t count);
void Store(DType dtype, const Values& values, void* data);

// Where an element lies, and which set it belongs to. The problem is not empty.
int64_t OffsetOf(const NormProblem& problem, int64_t n, int64_t c, int64_t p);
int64_t SetOf(const NormProblem& problem, int64_t n, int64_t c);

// A value each set. center = false: the mean is 0.
struct SetMoments {
  Values mean;
  Values m2;  // sum of squared deviations from the mean
};
SetMoments MomentsOf(const NormProblem& problem, const Values& x);

// Biased variance without eps: m2 / set_size.
Values VarianceOf(const NormProblem& problem, const Values& m2);

// Empty `weight`, `bias` and `residual`: none.
struct Parameters {
  Values weight;
  Values bias;
};
struct ForwardResult {
  Values y;
  std::vector<bool> relu_mask;  // kRelu only
};
ForwardResult Forward(const NormProblem& problem, const Values& x, const Parameters& parameters,
                      const Values& mean, const Values& var, const Values& residual = {},
                      Activation activation = Activation::kNone);

struct BackwardResult {
  Values grad_x;
  Values grad_weight;
  Values grad_bias;
  Values grad_residual;
};
// Empty `relu_mask`: no activation.
BackwardResult Backward(const NormProblem& problem, const Values& x, const Values& grad_y,
                        const Values& weight, const Values& mean, const Values& var,
                        bool statistics_of_batch, const std::vector<bool>& relu_mask = {});

}  // namespace normd::reference

#endif  // NORMD_KERNELS_REFERENCE_H_
