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
// The same for columns, whose accumulators collect a row each.
inline constexpr int64_t kBlockRows = 128;

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
  HWY_INLINE double Total() const {
    const D d;
    return SumOfDoubles(
        hn::Add(hn::Add(Doubles(d, a), Doubles(d, b)), hn::Add(Doubles(d, c), Doubles(d, e))));
  }

  V a, b, c, e;
};

// Sums of many sets at once, a vector of each in memory: where runs are short, the
// sets' runs are read one after the other as they lie, and each set's sums wait for
// its next run.
template <class D, int kSums>
class WaitingSums {
 public:
  using T = hn::TFromD<D>;

  explicit WaitingSums(int64_t sets)
      : lanes_(static_cast<int64_t>(hn::Lanes(D()))),
        values_(static_cast<size_t>(sets * kSums * lanes_), T{0}) {}

  HWY_INLINE void Add(int64_t set, int which, hn::Vec<D> sum) {
    T* at = values_.data() + (set * kSums + which) * lanes_;
    hn::StoreU(hn::Add(hn::LoadU(D(), at), sum), D(), at);
  }

  // Returns the total and begins anew.
  HWY_INLINE double Take(int64_t set, int which) {
    T* at = values_.data() + (set * kSums + which) * lanes_;
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

// Adds elements [0, n), n >= Lanes(d), to `sums`, which has
//   Add<k>(i)              the vector at i, to accumulator k of 4
//   AddTwo<k>(i)           the two vectors from i on, to accumulators k and k + 1
//   Add<k>(i, mask)        those of its lanes that are in the mask
template <class D, class Sums>
HWY_INLINE void AddRun(D d, int64_t n, Sums& sums) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    sums.template AddTwo<0>(i);
    sums.template AddTwo<2>(i + 2 * lanes);
  }
  if (i + lanes <= n) sums.template Add<0>(i), i += lanes;
  if (i + lanes <= n) sums.template Add<1>(i), i += lanes;
  if (i + lanes <= n) sums.template Add<2>(i), i += lanes;
  if (i < n) {  // the run's last vector, without the lanes that have been added
    const auto seen = hn::FirstN(d, static_cast<size_t>(lanes - (n - i)));
    sums.template Add<3>(n - lanes, hn::Not(seen));
  }
}

// AddRun(), of elements of `element_bytes` in all tensors, and what is done meanwhile. `sums` also
// has
//   Skip(n)                what is n elements further on becomes 0
// The sums are the same to the last bit whether there is something to do or not.
template <class D, class Sums>
HWY_INLINE void AddRunMeanwhile(D d, int64_t n, int64_t element_bytes, Sums& sums,
                                const Meanwhile& meanwhile) {
  const bool in_steps = static_cast<bool>(meanwhile);
  const int64_t step = kBytesMeanwhile / element_bytes;  // a multiple of four vectors
  for (;;) {
    const int64_t part = in_steps && n >= 2 * step ? step : n;
    AddRun(d, part, sums);
    if (in_steps) meanwhile(part);
    n -= part;
    if (n == 0) return;
    sums.Skip(part);
  }
}

// Calls add(run, begin, n) for pieces of the runs and flush(elements) after about
// every BlockOf(d) elements. No piece is shorter than a vector, if the runs are not.
// Both are called from one place each, so that the sums stay in registers.
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
