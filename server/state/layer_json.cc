#include "server/state/layer_json.h"

#include <iterator>
#include <limits>

#include <fmt/format.h>

#include "formats/json_text.h"
#include "server/state/strict_json.h"

namespace normd {
namespace {

constexpr char kBatchNorm2d[] = "BatchNorm2d";

}  // namespace

void AppendLayerJson(std::string& out, const Layer& layer) {
  switch (layer.kind) {
    case LayerKind::kBatchNorm2d:
      fmt::format_to(std::back_inserter(out), R"({{"kind":"{}","num_features":{},"eps":)",
                     kBatchNorm2d, layer.num_features);
      AppendJsonNumber(out, layer.eps);
      out += R"(,"momentum":)";
      if (layer.momentum.has_value()) {
        AppendJsonNumber(out, *layer.momentum);
      } else {
        out += "null";
      }
      fmt::format_to(std::back_inserter(out),
                     R"(,"affine":{},"track_running_stats":{},"dtype":"{}"}})", layer.affine,
                     layer.track_running_stats, NameOf(layer.state_dtype));
      return;
  }
}

absl::StatusOr<Layer> LayerFromJson(const nlohmann::json& json) {
  JsonMembers members(json, "layer");
  Layer layer;
  if (members.String("kind") != kBatchNorm2d) members.Fail("kind", "is not known here");
  layer.kind = LayerKind::kBatchNorm2d;
  layer.num_features = members.Int("num_features", 1, std::numeric_limits<int64_t>::max());
  layer.eps = members.Number("eps");
  if (layer.eps < 0) members.Fail("eps", "is negative");
  layer.momentum = members.NumberOrNull("momentum");
  layer.affine = members.Bool("affine");
  layer.track_running_stats = members.Bool("track_running_stats");
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
