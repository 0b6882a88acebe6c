// Layer: what an instance is, fixed when it is created.
#ifndef NORMD_SERVER_INSTANCE_LAYER_H_
#define NORMD_SERVER_INSTANCE_LAYER_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/dtype.h"

namespace normd {

enum class LayerKind : uint8_t {
  kBatchNorm1d,
  kBatchNorm2d,
  kBatchNorm3d,
  kLayerNorm,
  kGroupNorm,
  kInstanceNorm2d,
  kRmsNorm,
};

// PyTorch's name: "BatchNorm2d".
constexpr const char* NameOf(LayerKind kind) {
  switch (kind) {
    case LayerKind::kBatchNorm1d: return "BatchNorm1d";
    case LayerKind::kBatchNorm2d: return "BatchNorm2d";
    case LayerKind::kBatchNorm3d: return "BatchNorm3d";
    case LayerKind::kLayerNorm: return "LayerNorm";
    case LayerKind::kGroupNorm: return "GroupNorm";
    case LayerKind::kInstanceNorm2d: return "InstanceNorm2d";
    case LayerKind::kRmsNorm: return "RMSNorm";
  }
  return "?";
}

inline constexpr LayerKind kLayerKinds[] = {
    LayerKind::kBatchNorm1d, LayerKind::kBatchNorm2d, LayerKind::kBatchNorm3d,
    LayerKind::kLayerNorm,   LayerKind::kGroupNorm,   LayerKind::kInstanceNorm2d,
    LayerKind::kRmsNorm,
};

constexpr bool IsBatchNorm(LayerKind kind) {
  return kind == LayerKind::kBatchNorm1d || kind == LayerKind::kBatchNorm2d ||
         kind == LayerKind::kBatchNorm3d;
}
// Those over the last dimensions.
constexpr bool HasNormalizedShape(LayerKind kind) {
  return kind == LayerKind::kLayerNorm || kind == LayerKind::kRmsNorm;
}

// A layer with PyTorch's arguments of the same names. Checked when it is made
// (service/layers): the rest of the server relies on its ranges.
struct Layer {
  LayerKind kind = LayerKind::kBatchNorm2d;
  // Values of a parameter, 1 or more: channels, or the product of normalized_shape.
  int64_t num_features = 0;
  std::vector<int64_t> normalized_shape;  // HasNormalizedShape() only
  int64_t num_groups = 1;                 // GroupNorm only; divides num_features
  // Finite, 0 or more; none (RMSNorm only): the epsilon of the input's dtype.
  std::optional<double> eps = 1e-5;
  // Finite; none: cumulative average. Those with running statistics only.
  std::optional<double> momentum = 0.1;
  bool affine = true;  // there is a weight
  bool bias = true;    // and a bias beside it
  bool track_running_stats = true;
  DType state_dtype = DType::kFloat32;  // kFloat32 or kFloat64

  bool has_weight() const { return affine; }
  bool has_bias() const { return affine && bias; }
  // Shape of weight and bias.
  std::vector<int64_t> parameter_shape() const {
    return normalized_shape.empty() ? std::vector<int64_t>{num_features} : normalized_shape;
  }

  bool operator==(const Layer&) const = default;
};

}  // namespace normd

#endif  // NORMD_SERVER_INSTANCE_LAYER_H_
