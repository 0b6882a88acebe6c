// Every backend beside the reference.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

#include "tests/unit/kernels/backends.h"
#include "tests/unit/kernels/problem_cases.h"

namespace normd {
namespace {

class Conformance : public BackendTest {
 protected:
  // Every n-th problem; fewer on instruction sets other than the best, where it is the
  // same source with other vectors, and on the emulated GPU, which is slow.
  void Check(const CallOptions& options, bool forward, size_t every) {
    const auto problems = ManyProblems();
    if (!is_best()) every = is_cpu() ? 3 * every + 1 : 6 * every + 1;
    for (size_t i = 0; i < problems.size(); i += every) {
      if (forward) {
        ExpectForwardMatches(*backend_, problems[i], options);
      } else {
        ExpectBackwardMatches(*backend_, problems[i], options);
      }
      if (HasFatalFailure()) return;
    }
  }
};

NORMD_FOR_EVERY_BACKEND(Conformance);

TEST_P(Conformance, NormalizesByBatch) { Check({}, true, 1); }
TEST_P(Conformance, NormalizesByBatchWithoutAffine) { Check({.affine = false}, true, 3); }
TEST_P(Conformance, NormalizesInPlace) { Check({.in_place = true}, true, 3); }
TEST_P(Conformance, NormalizesByStatistics) { Check({.by_batch = false}, true, 1); }
TEST_P(Conformance, NormalizesFarFromZero) { Check({.mean = 300, .deviation = 2}, true, 3); }
// About two deviations from it: some rows are shifted, others are not.
TEST_P(Conformance, NormalizesBothNearAndFarFromZero) {
  Check({.mean = 4.6, .deviation = 2}, true, 3);
  Check({.mean = 4.6, .deviation = 2}, false, 3);
}
TEST_P(Conformance, AddsAResidual) { Check({.residual = true}, true, 3); }
TEST_P(Conformance, AppliesReluAndWritesItsMask) {
  Check({.residual = true, .relu = true, .in_place = true}, true, 2);
  Check({.by_batch = false, .relu = true}, true, 5);
}
TEST_P(Conformance, DifferentiatesByBatch) { Check({}, false, 1); }
TEST_P(Conformance, DifferentiatesWithoutAffine) { Check({.affine = false}, false, 3); }
TEST_P(Conformance, DifferentiatesInPlace) { Check({.in_place = true}, false, 3); }
TEST_P(Conformance, DifferentiatesByStatistics) { Check({.by_batch = false}, false, 1); }
TEST_P(Conformance, DifferentiatesThroughReluAndResidual) {
  Check({.residual = true, .relu = true}, false, 2);
  Check({.by_batch = false, .residual = true, .relu = true}, false, 5);
}

// Sets of more than a block of a GPU keeps, or too few of them for it; many rows.
TEST_P(Conformance, TakesLargeSetsAndManyRows) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (NormProblem problem : {NormProblem{.batch = 2, .channels = 3, .positions = 21001},
                                NormProblem{.batch = 5, .channels = 4, .positions = 6400},
                                NormProblem{.batch = 1100,
                                .channels = 264,
                                .positions = 1,
                                .reduction = Reduction::kPerSampleGroup}}) {
      problem.dtype = dtype;
      ExpectForwardMatches(*backend_, problem, {.residual = true, .relu = true});
      ExpectBackwardMatches(*backend_, problem, {.residual = true, .relu = true});
    }
  }
}

// Past a cache of 2 MiB, where planes and rows are written while others are summed.
TEST_P(Conformance, NormalizesTensorsThatOutgrowTheCache) {
  if (!is_cpu()) GTEST_SKIP() << "a GPU has no such path";
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (NormProblem problem : {NormProblem{.batch = 3, .channels = 210, .positions = 1031},
                                NormProblem{.batch = 300, .channels = 64, .positions = 49},
                                NormProblem{.batch = 70, .channels = 128, .positions = 196},
                                NormProblem{.batch = 2, .channels = 63, .positions = 5003},
                                NormProblem{.batch = 3,
                                .channels = 520,
                                .positions = 1002,
                                .format = MemoryFormat::kChannelsLast},
                                NormProblem{.batch = 6,
                                .channels = 24,
                                .positions = 4999,
                                .groups = 4,
                                .reduction = Reduction::kPerSampleGroup},
                                NormProblem{.batch = 1100,
                                .channels = 601,
                                .positions = 1,
                                .reduction = Reduction::kPerSampleGroup}}) {
      problem.dtype = dtype;
      for (const CallOptions& options :
           {CallOptions{.on_lines = true}, CallOptions{},
            CallOptions{.residual = true, .relu = true, .in_place = true},
            CallOptions{.residual = true, .relu = true, .on_lines = true}}) {
        ExpectForwardMatches(*backend_, problem, options);
        ExpectBackwardMatches(*backend_, problem, options);
        if (!is_best()) break;
      }
    }
  }
}

TEST_P(Conformance, RoundsHalvesToNearestEven) {
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

TEST_P(Conformance, KeepsNanAndInfWithinTheirSet) {
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

TEST_P(Conformance, SurvivesValuesWhoseSquaresOverflow) {
  for (const double size : {1e30, 1e-30}) {
    const NormProblem problem{.batch = 2, .channels = 3, .positions = 100, .eps = 0};
    ExpectForwardMatches(*backend_, problem, {.mean = 0, .deviation = size});
  }
}

TEST_P(Conformance, StopsWhenAsked) {
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

TEST_P(Conformance, AnswersEmptyProblemsWithZeros) {
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

// A tensor normalized in parts is the tensor normalized as a whole, bit for bit,
// wherever the cuts are.
TEST_P(Conformance, NormalizesPartsAsItDoesTheWhole) {
  const auto problems = ManyProblems();
  const size_t every = is_best() ? 1 : is_cpu() ? 5 : 11;
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

TEST_P(Conformance, FindsTheSameMomentsWithoutAnOutput) {
  const auto problems = ManyProblems();
  for (size_t i = 0; i < problems.size(); i += is_cpu() ? 3 : 11) {
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

// Gradients of the parameters alone write nothing else.
TEST_P(Conformance, LeavesOutWhatIsNotWanted) {
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

// Neither the bias nor its gradient changes anything else by not being there.
TEST_P(Conformance, DoesWithoutABiasWhatItDoesWithOneOfZeros) {
  const auto problems = ManyProblems();
  const size_t every = is_best() ? 1 : is_cpu() ? 5 : 11;
  for (size_t i = 0; i < problems.size(); i += every) {
    const NormProblem& problem = problems[i];
    if (problem.set_size() < 2) continue;
    SCOPED_TRACE(Describe(problem));
    const int64_t size = problem.size();
    const DType parameter = problem.parameter_dtype();
    const auto values = RandomValues(problem.dtype, size, 0.5, 2, 1);
    const auto moments = reference::MomentsOf(problem, values);
    const auto var = reference::VarianceOf(problem, moments.m2);
    const TestTensor x(problem.dtype, values);
    const TestTensor grad_y(problem.dtype, RandomValues(problem.dtype, size, 0, 1, 4));
    const TestTensor weight(parameter, RandomValues(parameter, problem.channels, 1, 0.3, 2));
    const TestTensor zeros(parameter, reference::Values(static_cast<size_t>(problem.channels)));
    TestTensor y[2] = {{problem.dtype, size}, {problem.dtype, size}};
    TestTensor grad_x[2] = {{problem.dtype, size}, {problem.dtype, size}};
    TestTensor grad_weight[2] = {{parameter, problem.channels}, {parameter, problem.channels}};
    TestTensor grad_bias(parameter, problem.channels);
    for (const int biased : {0, 1}) {
      reference::Values mean(static_cast<size_t>(problem.num_sets())), m2(mean.size());
      ASSERT_EQ(
          backend_->ForwardByBatch(problem,
                                   {.x = x.data(),
                                    .y = y[biased].data(),
                                    .affine = {weight.data(), biased ? zeros.data() : nullptr},
                                    .moments = {mean.data(), m2.data()}},
                                   Place::kHost, {}),
          Outcome::kOk);
      ASSERT_EQ(backend_->Backward(problem,
                                   {.x = x.data(),
                                    .grad_y = grad_y.data(),
                                    .grad_x = grad_x[biased].data(),
                                    .weight = weight.data(),
                                    .statistics = {moments.mean.data(), var.data()},
                                    .grad_weight = grad_weight[biased].data(),
                                    .grad_bias = biased ? grad_bias.data() : nullptr},
                                   Place::kHost, {}),
                Outcome::kOk);
    }
    EXPECT_EQ(y[0].values(), y[1].values());
    EXPECT_EQ(grad_x[0].values(), grad_x[1].values());
    EXPECT_EQ(grad_weight[0].values(), grad_weight[1].values());
  }
}

}  // namespace
}  // namespace normd
