#include <cmath>

#include "kernels/cpu/call.h"
#include "kernels/half.h"
#include "kernels/reference.h"

namespace normd::cpu {
namespace {

double ValueAt(DType dtype, const void* x, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(x)[i];
    case DType::kFloat64: return static_cast<const double*>(x)[i];
    case DType::kFloat16: return ToFloat(static_cast<const Float16*>(x)[i]);
    case DType::kBFloat16: return ToFloat(static_cast<const BFloat16*>(x)[i]);
  }
  return 0;
}

// Calls visit(value) for each element of the set, until it returns false.
template <class Visit>
void ForEachOf(const NormProblem& problem, const void* x, int64_t set, Visit visit) {
  const bool per_channel = problem.reduction == Reduction::kPerChannel;
  const int64_t width = per_channel ? 1 : problem.channels / problem.groups;
  const int64_t first_n = per_channel ? 0 : set / problem.groups;
  const int64_t last_n = per_channel ? problem.batch : first_n + 1;
  const int64_t first_c = per_channel ? set : set % problem.groups * width;
  for (int64_t n = first_n; n < last_n; ++n) {
    for (int64_t c = first_c; c < first_c + width; ++c) {
      for (int64_t p = 0; p < problem.positions; ++p) {
        if (!visit(ValueAt(problem.dtype, x, reference::OffsetOf(problem, n, c, p)))) return;
      }
    }
  }
}

}  // namespace

SetMoments ExactMomentsOf(const NormProblem& problem, const void* x, int64_t set) {
  double mean = 0;
  if (problem.center) {
    ForEachOf(problem, x, set, [&](double value) {
      mean += value;
      return !std::isnan(mean);
    });
    mean /= static_cast<double>(problem.set_size());
  }
  double m2 = 0;
  ForEachOf(problem, x, set, [&](double value) {
    m2 += (value - mean) * (value - mean);
    return !std::isnan(m2);
  });
  return {mean, m2};
}

}  // namespace normd::cpu
