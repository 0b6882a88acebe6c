// Instances for tests, with every kind of state that one can have.
#ifndef NORMD_TESTS_UNIT_SERVER_SAMPLE_INSTANCES_H_
#define NORMD_TESTS_UNIT_SERVER_SAMPLE_INSTANCES_H_

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/state/state_store.h"

namespace normd {

inline Values SampleValues(const Layer& layer, double first) {
  return Values::Map(layer.state_dtype, layer.num_features,
                     [first](int64_t i) { return first + std::sqrt(static_cast<double>(i)); });
}

inline std::shared_ptr<const Identity> SampleIdentity(std::string name, Layer layer) {
  return std::make_shared<const Identity>(
      Identity{.name = std::move(name),
               .uid = "0b5cd3c1-30aa-4e3c-9f4e-6b1f5ec6a001",
               .layer = layer,
               .create_time = absl::FromUnixNanos(1'900'000'000'123'456'789)});
}

inline Layer SampleLayer(int64_t num_features = 3) {
  Layer layer;
  layer.num_features = num_features;
  return layer;
}

// A state some way into training: statistics, gradients and Adam's moments.
inline InstanceState TrainedState(std::string name, Layer layer = SampleLayer()) {
  InstanceState state = InitialState(SampleIdentity(std::move(name), layer), Mode::kTrain);
  state.version = 41;
  state.update_time = absl::FromUnixNanos(1'900'000'001'000'000'001);
  if (layer.track_running_stats) {
    state.num_batches_tracked = 17;
    state.running_mean = SampleValues(layer, -1.5);
    state.running_var = SampleValues(layer, 0.25);
  }
  if (layer.affine) {
    state.weight = SampleValues(layer, 1.125);
    state.bias = SampleValues(layer, 1e-30);
    state.grad_weight = SampleValues(layer, std::numeric_limits<double>::quiet_NaN());
    state.grad_bias = SampleValues(layer, std::numeric_limits<double>::infinity());
    auto optimizer = std::make_shared<OptimizerState>();
    optimizer->rule = OptimizerRule::kAdam;
    for (OptimizerSlot* slot : {&optimizer->weight, &optimizer->bias}) {
      slot->exp_avg = SampleValues(layer, 3);
      slot->exp_avg_sq = SampleValues(layer, 4);
      slot->max_exp_avg_sq = SampleValues(layer, 5);
      slot->step = 12;
    }
    state.optimizer = std::move(optimizer);
  }
  return state;
}

inline std::shared_ptr<const InstanceState> Share(InstanceState state) {
  return std::make_shared<const InstanceState>(std::move(state));
}

// `state` one version on.
inline InstanceState Next(const InstanceState& state) {
  InstanceState next = state;
  ++next.version;
  ++next.num_batches_tracked;
  next.running_mean =
      Values::Filled(next.layer().state_dtype, next.layer().num_features, next.version * 0.5);
  return next;
}

inline AppliedRequest SampleRequest(uint64_t number, absl::Time time,
                                    Method method = Method::kForward) {
  return {.id = absl::MakeUint128(0xfedcba9876543210, number),
          .method = method,
          .version = number,
          .num_batches_tracked = static_cast<int64_t>(number),
          .time = absl::FromUnixNanos(absl::ToUnixNanos(time))};
}

}  // namespace normd

#endif  // NORMD_TESTS_UNIT_SERVER_SAMPLE_INSTANCES_H_
