#include "server/state/instance_codec.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <limits>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "absl/numeric/int128.h"
#include "formats/json_text.h"
#include "formats/safetensors.h"
#include "server/instance/instance_name.h"
#include "server/state/layer_json.h"
#include "server/state/strict_json.h"

namespace normd {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "tensors are little-endian on disk and are written as they lie in memory");

constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();
constexpr int64_t kMinInt64 = std::numeric_limits<int64_t>::min();

constexpr char kMetadataKey[] = "normd.instance";
constexpr char kNumBatchesTracked[] = "num_batches_tracked";
constexpr size_t kMaxUidBytes = 64;

// A member of InstanceState or OptimizerSlot and the tensor it is kept in.
template <typename Owner>
struct NamedValues {
  const char* name;
  Values Owner::*member;
};

constexpr NamedValues<InstanceState> kStateValues[] = {
    {"weight", &InstanceState::weight},
    {"bias", &InstanceState::bias},
    {"running_mean", &InstanceState::running_mean},
    {"running_var", &InstanceState::running_var},
    {"normd.grad.weight", &InstanceState::grad_weight},
    {"normd.grad.bias", &InstanceState::grad_bias},
};

constexpr NamedValues<OptimizerSlot> kWeightValues[] = {
    {"normd.optimizer.weight.momentum_buffer", &OptimizerSlot::momentum_buffer},
    {"normd.optimizer.weight.exp_avg", &OptimizerSlot::exp_avg},
    {"normd.optimizer.weight.exp_avg_sq", &OptimizerSlot::exp_avg_sq},
    {"normd.optimizer.weight.max_exp_avg_sq", &OptimizerSlot::max_exp_avg_sq},
};
constexpr NamedValues<OptimizerSlot> kBiasValues[] = {
    {"normd.optimizer.bias.momentum_buffer", &OptimizerSlot::momentum_buffer},
    {"normd.optimizer.bias.exp_avg", &OptimizerSlot::exp_avg},
    {"normd.optimizer.bias.exp_avg_sq", &OptimizerSlot::exp_avg_sq},
    {"normd.optimizer.bias.max_exp_avg_sq", &OptimizerSlot::max_exp_avg_sq},
};
constexpr char kWeightStep[] = "normd.optimizer.weight.step";
constexpr char kBiasStep[] = "normd.optimizer.bias.step";

constexpr std::pair<OptimizerRule, const char*> kRules[] = {
    {OptimizerRule::kSgd, "sgd"},
    {OptimizerRule::kAdam, "adam"},
    {OptimizerRule::kAdamW, "adamw"},
};

const char* SafetensorsType(DType dtype) { return dtype == DType::kFloat64 ? "F64" : "F32"; }

std::string_view BytesOf(const int64_t& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

// The JSON of "normd.instance".
std::string InstanceJson(const StoredInstance& instance) {
  const InstanceState& state = *instance.state;
  const Identity& identity = *state.identity;
  // What RequestLog holds beyond its capacity it has forgotten already.
  const size_t requests = std::min(instance.requests.size(), RequestLog::kCapacity);

  std::string out;
  out.reserve(512 + 96 * requests);
  out += R"({"name":)";
  AppendJsonString(out, identity.name);
  out += R"(,"uid":)";
  AppendJsonString(out, identity.uid);
  out += R"(,"layer":)";
  AppendLayerJson(out, identity.layer);
  fmt::format_to(
      std::back_inserter(out),
      R"(,"mode":"{}","version":{},"parameters_version":{},"create_unix_ns":{},"update_unix_ns":{})",
      state.mode == Mode::kTrain ? "train" : "eval", state.version, state.parameters_version,
      absl::ToUnixNanos(identity.create_time), absl::ToUnixNanos(state.update_time));
  if (state.optimizer != nullptr) {
    for (const auto& [rule, name] : kRules) {
      if (state.optimizer->rule == rule) {
        fmt::format_to(std::back_inserter(out), R"(,"optimizer":"{}")", name);
      }
    }
  }
  if (requests > 0) {
    // Each: id, method, version, num_batches_tracked, time.
    out += R"(,"requests":)";
    const char* separator = "[";
    for (auto it = instance.requests.end() - requests; it != instance.requests.end(); ++it) {
      fmt::format_to(std::back_inserter(out), R"({}["{:016x}{:016x}",{},{},{},{}])", separator,
                     absl::Uint128High64(it->id), absl::Uint128Low64(it->id),
                     static_cast<int>(it->method), it->version, it->num_batches_tracked,
                     absl::ToUnixNanos(it->time));
      separator = ",";
    }
    out += ']';
  }
  out += '}';
  return out;
}

std::optional<absl::uint128> ParseId(std::string_view hex) {
  if (hex.size() != 32) return std::nullopt;
  absl::uint128 id = 0;
  for (const char c : hex) {
    int digit;
    if ('0' <= c && c <= '9') {
      digit = c - '0';
    } else if ('a' <= c && c <= 'f') {
      digit = c - 'a' + 10;
    } else {
      return std::nullopt;
    }
    id = id << 4 | digit;
  }
  return id;
}

std::optional<AppliedRequest> ParseRequest(const nlohmann::json& json) {
  if (!json.is_array() || json.size() != 5 || !json[0].is_string()) return std::nullopt;
  for (int i = 1; i < 5; ++i) {
    if (!json[i].is_number_integer()) return std::nullopt;
  }
  const std::optional<absl::uint128> id = ParseId(json[0].get_ref<const std::string&>());
  // Read as unsigned, a negative number is too large for each of the three.
  const uint64_t method = json[1].get<uint64_t>();
  const uint64_t batches = json[3].get<uint64_t>();
  const bool time_fits =
      !json[4].is_number_unsigned() || json[4].get<uint64_t>() <= static_cast<uint64_t>(kMaxInt64);
  if (!id.has_value() || !KnownMethod(method) || !json[2].is_number_unsigned() ||
      batches > static_cast<uint64_t>(kMaxInt64) || !time_fits) {
    return std::nullopt;
  }
  return AppliedRequest{.id = *id,
                        .method = static_cast<Method>(method),
                        .version = json[2].get<uint64_t>(),
                        .num_batches_tracked = static_cast<int64_t>(batches),
                        .time = absl::FromUnixNanos(json[4].get<int64_t>())};
}

bool ValidUid(std::string_view uid) {
  return !uid.empty() && uid.size() <= kMaxUidBytes &&
         std::all_of(uid.begin(), uid.end(), [](unsigned char c) {
           return ('0' <= c && c <= '9') || ('a' <= c && c <= 'z') || ('A' <= c && c <= 'Z') ||
                  c == '-';
         });
}

// Takes the tensors of a file one by one, so that what nobody asked for is seen.
class Tensors {
 public:
  Tensors(const Safetensors& file, const Layer& layer) : file_(file), layer_(layer) {}

  // Absent where the file has no such tensor.
  Values Take(std::string_view name) {
    const SafetensorsEntry* entry = Find(name);
    if (entry == nullptr) return {};
    if (entry->dtype != SafetensorsType(layer_.state_dtype) ||
        entry->shape != layer_.parameter_shape()) {
      Fail(fmt::format("tensor \"{}\" is not {} of the layer's shape", name,
                       SafetensorsType(layer_.state_dtype)));
      return {};
    }
    return Values::FromBytes(layer_.state_dtype, entry->data);
  }

  // 0 or more; 0 where the file has no such tensor.
  int64_t TakeCount(std::string_view name, bool* present = nullptr) {
    const SafetensorsEntry* entry = Find(name);
    if (present != nullptr) *present = entry != nullptr;
    if (entry == nullptr) return 0;
    int64_t value = -1;
    if (entry->dtype == "I64" && entry->shape.empty()) {
      std::memcpy(&value, entry->data.data(), sizeof(value));
    }
    if (value < 0) Fail(fmt::format("tensor \"{}\" is no I64 scalar of 0 or more", name));
    return value;
  }

  void Fail(std::string problem) {
    if (problem_.empty()) problem_ = std::move(problem);
  }

  // Empty when all went well and every tensor was taken.
  std::string Finish() {
    if (problem_.empty() && taken_ != file_.tensors.size()) problem_ = "it has unknown tensors";
    return std::move(problem_);
  }

 private:
  const SafetensorsEntry* Find(std::string_view name) {
    const SafetensorsEntry* entry = file_.Find(name);
    if (entry != nullptr) ++taken_;
    return entry;
  }

  const Safetensors& file_;
  const Layer& layer_;
  size_t taken_ = 0;
  std::string problem_;
};

absl::Status Damaged(std::string_view problem) {
  return absl::DataLossError(fmt::format("no instance of normd: {}", problem));
}

// What of a state does not go with its layer; empty: nothing. The sizes are right already.
std::string_view Inconsistency(const InstanceState& state, const Layer& layer) {
  if (state.weight.present() != layer.has_weight() || state.bias.present() != layer.has_bias()) {
    return "weight or bias is there though the layer has none, or missing";
  }
  if ((!layer.has_weight() && state.grad_weight.present()) ||
      (!layer.has_bias() && state.grad_bias.present())) {
    return "gradients of parameters that it does not have";
  }
  if (state.running_mean.present() != layer.track_running_stats ||
      state.running_var.present() != layer.track_running_stats) {
    return "running statistics are there though untracked, or missing though tracked";
  }
  return {};
}

// As a number it is more than any safetensors header is long, with which a file begins.
constexpr std::string_view kRecordMagic = "normdrec";

void AppendNumber(std::string& out, uint64_t value) {
  value = __builtin_bswap64(value);
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void AppendBytes(std::string& out, std::string_view bytes) {
  AppendNumber(out, bytes.size());
  out += bytes;
}

// Takes a record apart. Past its end everything is 0 and empty, and ok() is false.
class RecordReader {
 public:
  explicit RecordReader(std::string_view rest) : rest_(rest) {}

  uint64_t Number() {
    uint64_t value = 0;
    if (const std::string_view bytes = Take(sizeof(value)); !bytes.empty()) {
      std::memcpy(&value, bytes.data(), sizeof(value));
    }
    return __builtin_bswap64(value);
  }
  // At most `max`.
  uint64_t Number(uint64_t max) {
    const uint64_t value = Number();
    ok_ = ok_ && value <= max;
    return ok_ ? value : 0;
  }
  int64_t Count() { return static_cast<int64_t>(Number(static_cast<uint64_t>(kMaxInt64))); }
  absl::Time Time() { return absl::FromUnixNanos(static_cast<int64_t>(Number())); }
  std::string_view Bytes() { return Take(Number()); }
  // A parameter of the layer, or none.
  Values Tensor(const Layer& layer) {
    const std::string_view bytes = Bytes();
    if (bytes.empty()) return {};
    ok_ = ok_ && bytes.size() % SizeOf(layer.state_dtype) == 0 &&
          static_cast<int64_t>(bytes.size() / SizeOf(layer.state_dtype)) == layer.num_features;
    return ok_ ? Values::FromBytes(layer.state_dtype, bytes) : Values();
  }
  bool ok() const { return ok_; }
  bool at_end() const { return rest_.empty(); }

 private:
  std::string_view Take(uint64_t count) {
    ok_ = ok_ && count <= rest_.size();
    if (!ok_) return {};
    const std::string_view bytes = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return bytes;
  }

  std::string_view rest_;
  bool ok_ = true;
};

// LayerFromJson, quick where one text comes again and again, as it does in a store.
absl::StatusOr<Layer> LayerFromText(std::string_view text) {
  thread_local std::string last_text;
  thread_local Layer last_layer;
  if (text == last_text) return last_layer;
  const std::optional<nlohmann::json> json = ParseStrictJson(text);
  if (!json.has_value()) return absl::DataLossError("its layer is no JSON");
  absl::StatusOr<Layer> layer = LayerFromJson(*json);
  if (layer.ok()) {
    last_text = text;
    last_layer = *layer;
  }
  return layer;
}

}  // namespace

bool KnownMethod(uint64_t number) {
  return number >= static_cast<uint64_t>(Method::kCreate) &&
         number <= static_cast<uint64_t>(Method::kResetOptimizer);
}

std::string EncodeInstance(const StoredInstance& instance) {
  const InstanceState& state = *instance.state;
  const Layer& layer = state.layer();
  const std::vector<int64_t> shape = layer.parameter_shape();
  static const OptimizerState kNoOptimizer;
  const OptimizerState& optimizer = state.optimizer ? *state.optimizer : kNoOptimizer;

  Safetensors file;
  file.metadata = {{"format", "pt"}, {"normd.format", "1"}, {kMetadataKey, InstanceJson(instance)}};
  file.tensors.reserve(8);
  // 8-byte scalars first: torch needs its tensors aligned to their elements.
  const auto add_count = [&file](const char* name, const int64_t& value) {
    file.tensors.push_back({name, "I64", {}, BytesOf(value)});
  };
  const auto add = [&](const char* name, const Values& values) {
    if (!values.present()) return;
    file.tensors.push_back({name, SafetensorsType(values.dtype()), shape, values.bytes()});
  };
  if (layer.track_running_stats) add_count(kNumBatchesTracked, state.num_batches_tracked);
  if (optimizer.weight.step != 0) add_count(kWeightStep, optimizer.weight.step);
  if (optimizer.bias.step != 0) add_count(kBiasStep, optimizer.bias.step);
  for (const auto& [name, member] : kStateValues) add(name, state.*member);
  for (const auto& [name, member] : kWeightValues) add(name, optimizer.weight.*member);
  for (const auto& [name, member] : kBiasValues) add(name, optimizer.bias.*member);
  return WriteSafetensors(file);
}

absl::StatusOr<StoredInstance> DecodeInstance(std::string_view bytes) {
  absl::StatusOr<Safetensors> file = ParseSafetensors(bytes);
  if (!file.ok()) return Damaged(std::string(file.status().message()));

  const auto json_text = file->metadata.find(kMetadataKey);
  if (file->metadata.size() != 3 || json_text == file->metadata.end() ||
      file->metadata["format"] != "pt" || file->metadata["normd.format"] != "1") {
    return Damaged("its metadata are not those of format 1");
  }
  const std::optional<nlohmann::json> json = ParseStrictJson(json_text->second);
  if (!json.has_value()) return Damaged("its description is no JSON");

  JsonMembers members(*json, "instance");
  auto identity = std::make_shared<Identity>();
  auto state = std::make_shared<InstanceState>();
  StoredInstance instance;

  identity->name = members.String("name");
  if (!ValidInstanceName(identity->name)) members.Fail("name", "is no name of an instance");
  identity->uid = members.String("uid");
  if (!ValidUid(identity->uid)) members.Fail("uid", "is no uid");
  if (const nlohmann::json* layer_json = members.Take("layer")) {
    absl::StatusOr<Layer> layer = LayerFromJson(*layer_json);
    if (!layer.ok()) return Damaged(std::string(layer.status().message()));
    identity->layer = *layer;
  }
  const std::string mode = members.String("mode");
  if (mode != "train" && mode != "eval") members.Fail("mode", "is neither train nor eval");
  state->mode = mode == "train" ? Mode::kTrain : Mode::kEval;
  state->version = members.Uint("version", 1);
  // Records of before do not have it, and may have changed them just now.
  state->parameters_version = state->version;
  if (const nlohmann::json* json_version = members.TakeOptional("parameters_version")) {
    if (json_version->is_number_unsigned()) {
      state->parameters_version = json_version->get<uint64_t>();
    }
    if (!json_version->is_number_unsigned() || state->parameters_version < 1 ||
        state->parameters_version > state->version) {
      members.Fail("parameters_version", "is none from 1 to the version");
    }
  }
  identity->create_time = absl::FromUnixNanos(members.Int("create_unix_ns", kMinInt64, kMaxInt64));
  state->update_time = absl::FromUnixNanos(members.Int("update_unix_ns", kMinInt64, kMaxInt64));
  std::shared_ptr<OptimizerState> optimizer;
  if (const nlohmann::json* rule_json = members.TakeOptional("optimizer")) {
    const auto rule = std::find_if(std::begin(kRules), std::end(kRules), [&](const auto& known) {
      return rule_json->is_string() && rule_json->get_ref<const std::string&>() == known.second;
    });
    if (rule == std::end(kRules)) {
      members.Fail("optimizer", "is no known rule");
    } else {
      optimizer = std::make_shared<OptimizerState>();
      optimizer->rule = rule->first;
    }
  }
  if (const nlohmann::json* requests = members.TakeOptional("requests")) {
    if (!requests->is_array() || requests->empty() || requests->size() > RequestLog::kCapacity) {
      members.Fail("requests", "is no array of 1 to 1024");
    } else {
      instance.requests.reserve(requests->size());
      for (const nlohmann::json& request_json : *requests) {
        const std::optional<AppliedRequest> request = ParseRequest(request_json);
        if (!request.has_value()) {
          members.Fail("requests", "has one that is damaged");
          break;
        }
        instance.requests.push_back(*request);
      }
    }
  }
  if (absl::Status status = members.Finish(); !status.ok()) {
    return Damaged(std::string(status.message()));
  }

  const Layer& layer = identity->layer;
  Tensors tensors(*file, layer);
  bool counted = false;
  state->num_batches_tracked = tensors.TakeCount(kNumBatchesTracked, &counted);
  for (const auto& [name, member] : kStateValues) (*state).*member = tensors.Take(name);
  if (optimizer != nullptr) {
    optimizer->weight.step = tensors.TakeCount(kWeightStep);
    optimizer->bias.step = tensors.TakeCount(kBiasStep);
    for (const auto& [name, member] : kWeightValues) optimizer->weight.*member = tensors.Take(name);
    for (const auto& [name, member] : kBiasValues) optimizer->bias.*member = tensors.Take(name);
  }
  if (const std::string_view problem = Inconsistency(*state, layer); !problem.empty()) {
    tensors.Fail(std::string(problem));
  }
  if (counted != layer.track_running_stats) {
    tensors.Fail("batches are counted though untracked, or not though tracked");
  }
  if (const std::string problem = tensors.Finish(); !problem.empty()) return Damaged(problem);

  state->optimizer = std::move(optimizer);
  state->identity = std::move(identity);
  instance.state = std::move(state);
  return instance;
}

std::string EncodeRecord(const InstanceState& state) {
  const Identity& identity = *state.identity;
  static const OptimizerState kNoOptimizer;
  const OptimizerState& optimizer = state.optimizer ? *state.optimizer : kNoOptimizer;
  std::string out;
  out.reserve(768 + 4 * state.layer().num_features * SizeOf(state.layer().state_dtype));
  out += kRecordMagic;
  AppendBytes(out, identity.name);
  AppendBytes(out, identity.uid);
  std::string layer;
  AppendLayerJson(layer, identity.layer);
  AppendBytes(out, layer);
  AppendNumber(out, state.mode == Mode::kTrain ? 0 : 1);
  AppendNumber(out, state.version);
  AppendNumber(out, state.parameters_version);
  AppendNumber(out, static_cast<uint64_t>(absl::ToUnixNanos(identity.create_time)));
  AppendNumber(out, static_cast<uint64_t>(absl::ToUnixNanos(state.update_time)));
  AppendNumber(out, static_cast<uint64_t>(state.num_batches_tracked));
  AppendNumber(out, state.optimizer ? 1 + static_cast<uint64_t>(optimizer.rule) : 0);
  AppendNumber(out, static_cast<uint64_t>(optimizer.weight.step));
  AppendNumber(out, static_cast<uint64_t>(optimizer.bias.step));
  for (const auto& [name, member] : kStateValues) AppendBytes(out, (state.*member).bytes());
  for (const auto& [name, member] : kWeightValues) {
    AppendBytes(out, (optimizer.weight.*member).bytes());
  }
  for (const auto& [name, member] : kBiasValues) AppendBytes(out, (optimizer.bias.*member).bytes());
  return out;
}

bool IsRecord(std::string_view bytes) {
  return bytes.substr(0, kRecordMagic.size()) == kRecordMagic;
}

absl::StatusOr<std::shared_ptr<const InstanceState>> DecodeRecord(std::string_view bytes) {
  if (!IsRecord(bytes)) return Damaged("it is no record");
  RecordReader reader(bytes.substr(kRecordMagic.size()));
  auto identity = std::make_shared<Identity>();
  auto state = std::make_shared<InstanceState>();
  identity->name = reader.Bytes();
  identity->uid = reader.Bytes();
  absl::StatusOr<Layer> layer = LayerFromText(reader.Bytes());
  if (!layer.ok()) return Damaged(std::string(layer.status().message()));
  identity->layer = *std::move(layer);
  state->mode = reader.Number(1) == 0 ? Mode::kTrain : Mode::kEval;
  state->version = reader.Number();
  state->parameters_version = reader.Number();
  identity->create_time = reader.Time();
  state->update_time = reader.Time();
  state->num_batches_tracked = reader.Count();
  OptimizerState optimizer;
  const uint64_t rule = reader.Number(std::size(kRules));
  optimizer.weight.step = reader.Count();
  optimizer.bias.step = reader.Count();
  for (const auto& [name, member] : kStateValues) {
    (*state).*member = reader.Tensor(identity->layer);
  }
  for (const auto& [name, member] : kWeightValues) {
    optimizer.weight.*member = reader.Tensor(identity->layer);
  }
  for (const auto& [name, member] : kBiasValues) {
    optimizer.bias.*member = reader.Tensor(identity->layer);
  }
  if (!reader.ok() || !reader.at_end())
    return Damaged("its record is cut, too long or out of range");
  if (!ValidInstanceName(identity->name) || !ValidUid(identity->uid) || state->version == 0 ||
      state->parameters_version == 0 || state->parameters_version > state->version) {
    return Damaged("its record has no name, uid or version");
  }
  if (const auto problem = Inconsistency(*state, identity->layer); !problem.empty()) {
    return Damaged(problem);
  }
  if (!identity->layer.track_running_stats && state->num_batches_tracked != 0) {
    return Damaged("batches are counted though untracked");
  }
  if (rule != 0) {
    optimizer.rule = static_cast<OptimizerRule>(rule - 1);
    state->optimizer = std::make_shared<const OptimizerState>(std::move(optimizer));
  } else if (optimizer != OptimizerState()) {
    return Damaged("an optimizer's state without its rule");
  }
  state->identity = std::move(identity);
  return state;
}

}  // namespace normd
