// Rows, forward: sets that are contiguous, with a weight and a bias for each of their elements.
// While some rows are written, the next ones are summed in the same loop, so that memory is
// read and written at once and at an even pace, as in a copy.
#if defined(NORMD_KERNELS_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_ROWS_INL_H_
#undef NORMD_KERNELS_CPU_ROWS_INL_H_
#else
#define NORMD_KERNELS_CPU_ROWS_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments-inl.h"
#include "kernels/cpu/normalize-inl.h"
#include "kernels/cpu/sums-inl.h"
#include "kernels/cpu/walk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using WideTag = hn::ScalableTag<double>;
inline constexpr size_t kMaxWideLanes = 8;

template <class E>
void RowInPairs(const void* values, int64_t count, void* to) {
  using T = ComputeType<E>;
  const Tag<E> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const T* from = static_cast<const T*>(values);
  T* out = static_cast<T*>(to);
  int64_t j = 0;
  for (; j + 2 * lanes <= count; j += 2 * lanes) {
    const Pair<Tag<E>> pair = LoadPairValues<E>(d, from + j);
    hn::StoreU(pair.a, d, out + j);
    hn::StoreU(pair.b, d, out + j + lanes);
  }
  std::copy(from + j, from + count, out + j);
}

// What is done to the columns of one row and to those of another, side by side:
//   Two(j)             to a pair from column j on; what comes of it is stored by
//   Store(j, result)   after all loads of these columns: one that follows a store to the same
//                      place of another page waits for it
//   Part(j, n)         to n columns, Lanes() or fewer
struct Nothing {
  HWY_INLINE int Two(int64_t) { return 0; }
  HWY_INLINE void Store(int64_t, int) {}
  HWY_INLINE void Part(int64_t, size_t) {}
};
template <class D, class Sum, class Write>
HWY_INLINE void OverColumns(D d, int64_t j, int64_t end, Sum& sum, Write write) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (; j + 2 * lanes <= end; j += 2 * lanes) {
    const auto summed = sum.Two(j);
    const auto written = write.Two(j);
    sum.Store(j, summed);
    write.Store(j, written);
  }
  for (; j < end; j += lanes) {
    const size_t n = static_cast<size_t>(std::min(lanes, end - j));
    sum.Part(j, n);
    write.Part(j, n);
  }
}

// Calls run(begin, end) for tiles of columns: whole pairs, and so small that what lies along rows
// stays in L1 while all of them pass.
template <class D, class Run>
HWY_INLINE void ForEachTile(D d, int64_t length, Run run) {
  const int64_t tile = 64 * static_cast<int64_t>(hn::Lanes(d));
  for (int64_t begin = 0; begin < length; begin += tile) run(begin, std::min(begin + tile, length));
}

// Where each row's own begin in the arrays along rows.
class Parameter {
 public:
  Parameter(const AlongRows& along, const Rows& rows)
      : length_(along.length), end_(along.parameters), at_(rows.parameter) {}
  HWY_INLINE int64_t Next() {
    const int64_t at = at_;
    at_ += length_;
    if (at_ >= end_) at_ = 0;
    return at;
  }

 private:
  const int64_t length_, end_;
  int64_t at_;
};

// Sums of rows, a vector of doubles each until they are added up for several rows at once.
template <int kKinds>
class SumsInLanes {
 public:
  using V = hn::Vec<WideTag>;

  // Of `count` rows. Where the last ones are no whole vector, the others' sums are 0: whatever is
  // in memory might be numbers that processors are slow with.
  explicit SumsInLanes(int64_t count) {
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(WideTag()));
    for (int64_t row = count; row % lanes != 0; ++row) {
      for (int kind = 0; kind < kKinds; ++kind) Add(row, kind, hn::Zero(WideTag()), /*begin=*/true);
    }
  }

  // Adds to a row's sums, or begins them.
  HWY_INLINE void Add(int64_t row, int kind, V v, bool begin) {
    double* at = At(row, kind);
    hn::Store(begin ? v : hn::Add(hn::Load(WideTag(), at), v), WideTag(), at);
  }
  // Of rows [row, row + Lanes()).
  HWY_INLINE V Totals(int64_t row, int kind) const {
    return TotalsOf<hn::MaxLanes(WideTag())>(row, kind);
  }

 private:
  template <size_t kRows>
  HWY_INLINE V TotalsOf(int64_t row, int kind) const {
    const WideTag d;
    if constexpr (kRows == 1) {
      return hn::Load(d, At(row, kind));
    } else {
#if HWY_TARGET != HWY_SCALAR
      const V a = TotalsOf<kRows / 2>(row, kind);
      const V b = TotalsOf<kRows / 2>(row + static_cast<int64_t>(kRows / 2), kind);
      return hn::Add(hn::ConcatEven(d, b, a), hn::ConcatOdd(d, b, a));
#endif
    }
  }
  HWY_INLINE double* At(int64_t row, int kind) {
    return values_ + (row * kKinds + kind) * static_cast<int64_t>(hn::Lanes(WideTag()));
  }
  HWY_INLINE const double* At(int64_t row, int kind) const {
    return const_cast<SumsInLanes*>(this)->At(row, kind);
  }

  HWY_ALIGN double values_[(kMostRows + kMaxWideLanes) * kKinds * kMaxWideLanes];
};

// Sums the rows `next` and writes `now` beside them, tile by tile. For a row and the place where
// its own begins in the arrays along rows, tile_of(row, parameter, begin, end) is what sums a tile
// of columns, with the sums First() and Second(), and write_of(row, parameter) is what writes them.
template <class D, class TileOf, class WriteOf>
HWY_INLINE void SumAndWrite(D d, const AlongRows& along, const Rows& now, const Rows& next,
                            SumsInLanes<2>& sums, TileOf tile_of, WriteOf write_of) {
  const int64_t both = std::min(now.count, next.count);
  ForEachTile(d, along.length, [&](int64_t begin, int64_t end) NORMD_INLINE_LAMBDA {
    Parameter of_now(along, now), of_next(along, next);
    const auto sum_up = [&](int64_t row, auto write) NORMD_INLINE_LAMBDA {
      auto tile = tile_of(row, of_next.Next(), begin, end);
      OverColumns(d, begin, end, tile, write);
      sums.Add(row, 0, tile.First(), begin == 0);
      sums.Add(row, 1, tile.Second(), begin == 0);
    };
    for (int64_t row = 0; row < both; ++row) sum_up(row, write_of(row, of_now.Next()));
    for (int64_t row = both; row < next.count; ++row) sum_up(row, Nothing());
    for (int64_t row = both; row < now.count; ++row) {
      Nothing nothing;
      OverColumns(d, begin, end, nothing, write_of(row, of_now.Next()));
    }
  });
}

// By which a row's elements are shifted where they are summed for the first time.
template <class E>
HWY_INLINE ComputeType<E> FirstShift(const E* row) {
  return kAlwaysShifts<E> ? ScalarAt(row, 0) : ComputeType<E>{0};
}

// Sums of a tile of a row, and of squares; of x - shift if kShifted.
template <class E, bool kShifted>
class TileMoments {
 public:
  using D = Tag<E>;
  using V = hn::Vec<D>;

  // `x`: the row's.
  TileMoments(const E* x, ComputeType<E> shift, int64_t ahead)
      : x_(x), ahead_(ahead), shift_(hn::Set(D(), shift)) {}

  HWY_INLINE int Two(int64_t j) {
    const D d;
    FetchPairNear(d, x_ + j + ahead_);
    const Pair<D> x = LoadPair(d, x_ + j);
    Collect(Shifted(x.a), sum_a_, square_a_);
    Collect(Shifted(x.b), sum_b_, square_b_);
    return 0;
  }
  HWY_INLINE void Store(int64_t, int) {}
  HWY_INLINE void Part(int64_t j, size_t n) {
    const D d;
    V x = LoadPartial(d, x_ + j, n);
    if constexpr (kShifted) x = hn::IfThenElseZero(hn::FirstN(d, n), Shifted(x));
    Collect(x, sum_a_, square_a_);
  }

  HWY_INLINE hn::Vec<WideTag> First() const { return Doubles(D(), hn::Add(sum_a_, sum_b_)); }
  HWY_INLINE hn::Vec<WideTag> Second() const { return Doubles(D(), hn::Add(square_a_, square_b_)); }

 private:
  HWY_INLINE V Shifted(V x) const {
    if constexpr (kShifted) return hn::Sub(x, shift_);
    return x;
  }
  static HWY_INLINE void Collect(V deviation, V& sum, V& square) {
    sum = hn::Add(sum, deviation);
    square = hn::MulAdd(deviation, deviation, square);
  }

  const E* x_;
  int64_t ahead_;
  V shift_;
  V sum_a_ = hn::Zero(D()), sum_b_ = sum_a_, square_a_ = sum_a_, square_b_ = sum_a_;
};

// Of a row far from its first shift: shifted by its first value, which is at hand at once, and
// only if that was far off a second time, by the mean.
template <class E>
HWY_NOINLINE PartialMoments MomentsOfFarRow(const E* x, int64_t length) {
  const Tag<E> d;
  const double elements = static_cast<double>(length);
  ComputeType<E> shift = ScalarAt(x, 0);
  double sum = 0, square = 0;
  for (int pass = 0; pass < 2; ++pass) {
    auto sums = hn::Zero(WideTag()), squares = sums;
    ForEachTile(d, length, [&](int64_t begin, int64_t end) NORMD_INLINE_LAMBDA {
      TileMoments<E, true> tile(x, shift, kNextBytes / static_cast<int64_t>(sizeof(E)));
      OverColumns(d, begin, end, tile, Nothing());
      sums = hn::Add(sums, tile.First());
      squares = hn::Add(squares, tile.Second());
    });
    sum = SumOfDoubles(sums);
    square = SumOfDoubles(squares);
    if (pass == 1 || !(sum * sum > 0.85 * elements * square)) break;
    shift = ShiftOfSums<E>(shift, sum, square, elements);
  }
  PartialMoments moments;
  Merge(elements, static_cast<double>(shift), sum, square, moments);
  return moments;
}

// From the sums of rows to their moments.
template <class E>
HWY_INLINE void MomentsOfSums(const E* x, const AlongRows& along, int64_t count,
                              const SumsInLanes<2>& sums, double* mean, double* m2) {
  const WideTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t length = along.length;
  const auto inverse = hn::Set(d, 1 / static_cast<double>(length));
  for (int64_t row = 0; row < count; row += lanes) {
    const int64_t rows = std::min(lanes, count - row);
    const auto sum = sums.Totals(row, 0), square = sums.Totals(row, 1);
    const auto missed = hn::Mul(sum, inverse);
    // Not Max(): a NaN must stay one.
    const auto raw = hn::Sub(square, hn::Mul(sum, missed));
    HWY_ALIGN double of_rows[2][kMaxWideLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      of_rows[0][r] = static_cast<double>(FirstShift(x + (row + r) * length));
    }
    hn::Store(hn::Add(hn::Load(d, of_rows[0]), missed), d, of_rows[0]);
    hn::Store(hn::IfThenZeroElse(hn::Lt(raw, hn::Zero(d)), raw), d, of_rows[1]);
    // More than 2.4 deviations from the shift, where that matters.
    const auto far = hn::And(hn::FirstN(d, static_cast<size_t>(rows)),
                             hn::Gt(hn::Mul(sum, missed), hn::Mul(hn::Set(d, 0.85), square)));
    if (HWY_UNLIKELY((along.center || kAlwaysShifts<E>)&&!hn::AllFalse(d, far))) {
      HWY_ALIGN double is_far[kMaxWideLanes];
      hn::Store(hn::IfThenElseZero(far, hn::Set(d, 1.0)), d, is_far);
      for (int64_t r = 0; r < rows; ++r) {
        if (is_far[r] == 0) continue;
        const PartialMoments again = MomentsOfFarRow(x + (row + r) * length, length);
        of_rows[0][r] = again.mean;
        of_rows[1][r] = again.m2;
      }
    }
    if (HWY_LIKELY(rows == lanes)) {
      hn::StoreU(hn::Load(d, of_rows[0]), d, mean + row);
      hn::StoreU(hn::Load(d, of_rows[1]), d, m2 + row);
    } else {
      std::copy_n(of_rows[0], rows, mean + row);
      std::copy_n(of_rows[1], rows, m2 + row);
    }
  }
}

// Doubles of up to a vector of rows; those of rows that are not there are 0.
HWY_INLINE hn::Vec<WideTag> LoadOfRows(const double* from, int64_t rows) {
  const WideTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  return rows < lanes ? LoadPartial(d, from, static_cast<size_t>(rows)) : hn::LoadU(d, from);
}

// What rows are normalized by, as SetConstants.
struct WideConstants {
  hn::Vec<WideTag> shift, residual, invstd;
};
// Of up to a vector of rows.
template <class E>
HWY_INLINE WideConstants ConstantsAt(const RowStatistics& statistics, int64_t row, int64_t rows) {
  const WideTag d;
  const auto one = hn::Set(d, 1.0);
  const auto mean =
      statistics.mean == nullptr ? hn::Zero(d) : LoadOfRows(statistics.mean + row, rows);
  // Divided as others do: a part of a tensor is then what it is in the whole.
  const auto var = hn::Div(LoadOfRows(statistics.m2 + row, rows), hn::Set(d, statistics.elements));
  auto shift = mean;
  if constexpr (sizeof(ComputeType<E>) == sizeof(float)) {
    const hn::Rebind<float, WideTag> df;
    shift = hn::PromoteTo(d, hn::DemoteTo(df, ShiftsNear(d, mean, var)));
    // Within two deviations of 0, x itself is as good.
    if constexpr (!kAlwaysShifts<E>) {
      shift = hn::IfThenZeroElse(IsNearZero(d, mean, var), shift);
    }
  }
  const auto residual = hn::IfThenElseZero(hn::IsFinite(shift), hn::Sub(mean, shift));
  return {shift, residual, hn::Div(one, hn::Sqrt(hn::Add(var, hn::Set(d, statistics.eps))))};
}

// `to` has a place for each lane of the last rows' vector, too.
template <class E>
void ConstantsOfRows(const RowStatistics& statistics, int64_t count, const RowConstants& to) {
  using T = ComputeType<E>;
  const WideTag d;
  for (int64_t row = 0; row < count; row += static_cast<int64_t>(hn::Lanes(d))) {
    const auto c = ConstantsAt<E>(statistics, row, count - row);
    StoreDoubles(d, c.shift, static_cast<T*>(to.shift) + row);
    StoreDoubles(d, c.invstd, static_cast<T*>(to.invstd) + row);
    StoreDoubles(d, hn::Neg(hn::Mul(c.residual, c.invstd)), static_cast<T*>(to.lost) + row);
  }
}

// Whether x - shift must be computed.
template <class E>
HWY_INLINE bool AreShifted(const Rows& rows) {
  const auto* shift = static_cast<const ComputeType<E>*>(rows.constants.shift);
  return kAlwaysShifts<E> || AreShifted(rows.count, shift);
}

// Of a row's constants, one kind of them.
template <class E>
HWY_INLINE Vector<E> ConstantOf(const void* values, int64_t row) {
  return hn::Set(Tag<E>(), static_cast<const ComputeType<E>*>(values)[row]);
}

// Writes columns of a row. kStream: past the cache. Order: the element whose pairs' values are put
// together from weight and bias. kBiased: there is a bias.
template <class E, bool kStream, bool kShifted, bool kBiased, class Order>
class WriteRow {
 public:
  using T = ComputeType<E>;
  using D = Tag<E>;
  using V = hn::Vec<D>;

  WriteRow(const E* x, E* y, const T* weight, const T* bias, const RowConstants& of, int64_t row)
      : x_(x),
        y_(y),
        weight_(weight),
        bias_(bias),
        shift_(ConstantOf<E>(of.shift, row)),
        invstd_(ConstantOf<E>(of.invstd, row)),
        lost_(ConstantOf<E>(of.lost, row)) {}

  HWY_INLINE Pair<D> Two(int64_t j) const {
    const D d;
    const Pair<D> weight = LoadPairValues<Order>(d, weight_ + j);
    Pair<D> bias = weight;
    if constexpr (kBiased) bias = LoadPairValues<Order>(d, bias_ + j);
    const Pair<D> x = LoadPair(d, x_ + j);
    return {Y(x.a, weight.a, bias.a), Y(x.b, weight.b, bias.b)};
  }
  HWY_INLINE void Store(int64_t j, const Pair<D>& y) const { StorePair(D(), y, y_ + j, kStream); }
  HWY_INLINE void Part(int64_t j, size_t n) const {
    const D d;
    const V weight = LoadPartial(d, weight_ + j, n);
    V bias = weight;
    if constexpr (kBiased) bias = LoadPartial(d, bias_ + j, n);
    const V y = Y(LoadPartial(d, x_ + j, n), weight, bias);
    if (kStream && n == hn::Lanes(d)) {
      StoreElements(d, y, y_ + j, kStream);
    } else {
      StorePartial(d, y, y_ + j, n);
    }
  }

 private:
  HWY_INLINE V Y(V x, V weight, V bias) const {
    if constexpr (kShifted) x = hn::Sub(x, shift_);
    const V normalized = hn::MulAdd(x, invstd_, lost_);
    if constexpr (!kBiased) return hn::Mul(normalized, weight);
    return hn::MulAdd(normalized, weight, bias);
  }

  const E* const x_;
  E* const y_;
  const T* const weight_;
  const T* const bias_;
  const V shift_, invstd_, lost_;
};

// With a residual or a ReLU.
template <class E>
void WriteRowsFused(const ForwardTensors& tensors, const AlongRows& along, const Rows& rows) {
  Normalize<E, true> op(tensors);
  op.FetchAheadBy(0);  // it was summed
  Parameter parameter(along, rows);
  for (int64_t r = 0; r < rows.count; ++r) {
    WalkColumns(op, rows.begin + r * along.length, {1, along.length, along.length},
                RowCoefficients<ComputeType<E>>(along, rows, r, parameter.Next()));
  }
}

// Not inlined: all of them in one function are more than a compiler with sanitizers can take.
template <class E, bool kStream, bool kShifted, bool kBiased, class Order>
HWY_NOINLINE void WriteAndSum(const ForwardTensors& tensors, const AlongRows& along,
                              const Rows& now, const Rows& next, SumsInLanes<2>& sums) {
  using T = ComputeType<E>;
  const Tag<E> d;
  const int64_t length = along.length;
  const E* const x_now = static_cast<const E*>(tensors.x) + now.begin;
  const E* const x_next = static_cast<const E*>(tensors.x) + next.begin;
  E* const y = static_cast<E*>(tensors.y) + now.begin;
  const T* const weight = static_cast<const T*>(along.weight);
  const T* const bias = static_cast<const T*>(along.bias);
  SumAndWrite(
      d, along, now, next, sums,
      [&](int64_t row, int64_t, int64_t, int64_t) NORMD_INLINE_LAMBDA {
        const E* const x = x_next + row * length;
        return TileMoments<E, kAlwaysShifts<E>>(x, FirstShift(x), tensors.ahead);
      },
      [&](int64_t row, int64_t parameter) NORMD_INLINE_LAMBDA {
        return WriteRow<E, kStream, kShifted, kBiased, Order>(
            x_now + row * length, y + row * length, weight + parameter,
            kBiased ? bias + parameter : nullptr, now.constants, row);
      });
}

template <class E>
void ForwardRows(const ForwardTensors& tensors, const AlongRows& along, const Rows& now,
                 const Rows& next, double* mean, double* m2) {
  using T = ComputeType<E>;
  const Tag<E> d;
  SumsInLanes<2> sums(next.count);
  Rows written = now;
  if (tensors.relu || tensors.residual != nullptr) {
    WriteRowsFused<E>(tensors, along, now);
    written.count = 0;
  }
  const bool stream =
      tensors.stream && IsAlignedForPair(d, static_cast<const E*>(tensors.y) + now.begin) &&
      IsAlignedForPair(d, static_cast<const E*>(tensors.y) + now.begin + along.length);
  const auto run_biased = [&]<bool kShifted, bool kBiased>() NORMD_INLINE_LAMBDA {
    if (kPairsInterleave<E> && !along.in_pairs) {
      WriteAndSum<E, false, kShifted, kBiased, E>(tensors, along, written, next, sums);
    } else if (stream) {
      WriteAndSum<E, true, kShifted, kBiased, T>(tensors, along, written, next, sums);
    } else {
      WriteAndSum<E, false, kShifted, kBiased, T>(tensors, along, written, next, sums);
    }
  };
  const auto run = [&]<bool kShifted>() NORMD_INLINE_LAMBDA {
    along.bias == nullptr ? run_biased.template operator()<kShifted, false>()
                          : run_biased.template operator()<kShifted, true>();
  };
  if (AreShifted<E>(written)) {
    run.template operator()<true>();
  } else {
    run.template operator()<kAlwaysShifts<E>>();
  }
  MomentsOfSums(static_cast<const E*>(tensors.x) + next.begin, along, next.count, sums, mean, m2);
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
