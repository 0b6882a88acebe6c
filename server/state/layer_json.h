// Layer <-> JSON: the one place where a kind of layer gets its written form.
//
//   {"kind": "BatchNorm2d", "num_features": 64, "eps": 1e-05, "momentum": 0.1,
//    "affine": true, "track_running_stats": true, "dtype": "float32"}
//
// with PyTorch's names, and of its arguments those that the kind has: also
// "normalized_shape": [64, 8] in place of num_features, "num_groups" and "bias".
// "momentum": null is the cumulative average, "eps": null RMSNorm's default.
#ifndef NORMD_SERVER_STATE_LAYER_JSON_H_
#define NORMD_SERVER_STATE_LAYER_JSON_H_

#include <string>

#include <nlohmann/json_fwd.hpp>

#include "absl/status/statusor.h"
#include "server/instance/layer.h"

namespace normd {

void AppendLayerJson(std::string& out, const Layer& layer);

// DataLoss for anything that AppendLayerJson cannot have written: unknown, missing
// or repeated members, values out of layer.h's ranges.
absl::StatusOr<Layer> LayerFromJson(const nlohmann::json& json);

}  // namespace normd

#endif  // NORMD_SERVER_STATE_LAYER_JSON_H_
