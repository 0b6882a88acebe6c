// How a batch's statistics fold into the running ones.
#ifndef NORMD_SERVER_INSTANCE_RUNNING_STATS_H_
#define NORMD_SERVER_INSTANCE_RUNNING_STATS_H_

#include <cstdint>
#include <vector>

#include "server/instance/instance_state.h"

namespace normd {

// Statistics of one batch, one value a set (a channel, or a sample's group of
// channels): the mean, and the sum of squared
// deviations from it. In double: a mean rounded to float32 loses the answer where
// |mean| >> deviation.
struct BatchMoments {
  int64_t count = 0;  // values behind each
  std::vector<double> mean;
  std::vector<double> m2;
};

// torch.nn.BatchNorm's rule. num_batches_tracked rises first, so that momentum
// none (the cumulative average) weighs the first batch with 1; then
//   running_mean <- (1 - momentum) * running_mean + momentum * mean
//   running_var  <- (1 - momentum) * running_var  + momentum * m2 / (count - 1)
// A batch of no values is counted, and leaves the statistics alone.
//
// torch.nn.InstanceNorm's: the samples' statistics, averaged over the samples, in the
// batch's place; num_batches_tracked does not rise.
//
// Precondition: state tracks running statistics; count is not 1.
void FoldBatch(const BatchMoments& batch, InstanceState& state);

// The initial values: running_mean 0, running_var 1, num_batches_tracked 0.
void ResetRunningStats(InstanceState& state);

// weight 1 and bias 0, and the running statistics reset, where there are any.
void ResetParameters(InstanceState& state);

}  // namespace normd

#endif  // NORMD_SERVER_INSTANCE_RUNNING_STATS_H_
