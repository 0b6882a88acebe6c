#include <cstring>

#include <gtest/gtest.h>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/thread_pool.h"
#include "tests/unit/kernels/problem_cases.h"

namespace normd {
namespace {

// One description for every thread count, every bit the same.
TEST(CpuBackend, IsDeterministicAcrossThreads) {
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
      {.batch = 9000,
       .channels = 100,
       .positions = 1,
       .reduction = Reduction::kPerSampleGroup,
       .dtype = DType::kBFloat16},
  };
  for (const NormProblem& problem : problems) {
    SCOPED_TRACE(Describe(problem));
    const TestTensor x(problem.dtype, RandomValues(problem.dtype, problem.size(), 3, 1, 1));
    const TestTensor grad(problem.dtype, RandomValues(problem.dtype, problem.size(), 0, 1, 2));
    std::vector<std::vector<double>> answers;
    for (const int threads : {1, 2, 3, 7}) {
      ThreadPool executor(threads);
      const auto backend = MakeCpuBackend(executor, {.deterministic = true});
      TestTensor y(problem.dtype, problem.size());
      TestTensor grad_x(problem.dtype, problem.size());
      TestTensor grad_weight(problem.parameter_dtype(), problem.channels);
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

}  // namespace
}  // namespace normd
