#include "client/normctl/normctl.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/normctl/suggest.h"
#include "client/normctl/tensor_file.h"
#include "formats/npy.h"
#include "tests/unit/client/fake_server.h"

namespace normd::normctl {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

struct Outcome {
  int exit_code;
  std::string out;
  std::string err;
};

Outcome RunIt(const std::string& line) {
  std::ostringstream out, err;
  const int exit_code = Run(absl::StrSplit(line, ' ', absl::SkipEmpty()), out, err, false);
  return {exit_code, out.str(), err.str()};
}

// With a server and a directory for files.
class NormctlTest : public ::testing::Test {
 protected:
  NormctlTest() {
    directory_ = std::filesystem::path(::testing::TempDir()) /
                 absl::StrCat("normctl_test.", getpid(), ".", counter_++);
    std::filesystem::create_directories(directory_);
  }
  ~NormctlTest() override { std::filesystem::remove_all(directory_); }

  Outcome Call(const std::string& line) {
    return RunIt(absl::StrCat(line, " --server=", server_.address()));
  }
  std::string File(const std::string& name) const { return directory_ / name; }

  // A .npy of (1, 2, 1, 2) float32: 1 2 3 4.
  std::string Input(bool fortran_order = false) {
    const float values[] = {1, 2, 3, 4};
    const std::string path = File(fortran_order ? "fortran.npy" : "x.npy");
    std::ofstream file(path, std::ios::binary);
    file << NpyHeader({.descr = "<f4", .shape = {1, 2, 1, 2}, .fortran_order = fortran_order});
    file.write(reinterpret_cast<const char*>(values), sizeof(values));
    return path;
  }

  static std::vector<float> Floats(const std::string& bytes) {
    std::vector<float> values(bytes.size() / 4);
    memcpy(values.data(), bytes.data(), values.size() * 4);
    return values;
  }

  FakeServer server_;

 private:
  static inline int counter_ = 0;
  std::filesystem::path directory_;
};

// --- what was typed ---

TEST(NormctlUsage, SuggestsWhatWasMeant) {
  const struct {
    const char* line;
    const char* said;
  } cases[] = {
      {"lst", "there is no command lst; did you mean list?"},
      {"crate x", "did you mean create?"},
      {"state gte x", "did you mean get?"},
      {"checkpoint sav", "did you mean save?"},
      {"create x --num_featurs=3", "there is no flag --num_featurs; did you mean --num_features?"},
      {"list --jsn", "did you mean --json?"},
      {"forward x --inptu=a.npy", "did you mean --input?"},
  };
  for (const auto& c : cases) {
    const Outcome outcome = RunIt(c.line);
    EXPECT_EQ(outcome.exit_code, 2) << c.line;
    EXPECT_THAT(outcome.err, HasSubstr(c.said)) << c.line;
    EXPECT_THAT(outcome.out, IsEmpty()) << c.line;
  }
}

TEST(NormctlUsage, SaysWhatIsWrong) {
  const struct {
    const char* line;
    const char* said;
  } cases[] = {
      {"xyzzyplugh", "there is no command xyzzyplugh\n"},
      {"state", "give a command: get, set"},
      {"create x", "--num_features is required"},
      {"create --num_features=3", "name is required"},
      {"create x --num_features=many", "--num_features"},
      {"create x --num_features=3 --momentum=fast", "'fast' is neither a number nor none"},
      {"create x --num_features=3 --mode=trian", "'trian' is none of train|eval"},
      {"create x --num_features=3 --state_dtype=float16", "none of float32|float64"},
      {"create x --layer=layer_norm", "--normalized_shape is required for a LayerNorm"},
      {"create x --layer=layer_norm --num_features=3", "a LayerNorm has no --num_features"},
      {"create x --layer=rms_norm --normalized_shape=8 --no-bias", "a RMSNorm has no --no_bias"},
      {"create x --layer=layer_norm --normalized_shape=3,x", "no sizes such as"},
      {"create x --layer=group_norm --num_groups=2", "--num_channels is required"},
      {"create x --layer=weight_norm", "none of batch_norm_2d|"},
      {"fold x --weight=w.npy --output=o.npy", "give --output_bias"},
      {"fold x --weight=w.npy --groups=2 --output=o.safetensors", "--groups requires --transposed"},
      {"describe x y", "one argument too many: y"},
      {"list --timeout=5", "'5' is no duration"},
      {"list --timeout=-5s", "is no duration"},
      {"step x --lr=1", "--optimizer is required"},
      {"step x --optimizer=sgd", "needs --lr"},
      {"step x --optimizer=sgd --lr=1 --amsgrad", "of adam and adamw"},
      {"step x --optimizer=adam --momentum=0.9", "of sgd"},
      {"forward x --input=x.txt", "'x.txt' does not name a tensor"},
      {"forward x --input=/no/such.npy", "cannot read /no/such.npy: No such file"},
      {"forward x --input=a.npy --output=y.png", "'y.png' does not name a tensor"},
      {"backward x --grad_output=a.npy", "give --context=ID"},
      {"backward x --grad_output=a.npy --context=1 --input=b.npy", "excludes"},
      {"state get x --output=x.npy", "must end in .safetensors"},
      {"state set x --input=x.npy", "must end in .safetensors"},
      {"completion tcsh", "none of bash|zsh|fish"},
      {"bench --concurrency=0", "--concurrency"},
  };
  for (const auto& c : cases) {
    const Outcome outcome = RunIt(c.line);
    EXPECT_EQ(outcome.exit_code, 2) << c.line << ": " << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(c.said)) << c.line;
  }
}

TEST(NormctlUsage, IsJsonWhereJsonWasAskedFor) {
  const Outcome outcome = RunIt("list --json --nonsense");
  EXPECT_EQ(outcome.exit_code, 2);
  const auto error = nlohmann::json::parse(outcome.err);
  EXPECT_EQ(error["error"]["code"], "INVALID_ARGUMENT");
}

TEST(NormctlUsage, HelpsWithEveryCommand) {
  EXPECT_EQ(RunIt("").exit_code, 2);
  EXPECT_THAT(RunIt("").err, HasSubstr("Subcommands"));
  for (const char* command : {"create",
                              "list",
                              "describe",
                              "delete",
                              "train",
                              "eval",
                              "forward",
                              "backward",
                              "zero-grad",
                              "step",
                              "state get",
                              "state set",
                              "reset-running-stats",
                              "reset-parameters",
                              "checkpoint save",
                              "checkpoint load",
                              "checkpoint list",
                              "info",
                              "health",
                              "bench",
                              "completion",
                              "version"}) {
    for (const std::string& line :
         {absl::StrCat(command, " --help"), absl::StrCat("help ", command)}) {
      const Outcome outcome = RunIt(line);
      EXPECT_EQ(outcome.exit_code, 0) << line;
      EXPECT_THAT(outcome.out, AllOf(HasSubstr(absl::StrCat("Usage: normctl ", command)),
                                     HasSubstr("Example:\n  normctl ")))
          << line;
    }
  }
}

TEST(NormctlUsage, NearestIsNothingWhereNothingIsNear) {
  EXPECT_EQ(Nearest("sate", {"state", "step"}), "state");
  EXPECT_EQ(Nearest("gte", {"get", "set"}), "get");
  EXPECT_EQ(Nearest("frobnicate", {"create", "list"}), "");
  EXPECT_EQ(Nearest("", {"a"}), "a");
}

TEST(NormctlCompletion, KnowsEveryCommandAndFlag) {
  for (const char* shell : {"bash", "zsh", "fish"}) {
    const Outcome outcome = RunIt(absl::StrCat("completion ", shell));
    EXPECT_EQ(outcome.exit_code, 0);
    EXPECT_THAT(outcome.out, AllOf(HasSubstr("checkpoint"), HasSubstr("num_features"),
                                   HasSubstr("server"), HasSubstr("save_for_backward")));
  }
}

// --- what was answered ---

TEST_F(NormctlTest, ConnectsWhereTheEnvironmentSays) {
  setenv("NORMD_SERVER", server_.address().c_str(), 1);
  EXPECT_EQ(RunIt("train bn1").exit_code, 0);
  unsetenv("NORMD_SERVER");
  EXPECT_THAT(server_.Requests<v1::TrainRequest>(), SizeIs(1));
}

TEST_F(NormctlTest, TakesDashesForUnderscores) {
  EXPECT_EQ(Call("create bn1 --num-features=3 --no-affine --momentum=none --eps 0.5").exit_code, 0);
  const auto requests = server_.Requests<v1::CreateInstanceRequest>();
  ASSERT_THAT(requests, SizeIs(1));
  const auto& layer = requests[0].config().batch_norm_2d();
  EXPECT_EQ(layer.num_features(), 3);
  EXPECT_EQ(layer.eps(), 0.5);
  EXPECT_FALSE(layer.affine());
  EXPECT_TRUE(layer.track_running_stats());
  EXPECT_TRUE(layer.cumulative_average());
}

TEST_F(NormctlTest, TakesNegativeMomentum) {
  EXPECT_EQ(Call("create bn1 --num_features=3 --momentum=-1.2").exit_code, 0);
  EXPECT_EQ(server_.Requests<v1::CreateInstanceRequest>()[0].config().batch_norm_2d().momentum(),
            -1.2);
}

TEST_F(NormctlTest, CreatesOtherLayers) {
  EXPECT_THAT(Call("create ln --layer=layer_norm --normalized_shape=3,224 --no-bias").out,
              HasSubstr("LayerNorm((3, 224), eps=1e-05, elementwise_affine=True, bias=False)"));
  EXPECT_THAT(Call("create in --layer=instance_norm_2d --num_features=3 --affine").out,
              HasSubstr("affine=True, track_running_stats=False)"));
  EXPECT_EQ(Call("create rms --layer=rms_norm --normalized_shape=768").exit_code, 0);
  const auto requests = server_.Requests<v1::CreateInstanceRequest>();
  ASSERT_THAT(requests, SizeIs(3));
  EXPECT_THAT(requests[0].config().layer_norm().normalized_shape(), ElementsAre(3, 224));
  EXPECT_TRUE(requests[1].config().instance_norm_2d().affine());
  EXPECT_FALSE(requests[2].config().rms_norm().has_eps());
}

TEST_F(NormctlTest, DescribesAsJson) {
  EXPECT_EQ(Call("describe bn1 --json").out, R"({
  "name": "bn1",
  "uid": "11111111-2222-4333-8444-555555555555",
  "layer": {
    "type": "BatchNorm2d",
    "num_features": 3,
    "eps": 1e-05,
    "momentum": 0.1,
    "affine": true,
    "track_running_stats": true
  },
  "state_dtype": "float32",
  "mode": "train",
  "version": 7,
  "num_batches_tracked": 5,
  "has_gradients": true,
  "optimizer": "sgd",
  "state_bytes": 1234,
  "create_time": "2023-11-14T22:13:20.000Z",
  "update_time": "2023-11-14T22:14:20.000Z",
  "normalizes": {
    "dimensions": [
      "N",
      "C",
      "H",
      "W"
    ],
    "reduced": [
      "N",
      "H",
      "W"
    ]
  }
}
)");
}

TEST_F(NormctlTest, DescribesForPeople) {
  EXPECT_EQ(Call("describe bn1").out,
            R"(name:             bn1
layer:            BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
state dtype:      float32
mode:             train
version:          7
batches tracked:  5
gradients:        accumulated
optimizer:        sgd
state:            1.23 kB
created:          2023-11-14 22:13:20 UTC
changed:          2023-11-14 22:14:20 UTC
uid:              11111111-2222-4333-8444-555555555555

  (N, C, H, W)
   ^     ^  ^  normalized over

    C
  N a b c
    a b c
    a b c   the same letter: the same statistics

  One mean and variance a channel, over the whole batch: the samples depend on one another.
  In eval mode the running statistics serve instead.
)");
}

TEST_F(NormctlTest, ListsEveryPage) {
  EXPECT_EQ(Call("list").out,
            R"(NAME  LAYER           MODE   VERSION  BATCHES  STATE    CHANGED
bn1   BatchNorm2d(3)  train  7        5        1.23 kB  2023-11-14 22:14:20 UTC
bn2   BatchNorm2d(3)  train  7        5        1.23 kB  2023-11-14 22:14:20 UTC
)");
  const auto json = nlohmann::json::parse(Call("list --json").out);
  EXPECT_THAT(json["instances"], SizeIs(2));
  EXPECT_EQ(json["total_count"], 2);
}

TEST_F(NormctlTest, AnswersChangesAsJson) {
  for (const char* command : {"train bn1", "eval bn1", "delete bn1", "zero-grad bn1",
                              "reset-running-stats bn1", "reset-parameters bn1"}) {
    const Outcome outcome = Call(absl::StrCat(command, " --json"));
    EXPECT_EQ(outcome.out, absl::StrCat("{\n  \"version\": ", server_.version(),
                                        ",\n  \"replayed\": false\n}\n"))
        << command;
  }
}

TEST_F(NormctlTest, SendsExpectedVersionAndRequestId) {
  const std::string id = "123e4567-e89b-42d3-a456-426614174000";
  EXPECT_EQ(Call(absl::StrCat("train bn1 --expected_version=7 --request_id=", id)).exit_code, 0);
  EXPECT_THAT(Call(absl::StrCat("train bn1 --request_id=", id)).out, HasSubstr("(replayed)"));
  const auto requests = server_.Requests<v1::TrainRequest>();
  EXPECT_EQ(requests[0].expected_version(), 7u);
  EXPECT_FALSE(requests[1].has_expected_version());
}

TEST_F(NormctlTest, ForwardReadsAndWritesNpy) {
  const Outcome outcome =
      Call(absl::StrCat("forward bn1 --json --stats --save_for_backward --input=", Input(),
                        " --output=", File("y.npy")));
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.out, absl::StrCat(R"({
  "version": 1,
  "replayed": false,
  "mode": "train",
  "num_batches_tracked": 6,
  "context_id": "context-1",
  "batch_statistics": {
    "count": 4,
    "mean": [
      0.5
    ],
    "var": [
      0.25
    ]
  },
  "output": {
    "dtype": "float32",
    "shape": [
      1,
      2,
      1,
      2
    ],
    "memory_format": "contiguous",
    "bytes": 16,
    "file": ")",
                                      File("y.npy"), "\"\n  }\n}\n"));
  const auto y = ReadTensor(File("y.npy"));
  ASSERT_TRUE(y.ok()) << y.status();
  EXPECT_THAT(y->values<float>(), ElementsAre(2, 4, 6, 8));
  EXPECT_THAT(y->shape(), ElementsAre(1, 2, 1, 2));
}

TEST_F(NormctlTest, ForwardPermutesForChannelsLastAndBack) {
  EXPECT_EQ(Call(absl::StrCat("forward bn1 --memory_format=channels_last --input=", Input(),
                              " --output=", File("y.npy")))
                .exit_code,
            0);
  const auto requests = server_.Requests<v1::ForwardRequest>();
  ASSERT_THAT(requests, SizeIs(1));
  EXPECT_EQ(requests[0].input().memory_format(), v1::MEMORY_FORMAT_CHANNELS_LAST);
  EXPECT_THAT(requests[0].input().shape(), ElementsAre(1, 2, 1, 2));
  EXPECT_THAT(Floats(requests[0].input().data()), ElementsAre(1, 3, 2, 4));
  EXPECT_THAT(ReadTensor(File("y.npy"))->values<float>(), ElementsAre(2, 4, 6, 8));
}

TEST_F(NormctlTest, ForwardTransposesFortranOrder) {
  EXPECT_EQ(Call(absl::StrCat("forward bn1 --input=", Input(/*fortran_order=*/true))).exit_code, 0);
  EXPECT_THAT(Floats(server_.Requests<v1::ForwardRequest>()[0].input().data()),
              ElementsAre(1, 3, 2, 4));
}

TEST_F(NormctlTest, ForwardConvertsToTheTypeAskedFor) {
  const Outcome outcome = Call(absl::StrCat("forward bn1 --dtype=bfloat16 --input=", Input(),
                                            " --output=", File("y.safetensors:y")));
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto requests = server_.Requests<v1::ForwardRequest>();
  EXPECT_EQ(requests[0].input().dtype(), v1::DATA_TYPE_BFLOAT16);
  EXPECT_EQ(requests[0].input().data(), std::string("\x80\x3f\0\x40\x40\x40\x80\x40", 8));
  const auto y = ReadTensor(File("y.safetensors:y"));
  ASSERT_TRUE(y.ok()) << y.status();
  EXPECT_EQ(y->dtype(), DataType::kBFloat16);
}

TEST_F(NormctlTest, BackwardSendsTheContextAndWritesGradients) {
  const Outcome outcome =
      Call(absl::StrCat("backward bn1 --context=context-1 --accumulate --grad_output=", Input(),
                        " --grad_input=", File("dx.npy"), " --grad_weight=", File("dw.npy")));
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("gradients accumulated"), HasSubstr("grad_bias: ")));
  const auto requests = server_.Requests<v1::BackwardRequest>();
  EXPECT_EQ(requests[0].context_id(), "context-1");
  EXPECT_TRUE(requests[0].accumulate());
  EXPECT_THAT(ReadTensor(File("dx.npy"))->values<float>(), ElementsAre(-1, -2, -3, -4));
  EXPECT_THAT(ReadTensor(File("dw.npy"))->values<float>(), ElementsAre(1));
}

TEST_F(NormctlTest, StateGoesOutAndComesBackTheSame) {
  const auto add = [](auto* list, const std::string& name, std::vector<int64_t> shape,
                      v1::DataType dtype, const std::string& data) {
    auto* named = list->Add();
    named->set_name(name);
    named->mutable_tensor()->set_dtype(dtype);
    named->mutable_tensor()->set_memory_format(v1::MEMORY_FORMAT_CONTIGUOUS);
    named->mutable_tensor()->mutable_shape()->Add(shape.begin(), shape.end());
    named->mutable_tensor()->set_data(data);
  };
  add(server_.state.mutable_state_dict(), "weight", {2}, v1::DATA_TYPE_FLOAT32, "12345678");
  add(server_.state.mutable_state_dict(), "num_batches_tracked", {}, v1::DATA_TYPE_INT64,
      "abcdefgh");
  const v1::State expected = server_.state;
  add(server_.state.mutable_gradients(), "weight", {2}, v1::DATA_TYPE_FLOAT32, "gradient");
  add(server_.state.mutable_optimizer_state(), "weight.step", {}, v1::DATA_TYPE_FLOAT32, "step");

  const std::string file = File("state.safetensors");
  Outcome outcome = Call(absl::StrCat("state get bn1 --gradients --optimizer --output=", file));
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto tensors = ReadTensors(file);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  std::vector<std::string> names;
  for (const auto& named : *tensors) names.push_back(named.name);
  EXPECT_THAT(names, ::testing::UnorderedElementsAre("weight", "num_batches_tracked", "grad.weight",
                                                     "optimizer.weight.step"));

  outcome = Call(absl::StrCat("state set bn1 --input=", file));
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto requests = server_.Requests<v1::SetStateRequest>();
  ASSERT_THAT(requests, SizeIs(1));
  std::map<std::string, std::string> sent, meant;
  for (const auto& named : requests[0].state().state_dict()) {
    sent[named.name()] = named.tensor().SerializeAsString();
  }
  for (const auto& named : expected.state_dict()) {
    meant[named.name()] = named.tensor().SerializeAsString();
  }
  EXPECT_EQ(sent, meant);
}

TEST_F(NormctlTest, SumsUpStateWithoutAFile) {
  auto* named = server_.state.add_state_dict();
  named->set_name("bias");
  named->mutable_tensor()->set_dtype(v1::DATA_TYPE_FLOAT32);
  named->mutable_tensor()->add_shape(2);
  named->mutable_tensor()->set_data(std::string("\0\0\x80\x3f\0\0\x40\x40", 8));
  EXPECT_EQ(Call("state get bn1").out,
            "bn1, version 7\n"
            "KEY   DTYPE    SHAPE  VALUES\n"
            "bias  float32  (2,)   1 .. 3, mean 2\n");
}

TEST_F(NormctlTest, StepsWithTheRuleGiven) {
  EXPECT_EQ(Call("step bn1 --optimizer=adamw --beta1=0.5 --zero_grad").exit_code, 0);
  const auto requests = server_.Requests<v1::StepRequest>();
  ASSERT_THAT(requests, SizeIs(1));
  EXPECT_EQ(requests[0].optimizer().adamw().beta1(), 0.5);
  EXPECT_EQ(requests[0].optimizer().adamw().weight_decay(), 0.01);
  EXPECT_TRUE(requests[0].zero_grad());
}

TEST_F(NormctlTest, TellsOfCheckpoints) {
  EXPECT_THAT(Call("checkpoint save").out,
              HasSubstr("saved 00000003-manual (2 instances, 4.1 kB)"));
  EXPECT_EQ(Call("checkpoint load --names=bn1,bn2").out,
            "passed over 00000003-manual: bn1.safetensors: wrong checksum\n"
            "loaded 1 instances of 00000002-manual\n"
            "INSTANCE  VERSION\n"
            "bn1       8\n");
  EXPECT_THAT(server_.Requests<v1::LoadCheckpointRequest>()[0].names(), ElementsAre("bn1", "bn2"));
  const auto json = nlohmann::json::parse(Call("checkpoint list --json").out);
  EXPECT_EQ(json["checkpoints"][0]["problem"], "bn1.safetensors: wrong checksum");
  EXPECT_EQ(json["checkpoints"][1]["sound"], true);
}

TEST_F(NormctlTest, TellsOfTheServer) {
  EXPECT_THAT(Call("info").out, AllOf(HasSubstr("version:          0.1.0"),
                                      HasSubstr("a processor, parallelism 2, 8.59 GB")));
  const auto json = nlohmann::json::parse(Call("info --json").out);
  EXPECT_EQ(json["limits"]["context_ttl_ms"], 600000);
  EXPECT_EQ(Call("health").out, "SERVING\n");
  EXPECT_EQ(Call("health").exit_code, 0);
  EXPECT_EQ(Call("health --service=no.such.Service").exit_code, 1);
}

TEST_F(NormctlTest, BenchMeasuresAndCleansUp) {
  const Outcome outcome =
      Call("bench --json --shape=1,3,2,2 --concurrency=2 --duration=100ms --op=backward");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const auto json = nlohmann::json::parse(outcome.out);
  EXPECT_EQ(json["op"], "backward");
  EXPECT_EQ(json["payload_bytes"], 48);
  EXPECT_GT(json["requests"], 2);
  EXPECT_LE(json["latency_ms"]["p50"], json["latency_ms"]["p90"]);
  EXPECT_LE(json["latency_ms"]["p99"], json["latency_ms"]["max"]);
  const auto created = server_.Requests<v1::CreateInstanceRequest>();
  const auto deleted = server_.Requests<v1::DeleteInstanceRequest>();
  ASSERT_THAT(created, SizeIs(1));
  ASSERT_THAT(deleted, SizeIs(1));
  EXPECT_EQ(created[0].name(), deleted[0].name());
  EXPECT_EQ(created[0].config().batch_norm_2d().num_features(), 3);
}

// --- what was refused ---

TEST_F(NormctlTest, ExitsWith1WhenTheServerSaysNo) {
  const Outcome outcome = Call("describe nobody");
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.out, "");
  EXPECT_EQ(outcome.err,
            "normctl: NOT_FOUND: no instance named nobody\n"
            "See which there are with: normctl list\n");
}

TEST_F(NormctlTest, PrintsTheDetailOfARefusal) {
  FakeServer::Failure failure = {.code = grpc::StatusCode::RESOURCE_EXHAUSTED,
                                 .message = "too many channels"};
  failure.detail.set_field("config.batch_norm_2d.num_features");
  failure.detail.set_value("99");
  failure.detail.set_limit(64);
  failure.detail.set_flag("--max_features");
  server_.FailNext(failure);
  EXPECT_EQ(Call("create x --num_features=99").err,
            "normctl: RESOURCE_EXHAUSTED: too many channels\n"
            "field: config.batch_norm_2d.num_features\n"
            "value: 99\n"
            "The server's flag --max_features sets this limit, now 64.\n");
  server_.FailNext(failure);
  EXPECT_EQ(Call("create x --num_features=99 --json").err, R"({
  "error": {
    "code": "RESOURCE_EXHAUSTED",
    "message": "too many channels",
    "field": "config.batch_norm_2d.num_features",
    "value": "99",
    "limit": 64,
    "flag": "--max_features"
  }
}
)");
}

TEST(Normctl, SaysHowToStartAServerWhenThereIsNone) {
  const Outcome outcome = RunIt("list --server=127.0.0.1:1");
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("normd --listen=127.0.0.1:1"),
                                 HasSubstr("--server=HOST:PORT or NORMD_SERVER")));
}

TEST_F(NormctlTest, ExitsWith2ForFilesThatAreNotWhatTheySay) {
  const auto write = [&](const std::string& name, const std::string& bytes) {
    std::ofstream(File(name), std::ios::binary) << bytes;
    return File(name);
  };
  const std::string int32 = NpyHeader({.descr = "<i4", .shape = {1}}) + "abcd";
  const std::string int64 = NpyHeader({.descr = "<i8", .shape = {1}}) + "abcdefgh";
  for (const auto& [file, said] : std::vector<std::pair<std::string, std::string>>{
           {write("a.npy", "not numpy"), "not a usable .npy file"},
           {write("b.npy", int32), "its dtype is '<i4'"},
           {write("c.npy", int64), "values are int64"},
           {write("d.safetensors", "short"), "d.safetensors"},
       }) {
    const Outcome outcome = Call(absl::StrCat("forward bn1 --input=", file));
    EXPECT_EQ(outcome.exit_code, 2) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(said));
  }
  EXPECT_EQ(server_.num_calls(), 0u);
}

TEST_F(NormctlTest, NamesTheTensorsToPickFrom) {
  const std::string file = File("two.safetensors");
  const Tensor one = Tensor::Own(DataType::kFloat32, {1}, "abcd");
  ASSERT_TRUE(WriteTensors(file, {{"a", one}, {"b", one}}, {}).ok());
  const Outcome outcome = Call(absl::StrCat("forward bn1 --input=", file));
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("of a, b"));
  EXPECT_EQ(Call(absl::StrCat("forward bn1 --input=", file, ":b")).exit_code, 0);
  EXPECT_THAT(Call(absl::StrCat("forward bn1 --input=", file, ":c")).err, HasSubstr("has no 'c'"));
}

TEST_F(NormctlTest, LeavesNoHalfWrittenFile) {
  const std::string directory = File("directory.npy");  // which a file cannot replace
  std::filesystem::create_directory(directory);
  for (const std::string& output : {directory, File("no/such/y.npy")}) {
    const Outcome outcome =
        Call(absl::StrCat("forward bn1 --input=", Input(), " --output=", output));
    EXPECT_EQ(outcome.exit_code, 2);
    EXPECT_THAT(outcome.err, HasSubstr("cannot write"));
    EXPECT_FALSE(std::filesystem::exists(output + ".part"));
  }
}

}  // namespace
}  // namespace normd::normctl
