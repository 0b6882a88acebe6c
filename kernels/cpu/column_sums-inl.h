// Two sums of each column of a matrix.
#if defined(NORMD_KERNELS_CPU_COLUMN_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_COLUMN_SUMS_INL_H_
#undef NORMD_KERNELS_CPU_COLUMN_SUMS_INL_H_
#else
#define NORMD_KERNELS_CPU_COLUMN_SUMS_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Values along columns from the order of memory into that of pairs (elements-inl.h), to the same
// array or another, and back. Those of the last columns, fewer than a pair's, stay as they are.
template <class E>
HWY_INLINE void ToPairs(int64_t columns, const ComputeType<E>* from, ComputeType<E>* to) {
  const Tag<E> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes) {
    const auto pair = LoadPairValues<E>(d, from + j);
    hn::StoreU(pair.a, d, to + j);
    hn::StoreU(pair.b, d, to + j + lanes);
  }
  if (from != to) std::copy(from + j, from + columns, to + j);
}
template <class E>
HWY_INLINE void FromPairs(int64_t columns, ComputeType<E>* values) {
  using D = Tag<E>;
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t j = 0; kPairsInterleave<E> && j + 2 * lanes <= columns; j += 2 * lanes) {
    const Pair<D> pair{hn::LoadU(d, values + j), hn::LoadU(d, values + j + lanes)};
    StorePairValues<E>(d, pair, values + j);
  }
}

// What is summed. `source` has
//   kInputs                           tensors it reads
//   kShifted                          whether shifts are read: else all are 0
//   AddTwo(i, shift, first, second)   what the columns of a pair from element i on add to their
//                                     sums, where they are shifted by `shift`
//   Add(i, shift, keep, first, second)   the same of a vector; keep(v) leaves out some lanes
//   Fetch(i)                          element i and its neighbours are wanted soon
// Shifts and sums are in the order of pairs.
template <class Source, class T>
struct ColumnSums {
  Source source;
  int64_t stride;  // elements from a row to the next
  const T* shift;
  T* first;
  T* second;
};

// Adds the columns from `left` to `right`, kPairs pairs after the other, of some rows: those of
// column 0 begin at elements `begin` and further on, before `end`. kFetches: `ahead` elements on.
// A function of its own: among others' variables the loop's would be kept in memory.
template <class E, int kPairs, bool kFetches, class Source>
HWY_NOINLINE void AddRows(const ColumnSums<Source, ComputeType<E>>& sums, int64_t left,
                          int64_t right, int64_t begin, int64_t end, int64_t ahead) {
  using D = Tag<E>;
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto [source, stride, shift, first, second] = sums;
  for (int64_t j = left; j < right; j += kPairs * 2 * lanes) {
    Pair<D> center[kPairs], a[kPairs], b[kPairs];
    for (int k = 0; k < kPairs; ++k) {
      const int64_t at = j + k * 2 * lanes;
      center[k] = {hn::Zero(d), hn::Zero(d)};
      if (Source::kShifted)
        center[k] = {hn::LoadU(d, shift + at), hn::LoadU(d, shift + at + lanes)};
      a[k] = {hn::LoadU(d, first + at), hn::LoadU(d, first + at + lanes)};
      b[k] = {hn::LoadU(d, second + at), hn::LoadU(d, second + at + lanes)};
    }
    for (int64_t i = begin + j; i < end + j; i += stride) {
      for (int k = 0; k < kPairs; ++k) {
        if (kFetches) source.Fetch(i + k * 2 * lanes + ahead);
        source.AddTwo(i + k * 2 * lanes, center[k], a[k], b[k]);
      }
    }
    for (int k = 0; k < kPairs; ++k) {
      const int64_t at = j + k * 2 * lanes;
      hn::StoreU(a[k].a, d, first + at);
      hn::StoreU(a[k].b, d, first + at + lanes);
      hn::StoreU(b[k].a, d, second + at);
      hn::StoreU(b[k].b, d, second + at + lanes);
    }
  }
}

// Adds both sums over all rows of each column. There is a vector's columns or more; no more rows
// than floats may collect (kBlockRows).
template <class E, class Source>
HWY_INLINE void SumColumns(const Source& source, const Matrix& matrix, const ComputeType<E>* shift,
                           ComputeType<E>* HWY_RESTRICT first,
                           ComputeType<E>* HWY_RESTRICT second) {
  using D = Tag<E>;
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t columns = matrix.columns, stride = matrix.stride, end = matrix.rows * stride;
  const int64_t paired = columns / (2 * lanes) * (2 * lanes);
  const ColumnSums<Source, ComputeType<E>> sums{source, stride, shift, first, second};
  if (matrix.near) {
    constexpr int kPairs = kManyRegisters ? 4 : 2;
    const int64_t wide = columns / (kPairs * 2 * lanes) * (kPairs * 2 * lanes);
    AddRows<E, kPairs, false>(sums, 0, wide, 0, end, 0);
    AddRows<E, 1, false>(sums, wide, paired, 0, end, 0);
  } else {
    // Rows are read side by side, so that their sums stay in registers for a while, a tile of
    // columns after the other, so that these and the next ones stay in L1. The next ones are
    // fetched by hand, since a vector a row gives the processor no pattern to follow.
    constexpr int64_t kElementBytes = sizeof(E), kTile = 4096 / kElementBytes;
    constexpr int64_t kNearBytes = 1 << 14, kFewest = 2, kMost = 8;
    const int64_t row_bytes = std::min(kTile, columns) * kElementBytes * Source::kInputs;
    const int64_t together = std::clamp(kNearBytes / row_bytes, kFewest, kMost) * stride;
    for (int64_t left = 0; left < paired; left += kTile) {
      for (int64_t begin = 0; begin < end; begin += together) {
        AddRows<E, 1, true>(sums, left, std::min(left + kTile, paired), begin,
                            std::min(begin + together, end), together);
      }
    }
  }
  // A last vector begins where it can, without the columns that have been added.
  for (int64_t j = paired; j < columns; j += lanes) {
    const int64_t at = std::min(j, columns - lanes);
    const auto seen = hn::FirstN(d, static_cast<size_t>(j - at));
    const auto center = Source::kShifted ? hn::LoadU(d, shift + at) : hn::Zero(d);
    auto a = hn::Zero(d), b = hn::Zero(d);
    for (int64_t i = at; i < matrix.rows * stride; i += stride) {
      source.Add(
          i, center, [&](auto v) { return hn::IfThenZeroElse(seen, v); }, a, b);
    }
    hn::StoreU(hn::Add(a, hn::LoadU(d, first + at)), d, first + at);
    hn::StoreU(hn::Add(b, hn::LoadU(d, second + at)), d, second + at);
  }
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
