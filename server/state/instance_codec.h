// An instance <-> one safetensors file, the form it has in checkpoints; and its
// state <-> a record, the form it has in the store.
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
//
// A record holds the same without requests and is read many times as fast, for
// stores of a million. Numbers are 8 bytes, big-endian; bytes follow their count:
//   kRecordMagic  name  uid  layer (layer_json)
//   mode (0 train, 1 eval)  version  parameters_version
//   create and update time (nanoseconds since 1970)
//   num_batches_tracked  optimizer rule (0: none, else 1 + its number)  steps of weight and bias
//   the tensors above, scalars left out, in that order; absent ones have no bytes
#ifndef NORMD_SERVER_STATE_INSTANCE_CODEC_H_
#define NORMD_SERVER_STATE_INSTANCE_CODEC_H_

#include <cstdint>
#include <memory>
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

std::string EncodeRecord(const InstanceState& state);

// DataLoss likewise, for anything that EncodeRecord cannot have written.
absl::StatusOr<std::shared_ptr<const InstanceState>> DecodeRecord(std::string_view bytes);

// Whether `bytes` are a record, sound or not, and no safetensors file, which a store of format 1
// holds in its place.
bool IsRecord(std::string_view bytes);

// Whether a Method has this number on disk.
bool KnownMethod(uint64_t number);

}  // namespace normd

#endif  // NORMD_SERVER_STATE_INSTANCE_CODEC_H_
