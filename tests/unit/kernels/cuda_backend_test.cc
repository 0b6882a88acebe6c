// The CUDA backend's host side, on devices that fail when told to.
#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <thread>

#include <gtest/gtest.h>

#include "kernels/cuda/lane.h"
#include "kernels/cuda/plan.h"
#include "tests/unit/kernels/emulated_device.h"
#include "tests/unit/kernels/problem_cases.h"

namespace normd {
namespace {

struct Machine {
  explicit Machine(int count = 1) {
    std::vector<std::unique_ptr<cuda::Device>> devices;
    for (int i = 0; i < count; ++i) {
      states.push_back(std::make_shared<EmulatedState>());
      devices.push_back(MakeEmulatedDevice(states.back()));
    }
    backend = cuda::MakeBackend(std::move(devices),
                                {.on_failure = [this](const DeviceInfo& failed, int left) {
                                  EXPECT_FALSE(failed.healthy);
                                  left_after_failures.push_back(left);
                                }});
  }

  Outcome Normalize(const NormProblem& problem, std::stop_token stop = {}) {
    const TestTensor x(problem.dtype, problem.size());
    TestTensor y(problem.dtype, problem.size());
    reference::Values mean(problem.num_sets()), m2(problem.num_sets());
    return backend->ForwardByBatch(
        problem, {.x = x.data(), .y = y.data(), .moments = {mean.data(), m2.data()}}, Place::kHost,
        std::move(stop));
  }

  std::vector<std::shared_ptr<EmulatedState>> states;
  std::vector<int> left_after_failures;
  std::unique_ptr<Backend> backend;
};

constexpr NormProblem kSmall{.batch = 2, .channels = 3, .positions = 64};

TEST(CudaBackend, MovesTensorsOfManyChunks) {
  Machine machine;
  // 5 chunks in, 10 with the residual, and as many out: the ring of staging goes round.
  const NormProblem problem{
      .batch = 1, .channels = 2, .positions = 5 * cuda::Lane::kChunkBytes / 8 + 3};
  ExpectForwardMatches(*machine.backend, problem, {.residual = true, .relu = true});
}

TEST(CudaBackend, KeepsMemoryForTheNextCall) {
  Machine machine;
  ASSERT_EQ(machine.Normalize(kSmall), Outcome::kOk);
  const int64_t kept = machine.states[0]->bytes_in_use;
  ASSERT_GT(kept, 0);
  for (int i = 0; i < 5; ++i) ASSERT_EQ(machine.Normalize(kSmall), Outcome::kOk);
  EXPECT_EQ(machine.states[0]->bytes_in_use, kept);
  EXPECT_EQ(machine.states[0]->streams, 1);
}

TEST(CudaBackend, GivesEverythingBack) {
  std::shared_ptr<EmulatedState> state;
  {
    Machine machine;
    state = machine.states[0];
    ASSERT_EQ(machine.Normalize(kSmall), Outcome::kOk);
  }
  EXPECT_EQ(state->bytes_in_use, 0);
  EXPECT_EQ(state->pinned_bytes, 0);
  EXPECT_EQ(state->streams, 0);
}

TEST(CudaBackend, SurvivesWantOfMemory) {
  Machine machine;
  machine.states[0]->memory_bytes = 1 << 20;
  EXPECT_EQ(machine.Normalize({.batch = 4, .channels = 8, .positions = 100000}),
            Outcome::kOutOfMemory);
  EXPECT_TRUE(machine.backend->devices()[0].healthy);
  EXPECT_EQ(machine.Normalize(kSmall), Outcome::kOk);
}

TEST(CudaBackend, TakesMemoryFromIdleLanes) {
  Machine machine;
  const NormProblem large{.batch = 1, .channels = 8, .positions = 10000};
  ASSERT_EQ(machine.Normalize(large), Outcome::kOk);
  // As much as that lane keeps, and a little more: a larger call needs all of it.
  machine.states[0]->memory_bytes = machine.states[0]->bytes_in_use + (int64_t{128} << 10);
  EXPECT_EQ(machine.Normalize({.batch = 1, .channels = 8, .positions = 11000}), Outcome::kOk);
}

TEST(CudaBackend, IsUnhealthyAfterADeviceFailed) {
  Machine machine;
  machine.states[0]->fail = true;
  EXPECT_EQ(machine.Normalize(kSmall), Outcome::kDeviceFailed);
  EXPECT_FALSE(machine.backend->devices()[0].healthy);
  // A device that failed is not asked again.
  machine.states[0]->fail = false;
  const int launches = machine.states[0]->launches;
  EXPECT_EQ(machine.Normalize(kSmall), Outcome::kDeviceFailed);
  EXPECT_EQ(machine.states[0]->launches, launches);
  EXPECT_EQ(machine.left_after_failures, std::vector<int>{0});
}

TEST(CudaBackend, GoesOnWithTheDevicesThatWork) {
  Machine machine(2);
  machine.states[0]->fail = true;
  EXPECT_EQ(machine.Normalize(kSmall), Outcome::kDeviceFailed);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(machine.Normalize(kSmall), Outcome::kOk);
  EXPECT_EQ(machine.states[1]->launches, 3);
  EXPECT_EQ(machine.left_after_failures, std::vector<int>{1});
  EXPECT_FALSE(machine.backend->Supports(Place::kDevice));
}

TEST(CudaBackend, ServesManyCallersAtOnce) {
  Machine machine(2);
  std::vector<std::jthread> callers;
  for (int caller = 0; caller < 8; ++caller) {
    callers.emplace_back([&, caller] {
      const NormProblem problem{.batch = 3, .channels = 4 + caller, .positions = 40};
      for (int call = 0; call < 5; ++call) ExpectForwardMatches(*machine.backend, problem, {});
    });
  }
  callers.clear();
  EXPECT_EQ(machine.states[0]->launches + machine.states[1]->launches, 40);
}

// Tensors on the device stay there, at any alignment.
TEST(CudaBackend, TakesTensorsOnTheDevice) {
  Machine machine;
  ASSERT_TRUE(machine.backend->Supports(Place::kDevice));
  for (const NormProblem& problem :
       {NormProblem{.batch = 3, .channels = 5, .positions = 49},
        NormProblem{
            .batch = 2, .channels = 16, .positions = 9, .format = MemoryFormat::kChannelsLast},
        NormProblem{.batch = 7,
        .channels = 24,
        .positions = 1,
        .reduction = Reduction::kPerSampleGroup,
        .dtype = DType::kBFloat16}}) {
    SCOPED_TRACE(Describe(problem));
    const auto x = RandomValues(problem.dtype, problem.size(), 1, 1, 1);
    const TestTensor x_memory(problem.dtype, x);
    TestTensor y(problem.dtype, problem.size());
    reference::Values mean(problem.num_sets()), m2(problem.num_sets());
    ASSERT_EQ(
        machine.backend->ForwardByBatch(
            problem, {.x = x_memory.data(), .y = y.data(), .moments = {mean.data(), m2.data()}},
            Place::kDevice, {}),
        Outcome::kOk);
    const auto expected =
        reference::Forward(problem, x, {}, mean, reference::VarianceOf(problem, m2)).y;
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_NEAR(y.values()[i], expected[i], problem.dtype == DType::kFloat32 ? 1e-5 : 2e-2);
    }
  }
}

// The same bits twice, and wherever the tensor is.
TEST(CudaBackend, AnswersTheSameBitsEachTime) {
  const NormProblem problem{.batch = 4, .channels = 3, .positions = 20000};
  const TestTensor x(problem.dtype, RandomValues(problem.dtype, problem.size(), 3, 1, 1));
  std::vector<reference::Values> answers;
  for (int run = 0; run < 2; ++run) {
    Machine machine(run + 1);
    TestTensor y(problem.dtype, problem.size());
    reference::Values mean(3), m2(3);
    ASSERT_EQ(machine.backend->ForwardByBatch(
                  problem, {.x = x.data(), .y = y.data(), .moments = {mean.data(), m2.data()}},
                  Place::kHost, {}),
              Outcome::kOk);
    answers.push_back(y.values());
    answers.back().insert(answers.back().end(), m2.begin(), m2.end());
  }
  EXPECT_EQ(answers[0], answers[1]);
}

TEST(CudaPlan, FillsTheGpuHoweverFewTheChannels) {
  for (const auto format : {MemoryFormat::kContiguous, MemoryFormat::kChannelsLast}) {
    for (const int64_t channels : {1, 3, 64, 2048}) {
      const NormProblem problem{
          .batch = 32, .channels = channels, .positions = 112 * 112, .format = format};
      const cuda::Plan plan = cuda::PlanFor(problem, false);
      const int64_t blocks = plan.geometry == cuda::Geometry::kRuns
                                 ? plan.runs.units * plan.splits
                                 : plan.columns.samples * plan.columns.tiles() * plan.splits;
      // A quarter of 8 blocks on each of 132 multiprocessors, or all that there is to do.
      EXPECT_GE(blocks, std::min<int64_t>(264, problem.size() / (64 * cuda::kThreads)))
          << Describe(problem);
      EXPECT_LE(plan.splits, cuda::kFullGrid);
    }
  }
}

}  // namespace
}  // namespace normd
