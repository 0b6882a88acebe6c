#include "server/service/validate.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "server/error/error.h"
#include "server/instance/instance_name.h"
#include "server/wire/elements.h"

namespace normd {
namespace {

constexpr int kMostDimensions = 8;
constexpr int64_t kLargestDimension = int64_t{1} << 40;

std::string Text(double value) { return absl::StrCat(value); }

absl::Status CheckBeta(double value, absl::string_view field) {
  if (value >= 0 && value < 1) return absl::OkStatus();
  return InvalidField(field, Text(value), "0 or more and less than 1");
}

absl::StatusOr<DType> ToDType(v1::DataType dtype, absl::string_view field) {
  switch (dtype) {
    case v1::DATA_TYPE_FLOAT32: return DType::kFloat32;
    case v1::DATA_TYPE_FLOAT64: return DType::kFloat64;
    case v1::DATA_TYPE_FLOAT16: return DType::kFloat16;
    case v1::DATA_TYPE_BFLOAT16: return DType::kBFloat16;
    default: break;
  }
  return InvalidField(field, DataTypeText(dtype), "FLOAT32, FLOAT64, FLOAT16 or BFLOAT16");
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// copy_ of a tensor of `shape`: any floating-point type into `dtype`.
absl::StatusOr<Values> ToValues(const v1::Tensor& tensor, const std::string& field,
                                const std::vector<int64_t>& shape, DType dtype) {
  const auto spec = ToTensorSpec(tensor, field);
  if (!spec.ok()) return spec.status();
  if (absl::Status s = CheckBytes(*spec, tensor.data().size(), field); !s.ok()) return s;
  if (spec->shape != shape) {
    return FailedField(
        absl::StrCat(field, ".shape"), ShapeText(spec->shape), ShapeText(shape),
        absl::StrCat("size mismatch for ", field, ": copying a tensor of shape ",
                     ShapeText(spec->shape), " into one of shape ", ShapeText(shape)));
  }
  if (spec->dtype == dtype) return Values::FromBytes(dtype, tensor.data());
  return Values::Map(dtype, spec->elements, [&](int64_t i) {
    return ReadElement(tensor.data().data(), spec->dtype, static_cast<size_t>(i));
  });
}

absl::StatusOr<int64_t> ToCount(const v1::Tensor& tensor, const std::string& field) {
  if (tensor.dtype() != v1::DATA_TYPE_INT64) {
    return InvalidField(absl::StrCat(field, ".dtype"), DataTypeText(tensor.dtype()), "INT64");
  }
  if (tensor.shape_size() != 0) {
    const std::vector<int64_t> shape(tensor.shape().begin(), tensor.shape().end());
    return FailedField(absl::StrCat(field, ".shape"), ShapeText(shape), "[]",
                       absl::StrCat("size mismatch for ", field, ": copying a tensor of shape ",
                                    ShapeText(shape), " into a scalar"));
  }
  int64_t count = 0;
  if (tensor.data().size() != sizeof(count)) {
    return InvalidField(absl::StrCat(field, ".data"), absl::StrCat(tensor.data().size(), " bytes"),
                        "8 bytes");
  }
  std::memcpy(&count, tensor.data().data(), sizeof(count));
  if (count < 0) return InvalidField(field, absl::StrCat(count), "0 or more");
  return count;
}

}  // namespace

absl::Status CheckFinite(double value, absl::string_view field) {
  if (std::isfinite(value)) return absl::OkStatus();
  return InvalidField(field, Text(value), "a finite number");
}

absl::Status CheckNotNegative(double value, absl::string_view field) {
  if (std::isfinite(value) && value >= 0) return absl::OkStatus();
  return InvalidField(field, Text(value), "a finite number, 0 or more");
}

absl::Status FailedField(absl::string_view field, absl::string_view value,
                         absl::string_view allowed, absl::string_view message) {
  return FieldError(absl::StatusCode::kFailedPrecondition, field, value, allowed, message);
}

std::string DataTypeText(v1::DataType dtype) {
  return v1::DataType_IsValid(dtype) ? v1::DataType_Name(dtype)
                                     : absl::StrCat(static_cast<int>(dtype));
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::Status CheckName(absl::string_view name) {
  if (ValidInstanceName({name.data(), name.size()})) return absl::OkStatus();
  return InvalidField("name", name,
                      "1 to 255 characters of [A-Za-z0-9._/-], with no empty, \".\" or \"..\" "
                      "segment between slashes");
}

absl::StatusOr<std::optional<absl::uint128>> ToRequestId(absl::string_view request_id) {
  if (request_id.empty()) return std::optional<absl::uint128>();
  absl::uint128 id = 0;
  bool valid = request_id.size() == 36;
  for (size_t i = 0; valid && i < request_id.size(); ++i) {
    if (i == 8 || i == 13 || i == 18 || i == 23) {
      valid = request_id[i] == '-';
    } else {
      const int digit = HexDigit(request_id[i]);
      valid = digit >= 0;
      id = id << 4 | static_cast<absl::uint128>(std::max(digit, 0));
    }
  }
  if (!valid) {
    return InvalidField("request_id", request_id,
                        "a UUID (xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx, hexadecimal) or nothing");
  }
  return id;
}

absl::StatusOr<std::optional<Mode>> ToMode(v1::Mode mode) {
  switch (mode) {
    case v1::MODE_UNSPECIFIED: return std::optional<Mode>();
    case v1::MODE_TRAIN: return Mode::kTrain;
    case v1::MODE_EVAL: return Mode::kEval;
    default: break;
  }
  return InvalidField("mode", absl::StrCat(static_cast<int>(mode)),
                      "MODE_TRAIN, MODE_EVAL or MODE_UNSPECIFIED (the instance's)");
}

absl::StatusOr<TensorSpec> ToTensorSpec(const v1::Tensor& tensor, absl::string_view field) {
  TensorSpec spec;
  if (tensor.has_shared_memory()) {
    return InvalidField(absl::StrCat(field, ".shared_memory"), "given",
                        "shared memory for the tensors of Forward and Backward alone");
  }
  const auto dtype = ToDType(tensor.dtype(), absl::StrCat(field, ".dtype"));
  if (!dtype.ok()) return dtype.status();
  spec.dtype = *dtype;
  const std::string shape_field = absl::StrCat(field, ".shape");
  if (tensor.shape_size() > kMostDimensions) {
    return InvalidField(shape_field, absl::StrCat(tensor.shape_size(), " dimensions"),
                        absl::StrCat("at most ", kMostDimensions, " dimensions"));
  }
  spec.shape.assign(tensor.shape().begin(), tensor.shape().end());
  // Empty dimensions too must not let the others' product overflow.
  int64_t product = static_cast<int64_t>(SizeOf(spec.dtype));
  spec.elements = 1;
  for (const int64_t size : spec.shape) {
    if (size < 0 || size > kLargestDimension) {
      return InvalidField(shape_field, ShapeText(spec.shape), "each dimension 0 to 2^40");
    }
    if (__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product)) {
      return InvalidField(shape_field, ShapeText(spec.shape), "fewer than 2^63 bytes in all");
    }
    spec.elements *= size;
  }
  switch (tensor.memory_format()) {
    case v1::MEMORY_FORMAT_UNSPECIFIED:
    case v1::MEMORY_FORMAT_CONTIGUOUS: break;
    case v1::MEMORY_FORMAT_CHANNELS_LAST:
      if (spec.shape.size() < 3) {
        return InvalidField(absl::StrCat(field, ".memory_format"),
                            absl::StrCat("CHANNELS_LAST for ", spec.shape.size(), " dimensions"),
                            "CHANNELS_LAST only for 3 dimensions or more");
      }
      spec.format = MemoryFormat::kChannelsLast;
      break;
    default:
      return InvalidField(absl::StrCat(field, ".memory_format"),
                          absl::StrCat(static_cast<int>(tensor.memory_format())),
                          "CONTIGUOUS or CHANNELS_LAST");
  }
  return spec;
}

absl::Status CheckBytes(const TensorSpec& spec, size_t data_bytes, absl::string_view field) {
  if (static_cast<size_t>(spec.bytes()) == data_bytes) return absl::OkStatus();
  return InvalidField(absl::StrCat(field, ".data"), absl::StrCat(data_bytes, " bytes"),
                      absl::StrCat(spec.bytes(), " bytes, which shape ", ShapeText(spec.shape),
                                   " of ", NameOf(spec.dtype), " takes"));
}

absl::Status CheckSameTensor(const TensorSpec& spec, absl::string_view field,
                             const TensorSpec& other, absl::string_view other_name) {
  if (spec.shape != other.shape) {
    return InvalidField(absl::StrCat(field, ".shape"), ShapeText(spec.shape),
                        absl::StrCat(ShapeText(other.shape), ", the shape of ", other_name));
  }
  if (spec.dtype != other.dtype) {
    return InvalidField(absl::StrCat(field, ".dtype"), NameOf(spec.dtype),
                        absl::StrCat(NameOf(other.dtype), ", the dtype of ", other_name));
  }
  if (spec.format != other.format) {
    return InvalidField(absl::StrCat(field, ".memory_format"),
                        spec.format == MemoryFormat::kChannelsLast ? "CHANNELS_LAST" : "CONTIGUOUS",
                        absl::StrCat("the memory format of ", other_name));
  }
  return absl::OkStatus();
}

absl::StatusOr<BatchMoments> ToBatchMoments(const v1::BatchStatistics& statistics,
                                            const NormProblem& problem) {
  const auto sets = static_cast<int>(problem.num_sets());
  if (statistics.count() != problem.set_size()) {
    return InvalidField("batch_statistics.count", absl::StrCat(statistics.count()),
                        absl::StrCat(problem.set_size(), ", the input's values per channel"));
  }
  const std::string allowed = absl::StrCat(sets, " values");
  if (statistics.mean_size() != sets) {
    return InvalidField("batch_statistics.mean", absl::StrCat(statistics.mean_size(), " values"),
                        allowed);
  }
  if (statistics.var_size() != sets) {
    return InvalidField("batch_statistics.var", absl::StrCat(statistics.var_size(), " values"),
                        allowed);
  }
  BatchMoments moments{.count = statistics.count(),
                       .mean = {statistics.mean().begin(), statistics.mean().end()},
                       .m2 = {statistics.var().begin(), statistics.var().end()}};
  for (double& m2 : moments.m2) {
    if (m2 < 0) return InvalidField("batch_statistics.var", Text(m2), "0 or more each");
    m2 *= static_cast<double>(moments.count);
  }
  return moments;
}

absl::StatusOr<OptimizerSettings> ToOptimizerSettings(const v1::Optimizer& optimizer) {
  OptimizerSettings settings;
  const auto first_error = [](std::initializer_list<absl::Status> checks) {
    for (const absl::Status& check : checks) {
      if (!check.ok()) return check;
    }
    return absl::OkStatus();
  };
  const auto adam = [&](const v1::Adam& from, OptimizerRule rule, const std::string& field,
                        double default_decay) {
    settings.rule = rule;
    settings.lr = from.has_lr() ? from.lr() : 1e-3;
    settings.beta1 = from.has_beta1() ? from.beta1() : 0.9;
    settings.beta2 = from.has_beta2() ? from.beta2() : 0.999;
    settings.eps = from.has_eps() ? from.eps() : 1e-8;
    settings.weight_decay = from.has_weight_decay() ? from.weight_decay() : default_decay;
    settings.amsgrad = from.amsgrad();
    settings.maximize = from.maximize();
    return first_error({CheckNotNegative(settings.lr, field + ".lr"),
                        CheckBeta(settings.beta1, field + ".beta1"),
                        CheckBeta(settings.beta2, field + ".beta2"),
                        CheckNotNegative(settings.eps, field + ".eps"),
                        CheckNotNegative(settings.weight_decay, field + ".weight_decay")});
  };
  absl::Status checked;
  switch (optimizer.rule_case()) {
    case v1::Optimizer::kSgd: {
      const v1::Sgd& from = optimizer.sgd();
      settings.rule = OptimizerRule::kSgd;
      settings.lr = from.lr();
      settings.momentum = from.momentum();
      settings.dampening = from.dampening();
      settings.weight_decay = from.weight_decay();
      settings.nesterov = from.nesterov();
      settings.maximize = from.maximize();
      checked =
          first_error({CheckNotNegative(settings.lr, "optimizer.sgd.lr"),
                       CheckNotNegative(settings.momentum, "optimizer.sgd.momentum"),
                       CheckFinite(settings.dampening, "optimizer.sgd.dampening"),
                       CheckNotNegative(settings.weight_decay, "optimizer.sgd.weight_decay")});
      if (checked.ok() && settings.nesterov &&
          (settings.momentum <= 0 || settings.dampening != 0)) {
        checked = InvalidField("optimizer.sgd.nesterov",
                               absl::StrCat("true with momentum ", settings.momentum,
                                            " and dampening ", settings.dampening),
                               "Nesterov momentum requires a momentum and zero dampening");
      }
      break;
    }
    case v1::Optimizer::kAdam:
      checked = adam(optimizer.adam(), OptimizerRule::kAdam, "optimizer.adam", 0);
      break;
    case v1::Optimizer::kAdamw:
      checked = adam(optimizer.adamw(), OptimizerRule::kAdamW, "optimizer.adamw", 1e-2);
      break;
    case v1::Optimizer::RULE_NOT_SET:
      checked = InvalidField("optimizer.rule", "", "one of sgd, adam, adamw");
      break;
  }
  if (!checked.ok()) return checked;
  return settings;
}

absl::StatusOr<int> ToPageSize(int32_t page_size) {
  if (page_size < 0 || page_size > 1000) {
    return InvalidField("page_size", absl::StrCat(page_size), "1 to 1000, or 0 for 100");
  }
  return page_size == 0 ? 100 : page_size;
}

absl::Status LoadStateDict(const v1::State& from, InstanceState& state) {
  if (from.gradients_size() > 0) {
    return InvalidField("state.gradients", absl::StrCat(from.gradients_size(), " tensors"), "none");
  }
  if (from.optimizer_state_size() > 0) {
    return InvalidField("state.optimizer_state",
                        absl::StrCat(from.optimizer_state_size(), " tensors"), "none");
  }
  const Layer& layer = state.layer();
  std::vector<absl::string_view> expected;
  if (layer.has_weight()) expected.push_back("weight");
  if (layer.has_bias()) expected.push_back("bias");
  if (layer.track_running_stats) {
    expected.insert(expected.end(), {"running_mean", "running_var", "num_batches_tracked"});
  }
  std::vector<std::string> missing;
  std::vector<std::string> unexpected;
  const auto quoted = [](absl::string_view key) { return absl::StrCat("\"", key, "\""); };
  for (const absl::string_view key : expected) {
    const auto named = std::count_if(from.state_dict().begin(), from.state_dict().end(),
                                     [&](const v1::NamedTensor& t) { return t.name() == key; });
    if (named == 0) missing.push_back(quoted(key));
    if (named > 1) {
      return InvalidField("state.state_dict", absl::StrCat(named, " tensors named ", key),
                          "each key once");
    }
  }
  for (const v1::NamedTensor& tensor : from.state_dict()) {
    if (std::find(expected.begin(), expected.end(), tensor.name()) == expected.end()) {
      unexpected.push_back(quoted(tensor.name().substr(0, 64)));
    }
  }
  if (!missing.empty() || !unexpected.empty()) {
    std::string message = "Error(s) in loading state_dict:";
    if (!missing.empty()) {
      absl::StrAppend(&message, " Missing key(s): ", absl::StrJoin(missing, ", "), ".");
    }
    if (unexpected.size() > 10) unexpected.resize(10);
    if (!unexpected.empty()) {
      absl::StrAppend(&message, " Unexpected key(s): ", absl::StrJoin(unexpected, ", "), ".");
    }
    return FailedField("state.state_dict", message,
                       absl::StrCat("exactly ", absl::StrJoin(expected, ", ")), message);
  }

  InstanceState next = state;
  for (const v1::NamedTensor& named : from.state_dict()) {
    const std::string field = absl::StrCat("state.state_dict.", named.name());
    if (named.name() == "num_batches_tracked") {
      const auto count = ToCount(named.tensor(), field);
      if (!count.ok()) return count.status();
      next.num_batches_tracked = *count;
      continue;
    }
    auto values = ToValues(named.tensor(), field, layer.parameter_shape(), layer.state_dtype);
    if (!values.ok()) return values.status();
    if (named.name() == "running_var") {
      for (int64_t i = 0; i < values->size(); ++i) {
        if ((*values)[i] < 0) {
          return InvalidField(field, absl::StrCat((*values)[i], " at channel ", i),
                              "0 or more each");
        }
      }
    }
    Values& target = named.name() == "weight"         ? next.weight
                     : named.name() == "bias"         ? next.bias
                     : named.name() == "running_mean" ? next.running_mean
                                                      : next.running_var;
    target = *std::move(values);
  }
  state = std::move(next);
  return absl::OkStatus();
}

}  // namespace normd
