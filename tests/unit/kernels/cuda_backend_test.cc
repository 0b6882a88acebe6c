// The CUDA backend's host side, on devices that fail when told to.
#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/cuda/lane.h"
#include "kernels/cuda/plan.h"
#include "kernels/moments.h"
#include "kernels/set_constants.h"
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

// Eval takes a tensor through the device in chunks: what comes out has the bits of the whole,
// which is on the device there; wherever the chunks end, and whatever lies over what.
TEST(CudaBackend, NormalizesInChunksAsItDoesTheWhole) {
  constexpr int64_t kChunk = cuda::Lane::kChunkBytes;
  const auto of_groups = Reduction::kPerSampleGroup;
  for (const NormProblem& problem :
       {// One element more than a chunk, and ten chunks with the residual.
        NormProblem{.batch = 1, .channels = 1, .positions = kChunk / 4 + 1},
        NormProblem{.batch = 1, .channels = 6, .positions = 5 * kChunk / 24 + 3},
        NormProblem{
            .batch = 5, .channels = 24, .positions = 10001, .format = MemoryFormat::kChannelsLast},
        NormProblem{.batch = 1500,
        .channels = 3,
        .positions = 900,
        .groups = 3,
        .reduction = of_groups,
        .dtype = DType::kBFloat16},
        NormProblem{.batch = 7,
        .channels = 2,
        .positions = 90000,
        .groups = 2,
        .reduction = of_groups,
        .dtype = DType::kFloat64}}) {
    for (const bool fused : {false, true}) {
      SCOPED_TRACE(Describe(problem) + (fused ? ", fused" : ""));
      Machine machine;
      const TestTensor x(problem.dtype, RandomValues(problem.dtype, problem.size(), 3, 2, 1));
      TestTensor residual = x;
      const TestTensor weight(problem.parameter_dtype(),
                              reference::Values(static_cast<size_t>(problem.channels), 0.7));
      reference::Values mean(static_cast<size_t>(problem.num_sets())), var(mean.size());
      for (size_t set = 0; set < mean.size(); ++set) {
        mean[set] = 3 + 0.001 * static_cast<double>(set % 100);
        var[set] = 1 + 0.01 * static_cast<double>(set % 7);
      }
      const auto normalize = [&](Place place, TestTensor& y, std::vector<uint8_t>& mask) {
        const Outcome outcome = machine.backend->ForwardByStatistics(
            problem,
            {.x = x.data(),
             .y = y.data(),
             .affine = {weight.data(), nullptr},
             .statistics = {mean.data(), var.data()},
             .epilogue = {fused ? residual.data() : nullptr,
                          fused ? Activation::kRelu : Activation::kNone,
                          fused ? mask.data() : nullptr}},
            place, {});
        ASSERT_EQ(outcome, Outcome::kOk);
      };
      const auto size = static_cast<size_t>(ReluMaskBytes(problem.size()));
      TestTensor whole(problem.dtype, problem.size());
      std::vector<uint8_t> whole_mask(size), mask(size);
      normalize(Place::kDevice, whole, whole_mask);
      ASSERT_EQ(machine.states[0]->launches, 1);
      TestTensor y(problem.dtype, problem.size());
      TestTensor& over = fused ? residual : y;  // in place
      normalize(Place::kHost, over, mask);
      EXPECT_GT(machine.states[0]->launches, 2);
      EXPECT_EQ(over.values(), whole.values());
      const auto bytes = static_cast<size_t>(problem.size() / 8);
      EXPECT_TRUE(std::equal(mask.begin(), mask.begin() + bytes, whole_mask.begin()));
      for (int64_t i = problem.size() / 8 * 8; fused && i < problem.size(); ++i) {
        EXPECT_EQ(mask.at(bytes) >> i % 8 & 1, whole_mask.at(bytes) >> i % 8 & 1);
      }
    }
  }
}

// However large the tensor is; and a chunk that fails, or comes after a stop, ends it.
TEST(CudaBackend, NormalizesInChunksWithinAFewChunksOfMemory) {
  Machine machine;
  EmulatedState& state = *machine.states[0];
  std::vector<int64_t> taken;
  for (const int64_t chunks : {5, 11}) {
    const NormProblem problem{.batch = 1,
                              .channels = 1,
                              .positions = chunks * int64_t{cuda::Lane::kChunkBytes} / 2,
                              .dtype = DType::kBFloat16};
    const TestTensor x(problem.dtype, problem.size());
    TestTensor y(problem.dtype, problem.size());
    const double mean = 0, var = 1;
    const ForwardByStatisticsArgs args{.x = x.data(), .y = y.data(), .statistics = {&mean, &var}};
    ASSERT_EQ(machine.backend->ForwardByStatistics(problem, args, Place::kHost, {}), Outcome::kOk);
    taken.push_back(state.bytes_in_use);
  }
  EXPECT_EQ(taken[0], taken[1]);
  EXPECT_LT(taken[0], 5 * int64_t{cuda::Lane::kChunkBytes});
  EXPECT_EQ(state.streams, 4);
}

TEST(CudaBackend, StopsBetweenChunks) {
  Machine machine;
  EmulatedState& state = *machine.states[0];
  const NormProblem problem{
      .batch = 1, .channels = 1, .positions = 8 * int64_t{cuda::Lane::kChunkBytes} / 4};
  const TestTensor x(problem.dtype, problem.size());
  TestTensor y(problem.dtype, problem.size());
  const double mean = 0, var = 1;
  const ForwardByStatisticsArgs args{.x = x.data(), .y = y.data(), .statistics = {&mean, &var}};
  std::stop_source source;
  state.on_launch = [&] {
    if (state.launches == 3) source.request_stop();
  };
  EXPECT_EQ(machine.backend->ForwardByStatistics(problem, args, Place::kHost, source.get_token()),
            Outcome::kStopped);
  EXPECT_EQ(state.launches, 3);
  state.on_launch = [&] { state.fail = state.launches == 6; };
  EXPECT_EQ(machine.backend->ForwardByStatistics(problem, args, Place::kHost, {}),
            Outcome::kDeviceFailed);
  EXPECT_EQ(state.launches, 6);
  EXPECT_FALSE(machine.backend->devices()[0].healthy);
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
  explicit LastingLayer(int64_t channels, double weight = 2, int64_t positions = 9)
      : problem_{.batch = 2, .channels = channels, .positions = positions},
        weight_(Filled<float>(weight)),
        bias_(Filled<float>(0.5)),
        mean_(Filled<double>(3)),
        var_(Filled<double>(4)) {}

  // Normalizes ones: the value of all of the output, or an error.
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
    EXPECT_EQ(y.values().front(), y.values().back());
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

// Streams other than the one that brought them read them too.
TEST(CudaBackend, ParametersTravelOnceWhereTheTensorPassesInChunks) {
  Machine machine;
  const LastingLayer layer(1000, 3, 1200);  // 9 MiB
  for (int i = 0; i < 2; ++i) {
    const int64_t before = machine.states[0]->bytes_in;
    EXPECT_NEAR(layer.Forward(*machine.backend), layer.expected(), 1e-4);
    const int64_t constants = machine.states[0]->bytes_in - before - layer.tensor_bytes();
    if (i == 0) {
      EXPECT_GE(constants, layer.constant_bytes());
    } else {
      EXPECT_LT(constants, 1024);
    }
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

// Everything that a forward and a backward call answer. Of a NaN no more than that it is
// one: a host chooses its sign.
struct Answers {
  void Add(reference::Values values) {
    for (double& value : values) {
      if (std::isnan(value)) value = 0x1p-140;
    }
    tensors.push_back(std::move(values));
  }
  std::vector<reference::Values> tensors;
};

Answers AnswersTo(const NormProblem& problem, Place place, bool fused, const reference::Values& x) {
  auto state = std::make_shared<EmulatedState>();
  std::vector<std::unique_ptr<cuda::Device>> devices;
  devices.push_back(MakeEmulatedDevice(state));
  const auto backend = cuda::MakeBackend(std::move(devices));
  const DType parameter = problem.parameter_dtype();
  const TestTensor x_memory(problem.dtype, x);
  TestTensor grad_y(problem.dtype, RandomValues(problem.dtype, problem.size(), 0.1, 1, 5));
  const TestTensor residual(problem.dtype, RandomValues(problem.dtype, problem.size(), 0, 1, 4));
  const TestTensor weight(parameter, RandomValues(parameter, problem.channels, 1, 0.3, 2));
  const TestTensor bias(parameter, RandomValues(parameter, problem.channels, 0, 0.5, 3));
  TestTensor y(problem.dtype, problem.size());
  TestTensor grad_residual(problem.dtype, problem.size());
  TestTensor grad_weight(parameter, problem.channels), grad_bias(parameter, problem.channels);
  std::vector<uint8_t> mask(static_cast<size_t>(ReluMaskBytes(problem.size())));
  reference::Values mean(problem.num_sets()), m2(problem.num_sets()), var;
  EXPECT_EQ(backend->ForwardByBatch(problem,
                                    {.x = x_memory.data(),
                                     .y = y.data(),
                                     .affine = {weight.data(), bias.data()},
                                     .moments = {mean.data(), m2.data()},
                                     .epilogue = {fused ? residual.data() : nullptr,
                                                  fused ? Activation::kRelu : Activation::kNone,
                                                  fused ? mask.data() : nullptr}},
                                    place, {}),
            Outcome::kOk);
  for (const double of_set : m2) var.push_back(of_set / static_cast<double>(problem.set_size()));
  EXPECT_EQ(backend->Backward(problem,
                              {.x = x_memory.data(),
                               .grad_y = grad_y.data(),
                               .grad_x = grad_y.data(),
                               .weight = weight.data(),
                               .statistics = {mean.data(), var.data()},
                               .grad_weight = grad_weight.data(),
                               .grad_bias = grad_bias.data(),
                               .relu_mask = fused ? mask.data() : nullptr,
                               .grad_residual = fused ? grad_residual.data() : nullptr},
                              place, {}),
            Outcome::kOk);
  Answers answers;
  for (const auto& values : {mean, m2}) answers.Add(values);
  for (const TestTensor* tensor : {&y, &grad_y, &grad_residual, &grad_weight, &grad_bias}) {
    answers.Add(tensor->values());
  }
  answers.Add({mask.begin(), mask.begin() + (fused ? problem.size() / 8 : 0)});
  return answers;
}

// What is on the device lies at no more than an element's alignment, and is copied to where
// the kernels can take it; a set that has gone wrong is wrong alike.
TEST(CudaBackend, AnswersTheSameBitsWhereverTensorsAre) {
  const auto of_rows = Reduction::kPerSampleGroup;
  for (const NormProblem& problem :
       {NormProblem{.batch = 3, .channels = 7, .positions = 1000},
        NormProblem{.batch = 5, .channels = 3, .positions = 12401},
        NormProblem{.batch = 4, .channels = 3, .positions = 9001, .dtype = DType::kBFloat16},
        NormProblem{.batch = 2, .channels = 3, .positions = 9000, .dtype = DType::kFloat64},
        NormProblem{.batch = 3, .channels = 12, .positions = 49, .groups = 2, .reduction = of_rows},
        NormProblem{.batch = 1111, .channels = 256, .positions = 1, .reduction = of_rows},
        NormProblem{.batch = 67, .channels = 769, .positions = 1, .reduction = of_rows},
        NormProblem{.batch = 9,
        .channels = 3,
        .positions = 400,
        .format = MemoryFormat::kChannelsLast,
        .dtype = DType::kFloat16}}) {
    SCOPED_TRACE(Describe(problem));
    auto x = RandomValues(problem.dtype, problem.size(), 300, 0.5, 1);
    x[x.size() / 2] = std::nan("");
    const bool fused = problem.batch % 2 == 1;
    const Answers of_host = AnswersTo(problem, Place::kHost, fused, x);
    const Answers of_device = AnswersTo(problem, Place::kDevice, fused, x);
    for (size_t i = 0; i < of_host.tensors.size(); ++i) {
      EXPECT_TRUE(of_host.tensors[i] == of_device.tensors[i]) << "tensor " << i;
    }
  }
}

// Sets that threads just hold, and sets of an element more, which are read twice.
TEST(CudaBackend, HoldsASetThatJustFits) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    const int64_t width = static_cast<int64_t>(SizeOf(dtype));
    for (const int tensors : {1, 2}) {
      const int64_t fits = int64_t{512} * 8 * cuda::MostHeld(static_cast<size_t>(width), tensors);
      for (const int64_t more : {0, 1}) {
        const NormProblem problem{.batch = 3,
                                  .channels = 1,
                                  .positions = fits + more,
                                  .reduction = Reduction::kPerSampleGroup,
                                  .dtype = dtype};
        SCOPED_TRACE(Describe(problem));
        Machine machine;
        if (tensors == 1) {
          ExpectForwardMatches(*machine.backend, problem, {.mean = 30});
          EXPECT_EQ(machine.states[0]->kernels, more == 0 ? 1 : 3);
        } else {
          ExpectBackwardMatches(*machine.backend, problem, {.affine = false});
          EXPECT_EQ(machine.states[0]->kernels, more == 0 ? 1 : 4);
        }
      }
    }
  }
}

// Whole octets of rows, and tiles that a channel has several columns in, are merged by channel.
TEST(CudaBackend, TakesRowsOfFewChannelsTogether) {
  Machine machine;
  for (const int64_t channels : {1, 3, 4, 6, 7}) {
    for (const int64_t positions : {8, 100, 768, 4096}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        const NormProblem problem{.batch = 2,
                                  .channels = channels,
                                  .positions = positions,
                                  .format = MemoryFormat::kChannelsLast,
                                  .dtype = dtype};
        SCOPED_TRACE(Describe(problem));
        EXPECT_TRUE(cuda::PlanFor(problem, false).columns.folded());
        ExpectForwardMatches(*machine.backend, problem, {.mean = 30});
        ExpectBackwardMatches(*machine.backend, problem, {.residual = true, .relu = true});
      }
    }
  }
}

// As many as there are passes, and what must come between them.
TEST(CudaBackend, LaunchesFewKernels) {
  const auto of_rows = Reduction::kPerSampleGroup;
  struct Case {
    NormProblem problem;
    int forward, backward;
  };
  const Case cases[] = {
      // Held, with the gradients of the parameters.
      {{.batch = 4, .channels = 16, .positions = 49}, 1, 1},
      // Read twice.
      {{.batch = 2, .channels = 3, .positions = 21001}, 3, 4},
      {{.batch = 6, .channels = 24, .positions = 9, .format = MemoryFormat::kChannelsLast}, 3, 4},
      // Groups of planes, whose channels have weights of their own.
      {{.batch = 12, .channels = 8, .positions = 49, .groups = 2, .reduction = of_rows}, 1, 5},
      // Rows, held with the sums of their columns.
      {{.batch = 48, .channels = 256, .positions = 1, .reduction = of_rows}, 1, 3},
  };
  for (const auto& [problem, forward, backward] : cases) {
    SCOPED_TRACE(Describe(problem));
    Machine machine;
    ExpectForwardMatches(*machine.backend, problem, {});
    EXPECT_EQ(machine.states[0]->kernels, forward);
    ExpectBackwardMatches(*machine.backend, problem, {});
    EXPECT_EQ(machine.states[0]->kernels, forward + backward);
  }
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
