// Mean and sum of squared deviations, in one pass over memory.
//
// Values are summed after a shift, block by block, and each block is shifted by the
// mean of the block before. What the shift then misses is no more than what the
// values themselves vary from block to block, so the squares stay of the size of
// the answer whatever the mean is, and blocks merge without loss (Chan, Golub,
// LeVeque 1979).
#if defined(NORMD_KERNELS_CPU_MOMENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_MOMENTS_INL_H_
#undef NORMD_KERNELS_CPU_MOMENTS_INL_H_
#else
#define NORMD_KERNELS_CPU_MOMENTS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/sums-inl.h"
#include "kernels/shift.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class E>
HWY_INLINE ComputeType<E> ScalarAt(const E* x, int64_t i) {
  if constexpr (std::is_same_v<E, float> || std::is_same_v<E, double>) {
    return x[i];
  } else {
    return ToFloat(x[i]);
  }
}

template <class E>
struct MomentSums {
  using D = Tag<E>;
  using V = hn::Vec<D>;

  template <int k>
  HWY_INLINE void Add(int64_t i) {
    const V deviation = hn::Sub(LoadElements(d, x + i), shift);
    sum.template At<k>() = hn::Add(sum.template At<k>(), deviation);
    square.template At<k>() = hn::MulAdd(deviation, deviation, square.template At<k>());
  }
  template <int k, class M>
  HWY_INLINE void Add(int64_t i, M mask) {
    const V deviation = hn::IfThenElseZero(mask, hn::Sub(LoadElements(d, x + i), shift));
    sum.template At<k>() = hn::Add(sum.template At<k>(), deviation);
    square.template At<k>() = hn::MulAdd(deviation, deviation, square.template At<k>());
  }
  HWY_INLINE void Clear() {
    sum.Clear();
    square.Clear();
  }

  D d;
  const E* x = nullptr;
  V shift;
  Accumulators<D> sum;
  Accumulators<D> square;
};

// The next shift, from `n` values' sums of x - shift and of their squares.
HWY_INLINE double ShiftOfSums(double shift, double sum, double square, double n) {
  const double mean = sum / n;
  return ShiftNear(shift + mean, std::sqrt(square / n - mean * mean));
}

// A first shift: the mean of the first few vectors, themselves shifted by the
// first value. A single outlier then costs a few bits, not the answer.
template <class E>
HWY_INLINE ComputeType<E> PilotShift(const E* x, int64_t n) {
  using T = ComputeType<E>;
  const Tag<E> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const T first = ScalarAt(x, 0);
  const int64_t end = std::min<int64_t>(n, 4 * lanes) / lanes * lanes;
  auto sum = hn::Zero(d), square = hn::Zero(d);
  for (int64_t i = 0; i < end; i += lanes) {
    const auto deviation = hn::Sub(LoadElements(d, x + i), hn::Set(d, first));
    sum = hn::Add(sum, deviation);
    square = hn::MulAdd(deviation, deviation, square);
  }
  return static_cast<T>(ShiftOfSums(first, hn::GetLane(hn::SumOfLanes(d, sum)),
                                    hn::GetLane(hn::SumOfLanes(d, square)),
                                    static_cast<double>(end)));
}

template <class E>
PartialMoments MomentsOfShortRuns(const E* x, const Runs& runs) {
  PartialMoments total;
  for (int64_t run = 0; run < runs.count; ++run) {
    for (int64_t i = 0; i < runs.length; ++i) {
      total.Merge({1, static_cast<double>(ScalarAt(x, run * runs.stride + i)), 0});
    }
  }
  return total;
}

// Merges a block's sums into `total`, and moves the shift to its mean.
template <class T>
HWY_INLINE void MergeBlock(double elements, double sum, double square, T& shift,
                           PartialMoments& total) {
  const double mean = static_cast<double>(shift) + sum / elements;
  const double m2 = square - sum * (sum / elements);
  total.Merge({elements, mean, m2 < 0 ? 0 : m2});
  shift = static_cast<T>(ShiftOfSums(shift, sum, square, elements));
}

template <class E>
PartialMoments MomentsOfLongRuns(const E* x, const Runs& runs) {
  MomentSums<E> sums;
  const auto d = sums.d;
  PartialMoments total;
  ComputeType<E> shift = PilotShift(x, runs.length);
  sums.shift = hn::Set(d, shift);
  sums.Clear();
  ForEachPiece(
      d, runs,
      [&](int64_t run, int64_t begin, int64_t n) NORMD_INLINE_LAMBDA {
        sums.x = x + run * runs.stride + begin;
        AddRun(d, n, sums);
      },
      [&](int64_t elements) NORMD_INLINE_LAMBDA {
        MergeBlock(static_cast<double>(elements), sums.sum.Total(), sums.square.Total(), shift,
                   total);
        sums.shift = hn::Set(d, shift);
        sums.Clear();
      });
  return total;
}

template <class E>
void MomentsOfSetsTogether(const E* x, int64_t sets, const Runs& runs, PartialMoments* moments) {
  MomentSums<E> sums;
  const auto d = sums.d;
  WaitingSums<Tag<E>, 2> waiting(sets);
  std::vector<ComputeType<E>> shift(static_cast<size_t>(sets));
  for (int64_t set = 0; set < sets; ++set) {
    shift[static_cast<size_t>(set)] = PilotShift(x + set * runs.length, runs.length);
    moments[set] = {};
  }
  ForEachShortRun(
      d, sets, runs,
      [&](int64_t run, int64_t set) NORMD_INLINE_LAMBDA {
        sums.x = x + run * runs.stride + set * runs.length;
        sums.shift = hn::Set(d, shift[static_cast<size_t>(set)]);
        sums.Clear();
        AddRun(d, runs.length, sums);
        waiting.Add(set, 0, sums.sum.Sum());
        waiting.Add(set, 1, sums.square.Sum());
      },
      [&](int64_t elements) NORMD_INLINE_LAMBDA {
        for (int64_t set = 0; set < sets; ++set) {
          const double sum = waiting.Take(set, 0);
          MergeBlock(static_cast<double>(elements), sum, waiting.Take(set, 1),
                     shift[static_cast<size_t>(set)], moments[set]);
        }
      });
}

template <class E>
void MomentsOfRuns(const void* data, int64_t sets, const Runs& runs, PartialMoments* moments) {
  const E* x = static_cast<const E*>(data);
  const Tag<E> d;
  if (AreReadTogether(d, sets, runs)) {
    MomentsOfSetsTogether(x, sets, runs, moments);
    return;
  }
  for (int64_t set = 0; set < sets; ++set, x += runs.length) {
    const bool is_short = runs.length < static_cast<int64_t>(hn::Lanes(d));
    moments[set] = is_short ? MomentsOfShortRuns(x, runs) : MomentsOfLongRuns(x, runs);
  }
}

// Columns [j, j + Lanes) of `count` rows added to the sums of these columns.
template <class E, class Keep>
HWY_INLINE void AddRows(const E* x, int64_t count, int64_t stride, const ComputeType<E>* shift,
                        ComputeType<E>* sum, ComputeType<E>* square, Keep keep) {
  const Tag<E> d;
  const auto center = hn::LoadU(d, shift);
  auto s0 = hn::LoadU(d, sum), q0 = hn::LoadU(d, square);
  auto s1 = hn::Zero(d), q1 = hn::Zero(d);
  int64_t row = 0;
  for (; row + 2 <= count; row += 2) {
    const auto a = keep(hn::Sub(LoadElements(d, x + row * stride), center));
    const auto b = keep(hn::Sub(LoadElements(d, x + (row + 1) * stride), center));
    s0 = hn::Add(s0, a);
    s1 = hn::Add(s1, b);
    q0 = hn::MulAdd(a, a, q0);
    q1 = hn::MulAdd(b, b, q1);
  }
  if (row < count) {
    const auto a = keep(hn::Sub(LoadElements(d, x + row * stride), center));
    s0 = hn::Add(s0, a);
    q0 = hn::MulAdd(a, a, q0);
  }
  hn::StoreU(hn::Add(s0, s1), d, sum);
  hn::StoreU(hn::Add(q0, q1), d, square);
}

template <class E>
void MomentsOfColumns(const void* data, const Matrix& matrix, void* scratch, double* mean,
                      double* m2) {
  using T = ComputeType<E>;
  const Tag<E> d;
  const E* x = static_cast<const E*>(data);
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t columns = matrix.columns;
  const int64_t stride = matrix.stride;
  if (columns < lanes || matrix.rows == 1) {
    for (int64_t j = 0; j < columns; ++j) {
      const PartialMoments moments = MomentsOfShortRuns(x + j, {matrix.rows, 1, stride});
      mean[j] = moments.mean;
      m2[j] = moments.m2;
    }
    return;
  }

  T* HWY_RESTRICT shift = static_cast<T*>(scratch);
  T* HWY_RESTRICT sum = shift + columns;
  T* HWY_RESTRICT square = sum + columns;
  // How many rows are read side by side: enough to keep the sums in registers for a
  // while, few enough for the prefetcher to follow.
  constexpr int64_t kTogether = 8;
  const auto add = [&](int64_t begin, int64_t count) {
    const E* from = x + begin * stride;
    int64_t j = 0;
    for (; j + lanes <= columns; j += lanes) {
      AddRows(from + j, count, stride, shift + j, sum + j, square + j, [](auto v) { return v; });
    }
    if (j < columns) {
      const auto fresh = hn::Not(hn::FirstN(d, static_cast<size_t>(j + lanes - columns)));
      j = columns - lanes;
      AddRows(from + j, count, stride, shift + j, sum + j, square + j,
              [&](auto v) { return hn::IfThenElseZero(fresh, v); });
    }
  };
  const auto clear = [&] {
    std::fill(sum, sum + columns, T{0});
    std::fill(square, square + columns, T{0});
  };

  // The first shift: the mean of the first rows, shifted by the first of them.
  const int64_t pilot = std::min(kTogether, matrix.rows);
  for (int64_t j = 0; j < columns; ++j) shift[j] = ScalarAt(x, j);
  clear();
  add(0, pilot);
  for (int64_t j = 0; j < columns; ++j)
    shift[j] = static_cast<T>(ShiftOfSums(shift[j], sum[j], square[j], static_cast<double>(pilot)));
  clear();

  double done = 0;
  for (int64_t begin = 0; begin < matrix.rows;) {
    const int64_t end = std::min(begin + kBlockRows, matrix.rows);
    const double n = static_cast<double>(end - begin);
    for (; begin < end; begin += kTogether) add(begin, std::min(kTogether, end - begin));
    begin = end;
    // PartialMoments::Merge(), all columns alike.
    const double total = done + n;
    const double part = n / total;
    for (int64_t j = 0; j < columns; ++j) {
      const double s = sum[j];
      const double block_m2 = square[j] - s * (s / n);
      const double block_mean = shift[j] + s / n;
      const double before = done == 0 ? block_mean : mean[j];
      const double delta = block_mean - before;
      mean[j] = before + delta * part;
      m2[j] =
          (done == 0 ? 0 : m2[j]) + (block_m2 < 0 ? 0 : block_m2) + delta * delta * (done * part);
      shift[j] = static_cast<T>(ShiftOfSums(shift[j], s, square[j], n));
    }
    clear();
    done = total;
  }
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
