// Layer: what an instance is, fixed when it is created.
#ifndef NORMD_SERVER_INSTANCE_LAYER_H_
#define NORMD_SERVER_INSTANCE_LAYER_H_

#include <cstdint>
#include <optional>

#include "kernels/dtype.h"

namespace normd {

enum class LayerKind : uint8_t { kBatchNorm2d };

// A layer with PyTorch's arguments of the same names. Checked when it is made
// (service/validate): the rest of the server relies on its ranges.
struct Layer {
  LayerKind kind = LayerKind::kBatchNorm2d;
  int64_t num_features = 0;              // channels, 1 or more
  double eps = 1e-5;                     // finite, 0 or more
  std::optional<double> momentum = 0.1;  // finite; none: cumulative average
  bool affine = true;
  bool track_running_stats = true;
  DType state_dtype = DType::kFloat32;  // kFloat32 or kFloat64

  bool operator==(const Layer&) const = default;
};

}  // namespace normd

#endif  // NORMD_SERVER_INSTANCE_LAYER_H_
