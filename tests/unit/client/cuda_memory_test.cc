// Tensors that a client has on the server's GPU, against a server in this process whose
// GPU is not there.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "client/normd_client.h"
#include "tests/unit/client/real_server.h"
#include "tests/unit/server/temporary_directory.h"

namespace normd::client {
namespace {

constexpr int64_t kChannels = 64;
const std::vector<int64_t> kShape = {4, kChannels};
constexpr size_t kValues = 4 * kChannels;
constexpr size_t kBytes = kValues * sizeof(float);

class CudaMemoryClient : public ::testing::Test {
 protected:
  CudaMemoryClient()
      : server_({.state_dir = directory_.File("state"), .shared_memory = true, .cuda_ipc = true}),
        handle_(64, 'h'),
        memory_(server_.MemoryOnDevice(handle_, 3 * kBytes)),
        client_(*Client::Connect(server_.address())) {
    const auto made =
        client_.CreateInstance("x", {.layer = BatchNorm1d{.num_features = kChannels}}, Mode::kEval);
    EXPECT_TRUE(made.ok()) << made.status();
    for (size_t i = 0; i < kValues; ++i) input_.push_back(static_cast<float>(i * 7919 % 1000));
    std::memcpy(memory_, input_.data(), kBytes);
  }

  // The n-th tensor in the memory.
  static CudaTensor At(const CudaMemory& memory, int n) {
    return {.memory = memory, .offset = n * static_cast<int64_t>(kBytes), .shape = kShape};
  }
  std::string BytesAt(int n) const { return {memory_ + n * kBytes, kBytes}; }

  const TemporaryDirectory directory_;
  RealServer server_;
  const std::string handle_;
  char* const memory_;
  const Client client_;
  std::vector<float> input_;
};

TEST_F(CudaMemoryClient, AnswersWhatMessagesDo) {
  const auto memory = client_.RegisterCudaMemory(handle_, 3 * kBytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->size(), static_cast<int64_t>(3 * kBytes));
  const CudaTensor x = At(*memory, 0), y = At(*memory, 1), dx = At(*memory, 2);
  const Tensor input = Tensor::Borrow<float>(input_, kShape);

  const ForwardOptions train = {.mode = Mode::kTrain, .return_batch_statistics = true};
  const auto due = client_.Forward("x", input, train);
  const auto answer = client_.Forward("x", x, y, train);
  ASSERT_TRUE(due.ok() && answer.ok()) << answer.status();
  EXPECT_EQ(answer->version, due->version + 1);
  EXPECT_EQ(answer->batch_statistics->mean, due->batch_statistics->mean);
  EXPECT_EQ(BytesAt(1), due->output.bytes());
  EXPECT_TRUE(answer->output.bytes().empty());

  const auto due_back = client_.Backward("x", due->output, {.input = input, .mode = Mode::kTrain});
  const auto back = client_.Backward("x", y, x, dx, {.mode = Mode::kTrain});
  ASSERT_TRUE(due_back.ok() && back.ok()) << back.status();
  EXPECT_EQ(BytesAt(2), due_back->grad_input->bytes());
  EXPECT_EQ(back->grad_weight->bytes(), due_back->grad_weight->bytes());
  EXPECT_TRUE(client_.Backward("x", y, x, std::nullopt, {.mode = Mode::kTrain}).ok());

  // Over the input, too.
  const auto due_eval = client_.Forward("x", input);
  ASSERT_TRUE(client_.Forward("x", x, x).ok());
  EXPECT_EQ(BytesAt(0), due_eval->output.bytes());
}

TEST_F(CudaMemoryClient, TheServerLetsGoWithTheLastCopy) {
  {
    auto memory = client_.RegisterCudaMemory(handle_, kBytes);
    ASSERT_TRUE(memory.ok()) << memory.status();
    const CudaMemory copy = *memory;
    memory = CudaMemory();
    EXPECT_EQ(server_.open_on_device(), 1);
  }
  EXPECT_EQ(server_.open_on_device(), 0);
}

TEST_F(CudaMemoryClient, WhatIsNotThereIsRefused) {
  EXPECT_TRUE(
      absl::IsInvalidArgument(client_.RegisterCudaMemory(std::string(64, '?'), kBytes).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(client_.RegisterCudaMemory("short", kBytes).status()));
  const auto beyond = client_.RegisterCudaMemory(handle_, 4 * kBytes);
  EXPECT_EQ(DetailOf(beyond.status()).field, "region_bytes");
  EXPECT_EQ(server_.open_on_device(), 0);
  const auto memory = client_.RegisterCudaMemory(handle_, kBytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const auto past = client_.Forward("x", At(*memory, 0), At(*memory, 1));
  EXPECT_EQ(DetailOf(past.status()).field, "output_memory.length");
  EXPECT_TRUE(absl::IsNotFound(client_.Forward("x", At({}, 0), At(*memory, 0)).status()));
}

}  // namespace
}  // namespace normd::client
