#include <set>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "client/internal/request_id.h"
#include "client/internal/retry.h"
#include "client/normd_client.h"
#include "tests/unit/client/fake_server.h"

namespace normd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::SizeIs;

constexpr char kUuid[] = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}";

ClientOptions Fast() {
  return {
      .timeout = absl::Seconds(20),
      .retry = {.initial_backoff = absl::Milliseconds(1), .max_backoff = absl::Milliseconds(4)}};
}

Client Connected(const FakeServer& server, const ClientOptions& options = Fast()) {
  auto client = Client::Connect(server.address(), options);
  EXPECT_TRUE(client.ok()) << client.status();
  return *client;
}

Tensor Ramp(int64_t count) {
  std::string bytes(count * sizeof(float), '\0');
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(i);
    memcpy(&bytes[i * sizeof(float)], &value, sizeof(float));
  }
  return Tensor::Own(DataType::kFloat32, {1, 1, 1, count}, std::move(bytes));
}

// Whether `result` is `times` Ramp(its size).
void ExpectRamp(const Tensor& result, int64_t count, float times) {
  ASSERT_EQ(result.shape(), Ramp(count).shape());
  const auto values = result.values<float>();
  ASSERT_THAT(values, SizeIs(count));
  for (int64_t i = 0; i < count; ++i) ASSERT_EQ(values[i], static_cast<float>(i) * times) << i;
}

TEST(RequestId, IsAUuidAndNeverTheSame) {
  std::set<std::string> ids;
  for (int i = 0; i < 1000; ++i) {
    const std::string id = client::internal::NewRequestId();
    EXPECT_TRUE(::testing::Value(id, ::testing::ContainsRegex(kUuid))) << id;
    EXPECT_THAT(id, SizeIs(36));
    ids.insert(id);
  }
  EXPECT_THAT(ids, SizeIs(1000));
}

TEST(RetryDelay, DoublesUpToTheLongestWithJitterOfAHalf) {
  const RetryPolicy policy = {.initial_backoff = absl::Milliseconds(100),
                              .max_backoff = absl::Milliseconds(350)};
  const absl::Status status = absl::UnavailableError("");
  using client::internal::RetryDelay;
  EXPECT_EQ(RetryDelay(policy, status, 0, 0), absl::Milliseconds(100));
  EXPECT_EQ(RetryDelay(policy, status, 0, 1), absl::Milliseconds(50));
  EXPECT_EQ(RetryDelay(policy, status, 1, 0), absl::Milliseconds(200));
  EXPECT_EQ(RetryDelay(policy, status, 2, 0), absl::Milliseconds(350));
  EXPECT_EQ(RetryDelay(policy, status, 5000, 0), absl::Milliseconds(350));
}

TEST(RetryDelay, IsOnlyForWhatMayPass) {
  const RetryPolicy policy;
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "");
    EXPECT_EQ(client::internal::RetryDelay(policy, status, 0, 0).has_value(),
              absl::IsUnavailable(status) || absl::IsCancelled(status))
        << status;
  }
}

TEST(RetryDelay, StopsAfterTheAttemptsAllowed) {
  const RetryPolicy policy = {.max_attempts = 3};
  const absl::Status status = absl::UnavailableError("");
  EXPECT_TRUE(client::internal::RetryDelay(policy, status, 1, 0).has_value());
  EXPECT_FALSE(client::internal::RetryDelay(policy, status, 2, 0).has_value());
}

TEST(Client, RefusesArgumentsThatCannotWork) {
  EXPECT_FALSE(Client::Connect("").ok());
  EXPECT_FALSE(Client::Connect("x:1", {.max_message_bytes = -1}).ok());
  EXPECT_FALSE(Client::Connect("x:1", {.stream_chunk_bytes = 0}).ok());
  EXPECT_FALSE(Client::Connect("x:1", {.retry = {.initial_backoff = absl::ZeroDuration()}}).ok());
}

TEST(Client, SendsWhatCreateWasGiven) {
  FakeServer server;
  const BatchNorm2d layer = {.num_features = 64,
                             .eps = 1e-3,
                             .momentum = std::nullopt,
                             .affine = false,
                             .track_running_stats = false};
  const auto created = Connected(server).CreateInstance(
      "net/bn", {.layer = layer, .state_dtype = DataType::kFloat64}, Mode::kEval);
  ASSERT_TRUE(created.ok()) << created.status();

  const auto requests = server.Requests<v1::CreateInstanceRequest>();
  ASSERT_THAT(requests, SizeIs(1));
  EXPECT_EQ(requests[0].name(), "net/bn");
  EXPECT_EQ(requests[0].mode(), v1::MODE_EVAL);
  const v1::BatchNorm2d& sent = requests[0].config().batch_norm_2d();
  EXPECT_EQ(sent.num_features(), 64);
  EXPECT_EQ(sent.eps(), 1e-3);
  EXPECT_TRUE(sent.cumulative_average());
  EXPECT_FALSE(sent.has_momentum());
  EXPECT_FALSE(sent.affine());
  EXPECT_FALSE(sent.track_running_stats());

  const Instance& instance = created->instance;
  EXPECT_EQ(instance.mode, Mode::kEval);
  EXPECT_EQ(instance.config.state_dtype, DataType::kFloat64);
  EXPECT_EQ(std::get<BatchNorm2d>(instance.config.layer).momentum, std::nullopt);
  EXPECT_EQ(instance.create_time, absl::FromUnixSeconds(1700000000));
}

TEST(Client, ForwardSendsTheTensorAndGetsAnother) {
  FakeServer server;
  const std::vector<float> x = {1, 2, 3, 4};
  const auto answer = Connected(server).Forward(
      "bn1", Tensor::Borrow(absl::Span<const float>(x), {1, 2, 2, 1}, MemoryFormat::kChannelsLast),
      {.mode = Mode::kEval, .save_for_backward = true, .return_batch_statistics = true},
      {.expected_version = 41});
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_THAT(answer->output.values<float>(), ElementsAre(2, 4, 6, 8));
  EXPECT_EQ(answer->output.memory_format(), MemoryFormat::kChannelsLast);
  EXPECT_THAT(answer->output.shape(), ElementsAre(1, 2, 2, 1));
  EXPECT_EQ(answer->mode, Mode::kEval);
  EXPECT_EQ(answer->context_id, "context-1");
  ASSERT_TRUE(answer->batch_statistics.has_value());
  EXPECT_THAT(answer->batch_statistics->mean, ElementsAre(0.5));

  const auto requests = server.Requests<v1::ForwardRequest>();
  ASSERT_THAT(requests, SizeIs(1));
  EXPECT_EQ(requests[0].expected_version(), 41u);
  EXPECT_EQ(requests[0].input().dtype(), v1::DATA_TYPE_FLOAT32);
  EXPECT_EQ(requests[0].input().data(), std::string(reinterpret_cast<const char*>(x.data()), 16));
}

TEST(Client, BackwardSendsBothTensors) {
  FakeServer server;
  BackwardOptions options;
  options.input = Ramp(3);
  options.batch_statistics = BatchStatistics{.count = 3, .mean = {1}, .var = {2}};
  options.accumulate = true;
  const auto answer = Connected(server).Backward("bn1", Ramp(3), options);
  ASSERT_TRUE(answer.ok()) << answer.status();
  ExpectRamp(*answer->grad_input, 3, -1);
  EXPECT_THAT(answer->grad_weight->values<float>(), ElementsAre(1));

  const auto requests = server.Requests<v1::BackwardRequest>();
  ASSERT_THAT(requests, SizeIs(1));
  EXPECT_EQ(requests[0].input().data(), std::string(Ramp(3).bytes()));
  EXPECT_TRUE(requests[0].accumulate());
  EXPECT_THAT(requests[0].batch_statistics().var(), ElementsAre(2));
}

TEST(Client, SendsAndReceivesEmptyTensors) {
  FakeServer server;
  const auto answer =
      Connected(server).Forward("bn1", Tensor::Borrow(DataType::kFloat32, {0, 5, 2, 2}, {}));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_THAT(answer->output.shape(), ElementsAre(0, 5, 2, 2));
  EXPECT_THAT(answer->output.bytes(), SizeIs(0));
}

TEST(Client, EveryChangeHasItsOwnId) {
  FakeServer server;
  const Client client = Connected(server);
  ASSERT_TRUE(client.Train("bn1").ok());
  ASSERT_TRUE(client.Train("bn1").ok());
  ASSERT_TRUE(client.Train("bn1", {.request_id = "mine"}).ok());
  const auto requests = server.Requests<v1::TrainRequest>();
  ASSERT_THAT(requests, SizeIs(3));
  EXPECT_NE(requests[0].request_id(), requests[1].request_id());
  EXPECT_THAT(requests[0].request_id(), SizeIs(36));
  EXPECT_EQ(requests[2].request_id(), "mine");
}

TEST(ClientRetry, RepeatsALostAnswerWithTheSameIdAndCountsItOnce) {
  FakeServer server;
  server.FailNext({.code = grpc::StatusCode::UNAVAILABLE});
  server.FailNext({.code = grpc::StatusCode::UNAVAILABLE, .after_applying = true});
  server.FailNext({.code = grpc::StatusCode::UNAVAILABLE, .after_applying = true});
  const auto answer = Connected(server).Forward("bn1", Ramp(4));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(answer->replayed);
  ExpectRamp(answer->output, 4, 2);

  const auto requests = server.Requests<v1::ForwardRequest>();
  ASSERT_THAT(requests, SizeIs(4));
  for (const auto& request : requests) {
    EXPECT_EQ(request.request_id(), requests[0].request_id());
    EXPECT_EQ(request.input().data(), std::string(Ramp(4).bytes()));
  }
  EXPECT_EQ(server.version(), 1u);
}

TEST(ClientRetry, RepeatsStreamsFromTheirBeginning) {
  FakeServer server;
  server.FailNext({.code = grpc::StatusCode::UNAVAILABLE, .after_applying = true});
  ClientOptions options = Fast();
  options.max_message_bytes = 1 << 20;  // known, so that the failure meets the stream itself
  options.stream_chunk_bytes = 1000;
  const auto answer = Connected(server, options).ForwardStream("bn1", Ramp(5000));
  ASSERT_TRUE(answer.ok()) << answer.status();
  ExpectRamp(answer->output, 5000, 2);
  const auto requests = server.Requests<v1::ForwardRequest>();
  ASSERT_THAT(requests, SizeIs(2));
  EXPECT_EQ(requests[0].request_id(), requests[1].request_id());
  EXPECT_EQ(server.version(), 1u);
}

TEST(ClientRetry, WaitsAsLongAsTheServerAsks) {
  FakeServer server;
  FakeServer::Failure busy = {.code = grpc::StatusCode::RESOURCE_EXHAUSTED};
  busy.detail.set_retry_delay_ms(120);
  server.FailNext(busy);
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(Connected(server).Eval("bn1").ok());
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(120));
}

TEST(ClientRetry, LeavesRefusalsAlone) {
  for (const auto code : {grpc::StatusCode::INVALID_ARGUMENT, grpc::StatusCode::NOT_FOUND,
                          grpc::StatusCode::ABORTED, grpc::StatusCode::RESOURCE_EXHAUSTED,
                          grpc::StatusCode::INTERNAL, grpc::StatusCode::DATA_LOSS}) {
    FakeServer server;
    server.FailNext({.code = code});
    const auto answer = Connected(server).Eval("bn1");
    EXPECT_EQ(static_cast<int>(answer.status().code()), static_cast<int>(code));
    EXPECT_EQ(server.num_calls(), 1u);
  }
}

TEST(ClientRetry, EndsWithTheTimeoutAndTheLastError) {
  FakeServer server;
  for (int i = 0; i < 1000; ++i) server.FailNext({.message = "still away"});
  const absl::Time begin = absl::Now();
  const auto answer = Connected(server).Eval("bn1", {.timeout = absl::Milliseconds(200)});
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  EXPECT_TRUE(absl::IsUnavailable(answer.status()) || absl::IsDeadlineExceeded(answer.status()))
      << answer.status();
  EXPECT_GT(server.num_calls(), 2u);
}

TEST(Client, SaysThatNoServerIsThere) {
  auto client = Client::Connect("127.0.0.1:1", {.retry = {.max_attempts = 2}});
  ASSERT_TRUE(client.ok());
  EXPECT_TRUE(absl::IsUnavailable(client->GetServerInfo().status()));
}

TEST(Client, FindsAServerThatComesBack) {
  auto server = std::make_unique<FakeServer>();
  const Client client = Connected(*server);
  ASSERT_TRUE(client.Train("bn1").ok());
  const std::string address = server->address();
  server.reset();

  // The same address, a while later.
  class Plain final : public v1::NormService::Service {
    grpc::Status Train(grpc::ServerContext*, const v1::TrainRequest*,
                       v1::TrainResponse* answer) override {
      answer->set_version(99);
      return grpc::Status::OK;
    }
  } service;
  std::unique_ptr<grpc::Server> second;
  std::thread starter([&] {
    absl::SleepFor(absl::Milliseconds(300));
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials());
    builder.RegisterService(&service);
    second = builder.BuildAndStart();
  });
  const auto answer = client.Train("bn1");
  starter.join();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->version, 99u);
}

TEST(ClientErrors, CarryTheServersDetail) {
  FakeServer server;
  FakeServer::Failure failure = {.code = grpc::StatusCode::INVALID_ARGUMENT,
                                 .message = "eps must be finite"};
  failure.detail.set_field("config.batch_norm_2d.eps");
  failure.detail.set_value("-1");
  failure.detail.set_allowed("0 or more");
  failure.detail.set_limit(12);
  failure.detail.set_flag("--max_features");
  failure.detail.set_current_version(9);
  server.FailNext(failure);
  const absl::Status status = Connected(server).Eval("bn1").status();
  EXPECT_EQ(status.message(), "eps must be finite");
  const ErrorDetail detail = DetailOf(status);
  EXPECT_EQ(detail.field, "config.batch_norm_2d.eps");
  EXPECT_EQ(detail.value, "-1");
  EXPECT_EQ(detail.allowed, "0 or more");
  EXPECT_EQ(detail.limit, 12);
  EXPECT_EQ(detail.flag, "--max_features");
  EXPECT_EQ(detail.retry_delay, absl::ZeroDuration());
  EXPECT_EQ(detail.current_version, 9u);
}

TEST(ClientErrors, HaveAnEmptyDetailWhereNoneCame) {
  EXPECT_EQ(DetailOf(absl::InternalError("x")).field, "");
  EXPECT_EQ(DetailOf(absl::OkStatus()).limit, 0);
}

TEST(ClientStream, ServesTensorsPastTheServersLimit) {
  FakeServer server;
  server.max_message_bytes = 1 << 20;
  const Client client = Connected(server);
  constexpr int64_t kCount = 700'001;  // 2.8 MB
  const auto answer = client.Forward("bn1", Ramp(kCount));
  ASSERT_TRUE(answer.ok()) << answer.status();
  ExpectRamp(answer->output, kCount, 2);
  for (const size_t size : server.chunk_sizes()) EXPECT_LE(size, size_t{1} << 19);

  BackwardOptions options;
  options.input = Ramp(kCount);
  const auto gradients = client.Backward("bn1", Ramp(kCount), options);
  ASSERT_TRUE(gradients.ok()) << gradients.status();
  ExpectRamp(*gradients->grad_input, kCount, -1);
  const auto requests = server.Requests<v1::BackwardRequest>();
  ASSERT_THAT(requests, SizeIs(1));
  EXPECT_TRUE(requests[0].input().data() == Ramp(kCount).bytes());
  // The limit was asked for once.
  EXPECT_THAT(server.Requests<v1::GetServerInfoRequest>(), SizeIs(1));
}

TEST(ClientStream, IsTakenWhenTheServerRefusesTheMessageAsTooLong) {
  FakeServer server;
  server.enforced_message_bytes = 1000;
  const auto answer = Connected(server).Forward("bn1", Ramp(500));
  ASSERT_TRUE(answer.ok()) << answer.status();
  ExpectRamp(answer->output, 500, 2);
  // One try in a message, one streamed, as the same request.
  const auto requests = server.Requests<v1::ForwardRequest>();
  ASSERT_THAT(requests, SizeIs(2));
  EXPECT_EQ(requests[0].request_id(), requests[1].request_id());
}

TEST(ClientStream, CarriesEmptyTensorsAndSkippedGradients) {
  FakeServer server;
  const Client client = Connected(server);
  const auto answer =
      client.ForwardStream("bn1", Tensor::Borrow(DataType::kFloat32, {0, 5, 2, 2}, {}));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_THAT(answer->output.shape(), ElementsAre(0, 5, 2, 2));

  const auto gradients =
      client.BackwardStream("bn1", Ramp(10), {.context_id = "context-1", .skip_grad_input = true});
  ASSERT_TRUE(gradients.ok()) << gradients.status();
  EXPECT_FALSE(gradients->grad_input.has_value());
  EXPECT_TRUE(gradients->grad_weight.has_value());
}

TEST(ClientStream, TellsItsProgress) {
  FakeServer server;
  std::vector<int64_t> told;
  CallOptions call;
  call.progress = [&](int64_t received, int64_t total) {
    EXPECT_EQ(total, 400'000);
    told.push_back(received);
  };
  ASSERT_TRUE(Connected(server).ForwardStream("bn1", Ramp(100'000), {}, call).ok());
  ASSERT_FALSE(told.empty());
  EXPECT_TRUE(std::is_sorted(told.begin(), told.end()));
  EXPECT_EQ(told.back(), 400'000);
}

TEST(ClientStream, ReportsARefusalInTheMiddle) {
  FakeServer server;
  server.FailNext({.code = grpc::StatusCode::FAILED_PRECONDITION, .message = "one value"});
  ClientOptions options = Fast();
  options.max_message_bytes = 1 << 20;
  const auto answer = Connected(server, options).ForwardStream("bn1", Ramp(1000));
  EXPECT_TRUE(absl::IsFailedPrecondition(answer.status())) << answer.status();
}

// What Ramp(count) is read from.
TensorSource RampSource(int64_t count) {
  return {.dtype = DataType::kFloat32,
          .shape = {1, 1, 1, count},
          .read = [ramp = Ramp(count)](int64_t offset, absl::Span<char> to) {
            ramp.bytes().copy(to.data(), to.size(), static_cast<size_t>(offset));
            return absl::OkStatus();
          }};
}

TEST(ClientStream, GoesFromASourceToASinkAndBeginsBothAgainOnARetry) {
  FakeServer server;
  server.FailNext({.code = grpc::StatusCode::UNAVAILABLE, .after_applying = true});
  ClientOptions options = Fast();
  options.max_message_bytes = 1 << 20;
  options.stream_chunk_bytes = 1000;
  std::string bytes(20'000, '\0');
  int64_t expected = 0;
  const auto answer =
      Connected(server, options)
          .ForwardStream("bn1", RampSource(5000), [&](int64_t offset, std::string_view part) {
            EXPECT_TRUE(offset == expected || offset == 0);
            expected = offset + static_cast<int64_t>(part.size());
            bytes.replace(static_cast<size_t>(offset), part.size(), part);
            return absl::OkStatus();
          });
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_TRUE(answer->output.bytes().empty());
  EXPECT_EQ(expected, 20'000);
  ExpectRamp(Tensor::Own(DataType::kFloat32, answer->output.shape(), std::move(bytes)), 5000, 2);
  EXPECT_EQ(server.version(), 1u);
}

TEST(ClientStream, EndsWithTheErrorOfItsSourceOrSink) {
  FakeServer server;
  ClientOptions options = Fast();
  options.stream_chunk_bytes = 1000;
  const Client client = Connected(server, options);
  const auto drop = [](int64_t, std::string_view) { return absl::OkStatus(); };
  TensorSource torn = RampSource(5000);
  torn.read = [whole = torn.read](int64_t offset, absl::Span<char> to) -> absl::Status {
    return offset < 3000 ? whole(offset, to) : absl::UnavailableError("the file ends here");
  };
  EXPECT_EQ(client.ForwardStream("bn1", torn, drop).status(),
            absl::UnavailableError("the file ends here"));
  const auto full = [](int64_t, std::string_view) { return absl::UnavailableError("full"); };
  EXPECT_EQ(client.ForwardStream("bn1", RampSource(5000), full).status(),
            absl::UnavailableError("full"));
}

TEST(Client, ReadsStateAndSetsIt) {
  FakeServer server;
  auto* named = server.state.add_state_dict();
  named->set_name("num_batches_tracked");
  named->mutable_tensor()->set_dtype(v1::DATA_TYPE_INT64);
  named->mutable_tensor()->set_data(std::string("\5\0\0\0\0\0\0\0", 8));
  const Client client = Connected(server);
  const auto state = client.GetState("bn1");
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_THAT(state->state_dict, SizeIs(1));
  EXPECT_THAT(state->state_dict[0].tensor.values<int64_t>(), ElementsAre(5));
  EXPECT_THAT(state->state_dict[0].tensor.shape(), SizeIs(0));

  ASSERT_TRUE(client.SetState("bn1", state->state_dict).ok());
  const auto requests = server.Requests<v1::SetStateRequest>();
  ASSERT_THAT(requests, SizeIs(1));
  EXPECT_EQ(requests[0].state().SerializeAsString(), [&] {
    v1::State expected = server.state;
    expected.mutable_state_dict(0)->mutable_tensor()->set_memory_format(
        v1::MEMORY_FORMAT_CONTIGUOUS);
    return expected.SerializeAsString();
  }());
}

TEST(Client, SendsEachOptimizerAsItIs) {
  FakeServer server;
  const Client client = Connected(server);
  ASSERT_TRUE(client.Step("bn1", Sgd{.lr = 0.5, .momentum = 0.9, .nesterov = true}).ok());
  ASSERT_TRUE(client.Step("bn1", Adam{}, {.reset_optimizer = true}).ok());
  ASSERT_TRUE(client.Step("bn1", AdamW{.amsgrad = true}, {.zero_grad = true}).ok());
  const auto requests = server.Requests<v1::StepRequest>();
  ASSERT_THAT(requests, SizeIs(3));
  EXPECT_EQ(requests[0].optimizer().sgd().momentum(), 0.9);
  EXPECT_TRUE(requests[0].optimizer().sgd().nesterov());
  EXPECT_EQ(requests[1].optimizer().adam().beta2(), 0.999);
  EXPECT_TRUE(requests[1].reset_optimizer());
  EXPECT_EQ(requests[2].optimizer().adamw().weight_decay(), 1e-2);
  EXPECT_TRUE(requests[2].optimizer().adamw().amsgrad());
  EXPECT_TRUE(requests[2].zero_grad());
}

TEST(Client, ReadsCheckpointsInfoAndHealth) {
  FakeServer server;
  const Client client = Connected(server);
  const auto loaded = client.LoadCheckpoint("", std::vector<std::string>{"bn1"});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->instances[0].version, 8u);
  EXPECT_THAT(loaded->damaged[0].problem, HasSubstr("checksum"));
  const auto info = client.GetServerInfo();
  ASSERT_TRUE(info.ok());
  EXPECT_EQ(info->limits.context_ttl, absl::Minutes(10));
  EXPECT_EQ(info->devices[0].parallelism, 2);
  const auto health = client.CheckHealth();
  ASSERT_TRUE(health.ok()) << health.status();
  EXPECT_EQ(*health, Health::kServing);
  EXPECT_TRUE(absl::IsNotFound(client.CheckHealth("no.such.Service").status()));
}

TEST(Client, IsSharedByThreads) {
  FakeServer server;
  const Client client = Connected(server);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([client, t] {
      for (int i = 0; i < 20; ++i) {
        const auto answer = client.Forward("bn1", Ramp(100 + t));
        ASSERT_TRUE(answer.ok()) << answer.status();
        ExpectRamp(answer->output, 100 + t, 2);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(server.version(), 160u);
}

}  // namespace
}  // namespace normd
