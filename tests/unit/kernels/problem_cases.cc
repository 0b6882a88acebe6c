#include "tests/unit/kernels/problem_cases.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <sstream>

#include <gtest/gtest.h>

namespace normd {
namespace {

// Largest error allowed of a result rounded to `dtype`, relative to the largest
// value: one rounding, and what the computing type collects.
double ToleranceOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4e-6;
    case DType::kFloat64: return 1e-12;
    case DType::kFloat16: return 0x1p-11 + 1e-5;
    case DType::kBFloat16: return 0x1p-8 + 1e-5;
  }
  return 0;
}

void ExpectNear(const reference::Values& actual, const reference::Values& expected,
                double tolerance, const std::string& what, double scale = 1e-30) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (double value : expected) scale = std::max(scale, std::abs(value));
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(expected[i]) && std::isnan(actual[i])) continue;
    ASSERT_NEAR(actual[i], expected[i], tolerance * scale) << what << ", element " << i;
  }
}

std::vector<bool> BitsOf(const std::vector<uint8_t>& mask, int64_t count) {
  std::vector<bool> bits;
  for (int64_t i = 0; i < count; ++i) bits.push_back((mask[i / 8] >> (i % 8) & 1) != 0);
  return bits;
}

constexpr size_t kLineBytes = 64;

}  // namespace

TestTensor::TestTensor(DType dtype, int64_t count, bool on_line)
    : dtype_(dtype),
      count_(count),
      bytes_(2 * kLineBytes + static_cast<size_t>(count) * SizeOf(dtype), std::byte{0x5a}) {
  offset_ = kLineBytes - reinterpret_cast<uintptr_t>(bytes_.data()) % kLineBytes;
  if (!on_line) offset_ += SizeOf(dtype);
}

TestTensor::TestTensor(DType dtype, const reference::Values& values, bool on_line)
    : TestTensor(dtype, static_cast<int64_t>(values.size()), on_line) {
  reference::Store(dtype, values, data());
}

reference::Values RandomValues(DType dtype, int64_t count, double mean, double deviation,
                               uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(mean, deviation);
  reference::Values values(static_cast<size_t>(count));
  for (double& value : values) value = normal(generator);
  return TestTensor(dtype, values).values();
}

std::string Describe(const NormProblem& problem) {
  std::ostringstream text;
  text << NameOf(problem.dtype) << " (" << problem.batch << ", " << problem.channels << ", "
       << problem.positions << ") "
       << (problem.format == MemoryFormat::kContiguous ? "contiguous" : "channels_last")
       << (problem.reduction == Reduction::kPerChannel ? " per channel" : " per sample group, ")
       << (problem.reduction == Reduction::kPerChannel ? 0 : problem.groups) << " groups"
       << (problem.center ? "" : ", not centered");
  return text.str();
}

std::vector<NormProblem> ManyProblems() {
  struct Shape {
    int64_t batch, channels, positions;
  };
  // Planes and rows around vector sizes, single values, more than a block.
  const std::vector<Shape> shapes = {
      {2, 1, 1},   {5, 3, 1},    {4, 7, 4},     {3, 8, 9},    {2, 6, 15},   {2, 6, 16},
      {3, 5, 17},  {4, 16, 31},  {3, 4, 49},    {2, 3, 196},  {1, 2, 64},   {9, 33, 25},
      {1, 1, 900}, {7, 65, 1},   {300, 12, 1},  {40, 520, 2}, {2, 3, 5000}, {1, 40, 333},
      {6, 48, 64}, {129, 4, 18}, {33, 1030, 1}, {3, 2, 9001},
  };
  std::vector<NormProblem> problems;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    for (const Shape& shape : shapes) {
      for (const auto format : {MemoryFormat::kContiguous, MemoryFormat::kChannelsLast}) {
        NormProblem problem{.batch = shape.batch,
                            .channels = shape.channels,
                            .positions = shape.positions,
                            .format = format,
                            .dtype = dtype};
        if (problem.set_size() > 1) problems.push_back(problem);
        problem.reduction = Reduction::kPerSampleGroup;
        for (int64_t groups : {int64_t{1}, shape.channels / 2, shape.channels}) {
          if (groups == 0 || shape.channels % groups != 0) continue;
          problem.groups = groups;
          if (problem.set_size() > 1) problems.push_back(problem);
        }
        problem.groups = 1;
        problem.center = false;
        problems.push_back(problem);
      }
    }
  }
  return problems;
}

void ExpectForwardMatches(Backend& backend, const NormProblem& problem,
                          const CallOptions& options) {
  SCOPED_TRACE(Describe(problem));
  const DType parameter = problem.parameter_dtype();
  const auto x = RandomValues(problem.dtype, problem.size(), options.mean, options.deviation, 1);
  reference::Parameters parameters;
  if (options.affine) {
    parameters = {RandomValues(parameter, problem.channels, 1, 0.3, 2),
                  RandomValues(parameter, problem.channels, 0, 0.5, 3)};
  }
  reference::Values residual;
  if (options.residual) residual = RandomValues(problem.dtype, problem.size(), 0, 1, 4);
  auto moments = reference::MomentsOf(problem, x);
  auto var = reference::VarianceOf(problem, moments.m2);
  if (!options.by_batch) {
    for (double& value : moments.mean) value += 0.25;
    for (double& value : var) value *= 1.5;
    if (!problem.center) std::ranges::fill(moments.mean, 0.0);
  }
  const auto activation = options.relu ? Activation::kRelu : Activation::kNone;
  const auto expected =
      reference::Forward(problem, x, parameters, moments.mean, var, residual, activation);

  TestTensor x_memory(problem.dtype, x, options.on_lines);
  TestTensor y_memory(problem.dtype, problem.size(), options.on_lines);
  const TestTensor weight(parameter, parameters.weight);
  const TestTensor bias(parameter, parameters.bias);
  const TestTensor residual_memory(problem.dtype, residual, options.on_lines);
  std::vector<uint8_t> mask(static_cast<size_t>(ReluMaskBytes(problem.size())), 0xa5);
  TestTensor& y = options.in_place ? x_memory : y_memory;
  const Affine affine{options.affine ? weight.data() : nullptr,
                      options.affine ? bias.data() : nullptr};
  const Epilogue epilogue{options.residual ? residual_memory.data() : nullptr, activation,
                          options.relu ? mask.data() : nullptr};
  if (options.by_batch) {
    reference::Values mean(moments.mean.size(), -1), m2(moments.m2.size(), -1);
    ASSERT_EQ(backend.ForwardByBatch(problem,
                                     {.x = x_memory.data(),
                                      .y = y.data(),
                                      .affine = affine,
                                      .moments = {mean.data(), m2.data()},
                                      .epilogue = epilogue},
                                     Place::kHost, {}),
              Outcome::kOk);
    const double rounding = problem.dtype == DType::kFloat64 ? 1e-13 : 2e-6;
    for (size_t set = 0; set < mean.size(); ++set) {
      const double n = static_cast<double>(problem.set_size());
      const double deviation = std::sqrt(moments.m2[set] / n);
      ASSERT_NEAR(mean[set], moments.mean[set],
                  rounding * deviation + 2e-14 * std::abs(moments.mean[set]))
          << "set " << set;
      ASSERT_NEAR(m2[set], moments.m2[set], 4 * rounding * (moments.m2[set] + 1e-20))
          << "set " << set;
    }
  } else {
    ASSERT_EQ(backend.ForwardByStatistics(problem,
                                          {.x = x_memory.data(),
                                           .y = y.data(),
                                           .affine = affine,
                                           .statistics = {moments.mean.data(), var.data()},
                                           .epilogue = epilogue},
                                          Place::kHost, {}),
              Outcome::kOk);
  }
  ExpectNear(y.values(), expected.y, ToleranceOf(problem.dtype), "y");
  if (options.relu) {
    const auto bits = BitsOf(mask, problem.size());
    const auto before = reference::Forward(problem, x, parameters, moments.mean, var, residual);
    for (int64_t i = 0; i < problem.size(); ++i) {
      // A value at the edge may fall to either side.
      if (bits[i] == expected.relu_mask[i]) continue;
      ASSERT_NEAR(before.y[i], 0, 1e-5) << "mask, element " << i;
    }
  }
}

void ExpectBackwardMatches(Backend& backend, const NormProblem& problem,
                           const CallOptions& options) {
  SCOPED_TRACE(Describe(problem));
  const DType parameter = problem.parameter_dtype();
  const auto x = RandomValues(problem.dtype, problem.size(), options.mean, options.deviation, 1);
  const auto grad_y = RandomValues(problem.dtype, problem.size(), 0.1, 1, 5);
  reference::Values weight;
  if (options.affine) weight = RandomValues(parameter, problem.channels, 1, 0.3, 2);
  const auto moments = reference::MomentsOf(problem, x);
  const auto var = reference::VarianceOf(problem, moments.m2);
  std::vector<uint8_t> mask(static_cast<size_t>(ReluMaskBytes(problem.size())));
  std::vector<bool> bits;
  if (options.relu) {
    std::mt19937 generator(6);
    for (uint8_t& byte : mask) byte = static_cast<uint8_t>(generator());
    bits = BitsOf(mask, problem.size());
  }
  const auto expected =
      reference::Backward(problem, x, grad_y, weight, moments.mean, var, options.by_batch, bits);

  const TestTensor x_memory(problem.dtype, x, options.on_lines);
  TestTensor grad_y_memory(problem.dtype, grad_y, options.on_lines);
  TestTensor grad_x_memory(problem.dtype, problem.size(), options.on_lines);
  TestTensor grad_residual(problem.dtype, problem.size(), options.on_lines);
  TestTensor grad_weight(parameter, problem.channels);
  TestTensor grad_bias(parameter, problem.channels);
  const TestTensor weight_memory(parameter, weight);
  TestTensor& grad_x = options.in_place ? grad_y_memory : grad_x_memory;
  ASSERT_EQ(backend.Backward(problem,
                             {.x = x_memory.data(),
                              .grad_y = grad_y_memory.data(),
                              .grad_x = grad_x.data(),
                              .weight = options.affine ? weight_memory.data() : nullptr,
                              .statistics = {moments.mean.data(), var.data()},
                              .statistics_of_batch = options.by_batch,
                              .grad_weight = options.affine ? grad_weight.data() : nullptr,
                              .grad_bias = options.affine ? grad_bias.data() : nullptr,
                              .relu_mask = options.relu ? mask.data() : nullptr,
                              .grad_residual = options.residual ? grad_residual.data() : nullptr},
                             Place::kHost, {}),
            Outcome::kOk);
  // What is subtracted from a gradient may be nearly all of it: its scale is what it
  // was before.
  double scale = 1e-30;
  for (double value : reference::Backward(problem, x, grad_y, weight, moments.mean, var,
                                          /*statistics_of_batch=*/false, bits)
                          .grad_x) {
    scale = std::max(scale, std::abs(value));
  }
  ExpectNear(grad_x.values(), expected.grad_x, 2 * ToleranceOf(problem.dtype), "grad_x", scale);
  if (options.residual) {
    ExpectNear(grad_residual.values(), expected.grad_residual, 0, "grad_residual");
  }
  if (options.affine) {
    // Sums of n values of deviation 1 round by their size, not by the sum's.
    const double n = static_cast<double>(problem.size() / problem.channels);
    const double rounding = (problem.dtype == DType::kFloat64 ? 1e-14 : 1e-6) * (std::sqrt(n) + 1);
    const auto actual_weight = grad_weight.values();
    const auto actual_bias = grad_bias.values();
    for (int64_t c = 0; c < problem.channels; ++c) {
      ASSERT_NEAR(actual_weight[c], expected.grad_weight[c],
                  rounding + 1e-6 * std::abs(expected.grad_weight[c]))
          << "channel " << c;
      ASSERT_NEAR(actual_bias[c], expected.grad_bias[c],
                  rounding + 1e-6 * std::abs(expected.grad_bias[c]))
          << "channel " << c;
    }
  }
}

}  // namespace normd
