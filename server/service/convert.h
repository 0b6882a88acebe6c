// From what is true inside to the messages of the contract.
#ifndef NORMD_SERVER_SERVICE_CONVERT_H_
#define NORMD_SERVER_SERVICE_CONVERT_H_

#include "normd/v1/checkpoint.pb.h"
#include "normd/v1/instance.pb.h"
#include "normd/v1/tensor.pb.h"
#include "server/instance/instance_state.h"
#include "server/instance/running_stats.h"
#include "server/service/validate.h"
#include "server/state/checkpoints.h"

namespace normd {

v1::Mode ToProto(Mode mode);
v1::Instance ToProto(const InstanceState& state);
v1::Checkpoint ToProto(const CheckpointInfo& info);
// Without data.
v1::Tensor ToProto(const TensorSpec& spec);
v1::BatchStatistics ToProto(const BatchMoments& moments);

// The state_dict, and the rest as asked.
v1::State ToStateProto(const InstanceState& state, bool gradients, bool optimizer);

// Of the parameters' type.
v1::Tensor ToProto(const Values& values, const std::vector<int64_t>& shape);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_CONVERT_H_
