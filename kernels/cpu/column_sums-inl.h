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

// Adds both sums over all rows of each column, shifts and sums in the order of pairs. There is a
// vector's columns or more; no more rows than floats may collect (kBlockRows). `source` has
//   kInputs                           tensors it reads
//   kShifted                          whether shifts are read: else all are 0
//   AddTwo(i, shift, first, second)   what the columns of a pair from element i on add to their
//                                     sums, where they are shifted by `shift`
//   Add(i, shift, keep, first, second)   the same of a vector; keep(v) leaves out some lanes
//   Fetch(i)                          element i and its neighbours are wanted soon
template <class E, class Source>
HWY_INLINE void SumColumns(const Source& source, const Matrix& matrix, const ComputeType<E>* shift,
                           ComputeType<E>* HWY_RESTRICT first,
                           ComputeType<E>* HWY_RESTRICT second) {
  using D = Tag<E>;
  // Rows are read side by side, so that their sums stay in registers for a while, a tile of
  // columns after the other, so that these and the next ones stay in L1. The next ones are fetched
  // by hand, since a vector a row gives the processor no pattern to follow.
  constexpr int64_t kElementBytes = sizeof(E), kTile = 4096 / kElementBytes;
  constexpr int64_t kNearBytes = 1 << 14, kFewest = 2, kMost = 8;
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t columns = matrix.columns, stride = matrix.stride;
  const int64_t row_bytes = std::min(kTile, columns) * kElementBytes * Source::kInputs;
  const int64_t together = std::clamp(kNearBytes / row_bytes, kFewest, kMost);
  const bool fetches = !matrix.near;
  const auto shift_at = [&](int64_t j) NORMD_INLINE_LAMBDA {
    return Source::kShifted ? hn::LoadU(d, shift + j) : hn::Zero(d);
  };
  const int64_t paired = columns / (2 * lanes) * (2 * lanes);
  for (int64_t left = 0; left < paired; left += kTile) {
    const int64_t right = std::min(left + kTile, paired);
    for (int64_t row = 0; row < matrix.rows; row += together) {
      const int64_t begin = row * stride;
      const int64_t end = begin + std::min(together, matrix.rows - row) * stride;
      for (int64_t j = left; j < right; j += 2 * lanes) {
        const Pair<D> center{shift_at(j), shift_at(j + lanes)};
        Pair<D> a{hn::LoadU(d, first + j), hn::LoadU(d, first + j + lanes)};
        Pair<D> b{hn::LoadU(d, second + j), hn::LoadU(d, second + j + lanes)};
        const auto add = [&](int64_t i) NORMD_INLINE_LAMBDA {
          if (fetches) source.Fetch(i + together * stride);
          source.AddTwo(i, center, a, b);
        };
        int64_t i = begin + j;
        for (; i + stride < end; i += 2 * stride) {
          add(i);
          add(i + stride);
        }
        if (i < end) add(i);
        hn::StoreU(a.a, d, first + j);
        hn::StoreU(a.b, d, first + j + lanes);
        hn::StoreU(b.a, d, second + j);
        hn::StoreU(b.b, d, second + j + lanes);
      }
    }
  }
  // A last vector begins where it can, without the columns that have been added.
  for (int64_t j = paired; j < columns; j += lanes) {
    const int64_t at = std::min(j, columns - lanes);
    const auto seen = hn::FirstN(d, static_cast<size_t>(j - at));
    const auto center = shift_at(at);
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
