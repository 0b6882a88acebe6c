#include "kernels/reference.h"

#include <cmath>
#include <cstring>

#include "kernels/half.h"

namespace normd::reference {
namespace {

// Calls visit(element, channel, set) for each element of the problem.
template <class Visit>
void ForEach(const NormProblem& problem, Visit visit) {
  for (int64_t n = 0; n < problem.batch; ++n) {
    for (int64_t c = 0; c < problem.channels; ++c) {
      for (int64_t p = 0; p < problem.positions; ++p) {
        visit(OffsetOf(problem, n, c, p), c, SetOf(problem, n, c));
      }
    }
  }
}

double WeightOf(const Values& weight, int64_t c) { return weight.empty() ? 1.0 : weight[c]; }

Values InverseDeviation(const NormProblem& problem, const Values& var) {
  Values invstd(var.size());
  for (size_t i = 0; i < var.size(); ++i) invstd[i] = 1.0 / std::sqrt(var[i] + problem.eps);
  return invstd;
}

template <class T>
T At(const void* data, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + i * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void Put(void* data, int64_t i, T value) {
  std::memcpy(static_cast<char*>(data) + i * sizeof(T), &value, sizeof(T));
}

}  // namespace

Values Load(DType dtype, const void* data, int64_t count) {
  Values values(count);
  for (int64_t i = 0; i < count; ++i) {
    switch (dtype) {
      case DType::kFloat32: values[i] = At<float>(data, i); break;
      case DType::kFloat64: values[i] = At<double>(data, i); break;
      case DType::kFloat16: values[i] = ToFloat(At<Float16>(data, i)); break;
      case DType::kBFloat16: values[i] = ToFloat(At<BFloat16>(data, i)); break;
    }
  }
  return values;
}

void Store(DType dtype, const Values& values, void* data) {
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
    const float single = static_cast<float>(values[i]);
    switch (dtype) {
      case DType::kFloat32: Put(data, i, single); break;
      case DType::kFloat64: Put(data, i, values[i]); break;
      case DType::kFloat16: Put(data, i, ToFloat16(single)); break;
      case DType::kBFloat16: Put(data, i, ToBFloat16(single)); break;
    }
  }
}

int64_t OffsetOf(const NormProblem& problem, int64_t n, int64_t c, int64_t p) {
  return problem.format == MemoryFormat::kContiguous
             ? (n * problem.channels + c) * problem.positions + p
             : (n * problem.positions + p) * problem.channels + c;
}

int64_t SetOf(const NormProblem& problem, int64_t n, int64_t c) {
  return problem.reduction == Reduction::kPerChannel
             ? c
             : n * problem.groups + c / (problem.channels / problem.groups);
}

SetMoments MomentsOf(const NormProblem& problem, const Values& x) {
  SetMoments moments{Values(problem.num_sets()), Values(problem.num_sets())};
  if (problem.size() == 0) return moments;
  if (problem.center) {
    ForEach(problem, [&](int64_t i, int64_t, int64_t set) { moments.mean[set] += x[i]; });
    for (double& mean : moments.mean) mean /= static_cast<double>(problem.set_size());
  }
  ForEach(problem, [&](int64_t i, int64_t, int64_t set) {
    const double deviation = x[i] - moments.mean[set];
    moments.m2[set] += deviation * deviation;
  });
  return moments;
}

Values VarianceOf(const NormProblem& problem, const Values& m2) {
  Values var(m2);
  for (double& value : var) value /= static_cast<double>(problem.set_size());
  return var;
}

ForwardResult Forward(const NormProblem& problem, const Values& x, const Parameters& parameters,
                      const Values& mean, const Values& var, const Values& residual,
                      Activation activation) {
  const Values invstd = InverseDeviation(problem, var);
  const bool relu = activation == Activation::kRelu;
  ForwardResult result{Values(problem.size()), std::vector<bool>(relu ? problem.size() : 0)};
  ForEach(problem, [&](int64_t i, int64_t c, int64_t set) {
    const double center = problem.center ? mean[set] : 0.0;
    double y = (x[i] - center) * invstd[set] * WeightOf(parameters.weight, c);
    if (!parameters.bias.empty()) y += parameters.bias[c];
    if (!residual.empty()) y += residual[i];
    if (relu) {
      result.relu_mask[i] = !(y <= 0.0);
      if (y <= 0.0) y = 0.0;
    }
    result.y[i] = y;
  });
  return result;
}

BackwardResult Backward(const NormProblem& problem, const Values& x, const Values& grad_y,
                        const Values& weight, const Values& mean, const Values& var,
                        bool statistics_of_batch, const std::vector<bool>& relu_mask) {
  const Values invstd = InverseDeviation(problem, var);
  BackwardResult result;
  result.grad_x.resize(problem.size());
  result.grad_weight.resize(problem.channels);
  result.grad_bias.resize(problem.channels);
  result.grad_residual = grad_y;
  for (size_t i = 0; i < relu_mask.size(); ++i) {
    if (!relu_mask[i]) result.grad_residual[i] = 0.0;
  }
  const auto normalized = [&](int64_t i, int64_t set) {
    return (x[i] - (problem.center ? mean[set] : 0.0)) * invstd[set];
  };
  // Over each set: sums of g and of g * x^, with g the gradient of x^.
  Values sum_g(problem.num_sets());
  Values sum_gx(problem.num_sets());
  ForEach(problem, [&](int64_t i, int64_t c, int64_t set) {
    const double dy = result.grad_residual[i];
    result.grad_bias[c] += dy;
    result.grad_weight[c] += dy * normalized(i, set);
    sum_g[set] += dy * WeightOf(weight, c);
    sum_gx[set] += dy * WeightOf(weight, c) * normalized(i, set);
  });
  const double count = static_cast<double>(problem.set_size());
  ForEach(problem, [&](int64_t i, int64_t c, int64_t set) {
    double g = result.grad_residual[i] * WeightOf(weight, c);
    if (statistics_of_batch) {
      // A mean that is not subtracted passes no gradient.
      if (problem.center) g -= sum_g[set] / count;
      g -= normalized(i, set) * sum_gx[set] / count;
    }
    result.grad_x[i] = invstd[set] * g;
  });
  return result;
}

}  // namespace normd::reference
