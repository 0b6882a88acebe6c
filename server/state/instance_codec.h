// An instance <-> one safetensors file, the form it has in checkpoints and in
// the store.
//
// Tensors, so that torch's load_state_dict takes the unprefixed ones as they are:
//   weight bias running_mean running_var   F32 or F64, (num_features)
//   num_batches_tracked                    I64, ()
//   normd.grad.weight  normd.grad.bias     accumulated gradients
//   normd.optimizer.weight.momentum_buffer, .exp_avg, .exp_avg_sq,
//   .max_exp_avg_sq, .step (I64, ())       and the same for bias
// Absent ones are left out. Metadata:
//   format          "pt"
//   normd.format    "1"
//   normd.instance  JSON: name, uid, layer and its arguments, mode, version,
//                   parameters_version, times, optimizer rule, remembered requests
#ifndef NORMD_SERVER_STATE_INSTANCE_CODEC_H_
#define NORMD_SERVER_STATE_INSTANCE_CODEC_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "server/state/state_store.h"

namespace normd {

// Of the requests, the last RequestLog::kCapacity.
std::string EncodeInstance(const StoredInstance& instance);

// DataLoss, saying what is wrong, for anything that EncodeInstance cannot have
// written: every field is checked as if it came from the network.
absl::StatusOr<StoredInstance> DecodeInstance(std::string_view bytes);

// Whether a Method has this number on disk.
bool KnownMethod(uint64_t number);

}  // namespace normd

#endif  // NORMD_SERVER_STATE_INSTANCE_CODEC_H_
