#include "server/instance/instance_state.h"

namespace normd {

bool SameState(const InstanceState& a, const InstanceState& b) {
  const bool same_optimizer = (a.optimizer == nullptr) == (b.optimizer == nullptr) &&
                              (a.optimizer == nullptr || *a.optimizer == *b.optimizer);
  return *a.identity == *b.identity && a.mode == b.mode && a.version == b.version &&
         a.parameters_version == b.parameters_version && a.update_time == b.update_time &&
         a.weight == b.weight && a.bias == b.bias && a.running_mean == b.running_mean &&
         a.running_var == b.running_var && a.num_batches_tracked == b.num_batches_tracked &&
         a.grad_weight == b.grad_weight && a.grad_bias == b.grad_bias && same_optimizer;
}

InstanceState InitialState(std::shared_ptr<const Identity> identity, Mode mode) {
  InstanceState state;
  const Layer& layer = identity->layer;
  const auto filled = [&](double value) {
    return Values::Filled(layer.state_dtype, layer.num_features, value);
  };
  if (layer.has_weight()) state.weight = filled(1);
  if (layer.has_bias()) state.bias = filled(0);
  if (layer.track_running_stats) {
    state.running_mean = filled(0);
    state.running_var = filled(1);
  }
  state.mode = mode;
  state.update_time = identity->create_time;
  state.identity = std::move(identity);
  return state;
}

}  // namespace normd
