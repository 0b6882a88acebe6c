#include "server/instance/running_stats.h"

namespace normd {

void FoldBatch(const BatchMoments& batch, InstanceState& state) {
  const Layer& layer = state.layer();
  if (IsBatchNorm(layer.kind)) state.num_batches_tracked += 1;
  const auto channels = static_cast<size_t>(layer.num_features);
  const size_t samples = batch.mean.size() / channels;  // 1 for batch norm
  if (batch.count == 0 || samples == 0) return;
  const double momentum =
      layer.momentum.value_or(1.0 / static_cast<double>(state.num_batches_tracked));
  const auto fold = [&](Values& running, const std::vector<double>& sets, double divisor) {
    running = Values::Map(running.dtype(), running.size(), [&, old = running](int64_t i) {
      double sum = 0;
      for (size_t n = 0; n < samples; ++n) sum += sets[n * channels + static_cast<size_t>(i)];
      const double value = sum / static_cast<double>(samples) / divisor;
      return (1 - momentum) * old[i] + momentum * value;
    });
  };
  fold(state.running_mean, batch.mean, 1);
  fold(state.running_var, batch.m2, static_cast<double>(batch.count - 1));
}

void ResetRunningStats(InstanceState& state) {
  if (!state.layer().track_running_stats) return;
  const InstanceState initial = InitialState(state.identity, state.mode);
  state.running_mean = initial.running_mean;
  state.running_var = initial.running_var;
  state.num_batches_tracked = 0;
}

void ResetParameters(InstanceState& state) {
  ResetRunningStats(state);
  const InstanceState initial = InitialState(state.identity, state.mode);
  state.weight = initial.weight;
  state.bias = initial.bias;
}

}  // namespace normd
