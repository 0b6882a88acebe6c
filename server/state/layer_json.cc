#include "server/state/layer_json.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "formats/json_text.h"
#include "server/state/strict_json.h"

namespace normd {
namespace {

// Which members a kind is written with: the arguments that PyTorch has for it.
bool HasMomentum(LayerKind kind) { return IsBatchNorm(kind) || kind == LayerKind::kInstanceNorm2d; }
bool HasBias(LayerKind kind) { return kind == LayerKind::kLayerNorm; }

void AppendNumberOrNull(std::string& out, const char* key, std::optional<double> value) {
  fmt::format_to(std::back_inserter(out), R"(,"{}":)", key);
  if (value.has_value()) {
    AppendJsonNumber(out, *value);
  } else {
    out += "null";
  }
}

}  // namespace

void AppendLayerJson(std::string& out, const Layer& layer) {
  const auto append = std::back_inserter(out);
  fmt::format_to(append, R"({{"kind":"{}",)", NameOf(layer.kind));
  if (HasNormalizedShape(layer.kind)) {
    fmt::format_to(append, R"("normalized_shape":[{}])", fmt::join(layer.normalized_shape, ","));
  } else {
    fmt::format_to(append, R"("num_features":{})", layer.num_features);
  }
  if (layer.kind == LayerKind::kGroupNorm) {
    fmt::format_to(append, R"(,"num_groups":{})", layer.num_groups);
  }
  AppendNumberOrNull(out, "eps", layer.eps);
  if (HasMomentum(layer.kind)) AppendNumberOrNull(out, "momentum", layer.momentum);
  fmt::format_to(append, R"(,"affine":{})", layer.affine);
  if (HasBias(layer.kind)) fmt::format_to(append, R"(,"bias":{})", layer.bias);
  if (HasMomentum(layer.kind)) {
    fmt::format_to(append, R"(,"track_running_stats":{})", layer.track_running_stats);
  }
  fmt::format_to(append, R"(,"dtype":"{}"}})", NameOf(layer.state_dtype));
}

absl::StatusOr<Layer> LayerFromJson(const nlohmann::json& json) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  JsonMembers members(json, "layer");
  Layer layer;
  const std::string kind = members.String("kind");
  const auto known = std::find_if(std::begin(kLayerKinds), std::end(kLayerKinds),
                                  [&](LayerKind other) { return kind == NameOf(other); });
  if (known == std::end(kLayerKinds)) {
    members.Fail("kind", "is not known here");
    return members.Finish();
  }
  layer.kind = *known;
  if (HasNormalizedShape(layer.kind)) {
    layer.num_features = 1;
    if (const nlohmann::json* shape = members.Take("normalized_shape")) {
      if (!shape->is_array() || shape->empty() || shape->size() > 7) {
        members.Fail("normalized_shape", "is no array of 1 to 7");
      } else {
        for (const nlohmann::json& size : *shape) {
          const int64_t value = size.is_number_unsigned() ? size.get<int64_t>() : 0;
          if (value < 1 || __builtin_mul_overflow(layer.num_features, value, &layer.num_features)) {
            members.Fail("normalized_shape", "has a size out of range");
            break;
          }
          layer.normalized_shape.push_back(value);
        }
      }
    }
  } else {
    layer.num_features = members.Int("num_features", 1, kMax);
  }
  if (layer.kind == LayerKind::kGroupNorm) {
    layer.num_groups = members.Int("num_groups", 1, kMax);
    if (layer.num_groups < 1 || layer.num_features % layer.num_groups != 0) {
      members.Fail("num_groups", "does not divide num_features");
    }
  }
  layer.eps = members.NumberOrNull("eps");
  if (!layer.eps.has_value() && layer.kind != LayerKind::kRmsNorm) members.Fail("eps", "is null");
  if (layer.eps.has_value() && *layer.eps < 0) members.Fail("eps", "is negative");
  layer.track_running_stats = false;
  if (HasMomentum(layer.kind)) {
    layer.momentum = members.NumberOrNull("momentum");
    if (!layer.momentum.has_value() && !IsBatchNorm(layer.kind)) {
      members.Fail("momentum", "is null");
    }
    layer.track_running_stats = members.Bool("track_running_stats");
  }
  layer.affine = members.Bool("affine");
  layer.bias = layer.kind == LayerKind::kRmsNorm ? false
               : HasBias(layer.kind)             ? members.Bool("bias")
                                                 : true;
  const std::string dtype = members.String("dtype");
  if (dtype == NameOf(DType::kFloat64)) {
    layer.state_dtype = DType::kFloat64;
  } else if (dtype != NameOf(DType::kFloat32)) {
    members.Fail("dtype", "is neither float32 nor float64");
  }
  if (absl::Status status = members.Finish(); !status.ok()) return status;
  return layer;
}

}  // namespace normd
