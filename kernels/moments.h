// Moments: count, mean and sum of squared deviations of some values, and their
// exact merge.
#ifndef NORMD_KERNELS_MOMENTS_H_
#define NORMD_KERNELS_MOMENTS_H_

namespace normd {

struct PartialMoments {
  double count = 0;
  double mean = 0;
  double m2 = 0;

  // The moments of both together (Chan, Golub, LeVeque 1979). What is merged in
  // the same order gives the same bits. With Inf or NaN the mean is what a sum would
  // have given.
  constexpr void Merge(const PartialMoments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double total = count + other.count;
    const double delta = other.mean - mean;
    if (delta - delta == 0) {
      mean += delta * (other.count / total);
    } else {
      mean = mean * (count / total) + other.mean * (other.count / total);
    }
    m2 += other.m2 + delta * delta * (count * (other.count / total));
    count = total;
  }
};

}  // namespace normd

#endif  // NORMD_KERNELS_MOMENTS_H_
