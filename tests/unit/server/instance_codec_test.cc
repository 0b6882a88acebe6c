#include "server/state/instance_codec.h"

#include <functional>
#include <random>

#include <gtest/gtest.h>

#include "formats/safetensors.h"
#include "server/instance/instance_name.h"
#include "tests/unit/server/sample_instances.h"

namespace normd {
namespace {

void ExpectSurvives(const StoredInstance& instance) {
  const std::string bytes = EncodeInstance(instance);
  const absl::StatusOr<StoredInstance> decoded = DecodeInstance(bytes);
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_TRUE(SameState(*decoded->state, *instance.state));
  EXPECT_EQ(decoded->requests, instance.requests);
  EXPECT_EQ(EncodeInstance(*decoded), bytes);
}

TEST(InstanceCodec, KeepsEveryCombinationOfLayerArguments) {
  for (const bool affine : {true, false}) {
    for (const bool track : {true, false}) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
        for (const std::optional<double> momentum :
             {std::optional(0.1), std::optional(-1.2), std::optional(0.0), std::optional(1e300),
              std::optional<double>()}) {
          Layer layer = SampleLayer(5);
          layer.affine = affine;
          layer.track_running_stats = track;
          layer.state_dtype = dtype;
          layer.momentum = momentum;
          InstanceState state = TrainedState("net/layer1.0/bn", layer);
          ExpectSurvives({.state = Share(state), .requests = {}});
          state.mode = Mode::kEval;
          state.optimizer = nullptr;
          state.grad_bias = {};
          ExpectSurvives({.state = Share(state), .requests = {}});
        }
      }
    }
  }
}

TEST(InstanceCodec, KeepsDoublesBitForBit) {
  std::mt19937_64 random(20300101);
  for (int i = 0; i < 2000; ++i) {
    Layer layer = SampleLayer(1);
    const auto draw = [&] {
      double value;
      do {
        value = std::bit_cast<double>(random());
      } while (!std::isfinite(value));
      return value;
    };
    layer.eps = std::abs(draw());
    layer.momentum = draw();
    const InstanceState state = InitialState(SampleIdentity("bn", layer), Mode::kTrain);
    const auto decoded = DecodeInstance(EncodeInstance({.state = Share(state), .requests = {}}));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    ASSERT_EQ(decoded->state->layer(), layer);
  }
}

TEST(InstanceCodec, TakesARecordOfBeforeForOneWhoseParametersHaveJustChanged) {
  InstanceState state = TrainedState("bn", SampleLayer(2));
  state.version = 9;
  state.parameters_version = 4;
  const std::string bytes = EncodeInstance({.state = Share(state), .requests = {}});
  EXPECT_EQ((*DecodeInstance(bytes)).state->parameters_version, 4u);
  auto file = ParseSafetensors(bytes);
  ASSERT_TRUE(file.ok());
  std::string& json = file->metadata["normd.instance"];
  const std::string member = R"("parameters_version":4,)";
  ASSERT_NE(json.find(member), std::string::npos);
  json.erase(json.find(member), member.size());
  const auto decoded = DecodeInstance(WriteSafetensors(*file));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(decoded->state->parameters_version, 9u);
}

TEST(InstanceCodec, KeepsEachOptimizerRule) {
  for (const OptimizerRule rule :
       {OptimizerRule::kSgd, OptimizerRule::kAdam, OptimizerRule::kAdamW}) {
    InstanceState state = TrainedState("bn");
    auto optimizer = std::make_shared<OptimizerState>();
    optimizer->rule = rule;
    if (rule == OptimizerRule::kSgd) {
      optimizer->weight.momentum_buffer = SampleValues(state.layer(), 7);
    }
    state.optimizer = optimizer;
    ExpectSurvives({.state = Share(state), .requests = {}});
  }
}

TEST(InstanceCodec, KeepsRequestsInOrder) {
  StoredInstance instance{.state = Share(TrainedState("bn")), .requests = {}};
  for (uint64_t i = 0; i < RequestLog::kCapacity; ++i) {
    instance.requests.push_back(
        SampleRequest(i + 1, absl::UnixEpoch() + absl::Nanoseconds(i * 1'234'567'891)));
  }
  instance.requests[3].id = absl::Uint128Max();
  instance.requests[4].id = 0;
  instance.requests[5].version = std::numeric_limits<uint64_t>::max();
  instance.requests[6].num_batches_tracked = std::numeric_limits<int64_t>::max();
  instance.requests[7].time = absl::FromUnixNanos(-1);
  for (int method = 1; method <= 11; ++method) {
    instance.requests[20 + method].method = static_cast<Method>(method);
  }
  ExpectSurvives(instance);
}

TEST(InstanceCodec, KeepsTheLastRequestsOfALongLog) {
  StoredInstance instance{.state = Share(TrainedState("bn")), .requests = {}};
  for (uint64_t i = 0; i < RequestLog::kCapacity + 10; ++i) {
    instance.requests.push_back(SampleRequest(i + 1, absl::UnixEpoch()));
  }
  const auto decoded = DecodeInstance(EncodeInstance(instance));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  ASSERT_EQ(decoded->requests.size(), RequestLog::kCapacity);
  EXPECT_EQ(decoded->requests.front(), instance.requests[10]);
  EXPECT_EQ(decoded->requests.back(), instance.requests.back());
}

TEST(InstanceCodec, WritesTensorsUnderStateDictKeysAlignedForTorch) {
  // Three float32 values a tensor: an int64 after them would not be aligned.
  const std::string bytes =
      EncodeInstance({.state = Share(TrainedState("bn", SampleLayer(3))), .requests = {}});
  const auto file = ParseSafetensors(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata.at("format"), "pt");
  for (const char* key : {"weight", "bias", "running_mean", "running_var"}) {
    const SafetensorsEntry* entry = file->Find(key);
    ASSERT_NE(entry, nullptr) << key;
    EXPECT_EQ(entry->dtype, "F32");
    EXPECT_EQ(entry->shape, std::vector<int64_t>{3});
  }
  const SafetensorsEntry* batches = file->Find("num_batches_tracked");
  ASSERT_NE(batches, nullptr);
  EXPECT_EQ(batches->dtype, "I64");
  EXPECT_TRUE(batches->shape.empty());
  for (const SafetensorsEntry& entry : file->tensors) {
    EXPECT_EQ((entry.data.data() - bytes.data()) % SafetensorsElementSize(entry.dtype), 0)
        << entry.name;
  }
}

TEST(InstanceCodec, RefusesEveryCutAndMostDamage) {
  StoredInstance instance{.state = Share(TrainedState("bn")),
                          .requests = {SampleRequest(1, absl::UnixEpoch())}};
  const std::string sound = EncodeInstance(instance);
  for (size_t size = 0; size < sound.size(); ++size) {
    const auto decoded = DecodeInstance(sound.substr(0, size));
    ASSERT_EQ(decoded.status().code(), absl::StatusCode::kDataLoss) << "cut to " << size;
  }
  ASSERT_FALSE(DecodeInstance(sound + '\0').ok());
  // A changed byte may make another instance (checksums are not the codec's), but
  // only one that it could have written itself.
  for (size_t at = 0; at < sound.size(); ++at) {
    for (const int bit : {0, 3, 7}) {
      std::string damaged = sound;
      damaged[at] = static_cast<char>(damaged[at] ^ 1 << bit);
      const auto decoded = DecodeInstance(damaged);
      if (!decoded.ok()) {
        ASSERT_EQ(decoded.status().code(), absl::StatusCode::kDataLoss);
        continue;
      }
      const auto again = DecodeInstance(EncodeInstance(*decoded));
      ASSERT_TRUE(again.ok()) << again.status();
      ASSERT_TRUE(SameState(*again->state, *decoded->state));
    }
  }
}

TEST(Record, KeepsEveryKindOfState) {
  Layer bare = SampleLayer(5);
  bare.affine = bare.track_running_stats = false;
  Layer tokens = {.kind = LayerKind::kLayerNorm, .num_features = 6, .normalized_shape = {2, 3}};
  tokens.track_running_stats = tokens.bias = false;
  Layer wide = SampleLayer(4);
  wide.state_dtype = DType::kFloat64;
  // Twice: the second time the layer's text is the one before.
  for (const Layer& layer : {SampleLayer(), SampleLayer(), bare, tokens, wide}) {
    for (const bool trained : {true, false}) {
      const InstanceState state = trained && layer.bias
                                      ? TrainedState("net/bn", layer)
                                      : InitialState(SampleIdentity("a", layer), Mode::kEval);
      const std::string record = EncodeRecord(state);
      EXPECT_TRUE(IsRecord(record));
      const auto decoded = DecodeRecord(record);
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      EXPECT_TRUE(SameState(**decoded, state));
      EXPECT_EQ(EncodeRecord(**decoded), record);
    }
  }
  EXPECT_FALSE(IsRecord(EncodeInstance({.state = Share(TrainedState("bn")), .requests = {}})));
}

TEST(Record, RefusesEveryCutAndMostDamage) {
  const std::string sound = EncodeRecord(TrainedState("bn"));
  for (size_t size = 0; size < sound.size(); ++size) {
    const auto decoded = DecodeRecord(sound.substr(0, size));
    ASSERT_EQ(decoded.status().code(), absl::StatusCode::kDataLoss) << "cut to " << size;
  }
  ASSERT_FALSE(DecodeRecord(sound + '\0').ok());
  // As for a file: only what could have been written itself.
  for (size_t at = 0; at < sound.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = sound;
      damaged[at] = static_cast<char>(damaged[at] ^ 1 << bit);
      const auto decoded = DecodeRecord(damaged);
      if (decoded.ok()) {
        const auto again = DecodeRecord(EncodeRecord(**decoded));
        ASSERT_TRUE(again.ok()) << again.status();
        ASSERT_TRUE(SameState(**again, **decoded));
      } else {
        ASSERT_EQ(decoded.status().code(), absl::StatusCode::kDataLoss);
      }
    }
  }
}

TEST(Record, RefusesWhatDoesNotGoTogether) {
  const auto refused = [](InstanceState state) {
    return DecodeRecord(EncodeRecord(state)).status().code() == absl::StatusCode::kDataLoss;
  };
  const InstanceState sound = TrainedState("bn");
  EXPECT_FALSE(refused(sound));
  const auto with = [&](const auto& edit) {
    InstanceState state = sound;
    edit(state);
    return state;
  };
  EXPECT_TRUE(refused(with([](InstanceState& s) { s.weight = {}; })));
  EXPECT_TRUE(refused(with([](InstanceState& s) { s.running_mean = {}; })));
  EXPECT_TRUE(refused(with([](InstanceState& s) { s.version = 0; })));
  EXPECT_TRUE(refused(with([](InstanceState& s) { s.num_batches_tracked = -1; })));
  EXPECT_TRUE(
      refused(with([](InstanceState& s) { s.bias = Values::Filled(DType::kFloat32, 4, 0); })));
  EXPECT_TRUE(
      refused(with([](InstanceState& s) { s.identity = SampleIdentity("../bn", SampleLayer()); })));
  Layer untracked = SampleLayer();
  untracked.track_running_stats = false;
  InstanceState counted = TrainedState("bn", untracked);
  counted.num_batches_tracked = 1;
  EXPECT_TRUE(refused(counted));
}

// Decodes what `edit` made of the file of a sound instance.
absl::Status StatusAfter(const std::function<void(Safetensors&)>& edit) {
  const std::string bytes = EncodeInstance(
      {.state = Share(TrainedState("bn")), .requests = {SampleRequest(1, absl::UnixEpoch())}});
  Safetensors file = *ParseSafetensors(bytes);
  edit(file);
  return DecodeInstance(WriteSafetensors(file)).status();
}

// `from` is replaced where it comes last.
absl::Status StatusWithJson(const std::string& from, const std::string& to) {
  return StatusAfter([&](Safetensors& file) {
    std::string& json = file.metadata["normd.instance"];
    const size_t at = json.rfind(from);
    ASSERT_NE(at, std::string::npos) << from;
    json.replace(at, from.size(), to);
  });
}

TEST(InstanceCodec, TheEditsOfTheseTestsBeginFromWhatIsSound) {
  EXPECT_TRUE(StatusAfter([](Safetensors&) {}).ok());
}

TEST(InstanceCodec, RefusesJsonThatItCannotHaveWritten) {
  const std::pair<const char*, const char*> edits[] = {
      {"\"name\":\"bn\"", "\"name\":\"../bn\""},
      {"\"name\":\"bn\"", "\"name\":\"\""},
      {"\"name\":\"bn\"", "\"name\":\"a b\""},
      {"\"name\":\"bn\"", "\"name\":7"},
      {"\"name\":\"bn\"", "\"name\":\"bn\",\"name\":\"bn\""},
      {"\"name\":\"bn\",", ""},
      {"\"uid\":\"0b5cd3c1-30aa-4e3c-9f4e-6b1f5ec6a001\"", "\"uid\":\"\""},
      {"\"uid\":\"0b5cd3c1-30aa-4e3c-9f4e-6b1f5ec6a001\"", "\"uid\":\"\\n\""},
      {"BatchNorm2d", "BatchNorm9d"},
      {"\"num_features\":3", "\"num_features\":0"},
      {"\"num_features\":3", "\"num_features\":-3"},
      {"\"num_features\":3", "\"num_features\":4"},
      {"\"num_features\":3", "\"num_features\":3.0"},
      {"\"num_features\":3", "\"num_features\":18446744073709551615"},
      {"\"eps\":1e-05", "\"eps\":-1e-05"},
      {"\"eps\":1e-05", "\"eps\":1e999"},
      {"\"eps\":1e-05", "\"eps\":null"},
      {"\"momentum\":0.1", "\"momentum\":\"0.1\""},
      {"\"momentum\":0.1,", ""},
      {"\"affine\":true", "\"affine\":false"},
      {"\"affine\":true", "\"affine\":1"},
      {"\"track_running_stats\":true", "\"track_running_stats\":false"},
      {"float32", "float64"},
      {"float32", "float16"},
      {"\"mode\":\"train\"", "\"mode\":\"training\""},
      {"\"version\":41", "\"version\":0"},
      {"\"version\":41", "\"version\":-1"},
      {"\"version\":41", "\"version\":18446744073709551616"},
      {"\"update_unix_ns\":1900000001000000001", "\"update_unix_ns\":9223372036854775808"},
      {"\"optimizer\":\"adam\"", "\"optimizer\":\"lamb\""},
      {",\"optimizer\":\"adam\"", ""},
      {"\"requests\":[[\"fedcba98765432100000000000000001\",5,1,1,0]]", "\"requests\":[]"},
      {"\"requests\":[[\"fedcba98765432100000000000000001\",5,1,1,0]]", "\"requests\":{}"},
      {"fedcba98", "FEDCBA98"},
      {"fedcba98", "fedcba9"},
      {",5,1,1,", ",0,1,1,"},
      {",5,1,1,", ",200,1,1,"},
      {",5,1,1,", ",-5,1,1,"},
      {",5,1,1,", ",5,-1,1,"},
      {",5,1,1,", ",5,1,-1,"},
      {",5,1,1,", ",5,1,1,1,"},
      {",5,1,1,", ",5,1,"},
      {"}", ",\"surprise\":1}"},
      {"}", ""},
      {"}", "}x"},
      {"\"layer\":{", "\"layer\":{\"surprise\":[[[[[[[[[]]]]]]]]],"},
  };
  for (const auto& [from, to] : edits) {
    const absl::Status status = StatusWithJson(from, to);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << from << " -> " << to;
  }
}

TEST(InstanceCodec, RefusesTensorsThatItCannotHaveWritten) {
  const auto entry = [](Safetensors& file, std::string_view name) -> SafetensorsEntry& {
    return const_cast<SafetensorsEntry&>(*file.Find(name));
  };
  const std::function<void(Safetensors&)> edits[] = {
      [](Safetensors& f) { f.metadata.erase("format"); },
      [](Safetensors& f) { f.metadata["normd.format"] = "2"; },
      [](Safetensors& f) { f.metadata["other"] = ""; },
      [](Safetensors& f) { f.metadata.erase("normd.instance"); },
      [](Safetensors& f) { f.tensors.erase(f.tensors.begin()); },
      [](Safetensors& f) {
        f.tensors.pop_back();
        f.tensors.push_back({"x", "U8", {0}, ""});
      },
      [&](Safetensors& f) { entry(f, "weight").name = "wait"; },
      [&](Safetensors& f) {
        entry(f, "weight").shape = {3, 1};
      },
      [&](Safetensors& f) { entry(f, "weight").dtype = "I32"; },
      [&](Safetensors& f) {
        entry(f, "running_var").data.remove_suffix(4);
        entry(f, "running_var").shape = {2};
      },
      [&](Safetensors& f) { entry(f, "num_batches_tracked").shape = {1}; },
      [&](Safetensors& f) { entry(f, "num_batches_tracked").dtype = "F64"; },
      [&](Safetensors& f) {
        entry(f, "num_batches_tracked").data = std::string_view("\xff\xff\xff\xff\xff\xff\xff\xff");
      },
      [&](Safetensors& f) {
        entry(f, "normd.optimizer.bias.exp_avg").shape = {1, 3};
      },
  };
  for (size_t i = 0; i < std::size(edits); ++i) {
    EXPECT_EQ(StatusAfter(edits[i]).code(), absl::StatusCode::kDataLoss) << "edit " << i;
  }
}

TEST(InstanceName, AllowsPathsOfPlainSegments) {
  for (const std::string& name :
       {std::string("a"), std::string("net/layer1.0/bn-1_x"), std::string("..."),
        std::string(".hidden/..b"), std::string(255, 'a')}) {
    EXPECT_TRUE(ValidInstanceName(name)) << name;
  }
  for (const std::string& name :
       {std::string(), std::string("/a"), std::string("a/"), std::string("a//b"), std::string("."),
        std::string(".."), std::string("a/./b"), std::string("../a"), std::string("a/.."),
        std::string("a b"), std::string("a\\b"), std::string("a%2Fb"), std::string("\xc3\xa4"),
        std::string("a\0b", 3), std::string(256, 'a')}) {
    EXPECT_FALSE(ValidInstanceName(name)) << name;
  }
}

}  // namespace
}  // namespace normd
