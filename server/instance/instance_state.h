// InstanceState: everything that an instance is at one version.
#ifndef NORMD_SERVER_INSTANCE_INSTANCE_STATE_H_
#define NORMD_SERVER_INSTANCE_INSTANCE_STATE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "server/instance/layer.h"
#include "server/instance/values.h"

namespace normd {

enum class Mode : uint8_t { kTrain, kEval };

enum class OptimizerRule : uint8_t { kSgd, kAdam, kAdamW };

// What torch.optim keeps for one parameter. Absent until the rule first needs it.
struct OptimizerSlot {
  Values momentum_buffer;  // SGD with momentum
  Values exp_avg;          // Adam, AdamW
  Values exp_avg_sq;
  Values max_exp_avg_sq;  // with amsgrad
  int64_t step = 0;       // steps taken; Adam, AdamW

  bool operator==(const OptimizerSlot&) const = default;
};

struct OptimizerState {
  OptimizerRule rule = OptimizerRule::kSgd;
  OptimizerSlot weight;
  OptimizerSlot bias;

  bool operator==(const OptimizerState&) const = default;
};

// What never changes in an instance's life.
struct Identity {
  std::string name;
  std::string uid;  // tells it from an earlier one of the same name
  Layer layer;
  absl::Time create_time;

  bool operator==(const Identity&) const = default;
};

// One version of an instance. Immutable once published, and cheap to copy: a
// change copies it, replaces what it changes, and publishes the copy.
struct InstanceState {
  std::shared_ptr<const Identity> identity;
  Mode mode = Mode::kTrain;
  uint64_t version = 1;
  // Of the last change of weight or bias: an output of this version or a later one is
  // what the same input gives today.
  uint64_t parameters_version = 1;
  absl::Time update_time;

  // Of layer.state_dtype; absent where the layer has none.
  Values weight;
  Values bias;
  Values running_mean;
  Values running_var;
  int64_t num_batches_tracked = 0;

  // Accumulated gradients; absent: none since the last ZeroGrad.
  Values grad_weight;
  Values grad_bias;

  // Null before the first Step.
  std::shared_ptr<const OptimizerState> optimizer;

  const Layer& layer() const { return identity->layer; }
};

// Equal in everything that is kept on disk.
bool SameState(const InstanceState& a, const InstanceState& b);

// PyTorch's initial state: weight 1, bias 0, running_mean 0, running_var 1.
InstanceState InitialState(std::shared_ptr<const Identity> identity, Mode mode);

}  // namespace normd

#endif  // NORMD_SERVER_INSTANCE_INSTANCE_STATE_H_
