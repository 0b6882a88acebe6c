// Where |mean| >> deviation, and float32 arithmetic that is not careful loses the
// answer (PyTorch 1.13 is off by up to 5.7 in y).
#include <algorithm>
#include <cmath>

#include <gtest/gtest.h>

#include "tests/unit/kernels/backends.h"
#include "tests/unit/kernels/problem_cases.h"

namespace normd {
namespace {

struct Distribution {
  double mean;
  double deviation;
};

constexpr Distribution kDistributions[] = {{0, 1}, {1e4, 1e-2}, {1e6, 1}, {100, 1e-3}};

class Exactness : public BackendTest {
 protected:
  static std::vector<NormProblem> Problems() {
    std::vector<NormProblem> problems;
    for (const auto format : {MemoryFormat::kContiguous, MemoryFormat::kChannelsLast}) {
      // The last two are oneDNN's catastrophic-cancellation shapes.
      for (const auto& [batch, channels, positions] :
           {std::tuple{8, 16, 1024}, {32, 24, 49}, {4, 3, 20000}, {2, 128, 4}, {2, 1024, 4}}) {
        problems.push_back(
            {.batch = batch, .channels = channels, .positions = positions, .format = format});
        if (positions > 4) {
          problems.push_back({.batch = batch,
                              .channels = channels,
                              .positions = positions,
                              .groups = channels,
                              .reduction = Reduction::kPerSampleGroup,
                              .format = format});
        }
      }
    }
    problems.push_back(
        {.batch = 50, .channels = 769, .positions = 1, .reduction = Reduction::kPerSampleGroup});
    return problems;
  }
};

NORMD_FOR_EVERY_BACKEND(Exactness);

TEST_P(Exactness, ForwardIsWithinOneHundredThousandth) {
  for (const auto& [mean, deviation] : kDistributions) {
    for (const NormProblem& problem : Problems()) {
      SCOPED_TRACE(Describe(problem));
      const auto x = RandomValues(problem.dtype, problem.size(), mean, deviation, 1);
      const TestTensor x_memory(problem.dtype, x);
      TestTensor y(problem.dtype, problem.size());
      reference::Values means(problem.num_sets()), m2(problem.num_sets());
      ASSERT_EQ(
          backend_->ForwardByBatch(
              problem, {.x = x_memory.data(), .y = y.data(), .moments = {means.data(), m2.data()}},
              Place::kHost, {}),
          Outcome::kOk);
      const auto moments = reference::MomentsOf(problem, x);
      const auto expected = reference::Forward(problem, x, {}, moments.mean,
                                               reference::VarianceOf(problem, moments.m2));
      double worst = 0;
      const auto actual = y.values();
      for (size_t i = 0; i < actual.size(); ++i) {
        worst = std::max(worst, std::abs(actual[i] - expected.y[i]));
      }
      EXPECT_LE(worst, 1e-5);
    }
  }
}

TEST_P(Exactness, GradientIsWithinOneHundredThousandthOfItsSize) {
  for (const auto& [mean, deviation] : kDistributions) {
    for (const NormProblem& problem : Problems()) {
      SCOPED_TRACE(Describe(problem));
      const auto x = RandomValues(problem.dtype, problem.size(), mean, deviation, 1);
      const auto grad_y = RandomValues(problem.dtype, problem.size(), 0, 1, 2);
      const auto moments = reference::MomentsOf(problem, x);
      const auto var = reference::VarianceOf(problem, moments.m2);
      const TestTensor x_memory(problem.dtype, x);
      const TestTensor grad_y_memory(problem.dtype, grad_y);
      TestTensor grad_x(problem.dtype, problem.size());
      ASSERT_EQ(backend_->Backward(problem,
                                   {.x = x_memory.data(),
                                    .grad_y = grad_y_memory.data(),
                                    .grad_x = grad_x.data(),
                                    .statistics = {moments.mean.data(), var.data()}},
                                   Place::kHost, {}),
                Outcome::kOk);
      const auto expected =
          reference::Backward(problem, x, grad_y, {}, moments.mean, var, true).grad_x;
      double worst = 0, scale = 0;
      const auto actual = grad_x.values();
      for (size_t i = 0; i < actual.size(); ++i) {
        worst = std::max(worst, std::abs(actual[i] - expected[i]));
        scale = std::max(scale, std::abs(expected[i]));
      }
      EXPECT_LE(worst, 1e-5 * scale);
    }
  }
}

// A first value far from all others, values in order, two far clusters: the shift
// follows the data.
TEST_P(Exactness, MomentsFollowValuesThatWander) {
  for (const auto format : {MemoryFormat::kContiguous, MemoryFormat::kChannelsLast}) {
    const NormProblem problem{.batch = 1, .channels = 3, .positions = 50000, .format = format};
    for (int kind = 0; kind < 3; ++kind) {
      auto x = RandomValues(problem.dtype, problem.size(), 0, 1, 1);
      for (int64_t c = 0; c < 3; ++c) {
        for (int64_t p = 0; p < problem.positions; ++p) {
          double& value = x[reference::OffsetOf(problem, 0, c, p)];
          if (kind == 0 && p == 0) value = 1e6;
          if (kind == 1) value = static_cast<double>(p);
          if (kind == 2) value += p < 300 ? 1e6 : 0;
        }
      }
      const TestTensor x_memory(problem.dtype, x);
      x = x_memory.values();
      TestTensor y(problem.dtype, problem.size());
      reference::Values mean(3), m2(3);
      ASSERT_EQ(
          backend_->ForwardByBatch(
              problem, {.x = x_memory.data(), .y = y.data(), .moments = {mean.data(), m2.data()}},
              Place::kHost, {}),
          Outcome::kOk);
      const auto expected = reference::MomentsOf(problem, x);
      for (int c = 0; c < 3; ++c) {
        const double deviation = std::sqrt(expected.m2[c] / 50000);
        EXPECT_NEAR(mean[c], expected.mean[c], 1e-6 * deviation) << "kind " << kind;
        EXPECT_NEAR(m2[c], expected.m2[c], 4e-6 * expected.m2[c]) << "kind " << kind;
      }
    }
  }
}

}  // namespace
}  // namespace normd
