// The CUDA backend's host side, on devices that fail when told to.
#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/cuda/lane.h"
#include "kernels/cuda/plan.h"
#include "tests/unit/kernels/emulated_device.h"
#include "tests/unit/kernels/problem_cases.h"

namespace normd {
namespace {

struct Machine {
  explicit Machine(int count = 1, CudaOptions options = {}) {
    std::vector<std::unique_ptr<cuda::Device>> devices;
    for (int i = 0; i < count; ++i) {
      states.push_back(std::make_shared<EmulatedState>());
      devices.push_back(MakeEmulatedDevice(states.back()));
    }
    options.on_failure = [this](const DeviceInfo& failed, int left) {
      EXPECT_FALSE(failed.healthy);
      left_after_failures.push_back(left);
    };
    backend = cuda::MakeBackend(std::move(devices), options);
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

// Parameters and statistics of a layer in eval mode.
class LastingLayer {
 public:
  explicit LastingLayer(int64_t channels, double weight = 2)
      : problem_{.batch = 2, .channels = channels, .positions = 9},
        weight_(Filled<float>(weight)),
        bias_(Filled<float>(0.5)),
        mean_(Filled<double>(3)),
        var_(Filled<double>(4)) {}

  // Normalizes ones: the first value of the output, or an error.
  double Forward(Backend& backend, Outcome expected = Outcome::kOk) const {
    const TestTensor x(problem_.dtype, reference::Values(problem_.size(), 1.0));
    TestTensor y(problem_.dtype, problem_.size());
    EXPECT_EQ(backend.ForwardByStatistics(
                  problem_,
                  {.x = x.data(),
                   .y = y.data(),
                   .affine = {weight_->data(), bias_->data()},
                   .statistics = {mean_->data(), var_->data()},
                   .lasting = {.weight = weight_, .bias = bias_, .mean = mean_, .var = var_}},
                  Place::kHost, {}),
              expected);
    return y.values().front();
  }
  double expected() const { return (1 - 3) / 2.0 * weight_->front() + 0.5; }
  int64_t tensor_bytes() const { return problem_.size() * 4; }
  int64_t constant_bytes() const { return problem_.channels * (4 + 4 + 8 + 8); }

 private:
  template <class T>
  std::shared_ptr<std::vector<T>> Filled(double value) const {
    return std::make_shared<std::vector<T>>(problem_.channels, static_cast<T>(value));
  }
  NormProblem problem_;
  std::shared_ptr<std::vector<float>> weight_, bias_;
  std::shared_ptr<std::vector<double>> mean_, var_;
};

TEST(CudaBackend, ParametersTravelOnce) {
  Machine machine;
  const LastingLayer layer(1000), other(1000, -1);
  const auto bytes_of = [&](const LastingLayer& of) {
    const int64_t before = machine.states[0]->bytes_in;
    EXPECT_NEAR(of.Forward(*machine.backend), of.expected(), 1e-4);
    return machine.states[0]->bytes_in - before;
  };
  EXPECT_GE(bytes_of(layer), layer.tensor_bytes() + layer.constant_bytes());
  EXPECT_GE(bytes_of(other), layer.tensor_bytes() + layer.constant_bytes());
  for (int i = 0; i < 3; ++i) {
    EXPECT_LT(bytes_of(layer), layer.tensor_bytes() + 256);
    EXPECT_LT(bytes_of(other), layer.tensor_bytes() + 256);
  }
}

// An owner's place in memory is taken by another as soon as it has gone.
TEST(CudaBackend, ParametersAreNeverThoseOfALayerThatIsGone) {
  Machine machine;
  for (int i = 0; i < 200; ++i) {
    const LastingLayer layer(70, i);
    EXPECT_NEAR(layer.Forward(*machine.backend), layer.expected(), 1e-3);
    EXPECT_NEAR(layer.Forward(*machine.backend), layer.expected(), 1e-3);
  }
}

TEST(CudaBackend, ParametersTakeNoMoreThanTheirShare) {
  constexpr int64_t kBudget = int64_t{64} << 20;  // of which a 16th is for these
  Machine machine(1, {.memory_budget = kBudget});
  std::vector<LastingLayer> layers;
  for (int i = 0; i < 12; ++i) layers.emplace_back(20'000, i);
  // Each drops what another still uses.
  constexpr int kCallers = 3;
  std::vector<std::jthread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (size_t i = 0; i < layers.size(); ++i) {
        const LastingLayer& layer = layers[(i + 4 * static_cast<size_t>(caller)) % layers.size()];
        EXPECT_NEAR(layer.Forward(*machine.backend), layer.expected(), 1e-3);
      }
    });
  }
  callers.clear();
  // And what lanes took for calls: tensors, parameters and scratch.
  EXPECT_LT(machine.states[0]->bytes_in_use, kBudget / 16 + kCallers * (int64_t{8} << 20));
  layers.back().Forward(*machine.backend);
  const int64_t before = machine.states[0]->bytes_in;
  layers.back().Forward(*machine.backend);
  EXPECT_LT(machine.states[0]->bytes_in - before, layers.back().tensor_bytes() + 256);
}

TEST(CudaBackend, ALayerStaysWhereItsParametersAre) {
  Machine machine(2);
  const LastingLayer layer(1000);
  // While the first device is at work the layer goes to the second, and stays there.
  machine.states[0]->on_launch = [&] {
    EXPECT_NEAR(layer.Forward(*machine.backend), layer.expected(), 1e-4);
  };
  ASSERT_EQ(machine.Normalize(kSmall), Outcome::kOk);
  machine.states[0]->on_launch = nullptr;
  EXPECT_EQ(machine.states[1]->launches, 1);
  for (int i = 0; i < 3; ++i) layer.Forward(*machine.backend);
  EXPECT_EQ(machine.states[1]->launches, 4);
  // Unless that is at work, and the first is not, or until it fails.
  machine.states[1]->on_launch = [&] {
    EXPECT_NEAR(layer.Forward(*machine.backend), layer.expected(), 1e-4);
  };
  layer.Forward(*machine.backend);
  machine.states[1]->on_launch = nullptr;
  EXPECT_EQ(machine.states[0]->launches, 2);
  machine.states[0]->fail = true;
  while (machine.backend->devices()[0].healthy) {
    EXPECT_EQ(machine.Normalize(kSmall), Outcome::kDeviceFailed);
  }
  for (int i = 0; i < 3; ++i) EXPECT_NEAR(layer.Forward(*machine.backend), layer.expected(), 1e-4);
}

TEST(CudaBackend, TakesNoMoreThanItsBudget) {
  constexpr int64_t kBudget = 1 << 20;
  Machine machine(1, {.memory_budget = kBudget});
  EXPECT_EQ(machine.backend->devices()[0].memory_budget, kBudget);
  EXPECT_EQ(machine.Normalize({.batch = 4, .channels = 8, .positions = 10000}), Outcome::kTooLarge);
  EXPECT_EQ(machine.states[0]->bytes_in_use, 0);
  EXPECT_EQ(machine.Normalize(kSmall), Outcome::kOk);
  EXPECT_EQ(machine.backend->devices()[0].memory_in_use, machine.states[0]->bytes_in_use);
  EXPECT_GT(machine.states[0]->bytes_in_use, 0);
}

// Room for one such call: of several at once some are refused, and none is harmed.
TEST(CudaBackend, RefusesWhatOthersHaveTaken) {
  Machine machine(1, {.memory_budget = 1 << 20});
  std::atomic<int> done = 0, refused = 0;
  std::vector<std::jthread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        const Outcome outcome = machine.Normalize({.batch = 2, .channels = 8, .positions = 5000});
        ++(outcome == Outcome::kOk ? done : refused);
        EXPECT_TRUE(outcome == Outcome::kOk || outcome == Outcome::kOutOfMemory);
      }
    });
  }
  callers.clear();
  EXPECT_GT(done, 0);
  EXPECT_EQ(done + refused, 80);
  EXPECT_EQ(machine.Normalize({.batch = 2, .channels = 8, .positions = 5000}), Outcome::kOk);
}

// Staging is the host's memory, and given back when that is asked for.
TEST(CudaBackend, ClaimsItsStaging) {
  std::atomic<int64_t> claimed = 0;
  std::atomic<bool> room = false;
  Machine machine(1, {.claim_pinned = [&](size_t bytes) -> std::shared_ptr<void> {
                    if (!room) return nullptr;
                    claimed += static_cast<int64_t>(bytes);
                    return std::shared_ptr<void>(
                        &claimed, [&, bytes](void*) { claimed -= static_cast<int64_t>(bytes); });
                  }});
  EXPECT_EQ(machine.Normalize(kSmall), Outcome::kOutOfMemory);
  EXPECT_EQ(machine.states[0]->pinned_bytes, 0);
  room = true;
  EXPECT_EQ(machine.Normalize(kSmall), Outcome::kOk);
  EXPECT_EQ(claimed, machine.states[0]->pinned_bytes);
  EXPECT_GT(claimed, 0);
  machine.backend->ReleaseIdle();
  EXPECT_EQ(claimed, 0);
  EXPECT_EQ(machine.states[0]->bytes_in_use, 0);
  EXPECT_EQ(machine.Normalize(kSmall), Outcome::kOk);
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
