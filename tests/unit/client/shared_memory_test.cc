// The client's side of shared memory, against a server in this process.
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "client/normd_client.h"
#include "normd/v1/norm_service.grpc.pb.h"
#include "tests/unit/client/real_server.h"
#include "tests/unit/server/temporary_directory.h"

namespace normd::client {
namespace {

constexpr int64_t kChannels = 16;
const std::vector<int64_t> kShape = {8, kChannels, 32, 32};
constexpr size_t kValues = 8 * kChannels * 32 * 32;

std::vector<float> Input(float scale = 1) {
  std::vector<float> values(kValues);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = scale * static_cast<float>(i * 7919 % 1000) / 100;
  }
  return values;
}

Tensor Borrowed(const std::vector<float>& values) { return Tensor::Borrow<float>(values, kShape); }

class SharedMemoryClient : public ::testing::Test {
 protected:
  void Serve(RealServer::Options options = {.shared_memory = true}) {
    server_.reset();
    options.state_dir = directory_.File("state");
    server_ = std::make_unique<RealServer>(options);
    address_ = server_->address();
    stub_ =
        v1::NormService::NewStub(grpc::CreateChannel(address_, grpc::InsecureChannelCredentials()));
  }

  Client Connect(SharedMemory use = SharedMemory::kOn) const {
    auto client = Client::Connect(address_, {.shared_memory = use});
    EXPECT_TRUE(client.ok()) << client.status();
    return *client;
  }

  // An instance in eval mode, so that calls on it are alike.
  static void Create(const Client& client, Mode mode = Mode::kEval) {
    const auto made =
        client.CreateInstance("x", {.layer = BatchNorm2d{.num_features = kChannels}}, mode);
    ASSERT_TRUE(made.ok()) << made.status();
  }

  v1::GetSharedMemoryStatusResponse Status() const {
    grpc::ClientContext context;
    v1::GetSharedMemoryStatusResponse status;
    EXPECT_TRUE(stub_->GetSharedMemoryStatus(&context, {}, &status).ok());
    return status;
  }

  void AwaitNoRegions() const {
    for (int i = 0; i < 1000 && Status().bytes_in_use() > 0; ++i) {
      absl::SleepFor(absl::Milliseconds(10));
    }
    EXPECT_EQ(Status().bytes_in_use(), 0);
    EXPECT_EQ(Status().connections(), 0);
  }

  const TemporaryDirectory directory_;
  std::unique_ptr<RealServer> server_;
  std::string address_;
  std::unique_ptr<v1::NormService::Stub> stub_;
};

TEST_F(SharedMemoryClient, AnswersWhatMessagesDo) {
  Serve();
  const Client plain = Connect(SharedMemory::kOff);
  Create(plain);
  const std::vector<float> x = Input(), residual = Input(-3);
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    ForwardOptions options = {.mode = mode,
                              .save_for_backward = true,
                              .activation = Activation::kRelu,
                              .residual = Borrowed(residual)};
    const auto due = plain.Forward("x", Borrowed(x), options);
    ASSERT_TRUE(due.ok()) << due.status();
    for (const SharedMemory use : {SharedMemory::kAuto, SharedMemory::kOn}) {
      const Client client = Connect(use);
      AwaitNoRegions();  // of the client before
      const auto got = client.Forward("x", Borrowed(x), options);
      ASSERT_TRUE(got.ok()) << got.status();
      EXPECT_EQ(Status().regions(), 3);  // input, residual, output
      EXPECT_EQ(got->output.bytes(), due->output.bytes());
      EXPECT_EQ(got->output.shape(), kShape);
      const auto due_back =
          plain.Backward("x", Borrowed(x), {.context_id = due->context_id, .retain_context = true});
      const auto back = client.Backward("x", Borrowed(x), {.context_id = got->context_id});
      ASSERT_TRUE(due_back.ok()) << due_back.status();
      ASSERT_TRUE(back.ok()) << back.status();
      EXPECT_EQ(back->grad_input->bytes(), due_back->grad_input->bytes());
      EXPECT_EQ(back->grad_residual->bytes(), due_back->grad_residual->bytes());
      EXPECT_EQ(back->grad_weight->bytes(), due_back->grad_weight->bytes());
      EXPECT_FALSE(
          client.Backward("x", Borrowed(x), {.input = Borrowed(x), .skip_grad_input = true})
              ->grad_input.has_value());
    }
  }
}

TEST_F(SharedMemoryClient, WhatIsBuiltInItIsNeitherCopiedNorAskedForAgain) {
  Serve();
  const Client client = Connect();
  Create(client);
  const auto buffer = client.Allocate(kValues * sizeof(float));
  ASSERT_TRUE(buffer.ok()) << buffer.status();
  EXPECT_TRUE(buffer->shared());
  const std::vector<float> x = Input();
  std::copy(x.begin(), x.end(), buffer->values<float>().begin());
  const Tensor tensor = buffer->AsTensor(DataType::kFloat32, kShape);
  const auto plain = Connect(SharedMemory::kOff).Forward("x", Borrowed(x));
  ASSERT_TRUE(plain.ok()) << plain.status();
  const char* output = nullptr;
  for (int i = 0; i < 5; ++i) {
    const auto answer = client.Forward("x", tensor);
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_EQ(answer->output.bytes(), plain->output.bytes());
    if (i > 0) {
      EXPECT_EQ(answer->output.bytes().data(), output);
    }
    output = answer->output.bytes().data();
    EXPECT_EQ(Status().regions(), 2);  // the buffer's and the output's
  }
}

TEST_F(SharedMemoryClient, AnswersOutliveTheClientAndTheirMemoryGoesWithThem) {
  Serve();
  Tensor output;
  std::string due;
  {
    const Client client = Connect();
    Create(client);
    const std::vector<float> x = Input();
    const auto answer = client.Forward("x", Borrowed(x));
    ASSERT_TRUE(answer.ok()) << answer.status();
    output = answer->output;
    due = std::string(output.bytes());
  }
  EXPECT_GT(Status().bytes_in_use(), 0);
  EXPECT_EQ(output.bytes(), due);
  output = Tensor();
  AwaitNoRegions();
}

TEST_F(SharedMemoryClient, ARestartedServerIsMetAnew) {
  Serve();
  const Client client = Connect(SharedMemory::kAuto);
  Create(client);
  const auto buffer = client.Allocate(kValues * sizeof(float));
  ASSERT_TRUE(buffer.ok()) << buffer.status();
  const std::vector<float> x = Input();
  std::copy(x.begin(), x.end(), buffer->values<float>().begin());
  const Tensor tensor = buffer->AsTensor(DataType::kFloat32, kShape);
  const auto before = client.Forward("x", tensor);
  ASSERT_TRUE(before.ok()) << before.status();
  const std::string due(before->output.bytes());
  for (const bool shared_memory : {true, false}) {
    Serve({.listen = address_, .shared_memory = shared_memory});
    for (int i = 0; i < 3; ++i) {
      const auto after = client.Forward("x", tensor);
      ASSERT_TRUE(after.ok()) << after.status();
      EXPECT_EQ(after->output.bytes(), due);
    }
    if (shared_memory) {
      EXPECT_EQ(Status().regions(), 2);  // input and output, in its own memory
    }
    // The answer of the server that is no more.
    EXPECT_EQ(before->output.bytes(), due);
  }
}

TEST_F(SharedMemoryClient, GoesWithoutUnlessItMustNot) {
  Serve({.shared_memory = false});
  Create(Connect(SharedMemory::kOff));
  const std::vector<float> x = Input();
  const Client automatic = Connect(SharedMemory::kAuto);
  EXPECT_TRUE(automatic.Forward("x", Borrowed(x)).ok());
  const auto buffer = automatic.Allocate(kValues * sizeof(float));
  ASSERT_TRUE(buffer.ok());
  EXPECT_FALSE(buffer->shared());
  const Client must = Connect();
  const auto refused = must.Forward("x", Borrowed(x));
  EXPECT_TRUE(absl::IsFailedPrecondition(refused.status())) << refused.status();
  EXPECT_THAT(std::string(refused.status().message()), testing::HasSubstr("--shared_memory=on"));
  EXPECT_TRUE(absl::IsFailedPrecondition(must.Allocate(1).status()));
  const auto elsewhere = Client::Connect("normd.example:1", {.shared_memory = SharedMemory::kOn});
  EXPECT_TRUE(absl::IsFailedPrecondition(elsewhere->Forward("x", Borrowed(x)).status()));
}

TEST_F(SharedMemoryClient, WhenItIsUsedUpCallsGoInMessages) {
  // Room for an input, and none for its output.
  Serve({.shared_memory = true, .shared_memory_budget = kValues * sizeof(float)});
  Create(Connect(SharedMemory::kOff));
  const std::vector<float> x = Input();
  const auto plain = Connect(SharedMemory::kOff).Forward("x", Borrowed(x));
  ASSERT_TRUE(plain.ok()) << plain.status();
  const Client client = Connect(SharedMemory::kAuto);
  const auto answer = client.Forward("x", Borrowed(x));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->output.bytes(), plain->output.bytes());
  const auto refused = Connect().Forward("x", Borrowed(x));
  EXPECT_TRUE(absl::IsResourceExhausted(refused.status())) << refused.status();
}

TEST_F(SharedMemoryClient, ServesManyThreadsEachWithItsOwnMemory) {
  Serve();
  const Client client = Connect();
  Create(client);
  const Client plain = Connect(SharedMemory::kOff);
  std::vector<std::thread> threads;
  for (int t = 1; t <= 6; ++t) {
    threads.emplace_back([&, t] {
      const std::vector<float> x = Input(static_cast<float>(t));
      const auto due = plain.Forward("x", Borrowed(x));
      ASSERT_TRUE(due.ok()) << due.status();
      for (int i = 0; i < 20; ++i) {
        const auto answer = client.Forward("x", Borrowed(x));
        ASSERT_TRUE(answer.ok()) << answer.status();
        ASSERT_EQ(answer->output.bytes(), due->output.bytes());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(Status().regions(), 12);
}

}  // namespace
}  // namespace normd::client
