#include "server/service/convert.h"

#include <string>

#include "absl/time/time.h"
#include "google/protobuf/timestamp.pb.h"
#include "server/service/layers.h"

namespace normd {
namespace {

v1::DataType ToProto(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return v1::DATA_TYPE_FLOAT32;
    case DType::kFloat64: return v1::DATA_TYPE_FLOAT64;
    case DType::kFloat16: return v1::DATA_TYPE_FLOAT16;
    case DType::kBFloat16: return v1::DATA_TYPE_BFLOAT16;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

google::protobuf::Timestamp ToProto(absl::Time time) {
  google::protobuf::Timestamp timestamp;
  const int64_t nanos = absl::ToUnixNanos(time);
  timestamp.set_seconds(nanos / 1'000'000'000);
  timestamp.set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
  return timestamp;
}

v1::Tensor CountTensor(int64_t count) {
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_INT64);
  tensor.set_data(&count, sizeof(count));
  return tensor;
}

const char* NameOf(OptimizerRule rule) {
  switch (rule) {
    case OptimizerRule::kSgd: return "sgd";
    case OptimizerRule::kAdam: return "adam";
    case OptimizerRule::kAdamW: return "adamw";
  }
  return "";
}

using NamedTensors = google::protobuf::RepeatedPtrField<v1::NamedTensor>;

void Add(NamedTensors& to, const std::string& name, v1::Tensor tensor) {
  v1::NamedTensor& named = *to.Add();
  named.set_name(name);
  *named.mutable_tensor() = std::move(tensor);
}

void AddPresent(NamedTensors& to, const std::string& name, const Values& values,
                const std::vector<int64_t>& shape) {
  if (values.present()) Add(to, name, ToProto(values, shape));
}

void AddSlot(NamedTensors& to, const std::string& parameter, const OptimizerSlot& slot,
             const std::vector<int64_t>& shape) {
  AddPresent(to, parameter + ".momentum_buffer", slot.momentum_buffer, shape);
  AddPresent(to, parameter + ".exp_avg", slot.exp_avg, shape);
  AddPresent(to, parameter + ".exp_avg_sq", slot.exp_avg_sq, shape);
  AddPresent(to, parameter + ".max_exp_avg_sq", slot.max_exp_avg_sq, shape);
  if (slot.exp_avg.present()) Add(to, parameter + ".step", CountTensor(slot.step));
}

int64_t StateBytes(const InstanceState& state) {
  int64_t bytes = state.layer().track_running_stats ? 8 : 0;
  const auto add = [&](const Values& values) {
    bytes += static_cast<int64_t>(values.bytes().size());
  };
  for (const Values* values : {&state.weight, &state.bias, &state.running_mean, &state.running_var,
                               &state.grad_weight, &state.grad_bias}) {
    add(*values);
  }
  if (state.optimizer != nullptr) {
    for (const OptimizerSlot* slot : {&state.optimizer->weight, &state.optimizer->bias}) {
      for (const Values* values :
           {&slot->momentum_buffer, &slot->exp_avg, &slot->exp_avg_sq, &slot->max_exp_avg_sq}) {
        add(*values);
      }
    }
  }
  return bytes;
}

}  // namespace

v1::Mode ToProto(Mode mode) { return mode == Mode::kTrain ? v1::MODE_TRAIN : v1::MODE_EVAL; }

v1::Instance ToProto(const InstanceState& state) {
  v1::Instance instance;
  instance.set_name(state.identity->name);
  instance.set_uid(state.identity->uid);
  *instance.mutable_config() = ToProto(state.layer());
  instance.set_mode(ToProto(state.mode));
  instance.set_version(state.version);
  instance.set_num_batches_tracked(state.num_batches_tracked);
  instance.set_has_gradients(state.grad_weight.present() || state.grad_bias.present());
  if (state.optimizer != nullptr) instance.set_optimizer(NameOf(state.optimizer->rule));
  instance.set_state_bytes(StateBytes(state));
  *instance.mutable_create_time() = ToProto(state.identity->create_time);
  *instance.mutable_update_time() = ToProto(state.update_time);
  return instance;
}

v1::Checkpoint ToProto(const CheckpointInfo& info) {
  v1::Checkpoint checkpoint;
  checkpoint.set_id(info.id);
  *checkpoint.mutable_create_time() = ToProto(info.create_time);
  checkpoint.set_reason(info.reason);
  checkpoint.set_instance_count(info.instance_count);
  checkpoint.set_total_bytes(info.total_bytes);
  checkpoint.set_sound(info.sound);
  checkpoint.set_problem(info.problem);
  return checkpoint;
}

v1::Tensor ToProto(const TensorSpec& spec) {
  v1::Tensor tensor;
  tensor.set_dtype(ToProto(spec.dtype));
  tensor.mutable_shape()->Add(spec.shape.begin(), spec.shape.end());
  tensor.set_memory_format(spec.format == MemoryFormat::kChannelsLast
                               ? v1::MEMORY_FORMAT_CHANNELS_LAST
                               : v1::MEMORY_FORMAT_CONTIGUOUS);
  return tensor;
}

v1::Tensor ToProto(const Values& values, const std::vector<int64_t>& shape) {
  v1::Tensor tensor;
  tensor.set_dtype(ToProto(values.dtype()));
  tensor.mutable_shape()->Add(shape.begin(), shape.end());
  tensor.set_memory_format(v1::MEMORY_FORMAT_CONTIGUOUS);
  tensor.set_data(values.bytes().data(), values.bytes().size());
  return tensor;
}

v1::BatchStatistics ToProto(const BatchMoments& moments) {
  v1::BatchStatistics statistics;
  statistics.set_count(moments.count);
  statistics.mutable_mean()->Add(moments.mean.begin(), moments.mean.end());
  statistics.mutable_var()->Reserve(static_cast<int>(moments.m2.size()));
  for (const double m2 : moments.m2) {
    statistics.add_var(moments.count == 0 ? 0 : m2 / static_cast<double>(moments.count));
  }
  return statistics;
}

v1::State ToStateProto(const InstanceState& state, bool gradients, bool optimizer) {
  v1::State proto;
  const std::vector<int64_t> shape = state.layer().parameter_shape();
  NamedTensors& dict = *proto.mutable_state_dict();
  AddPresent(dict, "weight", state.weight, shape);
  AddPresent(dict, "bias", state.bias, shape);
  AddPresent(dict, "running_mean", state.running_mean, shape);
  AddPresent(dict, "running_var", state.running_var, shape);
  if (state.layer().track_running_stats) {
    Add(dict, "num_batches_tracked", CountTensor(state.num_batches_tracked));
  }
  if (gradients) {
    AddPresent(*proto.mutable_gradients(), "weight", state.grad_weight, shape);
    AddPresent(*proto.mutable_gradients(), "bias", state.grad_bias, shape);
  }
  if (optimizer && state.optimizer != nullptr) {
    AddSlot(*proto.mutable_optimizer_state(), "weight", state.optimizer->weight, shape);
    AddSlot(*proto.mutable_optimizer_state(), "bias", state.optimizer->bias, shape);
  }
  return proto;
}

}  // namespace normd
