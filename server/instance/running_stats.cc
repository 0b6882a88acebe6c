#include "server/instance/running_stats.h"

namespace normd {

void FoldBatch(const BatchMoments& batch, InstanceState& state) {
  state.num_batches_tracked += 1;
  if (batch.count == 0) return;
  const double momentum =
      state.layer().momentum.value_or(1.0 / static_cast<double>(state.num_batches_tracked));
  const double unbiased = static_cast<double>(batch.count - 1);
  const auto fold = [&](Values& running, auto value) {
    running = Values::Map(running.dtype(), running.size(), [&, old = running](int64_t i) {
      return (1 - momentum) * old[i] + momentum * value(i);
    });
  };
  fold(state.running_mean, [&](int64_t i) { return batch.mean[static_cast<size_t>(i)]; });
  fold(state.running_var, [&](int64_t i) { return batch.m2[static_cast<size_t>(i)] / unbiased; });
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
