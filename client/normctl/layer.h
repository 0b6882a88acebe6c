// Layers as people write, read and picture them.
#ifndef NORMD_CLIENT_NORMCTL_LAYER_H_
#define NORMD_CLIENT_NORMCTL_LAYER_H_

#include <functional>
#include <string>

#include <CLI/CLI.hpp>

#include "absl/status/statusor.h"
#include "client/normctl/command.h"
#include "client/normd_client.h"

namespace normd::normctl {

std::string HumanLayer(const Layer& layer);  // "BatchNorm2d(64, eps=1e-05, ...)"
std::string BriefLayer(const Layer& layer);  // "BatchNorm2d(64)"
Json JsonLayer(const Layer& layer);          // {"type": "BatchNorm2d", "num_features": 64, ...}

// The layer's dimensions with those marked that it normalizes over, and which values
// share their statistics.
std::string Drawing(const Layer& layer);
// The same for programs: {"dimensions": ["N", "C", "H", "W"], "reduced": ["N", "H", "W"]}.
Json JsonNormalizes(const Layer& layer);

// --layer and the arguments of all layers. What they make is a usage error where the
// layer lacks one of the flags given, or one that it needs was not.
std::function<absl::StatusOr<Layer>()> AddLayerFlags(CLI::App& app);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_LAYER_H_
