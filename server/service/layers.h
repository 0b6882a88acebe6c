// Layers: what each kind of layer is made from, and what it makes of a tensor. The one
// place of the service where the kinds differ; PyTorch's rules, with its reasons in the
// errors.
#ifndef NORMD_SERVER_SERVICE_LAYERS_H_
#define NORMD_SERVER_SERVICE_LAYERS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/problem.h"
#include "normd/v1/instance.pb.h"
#include "server/instance/instance_state.h"
#include "server/instance/layer.h"
#include "server/service/validate.h"

namespace normd {

absl::StatusOr<Layer> ToLayer(const v1::InstanceConfig& config, int64_t max_features);
v1::InstanceConfig ToProto(const Layer& layer);

// How a layer treats one tensor in one mode.
struct Pass {
  NormProblem problem;
  // Normalized by the tensor's own statistics, and not by running ones.
  bool by_batch = true;
  // These then fold into the running statistics: the call is a change.
  bool folds = false;
};

// Checks dtype, dimensions and channels of the tensor that `field` names.
// FAILED_PRECONDITION where the tensor's own statistics would serve and PyTorch
// refuses so few values.
absl::StatusOr<Pass> ToPass(const Layer& layer, Mode mode, const TensorSpec& spec,
                            absl::string_view field);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_LAYERS_H_
