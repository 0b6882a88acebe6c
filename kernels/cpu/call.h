// One call of the CPU backend, as the three geometries take it.
//
//   planes    contiguous tensors whose channels have kSmallestPlane positions or more
//   columns   channels are neighbours in memory: channels_last, or a position or two
//   rows      a set is one contiguous row with a weight an element: LayerNorm
#ifndef NORMD_KERNELS_CPU_CALL_H_
#define NORMD_KERNELS_CPU_CALL_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stop_token>

#include "kernels/backend.h"
#include "kernels/cpu/cache.h"
#include "kernels/cpu/coefficients.h"
#include "kernels/cpu/kernels.h"
#include "kernels/executor.h"
#include "kernels/moments.h"
#include "kernels/problem.h"
#include "kernels/set_constants.h"

namespace normd::cpu {

struct Context {
  Executor& executor;
  std::stop_token stop;
};

// Of what a forward call reads and writes, `count` elements of each.
inline int64_t BytesOf(const NormProblem& problem, int64_t count, const void* y,
                       const Epilogue& epilogue) {
  const int64_t tensors = 1 + (y == nullptr ? 0 : 1) + (epilogue.residual == nullptr ? 0 : 1);
  return tensors * count * static_cast<int64_t>(SizeOf(problem.dtype));
}

inline ForwardTensors TensorsOf(const void* x, void* y, const Epilogue& epilogue, int64_t bytes) {
  return {.x = x,
          .y = y,
          .residual = epilogue.residual,
          .relu = epilogue.activation == Activation::kRelu,
          .relu_mask = epilogue.relu_mask,
          .stream = ShouldStream(bytes, y == x || y == epilogue.residual)};
}

// `ahead` of kernels.h, where tensors of so many bytes are read in the order of memory.
inline int64_t AheadInOrder(int64_t bytes, const NormProblem& problem) {
  constexpr int64_t kAheadBytes = int64_t{1} << 12;
  return bytes > LargestNearBytes() ? kAheadBytes / static_cast<int64_t>(SizeOf(problem.dtype)) : 0;
}

struct ForwardCall {
  const NormProblem& problem;
  const void* x;
  void* y;
  Affine affine;
  Epilogue epilogue;
  // One of both: to be written, or to be used.
  Moments moments;
  Statistics statistics;

  bool by_batch() const { return moments.mean != nullptr; }
  // Of all tensors that are read or written.
  int64_t bytes() const { return BytesOf(problem, problem.size(), y, epilogue); }
  ForwardTensors tensors() const { return TensorsOf(x, y, epilogue, bytes()); }
};

struct RangeCall {
  const NormProblem& problem;
  const ForwardRangeArgs& args;

  // Of all memory that is read or written.
  int64_t bytes() const { return BytesOf(problem, args.count, args.y, args.epilogue); }
  ForwardTensors tensors() const { return TensorsOf(args.x, args.y, args.epilogue, bytes()); }
  SetConstants ConstantsOf(int64_t set) const {
    return SetConstants(problem, args.statistics, set, args.statistics_of_batch);
  }
};

struct BackwardCall {
  const NormProblem& problem;
  const BackwardArgs& args;

  bool wants_sums() const {
    return args.grad_weight != nullptr || args.grad_bias != nullptr ||
           (args.statistics_of_batch && args.grad_x != nullptr);
  }
  bool wants_elements() const { return args.grad_x != nullptr || args.grad_residual != nullptr; }
  // Of all tensors that are read or written.
  int64_t bytes() const {
    const int64_t tensors = (wants_sums() ? 2 : 1) + (args.grad_x == nullptr ? 0 : 1) +
                            (args.grad_residual == nullptr ? 0 : 1);
    return tensors * problem.size() * static_cast<int64_t>(SizeOf(problem.dtype));
  }
  BackwardTensors tensors() const {
    return {.x = args.x,
            .grad_y = args.grad_y,
            .grad_x = args.grad_x,
            .grad_residual = args.grad_residual,
            .relu_mask = args.relu_mask,
            .stream = ShouldStream(bytes(), args.grad_x == args.x || args.grad_x == args.grad_y ||
                                                args.grad_residual == args.grad_y)};
  }
};

// Preconditions: the problem (and the range) is not empty; pointers as backend.h asks.
Outcome ForwardByPlanes(const ForwardCall& call, const Context& context);
Outcome ForwardByColumns(const ForwardCall& call, const Context& context);
Outcome ForwardByRows(const ForwardCall& call, const Context& context);
Outcome RangeByPlanes(const RangeCall& call, const Context& context);
Outcome RangeByColumns(const RangeCall& call, const Context& context);
Outcome RangeByRows(const RangeCall& call, const Context& context);
Outcome BackwardByPlanes(const BackwardCall& call, const Context& context);
Outcome BackwardByColumns(const BackwardCall& call, const Context& context);
Outcome BackwardByRows(const BackwardCall& call, const Context& context);

// Moments of one set in plain double arithmetic, for where the fast sums overflow
// or x holds NaN or Inf.
SetMoments ExactMomentsOf(const NormProblem& problem, const void* x, int64_t set);

// Fast sums of squares that are no less may be trusted, if they are finite: squares below float32's
// range matter only if eps does not hide them.
inline double LeastSound(const NormProblem& problem) {
  if (problem.eps > 1e-20 || problem.dtype == DType::kFloat64) return 0;
  return 1e-30 * static_cast<double>(problem.set_size());
}

// Whether fast sums may be trusted; if not, ExactMomentsOf().
inline bool AreSound(const NormProblem& problem, double m2) {
  return std::isfinite(m2) && m2 >= LeastSound(problem);
}
// Whether all of them may. Doubles have the order of their bits; a loop over these becomes vectors.
inline bool AllAreSound(const NormProblem& problem, int64_t count, const double* m2) {
  const auto least = std::bit_cast<uint64_t>(LeastSound(problem));
  const auto most = std::bit_cast<uint64_t>(std::numeric_limits<double>::max());
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<uint64_t>(m2[i]);
    outside |= (bits - least) | (most - bits);
  }
  return outside >> 63 == 0;
}

}  // namespace normd::cpu

#endif  // NORMD_KERNELS_CPU_CALL_H_
