// The CPU backend beside the reference, on every instruction set of this machine.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

#include "hwy/targets.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/kernels.h"
#include "kernels/tbb_executor.h"
#include "tests/unit/kernels/problem_cases.h"

namespace normd {
namespace {

// Names of the instruction sets that this machine can run.
std::vector<std::string> InstructionSets() {
  std::vector<std::string> names;
  for (const int64_t target : {HWY_AVX3, HWY_AVX2, HWY_SSE4, HWY_NEON, HWY_SCALAR}) {
    if ((hwy::SupportedTargets() & target) != 0 || target == HWY_SCALAR) {
      names.emplace_back(hwy::TargetName(target));
    }
  }
  return names;
}

class CpuBackend : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    for (const int64_t target : {HWY_AVX3, HWY_AVX2, HWY_SSE4, HWY_NEON, HWY_SCALAR}) {
      if (GetParam() == hwy::TargetName(target)) hwy::SetSupportedTargetsForTest(target);
    }
    ASSERT_EQ(cpu::InstructionSet(), GetParam());
  }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }

  // Every n-th problem; on instruction sets other than the best, where it is the same
  // source with other vectors, a third of those.
  void Check(const CallOptions& options, bool forward, size_t every) {
    const auto problems = ManyProblems();
    if (GetParam() != kBest) every = 3 * every + 1;
    for (size_t i = 0; i < problems.size(); i += every) {
      if (forward) {
        ExpectForwardMatches(*backend_, problems[i], options);
      } else {
        ExpectBackwardMatches(*backend_, problems[i], options);
      }
      if (HasFatalFailure()) return;
    }
  }

  // Before a test asks for another.
  static inline const std::string kBest = InstructionSets().front();
  TbbExecutor executor_{2};
  std::unique_ptr<Backend> backend_ = MakeCpuBackend(executor_, {});
};

INSTANTIATE_TEST_SUITE_P(Every, CpuBackend, ::testing::ValuesIn(InstructionSets()),
                         [](const auto& info) { return info.param; });

TEST_P(CpuBackend, NormalizesByBatch) { Check({}, true, 1); }
TEST_P(CpuBackend, NormalizesByBatchWithoutAffine) { Check({.affine = false}, true, 3); }
TEST_P(CpuBackend, NormalizesInPlace) { Check({.in_place = true}, true, 3); }
TEST_P(CpuBackend, NormalizesByStatistics) { Check({.by_batch = false}, true, 1); }
TEST_P(CpuBackend, NormalizesFarFromZero) { Check({.mean = 300, .deviation = 2}, true, 3); }
TEST_P(CpuBackend, AddsAResidual) { Check({.residual = true}, true, 3); }
TEST_P(CpuBackend, AppliesReluAndWritesItsMask) {
  Check({.residual = true, .relu = true, .in_place = true}, true, 2);
  Check({.by_batch = false, .relu = true}, true, 5);
}
TEST_P(CpuBackend, DifferentiatesByBatch) { Check({}, false, 1); }
TEST_P(CpuBackend, DifferentiatesWithoutAffine) { Check({.affine = false}, false, 3); }
TEST_P(CpuBackend, DifferentiatesInPlace) { Check({.in_place = true}, false, 3); }
TEST_P(CpuBackend, DifferentiatesByStatistics) { Check({.by_batch = false}, false, 1); }
TEST_P(CpuBackend, DifferentiatesThroughReluAndResidual) {
  Check({.residual = true, .relu = true}, false, 2);
  Check({.by_batch = false, .residual = true, .relu = true}, false, 5);
}

TEST_P(CpuBackend, RoundsHalvesToNearestEven) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    // Statistics 0 and 1 with eps 0: y is x * weight, rounded once.
    NormProblem problem{
        .batch = 1, .channels = 1, .positions = 4096, .dtype = dtype, .center = true, .eps = 0};
    std::vector<uint16_t> x(4096), y(4096);
    const float weight = 1.0f + 0x1p-9f;
    for (int block = 0; block < 16; ++block) {
      for (size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<uint16_t>(block * 4096 + static_cast<int>(i));
      }
      const double mean = 0, var = 1;
      ASSERT_EQ(backend_->ForwardByStatistics(problem,
                                              {.x = x.data(),
                                               .y = y.data(),
                                               .affine = {&weight, nullptr},
                                               .statistics = {&mean, &var}},
                                              Place::kHost, {}),
                Outcome::kOk);
      const auto values = reference::Load(dtype, x.data(), 4096);
      for (size_t i = 0; i < x.size(); ++i) {
        const float product = static_cast<float>(values[i]) * weight;
        uint16_t expected = 0;
        reference::Store(dtype, {product}, &expected);
        if (std::isnan(product)) {
          ASSERT_TRUE(std::isnan(reference::Load(dtype, &y[i], 1)[0])) << x[i];
        } else {
          // y is computed as 0 + product, so -0 may become 0.
          ASSERT_TRUE(y[i] == expected || (expected == 0x8000 && y[i] == 0))
              << NameOf(dtype) << " of bits " << x[i] << " times weight: " << y[i] << ", expected "
              << expected;
        }
      }
    }
  }
}

TEST_P(CpuBackend, KeepsNanAndInfWithinTheirSet) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const double bad : {std::nan(""), inf, -inf}) {
    for (const auto format : {MemoryFormat::kContiguous, MemoryFormat::kChannelsLast}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        const NormProblem problem{
            .batch = 3, .channels = 5, .positions = 33, .format = format, .dtype = dtype};
        auto x = RandomValues(dtype, problem.size(), 0, 1, 1);
        x[reference::OffsetOf(problem, 1, 2, 7)] = bad;
        const TestTensor x_memory(dtype, x);
        TestTensor y(dtype, problem.size());
        reference::Values mean(5), m2(5);
        ASSERT_EQ(
            backend_->ForwardByBatch(
                problem, {.x = x_memory.data(), .y = y.data(), .moments = {mean.data(), m2.data()}},
                Place::kHost, {}),
            Outcome::kOk);
        // PyTorch's mean of a channel with Inf is Inf, its variance NaN.
        EXPECT_TRUE(std::isnan(bad) ? std::isnan(mean[2]) : mean[2] == bad) << mean[2];
        EXPECT_TRUE(std::isnan(m2[2]));
        const auto values = y.values();
        for (int64_t n = 0; n < 3; ++n) {
          for (int64_t c = 0; c < 5; ++c) {
            for (int64_t p = 0; p < 33; ++p) {
              ASSERT_EQ(std::isnan(values[reference::OffsetOf(problem, n, c, p)]), c == 2);
            }
          }
        }
      }
    }
  }
}

TEST_P(CpuBackend, SurvivesValuesWhoseSquaresOverflow) {
  for (const double size : {1e30, 1e-30}) {
    const NormProblem problem{.batch = 2, .channels = 3, .positions = 100, .eps = 0};
    ExpectForwardMatches(*backend_, problem, {.mean = 0, .deviation = size});
  }
}

// One description for every thread count, every bit the same.
TEST_P(CpuBackend, IsDeterministicAcrossThreads) {
  const std::vector<NormProblem> problems = {
      {.batch = 8, .channels = 3, .positions = 60000},
      {.batch = 8, .channels = 3, .positions = 60000, .format = MemoryFormat::kChannelsLast},
      {.batch = 1, .channels = 2, .positions = 900001},
      {.batch = 16, .channels = 96, .positions = 441},
      {.batch = 600, .channels = 2048, .positions = 1},
      {.batch = 2,
       .channels = 6,
       .positions = 90000,
       .groups = 2,
       .reduction = Reduction::kPerSampleGroup},
      {.batch = 3,
       .channels = 20,
       .positions = 9000,
       .groups = 4,
       .reduction = Reduction::kPerSampleGroup,
       .format = MemoryFormat::kChannelsLast},
      {.batch = 900, .channels = 769, .positions = 1, .reduction = Reduction::kPerSampleGroup},
  };
  for (const NormProblem& problem : problems) {
    SCOPED_TRACE(Describe(problem));
    const TestTensor x(problem.dtype, RandomValues(problem.dtype, problem.size(), 3, 1, 1));
    const TestTensor grad(problem.dtype, RandomValues(problem.dtype, problem.size(), 0, 1, 2));
    std::vector<std::vector<double>> answers;
    for (const int threads : {1, 2, 3, 7}) {
      TbbExecutor executor(threads);
      const auto backend = MakeCpuBackend(executor, {.deterministic = true});
      TestTensor y(problem.dtype, problem.size());
      TestTensor grad_x(problem.dtype, problem.size());
      TestTensor grad_weight(problem.dtype, problem.channels);
      reference::Values mean(problem.num_sets()), m2(problem.num_sets());
      ASSERT_EQ(backend->ForwardByBatch(
                    problem, {.x = x.data(), .y = y.data(), .moments = {mean.data(), m2.data()}},
                    Place::kHost, {}),
                Outcome::kOk);
      const auto var = reference::VarianceOf(problem, m2);
      ASSERT_EQ(backend->Backward(problem,
                                  {.x = x.data(),
                                   .grad_y = grad.data(),
                                   .grad_x = grad_x.data(),
                                   .statistics = {mean.data(), var.data()},
                                   .grad_weight = grad_weight.data()},
                                  Place::kHost, {}),
                Outcome::kOk);
      std::vector<double> answer = mean;
      for (const auto& more : {m2, y.values(), grad_x.values(), grad_weight.values()}) {
        answer.insert(answer.end(), more.begin(), more.end());
      }
      answers.push_back(std::move(answer));
    }
    for (const auto& answer : answers) {
      ASSERT_EQ(std::memcmp(answer.data(), answers[0].data(), answer.size() * sizeof(double)), 0);
    }
  }
}

TEST_P(CpuBackend, StopsWhenAsked) {
  const NormProblem problem{.batch = 4, .channels = 8, .positions = 100};
  const TestTensor x(problem.dtype, problem.size());
  TestTensor y(problem.dtype, problem.size());
  reference::Values mean(8), m2(8);
  std::stop_source source;
  source.request_stop();
  EXPECT_EQ(backend_->ForwardByBatch(
                problem, {.x = x.data(), .y = y.data(), .moments = {mean.data(), m2.data()}},
                Place::kHost, source.get_token()),
            Outcome::kStopped);
}

TEST_P(CpuBackend, AnswersEmptyProblemsWithZeros) {
  const NormProblem problem{.batch = 0, .channels = 3, .positions = 4};
  reference::Values mean(3, 7.0), m2(3, 7.0), var(3, 1.0);
  std::vector<float> grad_weight(3, 7.0f), grad_bias(3, 7.0f);
  EXPECT_EQ(
      backend_->ForwardByBatch(problem, {.moments = {mean.data(), m2.data()}}, Place::kHost, {}),
      Outcome::kOk);
  EXPECT_EQ(backend_->Backward(problem,
                               {.statistics = {mean.data(), var.data()},
                                .grad_weight = grad_weight.data(),
                                .grad_bias = grad_bias.data()},
                               Place::kHost, {}),
            Outcome::kOk);
  EXPECT_EQ(mean, reference::Values(3));
  EXPECT_EQ(m2, reference::Values(3));
  EXPECT_EQ(grad_weight, std::vector<float>(3));
  EXPECT_EQ(grad_bias, std::vector<float>(3));
}

// Gradients of the parameters alone write nothing else.
// A tensor normalized in parts is the tensor normalized as a whole, bit for bit,
// wherever the cuts are.
TEST_P(CpuBackend, NormalizesPartsAsItDoesTheWhole) {
  const auto problems = ManyProblems();
  const size_t every = GetParam() == kBest ? 1 : 5;
  for (size_t i = 0; i < problems.size(); i += every) {
    const NormProblem& problem = problems[i];
    SCOPED_TRACE(Describe(problem));
    const int64_t size = problem.size();
    const auto element = static_cast<int64_t>(SizeOf(problem.dtype));
    const DType parameter = problem.parameter_dtype();
    const TestTensor x(problem.dtype, RandomValues(problem.dtype, size, 3, 2, 1));
    const TestTensor residual(problem.dtype, RandomValues(problem.dtype, size, 0, 1, 4));
    const TestTensor weight(parameter, RandomValues(parameter, problem.channels, 1, 0.3, 2));
    const TestTensor bias(parameter, RandomValues(parameter, problem.channels, 0, 0.5, 3));
    const Affine affine{weight.data(), bias.data()};
    const bool fused = i % 2 == 1;
    const bool of_batch = i % 3 != 0;
    const auto epilogue_from = [&](int64_t from, uint8_t* mask) {
      if (!fused) return Epilogue{};
      return Epilogue{static_cast<const char*>(residual.data()) + from * element, Activation::kRelu,
                      mask};
    };
    reference::Values mean(static_cast<size_t>(problem.num_sets())), var(mean.size());
    TestTensor whole(problem.dtype, size);
    std::vector<uint8_t> mask(static_cast<size_t>(ReluMaskBytes(size)));
    ASSERT_EQ(backend_->ForwardByBatch(problem,
                                       {.x = x.data(),
                                        .y = whole.data(),
                                        .affine = affine,
                                        .moments = {mean.data(), var.data()},
                                        .epilogue = epilogue_from(0, mask.data())},
                                       Place::kHost, {}),
              Outcome::kOk);
    for (double& value : var) value /= static_cast<double>(problem.set_size());
    if (!of_batch) {
      for (double& value : var) value *= 1.5;
      ASSERT_EQ(backend_->ForwardByStatistics(problem,
                                              {.x = x.data(),
                                               .y = whole.data(),
                                               .affine = affine,
                                               .statistics = {mean.data(), var.data()},
                                               .epilogue = epilogue_from(0, mask.data())},
                                              Place::kHost, {}),
                Outcome::kOk);
    }
    for (const int64_t step : {int64_t{37}, size / 3 + 1, size}) {
      if (step < size / 3000) continue;
      TestTensor parts = x;  // in place
      for (int64_t first = 0; first < size; first += step) {
        const int64_t count = std::min(step, size - first);
        char* const part = static_cast<char*>(parts.data()) + first * element;
        std::vector<uint8_t> part_mask(static_cast<size_t>(ReluMaskBytes(count)));
        ASSERT_EQ(backend_->ForwardRange(problem,
                                         {.first = first,
                                          .count = count,
                                          .x = part,
                                          .y = part,
                                          .affine = affine,
                                          .statistics = {mean.data(), var.data()},
                                          .statistics_of_batch = of_batch,
                                          .epilogue = epilogue_from(first, part_mask.data())},
                                         Place::kHost, {}),
                  Outcome::kOk);
        for (int64_t k = 0; fused && k < count; ++k) {
          ASSERT_EQ(part_mask[static_cast<size_t>(k / 8)] >> (k % 8) & 1,
                    mask[static_cast<size_t>((first + k) / 8)] >> ((first + k) % 8) & 1)
              << "mask, element " << first + k << " in parts of " << step;
        }
      }
      ASSERT_EQ(std::memcmp(parts.data(), whole.data(), static_cast<size_t>(size * element)), 0)
          << "in parts of " << step;
    }
  }
}

TEST_P(CpuBackend, FindsTheSameMomentsWithoutAnOutput) {
  const auto problems = ManyProblems();
  for (size_t i = 0; i < problems.size(); i += 3) {
    const NormProblem& problem = problems[i];
    SCOPED_TRACE(Describe(problem));
    const TestTensor x(problem.dtype, RandomValues(problem.dtype, problem.size(), 3, 2, 1));
    TestTensor y(problem.dtype, problem.size());
    const auto sets = static_cast<size_t>(problem.num_sets());
    reference::Values mean(sets), m2(sets), mean_alone(sets), m2_alone(sets);
    ASSERT_EQ(backend_->ForwardByBatch(
                  problem, {.x = x.data(), .y = y.data(), .moments = {mean.data(), m2.data()}},
                  Place::kHost, {}),
              Outcome::kOk);
    ASSERT_EQ(backend_->ForwardByBatch(
                  problem, {.x = x.data(), .moments = {mean_alone.data(), m2_alone.data()}},
                  Place::kHost, {}),
              Outcome::kOk);
    EXPECT_EQ(mean, mean_alone);
    EXPECT_EQ(m2, m2_alone);
  }
}

TEST_P(CpuBackend, LeavesOutWhatIsNotWanted) {
  for (const NormProblem& problem :
       {NormProblem{.batch = 4, .channels = 8, .positions = 50},
        NormProblem{.batch = 20, .channels = 8, .positions = 1},
        NormProblem{
            .batch = 20, .channels = 8, .positions = 1, .reduction = Reduction::kPerSampleGroup}}) {
    SCOPED_TRACE(Describe(problem));
    const auto x = RandomValues(problem.dtype, problem.size(), 0, 1, 1);
    const auto moments = reference::MomentsOf(problem, x);
    const auto var = reference::VarianceOf(problem, moments.m2);
    const TestTensor x_memory(problem.dtype, x);
    TestTensor grad_bias(problem.dtype, problem.channels);
    ASSERT_EQ(backend_->Backward(problem,
                                 {.x = x_memory.data(),
                                  .grad_y = x_memory.data(),
                                  .statistics = {moments.mean.data(), var.data()},
                                  .grad_bias = grad_bias.data()},
                                 Place::kHost, {}),
              Outcome::kOk);
    const auto expected = reference::Backward(problem, x, x, {}, moments.mean, var, true).grad_bias;
    for (int64_t c = 0; c < problem.channels; ++c) {
      EXPECT_NEAR(grad_bias.values()[c], expected[c], 1e-4);
    }
  }
}

}  // namespace
}  // namespace normd
