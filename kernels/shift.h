// What values are shifted by before they are summed.
#ifndef NORMD_KERNELS_SHIFT_H_
#define NORMD_KERNELS_SHIFT_H_

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/host_device.h"

namespace normd {

// `mean` rounded to about an eighth of `deviation`, a power of two: near enough for
// exact sums, and coarse enough for exact differences. Values are often coarser than
// the type they are computed in (halves, pixels over 256); a mean with all its bits
// would make every difference, and every sum of them, round the same way: a bias that
// does not average out. `mean` itself where the deviation is 0 or not finite.
NORMD_HOST_DEVICE inline double ShiftNear(double mean, double deviation) {
  constexpr uint64_t kExponent = uint64_t{0x7ff} << 52;
  const double power = std::bit_cast<double>(std::bit_cast<uint64_t>(deviation) & kExponent);
  // Adding this leaves no bits below an eighth of the power.
  const double large = power * (0x1.8p52 / 8);
  const double rounded = (mean + large) - large;
  return std::isfinite(rounded) ? rounded : mean;
}

}  // namespace normd

#endif  // NORMD_KERNELS_SHIFT_H_
