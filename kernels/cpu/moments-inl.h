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
#include "kernels/cpu/coefficients.h"
#include "kernels/cpu/column_sums-inl.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/set_constants-inl.h"
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

// A run whose values and squares are summed, after a shift. kShifted: by more than 0.
template <class E, bool kShifted>
struct MomentRun {
  using D = Tag<E>;
  using V = hn::Vec<D>;
  struct Sums {
    Accumulators<D> first, second;
  };

  template <int k>
  HWY_INLINE void Add(int64_t i, Sums& sums) const {
    Collect<k>(Deviation(LoadElements(D(), x + i)), sums);
  }
  template <int k, class M>
  HWY_INLINE void Add(int64_t i, Sums& sums, M mask) const {
    Collect<k>(hn::IfThenElseZero(mask, Deviation(LoadElements(D(), x + i))), sums);
  }
  template <int k>
  HWY_INLINE void AddTwo(int64_t i, Sums& sums) const {
    const Pair<D> values = LoadPair(D(), x + i);
    if (ahead != 0) FetchPairAhead(D(), x + i + ahead);
    Collect<k>(Deviation(values.a), sums);
    Collect<k + 1>(Deviation(values.b), sums);
  }
  HWY_INLINE V Deviation(V v) const { return kShifted ? hn::Sub(v, shift) : v; }
  template <int k>
  static HWY_INLINE void Collect(V deviation, Sums& sums) {
    V& sum = sums.first.template At<k>();
    V& square = sums.second.template At<k>();
    sum = hn::Add(sum, deviation);
    square = hn::MulAdd(deviation, deviation, square);
  }
  HWY_INLINE void Skip(int64_t n) { x += n; }

  const E* x;
  V shift;
  int64_t ahead;
};

// Calls add(run) with the run of those elements.
template <class E, class Add>
HWY_INLINE void WithMomentRun(const E* x, ComputeType<E> shift, int64_t ahead, Add add) {
  const auto center = hn::Set(Tag<E>(), shift);
  if (kAlwaysShifts<E> || shift != 0) {
    MomentRun<E, true> run{x, center, ahead};
    add(run);
  } else {
    MomentRun<E, kAlwaysShifts<E>> run{x, center, ahead};
    add(run);
  }
}

// The next shift, from `n` values' sums of x - shift and of their squares.
template <class E>
HWY_INLINE ComputeType<E> ShiftOfSums(double shift, double sum, double square, double n) {
  const double missed = sum / n, mean = shift + missed, var = square / n - missed * missed;
  if (!kAlwaysShifts<E> && normd::IsNearZero(mean, var)) return 0;
  return static_cast<ComputeType<E>>(ShiftNear(mean, var));
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
  return ShiftOfSums<E>(first, hn::GetLane(hn::SumOfLanes(d, sum)),
                        hn::GetLane(hn::SumOfLanes(d, square)), static_cast<double>(end));
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

// Merges the sums of a block, shifted by `shift`, into `total`.
HWY_INLINE void Merge(double elements, double shift, double sum, double square,
                      PartialMoments& total) {
  const double missed = sum / elements;
  const double m2 = square - sum * missed;
  total.Merge({elements, shift + missed, m2 < 0 ? 0 : m2});
}

// The same, and moves the shift to the block's mean.
template <class E>
HWY_INLINE void MergeBlock(double elements, double sum, double square, ComputeType<E>& shift,
                           PartialMoments& total) {
  Merge(elements, static_cast<double>(shift), sum, square, total);
  shift = ShiftOfSums<E>(shift, sum, square, elements);
}

// A set that is one run and block: shifted by its first value, which is at hand at once (halves: by
// 0), and only if that was far off (2.4 deviations) a second time, by the mean.
template <class E>
PartialMoments MomentsOfBlock(const E* x, const Runs& runs, const Meanwhile& meanwhile) {
  const Tag<E> d;
  const int64_t n = runs.length;
  ComputeType<E> shift = kAlwaysShifts<E> ? ScalarAt(x, 0) : ComputeType<E>{0};
  const double elements = static_cast<double>(n);
  double sum = 0, square = 0;
  Turns turns(meanwhile, runs, sizeof(E));
  const auto add_up = [&]() NORMD_INLINE_LAMBDA {
    TwoSums<Tag<E>> sums;
    sums.Clear();
    WithMomentRun(x, shift, runs.ahead,
                  [&](auto& run) NORMD_INLINE_LAMBDA { AddRunInTurns(d, n, run, sums, turns); });
    sum = SumInDouble(d, sums.first);
    square = SumInDouble(d, sums.second);
  };
  add_up();
  if (HWY_UNLIKELY(sum * sum > 0.85 * elements * square)) {
    shift = ShiftOfSums<E>(shift, sum, square, elements);
    add_up();
  }
  PartialMoments moments;
  Merge(elements, static_cast<double>(shift), sum, square, moments);
  return moments;
}

template <class E>
PartialMoments MomentsOfLongRuns(const E* x, const Runs& runs, const Meanwhile& meanwhile) {
  const Tag<E> d;
  if (runs.count == 1 && runs.length <= BlockOf(d)) {
    return MomentsOfBlock(x, runs, meanwhile);
  }
  PartialMoments total;
  Turns turns(meanwhile, runs, sizeof(E));
  TwoSums<Tag<E>> sums;
  sums.Clear();
  ComputeType<E> shift = PilotShift(x, runs.length);
  ForEachPiece(
      d, runs,
      [&](int64_t run, int64_t begin, int64_t n) NORMD_INLINE_LAMBDA {
        WithMomentRun(x + run * runs.stride + begin, shift, runs.ahead,
                      [&](auto& piece)
                          NORMD_INLINE_LAMBDA { AddRunInTurns(d, n, piece, sums, turns); });
      },
      [&](int64_t elements) NORMD_INLINE_LAMBDA {
        MergeBlock<E>(static_cast<double>(elements), SumInDouble(d, sums.first),
                      SumInDouble(d, sums.second), shift, total);
        sums.Clear();
      });
  return total;
}

// Of columns: x - shift, and its square.
template <class E, bool kIsShifted = true>
struct ColumnMoments {
  using D = Tag<E>;
  using V = hn::Vec<D>;
  static constexpr int64_t kInputs = 1;
  static constexpr bool kShifted = kIsShifted;

  HWY_INLINE void Fetch(int64_t i) const { FetchPairNear(D(), x + i); }
  HWY_INLINE void AddTwo(int64_t i, const Pair<D>& shift, Pair<D>& sum, Pair<D>& square) const {
    const Pair<D> values = LoadPair(D(), x + i);
    Collect(hn::Sub(values.a, shift.a), sum.a, square.a);
    Collect(hn::Sub(values.b, shift.b), sum.b, square.b);
  }
  template <class Keep>
  HWY_INLINE void Add(int64_t i, V shift, Keep keep, V& sum, V& square) const {
    Collect(keep(hn::Sub(LoadElements(D(), x + i), shift)), sum, square);
  }
  static HWY_INLINE void Collect(V deviation, V& sum, V& square) {
    sum = hn::Add(sum, deviation);
    square = hn::MulAdd(deviation, deviation, square);
  }

  const E* x;
};

// Sets whose runs are a few vectors, as a matrix with a column for each position of each
// set: a position's sums wait for the next run, and a set's are added up in the end. Halves are
// shifted by 0, and summed again if that was far off for some.
template <class E>
void MomentsOfTinySets(const E* x, int64_t sets, const Runs& runs, PartialMoments* moments) {
  using T = ComputeType<E>;
  const Tag<E> d;
  const int64_t columns = sets * runs.length;
  const Scratch memory(static_cast<size_t>(3 * columns + sets) * sizeof(T));
  T* const shift = memory.Get<T>();
  T* const sum = shift + columns;
  T* const square = sum + columns;
  T* const shift_of = square + columns;  // of sets
  for (int64_t set = 0; set < sets; ++set) {
    shift_of[set] = kAlwaysShifts<E> ? PilotShift(x + set * runs.length, runs.length) : T{0};
    moments[set] = {};
  }
  // Returns whether the shift of a set was far off.
  const auto add_block = [&](int64_t begin, int64_t rows) {
    const bool is_last = begin + rows == runs.count;
    const bool are_shifted = kAlwaysShifts<E> || AreShifted(sets, shift_of);
    if (are_shifted) {
      for (int64_t set = 0; set < sets; ++set) {
        std::fill_n(shift + set * runs.length, runs.length, shift_of[set]);
      }
      ToPairs<E>(columns, shift, shift);
    }
    std::fill_n(sum, 2 * columns, T{0});  // and the squares
    WithShifts<E>(are_shifted, [&](auto is_shifted) NORMD_INLINE_LAMBDA {
      SumColumns<E>(ColumnMoments<E, is_shifted>{x + begin * runs.stride},
                    {rows, columns, runs.stride}, shift, sum, square);
    });
    FromPairs<E>(columns, sum);
    FromPairs<E>(columns, square);
    bool any_far = false;
    const double elements = static_cast<double>(rows * runs.length);
    for (int64_t set = 0; set < sets; ++set) {
      const double s = SumOfArray(d, sum + set * runs.length, runs.length);
      const double q = SumOfArray(d, square + set * runs.length, runs.length);
      const T shifted_by = shift_of[set];
      const bool is_far = s * s > 0.85 * elements * q;
      any_far |= is_far;
      if (is_far || !is_last) shift_of[set] = ShiftOfSums<E>(shifted_by, s, q, elements);
      Merge(elements, static_cast<double>(shifted_by), s, q, moments[set]);
    }
    return any_far;
  };
  for (int64_t begin = 0; begin < runs.count; begin += kBlockRows<E>) {
    const int64_t rows = std::min(kBlockRows<E>, runs.count - begin);
    if (add_block(begin, rows) && begin == 0 && !kAlwaysShifts<E>) {
      std::fill_n(moments, sets, PartialMoments{});
      add_block(begin, rows);
    }
  }
}

template <class E>
void MomentsOfSetsTogether(const E* x, int64_t sets, const Runs& runs, PartialMoments* moments,
                           const Meanwhile& meanwhile) {
  const Tag<E> d;
  Turns turns(meanwhile, runs, sizeof(E));
  WaitingSums<Tag<E>> waiting(sets);
  std::vector<ComputeType<E>> shift(static_cast<size_t>(sets));
  for (int64_t set = 0; set < sets; ++set) {
    shift[static_cast<size_t>(set)] = PilotShift(x + set * runs.length, runs.length);
    moments[set] = {};
  }
  ForEachShortRun(
      d, sets, runs,
      [&](int64_t run, int64_t set) NORMD_INLINE_LAMBDA {
        TwoSums<Tag<E>> sums;
        sums.Clear();
        WithMomentRun(x + run * runs.stride + set * runs.length, shift[static_cast<size_t>(set)],
                      runs.ahead, [&](auto& values) NORMD_INLINE_LAMBDA {
                        AddRunInTurns(d, runs.length, values, sums, turns);
                      });
        waiting.Add(set, sums);
      },
      [&](int64_t elements) NORMD_INLINE_LAMBDA {
        for (int64_t set = 0; set < sets; ++set) {
          const double sum = waiting.Take(set, 0);
          MergeBlock<E>(static_cast<double>(elements), sum, waiting.Take(set, 1),
                        shift[static_cast<size_t>(set)], moments[set]);
        }
      });
}

template <class E>
void MomentsOfRuns(const void* data, int64_t sets, const Runs& runs, PartialMoments* moments,
                   const Meanwhile& meanwhile) {
  const E* x = static_cast<const E*>(data);
  const Tag<E> d;
  if (AreTiny(d, sets, runs)) {
    MomentsOfTinySets(x, sets, runs, moments);
    return;
  }
  if (AreReadTogether(d, sets, runs)) {
    MomentsOfSetsTogether(x, sets, runs, moments, meanwhile);
    return;
  }
  for (int64_t set = 0; set < sets; ++set, x += runs.length) {
    const bool is_short = runs.length < static_cast<int64_t>(hn::Lanes(d));
    moments[set] = is_short ? MomentsOfShortRuns(x, runs) : MomentsOfLongRuns(x, runs, meanwhile);
  }
}

// PartialMoments::Merge() of columns, all of which have `count` rows in mean and m2, and
// `more_count` more that are added.
template <class D64>
HWY_INLINE void MergeMomentsAt(D64 d, int64_t j, double count, double more_count,
                               hn::Vec<D64> more_mean, hn::Vec<D64> more_m2, double* mean,
                               double* m2) {
  const double part = more_count / (count + more_count);
  const auto before = hn::LoadU(d, mean + j);
  const auto delta = hn::Sub(more_mean, before);
  hn::StoreU(hn::MulAdd(delta, hn::Set(d, part), before), d, mean + j);
  hn::StoreU(hn::MulAdd(hn::Mul(delta, delta), hn::Set(d, count * part),
                        hn::Add(hn::LoadU(d, m2 + j), more_m2)),
             d, m2 + j);
}

// MergeBlock() for columns, all of which have `done` rows in mean and m2, and `n` more in
// sum and square. The same operations in each column, on whatever vectors it falls.
template <class D64, class T>
HWY_INLINE void MergeColumnsAt(D64 d, int64_t j, double done, double n, const T* shift,
                               const T* sum, const T* square, double* mean, double* m2) {
  const auto inverse = hn::Set(d, 1.0 / n);
  const auto s = LoadDoubles(d, sum + j);
  const auto q = LoadDoubles(d, square + j);
  const auto center = LoadDoubles(d, shift + j);
  const auto missed = hn::Mul(s, inverse);
  const auto block_mean = hn::Add(center, missed);
  // Not Max(): a NaN must stay one.
  const auto m2_of_block = hn::Sub(q, hn::Mul(s, missed));
  const auto block_m2 = hn::IfThenZeroElse(hn::Lt(m2_of_block, hn::Zero(d)), m2_of_block);
  if (done == 0) {
    hn::StoreU(block_mean, d, mean + j);
    hn::StoreU(block_m2, d, m2 + j);
  } else {
    MergeMomentsAt(d, j, done, n, block_mean, block_m2, mean, m2);
  }
}

inline void MergeMomentsOfColumns(int64_t columns, double count, double* HWY_RESTRICT mean,
                                  double* HWY_RESTRICT m2, double more_count,
                                  const double* HWY_RESTRICT more_mean,
                                  const double* HWY_RESTRICT more_m2) {
  ForEachDouble(columns, [&](auto d, int64_t j) NORMD_INLINE_LAMBDA {
    MergeMomentsAt(d, j, count, more_count, hn::LoadU(d, more_mean + j), hn::LoadU(d, more_m2 + j),
                   mean, m2);
  });
}

template <class T>
void MergeColumns(int64_t columns, double done, double n, const T* HWY_RESTRICT shift,
                  const T* HWY_RESTRICT sum, const T* HWY_RESTRICT square,
                  double* HWY_RESTRICT mean, double* HWY_RESTRICT m2) {
  ForEachDouble(columns, [&](auto d, int64_t j) NORMD_INLINE_LAMBDA {
    MergeColumnsAt(d, j, done, n, shift, sum, square, mean, m2);
  });
}

// Moves the shifts of columns to the means of the `n` rows in sum and square, or to 0 where halves
// are near it.
template <class E, class T = ComputeType<E>>
void ShiftColumns(int64_t columns, int64_t n, const T* HWY_RESTRICT sum,
                  const T* HWY_RESTRICT square, T* HWY_RESTRICT shift) {
  const Tag<E> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto inverse = hn::Set(d, T{1} / static_cast<T>(n));
  const auto moved = [&](hn::Vec<decltype(d)> from, auto s, auto q) NORMD_INLINE_LAMBDA {
    const auto missed = hn::Mul(s, inverse);
    const auto var = hn::Sub(hn::Mul(q, inverse), hn::Mul(missed, missed));
    const auto mean = hn::Add(from, missed);
    const auto near = ShiftsNear(d, mean, var);
    return kAlwaysShifts<E> ? near : hn::IfThenZeroElse(IsNearZero(d, mean, var), near);
  };
  int64_t j = 0;
  for (; j + lanes <= columns; j += lanes) {
    const auto from = hn::LoadU(d, shift + j);
    hn::StoreU(moved(from, hn::LoadU(d, sum + j), hn::LoadU(d, square + j)), d, shift + j);
  }
  if (j == columns) return;
  const size_t rest = static_cast<size_t>(columns - j);
  const auto part = [&](const T* from) { return LoadPartial(d, from + j, rest); };
  StorePartial(d, moved(part(shift), part(sum), part(square)), shift + j, rest);
}

// Whether the mean of the `n` rows of a column in sum and square is more than 2.4 deviations from
// what they were shifted by.
template <class T>
bool AreFar(int64_t columns, int64_t n, const T* sum, const T* square) {
  const hn::ScalableTag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto most = hn::Set(d, T(0.85) * static_cast<T>(n));
  const auto far = [&](auto s, auto q) { return hn::Gt(hn::Mul(s, s), hn::Mul(most, q)); };
  auto any = hn::FirstN(d, 0);
  int64_t j = 0;
  for (; j + lanes <= columns; j += lanes) {
    any = hn::Or(any, far(hn::LoadU(d, sum + j), hn::LoadU(d, square + j)));
  }
  if (j < columns) {
    const size_t rest = static_cast<size_t>(columns - j);
    any = hn::Or(any, far(LoadPartial(d, sum + j, rest), LoadPartial(d, square + j, rest)));
  }
  return !hn::AllFalse(d, any);
}

// Rows that the first shift comes from, and those that tell whether halves need one: so many that
// among thousands of columns none is taken to be far from 0 by chance.
inline constexpr int64_t kPilotRows = 8;
inline constexpr int64_t kRowsThatTell = 16;

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

  T* const shift = static_cast<T*>(scratch);
  T* const sum = shift + columns;
  T* const square = sum + columns;
  const auto add = [&](int64_t begin, int64_t rows) {
    WithShifts<E>(columns, shift, [&](auto is_shifted) NORMD_INLINE_LAMBDA {
      SumColumns<E>(ColumnMoments<E, is_shifted>{x + begin * stride},
                    {rows, columns, stride, matrix.near}, shift, sum, square);
    });
  };

  const auto clear = [&] { std::fill_n(sum, 2 * columns, T{0}); };  // and the squares
  // The first shift of halves: 0, if the first rows are near it. Their sums are those of the first
  // block already.
  int64_t summed = 0;
  if constexpr (!kAlwaysShifts<E>) {
    std::fill_n(shift, columns, T{0});
    clear();
    const int64_t rows = std::min(kRowsThatTell, matrix.rows);
    add(0, rows);
    if (!AreFar(columns, rows, sum, square)) summed = rows;
  }
  // Else the mean of the first rows, shifted by the first of them.
  if (summed == 0) {
    int64_t j = 0;
    for (; j + 2 * lanes <= columns; j += 2 * lanes) {
      const auto first = LoadPair(d, x + j);
      hn::StoreU(first.a, d, shift + j);
      hn::StoreU(first.b, d, shift + j + lanes);
    }
    for (; j < columns; ++j) shift[j] = ScalarAt(x, j);
    const int64_t pilot = std::min(kPilotRows, matrix.rows);
    clear();
    add(0, pilot);
    ShiftColumns<E>(columns, pilot, sum, square, shift);
  }
  for (int64_t begin = 0; begin < matrix.rows; begin += kBlockRows<E>) {
    const int64_t rows = std::min(kBlockRows<E>, matrix.rows - begin);
    if (summed == 0) clear();
    add(begin + summed, rows - summed);
    summed = 0;
    if (HWY_UNLIKELY(!kAlwaysShifts<E> && AreFar(columns, rows, sum, square))) {
      ShiftColumns<E>(columns, rows, sum, square, shift);
      clear();
      add(begin, rows);
    }
    for (T* values : {shift, sum, square}) FromPairs<E>(columns, values);
    MergeColumns(columns, static_cast<double>(begin), static_cast<double>(rows), shift, sum, square,
                 mean, m2);
    if (begin + rows == matrix.rows) return;
    ShiftColumns<E>(columns, rows, sum, square, shift);
    if constexpr (kPairsInterleave<E>) ToPairs<E>(columns, shift, shift);
  }
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
