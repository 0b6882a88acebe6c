// From the statistics of a set to what its elements are normalized by, for every
// backend. In double: kernels round the results to the type that they compute in.
#ifndef NORMD_KERNELS_SET_CONSTANTS_H_
#define NORMD_KERNELS_SET_CONSTANTS_H_

#include <cmath>
#include <cstdint>

#include "kernels/backend.h"
#include "kernels/host_device.h"
#include "kernels/moments.h"
#include "kernels/problem.h"
#include "kernels/shift.h"

namespace normd {

// Moments of one set.
struct SetMoments {
  double mean;
  double m2;
};

// Around the mean, or around 0 where the problem is not centered.
NORMD_HOST_DEVICE inline SetMoments CenteredAsAsked(const NormProblem& problem,
                                                    const PartialMoments& moments) {
  if (problem.center) return {moments.mean, moments.m2};
  return {0, moments.m2 + moments.count * moments.mean * moments.mean};
}

NORMD_HOST_DEVICE inline double InverseRoot(double value) {
#if defined(__CUDA_ARCH__)
  return rsqrt(value);  // a fifth of the time, and within a unit of the last place
#else
  return 1.0 / std::sqrt(value);
#endif
}

// What a set's elements are normalized by.
struct SetConstants {
  // `of_batch`: these are the statistics of the batch itself. Then a channel without
  // variance and eps gets 0 for 1 / 0, as in PyTorch: y = bias, dx = 0.
  NORMD_HOST_DEVICE SetConstants(const NormProblem& problem, double set_mean, double var,
                                 bool of_batch)
      : mean(problem.center ? set_mean : 0),
        shift(ShiftFor(problem.dtype, mean, var)),
        residual(std::isfinite(shift) ? mean - shift : 0),
        invstd(of_batch && problem.reduction == Reduction::kPerChannel && var + problem.eps == 0
                   ? 0
                   : InverseRoot(var + problem.eps)) {}

  // Those of a set among given statistics, whose mean may be null where the problem is
  // not centered.
  NORMD_HOST_DEVICE SetConstants(const NormProblem& problem, const Statistics& statistics,
                                 int64_t set, bool of_batch)
      : SetConstants(problem, statistics.mean == nullptr ? 0 : statistics.mean[set],
                     statistics.var[set], of_batch) {}

  // Of what was found before.
  NORMD_HOST_DEVICE SetConstants(double found_shift, double found_residual, double found_invstd)
      : mean(found_shift + found_residual),
        shift(found_shift),
        residual(found_residual),
        invstd(found_invstd) {}

  double mean;
  double shift;     // near the mean, in the computing type
  double residual;  // what it lost: mean - shift
  double invstd;
};

// Sums of dy and of dy * (x - shift).
struct GradientSums {
  double dy = 0;
  double dy_d = 0;
};

// grad_weight of a channel from its sums within a set.
NORMD_HOST_DEVICE inline double GradWeight(const SetConstants& set, const GradientSums& sums) {
  return (sums.dy_d - set.residual * sums.dy) * set.invstd;
}

// The part of dx that all elements of a set share, from the sums over the set of
// g = dy * weight and of g * x^:
//   dx = invstd * (g - sum_g / n - x^ * sum_gx / n) = dy * scale + d * slope + offset
struct SetGradient {
  NORMD_HOST_DEVICE SetGradient(const NormProblem& problem, const SetConstants& set, double sum_g,
                                double sum_gx) {
    const double n = static_cast<double>(problem.set_size());
    slope = -set.invstd * set.invstd * (sum_gx / n);
    offset = -set.residual * slope;
    if (problem.center) offset -= set.invstd * (sum_g / n);
  }
  double slope;
  double offset;
};

}  // namespace normd

#endif  // NORMD_KERNELS_SET_CONSTANTS_H_
