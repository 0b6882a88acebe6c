// Running over contiguous elements with independent accumulators.
#if defined(NORMD_KERNELS_CPU_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_SUMS_INL_H_
#undef NORMD_KERNELS_CPU_SUMS_INL_H_
#else
#define NORMD_KERNELS_CPU_SUMS_INL_H_
#endif

#include <cstdint>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Elements that are summed in the computing type before the sums go into doubles:
// with four accumulators of a vector each, no float collects more than about 64
// rounding errors.
template <class D>
HWY_INLINE int64_t BlockOf(D d) {
  return 256 * static_cast<int64_t>(hn::Lanes(d));
}
// The same for columns, whose accumulators collect a row each. Of halves, which are far coarser
// themselves, more: merging takes a tenth of the pass where it comes after 128.
template <class E>
inline constexpr int64_t kBlockRows = sizeof(E) == 2 ? 256 : 128;

// A vector of doubles whose lanes' sum is that of `v`'s. In double: a block's sum in float
// would be off by more than all the roundings before, and what it is off by counts dy times
// in a gradient.
template <class D>
HWY_INLINE auto Doubles([[maybe_unused]] D d, hn::Vec<D> v) {
  const hn::ScalableTag<double> wide;
#if HWY_TARGET == HWY_SCALAR
  return hn::Set(wide, static_cast<double>(hn::GetLane(v)));
#else
  if constexpr (sizeof(hn::TFromD<D>) == sizeof(double)) {
    return v;
  } else {
    const hn::Half<D> half;
    return hn::Add(hn::PromoteTo(wide, hn::LowerHalf(half, v)),
                   hn::PromoteTo(wide, hn::UpperHalf(half, v)));
  }
#endif
}

template <class V>
HWY_INLINE double SumOfDoubles(V v) {
  return hn::GetLane(hn::SumOfLanes(hn::ScalableTag<double>(), v));
}

template <class D>
HWY_INLINE double SumInDouble(D d, hn::Vec<D> v) {
  return SumOfDoubles(Doubles(d, v));
}

// Four accumulators, as members rather than as an array: GCC keeps them in registers.
template <class D>
struct Accumulators {
  using V = hn::Vec<D>;

  template <int k>
  HWY_INLINE V& At() {
    if constexpr (k == 0) return a;
    if constexpr (k == 1) return b;
    if constexpr (k == 2) return c;
    if constexpr (k == 3) return e;
  }
  HWY_INLINE void Clear() { a = b = c = e = hn::Zero(D()); }
  HWY_INLINE V Sum() const { return hn::Add(hn::Add(a, b), hn::Add(c, e)); }

  V a, b, c, e;
};

// Two sums of a run, or of several: a vector of each, whose lanes' sum is meant.
template <class D>
struct TwoSums {
  HWY_INLINE void Clear() { first = second = hn::Zero(D()); }

  hn::Vec<D> first, second;
};

// Two sums of many sets at once, a vector of each in memory: where runs are short, the
// sets' runs are read one after the other as they lie, and each set's sums wait for
// its next run.
template <class D>
class WaitingSums {
 public:
  using T = hn::TFromD<D>;

  explicit WaitingSums(int64_t sets)
      : lanes_(static_cast<int64_t>(hn::Lanes(D()))),
        values_(static_cast<size_t>(sets * 2 * lanes_), T{0}) {}

  HWY_INLINE void Add(int64_t set, const TwoSums<D>& sums) {
    T* at = values_.data() + set * 2 * lanes_;
    hn::StoreU(hn::Add(hn::LoadU(D(), at), sums.first), D(), at);
    hn::StoreU(hn::Add(hn::LoadU(D(), at + lanes_), sums.second), D(), at + lanes_);
  }

  // Returns the total and begins anew.
  HWY_INLINE double Take(int64_t set, int which) {
    T* at = values_.data() + (set * 2 + which) * lanes_;
    const auto sum = hn::SumOfLanes(D(), hn::LoadU(D(), at));
    hn::StoreU(hn::Zero(D()), D(), at);
    return static_cast<double>(hn::GetLane(sum));
  }

 private:
  int64_t lanes_;
  std::vector<T> values_;
};

// Calls add(run, set) for each run of each set, in the order of memory, and
// flush(elements) after about every BlockOf(d) elements of each set.
template <class D, class Add, class Flush>
HWY_INLINE void ForEachShortRun(D d, int64_t sets, const Runs& runs, Add add, Flush flush) {
  const int64_t block = BlockOf(d);
  int64_t pending = 0;
  for (int64_t run = 0; run < runs.count; ++run) {
    for (int64_t set = 0; set < sets; ++set) add(run, set);
    pending += runs.length;
    if (pending + runs.length / 2 > block || run + 1 == runs.count) {
      flush(pending);
      pending = 0;
    }
  }
}

// Whether the runs of several sets are read together.
template <class D>
HWY_INLINE bool AreReadTogether(D d, int64_t sets, const Runs& runs) {
  return sets > 1 && runs.count > 1 && runs.length <= BlockOf(d) &&
         runs.length >= static_cast<int64_t>(hn::Lanes(d));
}

// Of these, those whose runs are so short that sums by position are cheaper than a sum
// over each run.
template <class D>
HWY_INLINE bool AreTiny(D d, int64_t sets, const Runs& runs) {
  return AreReadTogether(d, sets, runs) && runs.count >= 4 &&
         runs.length < 8 * static_cast<int64_t>(hn::Lanes(d));
}

// The sum of an array of n values, n >= Lanes(d).
template <class D>
HWY_INLINE double SumOfArray(D d, const hn::TFromD<D>* from, int64_t n) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sum = hn::LoadU(d, from);
  int64_t i = lanes;
  for (; i + lanes <= n; i += lanes) sum = hn::Add(sum, hn::LoadU(d, from + i));
  if (i < n) {
    const auto seen = hn::FirstN(d, static_cast<size_t>(lanes - (n - i)));
    sum = hn::Add(sum, hn::IfThenZeroElse(seen, hn::LoadU(d, from + n - lanes)));
  }
  return SumInDouble(d, sum);
}

// Adds elements [0, n) of `run`, n >= Lanes(d), to `total`. A run has
//   Add<k>(i, sums)        the vector at i, to accumulators k of 4
//   AddTwo<k>(i, sums)     the two vectors from i on, to accumulators k and k + 1
//   Add<k>(i, sums, mask)  those of its lanes that are in the mask
// A function of its own: what else is called between runs would keep the accumulators in memory.
// The run by reference: a copy would read many of its members at once, of which some were stored
// a moment ago, and such a load waits for all stores before them, those past the cache included.
template <class D, class Run>
HWY_NOINLINE void AddRun(D d, int64_t n, const Run& run, TwoSums<D>& total) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  typename Run::Sums sums;
  sums.first.Clear();
  sums.second.Clear();
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    run.template AddTwo<0>(i, sums);
    run.template AddTwo<2>(i + 2 * lanes, sums);
  }
  if (i + lanes <= n) run.template Add<0>(i, sums), i += lanes;
  if (i + lanes <= n) run.template Add<1>(i, sums), i += lanes;
  if (i + lanes <= n) run.template Add<2>(i, sums), i += lanes;
  if (i < n) {  // the run's last vector, without the lanes that have been added
    const auto seen = hn::FirstN(d, static_cast<size_t>(lanes - (n - i)));
    run.template Add<3>(n - lanes, sums, hn::Not(seen));
  }
  total = {hn::Add(total.first, sums.first.Sum()), hn::Add(total.second, sums.second.Sum())};
}

// What is done while sums are taken, in turns: about `turn_bytes` of runs are read, then as many
// written.
class Turns {
 public:
  // `element_bytes`: of all tensors that are read.
  Turns(const Meanwhile& meanwhile, const Runs& runs, size_t element_bytes)
      : meanwhile_(meanwhile), length_(runs.turn_bytes / static_cast<int64_t>(element_bytes)) {}

  int64_t length() const { return length_; }  // in elements, a multiple of four vectors
  HWY_INLINE void Read(int64_t elements) {
    read_ += elements;
    if (read_ < length_) return;
    if (meanwhile_) meanwhile_(read_);
    read_ = 0;
  }

 private:
  const Meanwhile& meanwhile_;
  const int64_t length_;
  int64_t read_ = 0;
};

// AddRun() in turns. A run also has
//   Skip(n)                what is n elements further on becomes 0
template <class D, class Run>
HWY_INLINE void AddRunInTurns(D d, int64_t n, Run& run, TwoSums<D>& total, Turns& turns) {
  for (;;) {
    const int64_t part = n >= 2 * turns.length() ? turns.length() : n;
    AddRun(d, part, run, total);
    turns.Read(part);
    n -= part;
    if (n == 0) return;
    run.Skip(part);
  }
}

// Calls add(run, begin, n) for pieces of the runs and flush(elements) after about
// every BlockOf(d) elements. No piece is shorter than a vector, if the runs are not.
template <class D, class Add, class Flush>
HWY_INLINE void ForEachPiece(D d, const Runs& runs, Add add, Flush flush) {
  const int64_t block = BlockOf(d);
  int64_t pending = 0;
  for (int64_t run = 0, begin = 0; run < runs.count;) {
    const int64_t rest = runs.length - begin;
    const int64_t n = rest < block + block / 2 ? rest : block;
    add(run, begin, n);
    pending += n;
    begin += n;
    if (begin == runs.length) {
      begin = 0;
      ++run;
    }
    if (pending + n / 2 > block || run == runs.count) {
      flush(pending);
      pending = 0;
    }
  }
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
