// torch.optim's update rules for an instance's weight and bias.
#ifndef NORMD_SERVER_INSTANCE_OPTIMIZER_H_
#define NORMD_SERVER_INSTANCE_OPTIMIZER_H_

#include "server/instance/instance_state.h"

namespace normd {

// Settings of a step, named as in torch.optim; checked by the caller
// (service/validate). Those of other rules are ignored.
struct OptimizerSettings {
  OptimizerRule rule = OptimizerRule::kSgd;
  double lr = 0;
  double weight_decay = 0;
  bool maximize = false;
  // SGD.
  double momentum = 0;
  double dampening = 0;
  bool nesterov = false;
  // Adam, AdamW.
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  bool amsgrad = false;
};

// One step on the weight and the bias of `state` that have a gradient. Optimizer
// state of another rule is replaced. Computes in double and rounds what is stored.
void Step(const OptimizerSettings& settings, InstanceState& state);

}  // namespace normd

#endif  // NORMD_SERVER_INSTANCE_OPTIMIZER_H_
