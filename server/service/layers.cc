#include "server/service/layers.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"

namespace normd {
namespace {

// The members that several kinds share, checked. `path` is "config.batch_norm_2d".
class Members {
 public:
  Members(std::string path, int64_t max_features)
      : path_(std::move(path)), max_features_(max_features) {}

  int64_t Features(int64_t value, absl::string_view name) {
    if (value < 1) {
      Fail(InvalidField(Field(name), absl::StrCat(value), absl::StrCat("1 to ", max_features_)));
    } else if (value > max_features_) {
      Fail(LimitExceeded(Field(name), absl::StrCat(name, " of ", value), max_features_,
                         "--max_features"));
    }
    return value;
  }

  double Eps(double value) {
    Fail(CheckNotNegative(value, Field("eps")));
    return value;
  }

  double Momentum(double value) {
    Fail(CheckFinite(value, Field("momentum")));
    return value;
  }

  template <class Config>
  void NormalizedShape(const Config& config, Layer& layer) {
    constexpr int kMostDimensions = 7;
    layer.normalized_shape.assign(config.normalized_shape().begin(),
                                  config.normalized_shape().end());
    const std::string field = Field("normalized_shape");
    const std::string text = ShapeText(layer.normalized_shape);
    if (layer.normalized_shape.empty() || config.normalized_shape_size() > kMostDimensions) {
      return Fail(InvalidField(field, text, "1 to 7 dimensions"));
    }
    layer.num_features = 1;
    for (const int64_t size : layer.normalized_shape) {
      if (size < 1) return Fail(InvalidField(field, text, "each dimension 1 or more"));
      if (size > max_features_ / layer.num_features) {
        return Fail(LimitExceeded(field, absl::StrCat("normalized_shape of ", text), max_features_,
                                  "--max_features"));
      }
      layer.num_features *= size;
    }
  }

  std::string Field(absl::string_view name) const { return absl::StrCat(path_, ".", name); }
  // Keeps the first error.
  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  const absl::Status& status() const { return status_; }

 private:
  const std::string path_;
  const int64_t max_features_;
  absl::Status status_;
};

template <class Config>
void ReadBatchNorm(const Config& config, Members& members, Layer& layer) {
  layer.num_features = members.Features(config.num_features(), "num_features");
  if (config.has_eps()) layer.eps = members.Eps(config.eps());
  if (config.averaging_case() == Config::kMomentum) {
    layer.momentum = members.Momentum(config.momentum());
  } else if (config.averaging_case() == Config::kCumulativeAverage) {
    if (!config.cumulative_average()) {
      members.Fail(InvalidField(members.Field("cumulative_average"), "false",
                                "true, or a momentum instead"));
    }
    layer.momentum = std::nullopt;
  }
  if (config.has_affine()) layer.affine = config.affine();
  if (config.has_track_running_stats()) layer.track_running_stats = config.track_running_stats();
}

void ReadLayerNorm(const v1::LayerNorm& config, Members& members, Layer& layer) {
  members.NormalizedShape(config, layer);
  if (config.has_eps()) layer.eps = members.Eps(config.eps());
  if (config.has_elementwise_affine()) layer.affine = config.elementwise_affine();
  if (config.has_bias()) layer.bias = config.bias();
  layer.track_running_stats = false;
}

void ReadRmsNorm(const v1::RmsNorm& config, Members& members, Layer& layer) {
  members.NormalizedShape(config, layer);
  layer.eps = std::nullopt;
  if (config.has_eps()) layer.eps = members.Eps(config.eps());
  if (config.has_elementwise_affine()) layer.affine = config.elementwise_affine();
  layer.bias = false;
  layer.track_running_stats = false;
}

void ReadGroupNorm(const v1::GroupNorm& config, Members& members, Layer& layer) {
  layer.num_features = members.Features(config.num_channels(), "num_channels");
  layer.num_groups = members.Features(config.num_groups(), "num_groups");
  if (members.status().ok() && layer.num_features % layer.num_groups != 0) {
    members.Fail(
        InvalidField(members.Field("num_groups"), absl::StrCat(layer.num_groups),
                     absl::StrCat("a divisor of num_channels: num_channels (", layer.num_features,
                                  ") must be divisible by num_groups")));
  }
  if (config.has_eps()) layer.eps = members.Eps(config.eps());
  if (config.has_affine()) layer.affine = config.affine();
  layer.track_running_stats = false;
}

void ReadInstanceNorm(const v1::InstanceNorm2d& config, Members& members, Layer& layer) {
  layer.num_features = members.Features(config.num_features(), "num_features");
  if (config.has_eps()) layer.eps = members.Eps(config.eps());
  if (config.has_momentum()) layer.momentum = members.Momentum(config.momentum());
  layer.affine = config.affine();
  layer.track_running_stats = config.track_running_stats();
}

template <class Config>
void WriteBatchNorm(const Layer& layer, Config& config) {
  config.set_num_features(layer.num_features);
  config.set_eps(*layer.eps);
  if (layer.momentum.has_value()) {
    config.set_momentum(*layer.momentum);
  } else {
    config.set_cumulative_average(true);
  }
  config.set_affine(layer.affine);
  config.set_track_running_stats(layer.track_running_stats);
}

template <class Config>
void WriteNormalizedShape(const Layer& layer, Config& config) {
  config.mutable_normalized_shape()->Add(layer.normalized_shape.begin(),
                                         layer.normalized_shape.end());
  if (layer.eps.has_value()) config.set_eps(*layer.eps);
  config.set_elementwise_affine(layer.affine);
}

// Machine epsilon of a data type: torch.finfo(dtype).eps.
double EpsilonOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return std::numeric_limits<float>::epsilon();
    case DType::kFloat64: return std::numeric_limits<double>::epsilon();
    case DType::kFloat16: return 0x1p-10;
    case DType::kBFloat16: return 0x1p-7;
  }
  return 0;
}

absl::Status TooFewValues(absl::string_view what, const TensorSpec& spec, absl::string_view field) {
  return FailedField(absl::StrCat(field, ".shape"), ShapeText(spec.shape),
                     absl::StrCat("more than 1 ", what, " when training"),
                     absl::StrCat(field, ".shape: Expected more than 1 ", what,
                                  " when training, got input size ", ShapeText(spec.shape)));
}

int64_t Product(std::vector<int64_t>::const_iterator begin,
                std::vector<int64_t>::const_iterator end) {
  return std::accumulate(begin, end, int64_t{1}, std::multiplies<>());
}

// One field of a tensor that does not fit the layer.
class Misfit {
 public:
  Misfit(const TensorSpec& spec, absl::string_view field) : spec_(spec), field_(field) {}

  absl::Status Shape(absl::string_view allowed) const {
    return InvalidField(absl::StrCat(field_, ".shape"), ShapeText(spec_.shape), allowed);
  }
  absl::Status Dimensions(absl::string_view layout, absl::string_view expected) const {
    return Shape(absl::StrCat(layout, ": expected ", expected, " input (got ", spec_.shape.size(),
                              "D input)"));
  }
  absl::Status Channels(const Layer& layer, int64_t channels) const {
    return Shape(absl::StrCat("C = ", layer.num_features, ", the instance's ",
                              layer.kind == LayerKind::kGroupNorm ? "num_channels" : "num_features",
                              ", not ", channels));
  }
  absl::Status Format(absl::string_view why) const {
    return InvalidField(absl::StrCat(field_, ".memory_format"), "CHANNELS_LAST",
                        absl::StrCat("CONTIGUOUS: ", why));
  }

 private:
  const TensorSpec& spec_;
  const absl::string_view field_;
};

}  // namespace

absl::StatusOr<Layer> ToLayer(const v1::InstanceConfig& config, int64_t max_features) {
  Layer layer;
  absl::Status status;
  const auto read = [&](LayerKind kind, const char* name, auto read_config, const auto& from) {
    Members members(absl::StrCat("config.", name), max_features);
    layer.kind = kind;
    read_config(from, members, layer);
    status = members.status();
  };
  switch (config.layer_case()) {
    case v1::InstanceConfig::kBatchNorm1D:
      read(LayerKind::kBatchNorm1d, "batch_norm_1d", ReadBatchNorm<v1::BatchNorm1d>,
           config.batch_norm_1d());
      break;
    case v1::InstanceConfig::kBatchNorm2D:
      read(LayerKind::kBatchNorm2d, "batch_norm_2d", ReadBatchNorm<v1::BatchNorm2d>,
           config.batch_norm_2d());
      break;
    case v1::InstanceConfig::kBatchNorm3D:
      read(LayerKind::kBatchNorm3d, "batch_norm_3d", ReadBatchNorm<v1::BatchNorm3d>,
           config.batch_norm_3d());
      break;
    case v1::InstanceConfig::kLayerNorm:
      read(LayerKind::kLayerNorm, "layer_norm", ReadLayerNorm, config.layer_norm());
      break;
    case v1::InstanceConfig::kGroupNorm:
      read(LayerKind::kGroupNorm, "group_norm", ReadGroupNorm, config.group_norm());
      break;
    case v1::InstanceConfig::kInstanceNorm2D:
      read(LayerKind::kInstanceNorm2d, "instance_norm_2d", ReadInstanceNorm,
           config.instance_norm_2d());
      break;
    case v1::InstanceConfig::kRmsNorm:
      read(LayerKind::kRmsNorm, "rms_norm", ReadRmsNorm, config.rms_norm());
      break;
    case v1::InstanceConfig::LAYER_NOT_SET:
      return InvalidField("config.layer", "",
                          "one layer: batch_norm_1d, batch_norm_2d, batch_norm_3d, layer_norm, "
                          "group_norm, instance_norm_2d or rms_norm");
  }
  if (!status.ok()) return status;
  switch (config.state_dtype()) {
    case v1::DATA_TYPE_UNSPECIFIED:
    case v1::DATA_TYPE_FLOAT32: break;
    case v1::DATA_TYPE_FLOAT64: layer.state_dtype = DType::kFloat64; break;
    default:
      return InvalidField("config.state_dtype", DataTypeText(config.state_dtype()),
                          "FLOAT32 or FLOAT64");
  }
  return layer;
}

v1::InstanceConfig ToProto(const Layer& layer) {
  v1::InstanceConfig config;
  config.set_state_dtype(layer.state_dtype == DType::kFloat64 ? v1::DATA_TYPE_FLOAT64
                                                              : v1::DATA_TYPE_FLOAT32);
  switch (layer.kind) {
    case LayerKind::kBatchNorm1d: WriteBatchNorm(layer, *config.mutable_batch_norm_1d()); break;
    case LayerKind::kBatchNorm2d: WriteBatchNorm(layer, *config.mutable_batch_norm_2d()); break;
    case LayerKind::kBatchNorm3d: WriteBatchNorm(layer, *config.mutable_batch_norm_3d()); break;
    case LayerKind::kLayerNorm:
      WriteNormalizedShape(layer, *config.mutable_layer_norm());
      config.mutable_layer_norm()->set_bias(layer.bias);
      break;
    case LayerKind::kRmsNorm: WriteNormalizedShape(layer, *config.mutable_rms_norm()); break;
    case LayerKind::kGroupNorm: {
      v1::GroupNorm& norm = *config.mutable_group_norm();
      norm.set_num_groups(layer.num_groups);
      norm.set_num_channels(layer.num_features);
      norm.set_eps(*layer.eps);
      norm.set_affine(layer.affine);
      break;
    }
    case LayerKind::kInstanceNorm2d: {
      v1::InstanceNorm2d& norm = *config.mutable_instance_norm_2d();
      norm.set_num_features(layer.num_features);
      norm.set_eps(*layer.eps);
      norm.set_momentum(*layer.momentum);
      norm.set_affine(layer.affine);
      norm.set_track_running_stats(layer.track_running_stats);
      break;
    }
  }
  return config;
}

absl::StatusOr<Pass> ToPass(const Layer& layer, Mode mode, const TensorSpec& spec,
                            absl::string_view field) {
  if (ParameterTypeFor(spec.dtype) != layer.state_dtype) {
    return InvalidField(absl::StrCat(field, ".dtype"), NameOf(spec.dtype),
                        layer.state_dtype == DType::kFloat64
                            ? "float64, since the instance's state_dtype is FLOAT64"
                            : "float32, float16 or bfloat16, since the instance's state_dtype is "
                              "FLOAT32");
  }
  const Misfit misfit(spec, field);
  const std::vector<int64_t>& shape = spec.shape;
  const size_t rank = shape.size();
  Pass pass;
  pass.by_batch = mode == Mode::kTrain || !layer.track_running_stats;
  pass.folds = mode == Mode::kTrain && layer.track_running_stats;
  NormProblem& problem = pass.problem;
  problem.format = spec.format;
  problem.dtype = spec.dtype;
  problem.eps = layer.eps.value_or(EpsilonOf(spec.dtype));
  // Where the channels are: (N, C, positions...).
  const auto channels_at = [&](size_t dimension) {
    problem.batch = Product(shape.begin(), shape.begin() + static_cast<std::ptrdiff_t>(dimension));
    problem.channels = shape[dimension];
    problem.positions =
        Product(shape.begin() + static_cast<std::ptrdiff_t>(dimension) + 1, shape.end());
  };

  switch (layer.kind) {
    case LayerKind::kBatchNorm1d:
      if (rank != 2 && rank != 3) return misfit.Dimensions("(N, C) or (N, C, L)", "2D or 3D");
      channels_at(1);
      break;
    case LayerKind::kBatchNorm2d:
      if (rank != 4) return misfit.Dimensions("4 dimensions (N, C, H, W)", "4D");
      channels_at(1);
      break;
    case LayerKind::kBatchNorm3d:
      if (rank != 5) return misfit.Dimensions("5 dimensions (N, C, D, H, W)", "5D");
      channels_at(1);
      break;
    case LayerKind::kInstanceNorm2d:
      if (rank != 3 && rank != 4) {
        return misfit.Dimensions("(N, C, H, W) or (C, H, W)", "3D or 4D");
      }
      if (rank == 3 && spec.format == MemoryFormat::kChannelsLast) {
        return misfit.Format("(C, H, W) has no batch dimension");
      }
      channels_at(rank - 3);
      // Running statistics are a channel's, the samples' own a sample's channel.
      problem.reduction = pass.by_batch ? Reduction::kPerSampleGroup : Reduction::kPerChannel;
      problem.groups = pass.by_batch ? layer.num_features : 1;
      break;
    case LayerKind::kGroupNorm:
      if (rank < 2) return misfit.Dimensions("(N, C, *)", "at least 2D");
      channels_at(1);
      problem.reduction = Reduction::kPerSampleGroup;
      problem.groups = layer.num_groups;
      break;
    case LayerKind::kLayerNorm:
    case LayerKind::kRmsNorm: {
      const auto leading = static_cast<std::ptrdiff_t>(rank) -
                           static_cast<std::ptrdiff_t>(layer.normalized_shape.size());
      if (leading < 0 ||
          !std::equal(shape.begin() + leading, shape.end(), layer.normalized_shape.begin())) {
        std::string expected = ShapeText(layer.normalized_shape);
        expected.insert(1, "*, ");
        return misfit.Shape(
            absl::StrCat("given normalized_shape=", ShapeText(layer.normalized_shape),
                         ", expected input with shape ", expected, ", but got input of size ",
                         ShapeText(shape)));
      }
      if (spec.format == MemoryFormat::kChannelsLast) {
        return misfit.Format("the last dimensions are normalized over");
      }
      problem.batch = Product(shape.begin(), shape.begin() + leading);
      problem.channels = layer.num_features;
      problem.positions = 1;
      problem.reduction = Reduction::kPerSampleGroup;
      problem.center = layer.kind == LayerKind::kLayerNorm;
      return pass;
    }
  }
  if (problem.channels != layer.num_features) return misfit.Channels(layer, problem.channels);
  if (pass.by_batch) {
    if (IsBatchNorm(layer.kind) && problem.set_size() == 1) {
      return TooFewValues("value per channel", spec, field);
    }
    if (layer.kind == LayerKind::kGroupNorm && problem.batch * problem.set_size() == 1) {
      return TooFewValues("value per channel", spec, field);
    }
    if (layer.kind == LayerKind::kInstanceNorm2d && problem.positions == 1) {
      return TooFewValues("spatial element", spec, field);
    }
  }
  return pass;
}

}  // namespace normd
