// What values are shifted by before they are summed.
#ifndef NORMD_KERNELS_SHIFT_H_
#define NORMD_KERNELS_SHIFT_H_

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/host_device.h"

namespace normd {

// `mean` rounded to about an eighth of the deviation, a power of two: near enough for
// exact sums, and coarse enough for exact differences. Values are often coarser than
// the type they are computed in (halves, pixels over 256); a mean with all its bits
// would make every difference, and every sum of them, round the same way: a bias that
// does not average out. `mean` itself where the variance is 0 or not finite.
NORMD_HOST_DEVICE inline double ShiftNear(double mean, double var) {
  constexpr int kBias = 1023, kDigits = 52;
  const int exponent = static_cast<int>(std::bit_cast<uint64_t>(var) >> kDigits & 0x7ff);
  if (!(var > 0) || exponent == 0 || exponent == 0x7ff) return mean;
  // The power of two of the deviation, by half the exponent.
  const int half = ((exponent - kBias) >> 1) + kBias;
  const double power = std::bit_cast<double>(static_cast<uint64_t>(half) << kDigits);
  // Adding this leaves no bits below an eighth of the power.
  const double large = power * (0x1.8p52 / 8);
  const double rounded = (mean + large) - large;
  return std::isfinite(rounded) ? rounded : mean;
}

// Whether halves of such a set are as good unshifted: their own rounding is coarser than what
// float32 loses within two deviations of 0.
NORMD_HOST_DEVICE inline bool IsNearZero(double mean, double var) { return mean * mean <= 4 * var; }

// The shift of a set in the type that elements are computed in.
NORMD_HOST_DEVICE inline double ShiftFor(DType dtype, double mean, double var) {
  if (dtype == DType::kFloat64) return mean;
  if (dtype != DType::kFloat32 && IsNearZero(mean, var)) return 0;
  return static_cast<double>(static_cast<float>(ShiftNear(mean, var)));
}

}  // namespace normd

#endif  // NORMD_KERNELS_SHIFT_H_
