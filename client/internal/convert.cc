#include "client/internal/convert.h"

#include <utility>

namespace normd::inline client::internal {
namespace {

v1::DataType TypeToWire(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32: return v1::DATA_TYPE_FLOAT32;
    case DataType::kFloat64: return v1::DATA_TYPE_FLOAT64;
    case DataType::kFloat16: return v1::DATA_TYPE_FLOAT16;
    case DataType::kBFloat16: return v1::DATA_TYPE_BFLOAT16;
    case DataType::kInt64: return v1::DATA_TYPE_INT64;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

DataType TypeFromWire(v1::DataType wire) {
  switch (wire) {
    case v1::DATA_TYPE_FLOAT64: return DataType::kFloat64;
    case v1::DATA_TYPE_FLOAT16: return DataType::kFloat16;
    case v1::DATA_TYPE_BFLOAT16: return DataType::kBFloat16;
    case v1::DATA_TYPE_INT64: return DataType::kInt64;
    default: return DataType::kFloat32;
  }
}

absl::Time TimeFromWire(const google::protobuf::Timestamp& wire) {
  return absl::FromUnixSeconds(wire.seconds()) + absl::Nanoseconds(wire.nanos());
}

std::vector<NamedTensor> TensorsFromWire(
    google::protobuf::RepeatedPtrField<v1::NamedTensor>&& wire) {
  std::vector<NamedTensor> tensors;
  tensors.reserve(wire.size());
  for (v1::NamedTensor& named : wire) {
    tensors.push_back({named.name(), FromWire(std::move(*named.mutable_tensor()))});
  }
  return tensors;
}

// Adam and AdamW have the same fields.
template <class T>
void FillAdam(const T& adam, v1::Adam* wire) {
  wire->set_lr(adam.lr);
  wire->set_beta1(adam.beta1);
  wire->set_beta2(adam.beta2);
  wire->set_eps(adam.eps);
  wire->set_weight_decay(adam.weight_decay);
  wire->set_amsgrad(adam.amsgrad);
  wire->set_maximize(adam.maximize);
}

void Fill(const Sgd& sgd, v1::Optimizer* wire) {
  v1::Sgd* rule = wire->mutable_sgd();
  rule->set_lr(sgd.lr);
  rule->set_momentum(sgd.momentum);
  rule->set_dampening(sgd.dampening);
  rule->set_weight_decay(sgd.weight_decay);
  rule->set_nesterov(sgd.nesterov);
  rule->set_maximize(sgd.maximize);
}
void Fill(const Adam& adam, v1::Optimizer* wire) { FillAdam(adam, wire->mutable_adam()); }
void Fill(const AdamW& adamw, v1::Optimizer* wire) { FillAdam(adamw, wire->mutable_adamw()); }

// The three batch norms have the same fields.
template <class Wire>
void FillBatchNorm(const auto& layer, Wire* wire) {
  wire->set_num_features(layer.num_features);
  wire->set_eps(layer.eps);
  if (layer.momentum) {
    wire->set_momentum(*layer.momentum);
  } else {
    wire->set_cumulative_average(true);
  }
  wire->set_affine(layer.affine);
  wire->set_track_running_stats(layer.track_running_stats);
}

void Fill(const BatchNorm1d& layer, v1::InstanceConfig* wire) {
  FillBatchNorm(layer, wire->mutable_batch_norm_1d());
}
void Fill(const BatchNorm2d& layer, v1::InstanceConfig* wire) {
  FillBatchNorm(layer, wire->mutable_batch_norm_2d());
}
void Fill(const BatchNorm3d& layer, v1::InstanceConfig* wire) {
  FillBatchNorm(layer, wire->mutable_batch_norm_3d());
}
void Fill(const LayerNorm& layer, v1::InstanceConfig* wire) {
  v1::LayerNorm* norm = wire->mutable_layer_norm();
  norm->mutable_normalized_shape()->Add(layer.normalized_shape.begin(),
                                        layer.normalized_shape.end());
  norm->set_eps(layer.eps);
  norm->set_elementwise_affine(layer.elementwise_affine);
  norm->set_bias(layer.bias);
}
void Fill(const GroupNorm& layer, v1::InstanceConfig* wire) {
  v1::GroupNorm* norm = wire->mutable_group_norm();
  norm->set_num_groups(layer.num_groups);
  norm->set_num_channels(layer.num_channels);
  norm->set_eps(layer.eps);
  norm->set_affine(layer.affine);
}
void Fill(const InstanceNorm2d& layer, v1::InstanceConfig* wire) {
  v1::InstanceNorm2d* norm = wire->mutable_instance_norm_2d();
  norm->set_num_features(layer.num_features);
  norm->set_eps(layer.eps);
  norm->set_momentum(layer.momentum);
  norm->set_affine(layer.affine);
  norm->set_track_running_stats(layer.track_running_stats);
}
void Fill(const RmsNorm& layer, v1::InstanceConfig* wire) {
  v1::RmsNorm* norm = wire->mutable_rms_norm();
  norm->mutable_normalized_shape()->Add(layer.normalized_shape.begin(),
                                        layer.normalized_shape.end());
  if (layer.eps) norm->set_eps(*layer.eps);
  norm->set_elementwise_affine(layer.elementwise_affine);
}

// What the wire leaves out is the default, which the layer has already.

template <class Norm>
Norm BatchNormFromWire(const auto& wire) {
  Norm layer;
  layer.num_features = wire.num_features();
  if (wire.has_eps()) layer.eps = wire.eps();
  if (wire.has_momentum()) layer.momentum = wire.momentum();
  if (wire.cumulative_average()) layer.momentum = std::nullopt;
  if (wire.has_affine()) layer.affine = wire.affine();
  if (wire.has_track_running_stats()) layer.track_running_stats = wire.track_running_stats();
  return layer;
}

LayerNorm LayerFromWire(const v1::LayerNorm& wire) {
  LayerNorm layer;
  layer.normalized_shape = {wire.normalized_shape().begin(), wire.normalized_shape().end()};
  if (wire.has_eps()) layer.eps = wire.eps();
  if (wire.has_elementwise_affine()) layer.elementwise_affine = wire.elementwise_affine();
  if (wire.has_bias()) layer.bias = wire.bias();
  return layer;
}

GroupNorm LayerFromWire(const v1::GroupNorm& wire) {
  GroupNorm layer;
  layer.num_groups = wire.num_groups();
  layer.num_channels = wire.num_channels();
  if (wire.has_eps()) layer.eps = wire.eps();
  if (wire.has_affine()) layer.affine = wire.affine();
  return layer;
}

InstanceNorm2d LayerFromWire(const v1::InstanceNorm2d& wire) {
  InstanceNorm2d layer;
  layer.num_features = wire.num_features();
  if (wire.has_eps()) layer.eps = wire.eps();
  if (wire.has_momentum()) layer.momentum = wire.momentum();
  if (wire.has_affine()) layer.affine = wire.affine();
  if (wire.has_track_running_stats()) layer.track_running_stats = wire.track_running_stats();
  return layer;
}

RmsNorm LayerFromWire(const v1::RmsNorm& wire) {
  RmsNorm layer;
  layer.normalized_shape = {wire.normalized_shape().begin(), wire.normalized_shape().end()};
  if (wire.has_eps()) layer.eps = wire.eps();
  if (wire.has_elementwise_affine()) layer.elementwise_affine = wire.elementwise_affine();
  return layer;
}

Layer LayerFromWire(const v1::InstanceConfig& wire) {
  switch (wire.layer_case()) {
    case v1::InstanceConfig::kBatchNorm1D:
      return BatchNormFromWire<BatchNorm1d>(wire.batch_norm_1d());
    case v1::InstanceConfig::kBatchNorm2D:
      return BatchNormFromWire<BatchNorm2d>(wire.batch_norm_2d());
    case v1::InstanceConfig::kBatchNorm3D:
      return BatchNormFromWire<BatchNorm3d>(wire.batch_norm_3d());
    case v1::InstanceConfig::kLayerNorm: return LayerFromWire(wire.layer_norm());
    case v1::InstanceConfig::kGroupNorm: return LayerFromWire(wire.group_norm());
    case v1::InstanceConfig::kInstanceNorm2D: return LayerFromWire(wire.instance_norm_2d());
    case v1::InstanceConfig::kRmsNorm: return LayerFromWire(wire.rms_norm());
    case v1::InstanceConfig::LAYER_NOT_SET: break;
  }
  return {};
}

InstanceConfig ConfigFromWire(const v1::InstanceConfig& wire) {
  return {.layer = LayerFromWire(wire), .state_dtype = TypeFromWire(wire.state_dtype())};
}

}  // namespace

v1::Tensor HeaderOf(const Tensor& tensor) {
  v1::Tensor wire;
  wire.set_dtype(TypeToWire(tensor.dtype()));
  wire.mutable_shape()->Add(tensor.shape().begin(), tensor.shape().end());
  wire.set_memory_format(tensor.memory_format() == MemoryFormat::kChannelsLast
                             ? v1::MEMORY_FORMAT_CHANNELS_LAST
                             : v1::MEMORY_FORMAT_CONTIGUOUS);
  return wire;
}

v1::Tensor ToWire(const Tensor& tensor) {
  v1::Tensor wire = HeaderOf(tensor);
  wire.set_data(tensor.bytes().data(), tensor.bytes().size());
  return wire;
}

Tensor FromWire(v1::Tensor&& wire) {
  std::string bytes = std::move(*wire.mutable_data());
  return FromWire(wire, std::move(bytes));
}

Tensor FromWire(const v1::Tensor& header, std::string bytes) {
  return Tensor::Own(TypeFromWire(header.dtype()), {header.shape().begin(), header.shape().end()},
                     std::move(bytes),
                     header.memory_format() == v1::MEMORY_FORMAT_CHANNELS_LAST
                         ? MemoryFormat::kChannelsLast
                         : MemoryFormat::kContiguous);
}

v1::Mode ToWire(Mode mode) { return mode == Mode::kEval ? v1::MODE_EVAL : v1::MODE_TRAIN; }
Mode FromWire(v1::Mode wire) { return wire == v1::MODE_EVAL ? Mode::kEval : Mode::kTrain; }

v1::InstanceConfig ToWire(const InstanceConfig& config) {
  v1::InstanceConfig wire;
  std::visit([&](const auto& layer) { Fill(layer, &wire); }, config.layer);
  wire.set_state_dtype(TypeToWire(config.state_dtype));
  return wire;
}

v1::Optimizer ToWire(const Optimizer& optimizer) {
  v1::Optimizer wire;
  std::visit([&](const auto& rule) { Fill(rule, &wire); }, optimizer);
  return wire;
}

v1::BatchStatistics ToWire(const BatchStatistics& statistics) {
  v1::BatchStatistics wire;
  wire.set_count(statistics.count);
  wire.mutable_mean()->Add(statistics.mean.begin(), statistics.mean.end());
  wire.mutable_var()->Add(statistics.var.begin(), statistics.var.end());
  return wire;
}

BatchStatistics FromWire(const v1::BatchStatistics& wire) {
  return {.count = wire.count(),
          .mean = {wire.mean().begin(), wire.mean().end()},
          .var = {wire.var().begin(), wire.var().end()}};
}

Instance FromWire(const v1::Instance& wire) {
  return {.name = wire.name(),
          .uid = wire.uid(),
          .config = ConfigFromWire(wire.config()),
          .mode = FromWire(wire.mode()),
          .version = wire.version(),
          .num_batches_tracked = wire.num_batches_tracked(),
          .has_gradients = wire.has_gradients(),
          .optimizer = wire.optimizer(),
          .state_bytes = wire.state_bytes(),
          .create_time = TimeFromWire(wire.create_time()),
          .update_time = TimeFromWire(wire.update_time())};
}

Checkpoint FromWire(const v1::Checkpoint& wire) {
  return {.id = wire.id(),
          .create_time = TimeFromWire(wire.create_time()),
          .reason = wire.reason(),
          .instance_count = wire.instance_count(),
          .total_bytes = wire.total_bytes(),
          .sound = wire.sound(),
          .problem = wire.problem()};
}

ServerInfo FromWire(const v1::GetServerInfoResponse& wire) {
  ServerInfo info;
  info.version = wire.version();
  info.backend = wire.backend();
  info.backend_reason = wire.backend_reason();
  for (const v1::Device& device : wire.devices()) {
    info.devices.push_back({.name = device.name(),
                            .parallelism = device.parallelism(),
                            .memory_bytes = device.memory_bytes(),
                            .healthy = device.healthy(),
                            .memory_budget = device.memory_budget(),
                            .memory_in_use = device.memory_in_use()});
  }
  const v1::Limits& limits = wire.limits();
  info.limits = {.max_message_bytes = limits.max_message_bytes(),
                 .max_instances = limits.max_instances(),
                 .max_features = limits.max_features(),
                 .memory_budget = limits.memory_budget(),
                 .context_budget = limits.context_budget(),
                 .context_ttl = absl::Milliseconds(limits.context_ttl_ms())};
  info.start_time = TimeFromWire(wire.start_time());
  info.instance_count = wire.instance_count();
  info.memory_in_use = wire.memory_in_use();
  info.durability = wire.durability();
  return info;
}

State FromWire(v1::GetStateResponse&& wire) {
  State state;
  state.version = wire.version();
  state.instance = FromWire(wire.instance());
  state.state_dict = TensorsFromWire(std::move(*wire.mutable_state()->mutable_state_dict()));
  state.gradients = TensorsFromWire(std::move(*wire.mutable_state()->mutable_gradients()));
  state.optimizer_state =
      TensorsFromWire(std::move(*wire.mutable_state()->mutable_optimizer_state()));
  return state;
}

}  // namespace normd::inline client::internal
