// NormProblem: what is normalized over what. The one door for every norm and
// memory layout; kernels know nothing of layers, only of problems.
#ifndef NORMD_KERNELS_PROBLEM_H_
#define NORMD_KERNELS_PROBLEM_H_

#include <cstdint>

#include "kernels/dtype.h"

namespace normd {

// Order of the elements of (N, C, spatial...) in memory.
enum class MemoryFormat : uint8_t { kContiguous, kChannelsLast };

// Which elements share one mean and variance (one "set").
enum class Reduction : uint8_t {
  // A channel's, over the batch and all positions: BatchNorm. Sets: channels.
  kPerChannel,
  // A sample's group of channels, over its channels and positions: GroupNorm,
  // InstanceNorm (each channel a group), LayerNorm (one group, one position).
  // Sets: batch x groups.
  kPerSampleGroup,
};

// A tensor of batch x channels x positions, and how it is normalized:
//   y = (x - mean[set]) / sqrt(var[set] + eps) * weight[channel] + bias[channel]
//
//                      batch      channels   positions  groups    reduction
//   BatchNorm (N,C,*)  N          C          prod(*)    1         kPerChannel
//   InstanceNorm       N          C          prod(*)    C         kPerSampleGroup
//   GroupNorm          N          C          prod(*)    G         kPerSampleGroup
//   LayerNorm (*,D)    prod(*)    prod(D)    1          1         kPerSampleGroup
//   RMSNorm   (*,D)    as LayerNorm, center = false
//
// Elements lie densely; the offset of (n, c, p) is
//   kContiguous     (n * channels + c) * positions + p
//   kChannelsLast   (n * positions + p) * channels + c
struct NormProblem {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t positions = 0;
  int64_t groups = 1;  // divides channels; kPerSampleGroup only
  Reduction reduction = Reduction::kPerChannel;
  MemoryFormat format = MemoryFormat::kContiguous;
  DType dtype = DType::kFloat32;
  bool center = true;  // false: mean is taken as 0 and var is the mean square
  double eps = 1e-5;   // 0 or more

  friend bool operator==(const NormProblem&, const NormProblem&) = default;

  constexpr int64_t size() const { return batch * channels * positions; }
  constexpr int64_t num_sets() const {
    return reduction == Reduction::kPerChannel ? channels : batch * groups;
  }
  // Values in each set.
  constexpr int64_t set_size() const {
    return reduction == Reduction::kPerChannel ? batch * positions
           : groups == 0                       ? 0
                                               : channels / groups * positions;
  }
  constexpr DType parameter_dtype() const { return ParameterTypeFor(dtype); }
};

}  // namespace normd

#endif  // NORMD_KERNELS_PROBLEM_H_
