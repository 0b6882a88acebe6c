// Two sums of each column of a matrix.
#if defined(NORMD_KERNELS_CPU_COLUMN_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_COLUMN_SUMS_INL_H_
#undef NORMD_KERNELS_CPU_COLUMN_SUMS_INL_H_
#else
#define NORMD_KERNELS_CPU_COLUMN_SUMS_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

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
  constexpr int64_t kElementBytes = sizeof(E), kTile = 4096 / kElementBytes;
  constexpr int64_t kNearBytes = 1 << 14, kFewest = 2, kMost = 8;
  constexpr int kPairsAtOnce = kManyRegisters ? 4 : 2;
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t columns = matrix.columns, stride = matrix.stride;
  const auto shift_at = [&](int64_t j) NORMD_INLINE_LAMBDA {
    return Source::kShifted ? hn::LoadU(d, shift + j) : hn::Zero(d);
  };
  // Of some pairs of vectors after the other, `together` rows, one below the other.
  const auto add_up = [&](auto pairs, int64_t left, int64_t right, int64_t together,
                          bool fetches) NORMD_INLINE_LAMBDA {
    constexpr int kPairs = pairs;
    for (int64_t row = 0; row < matrix.rows; row += together) {
      const int64_t begin = row * stride;
      const int64_t end = begin + std::min(together, matrix.rows - row) * stride;
      for (int64_t j = left; j < right; j += kPairs * 2 * lanes) {
        Pair<D> center[kPairs], a[kPairs], b[kPairs];
        for (int k = 0; k < kPairs; ++k) {
          const int64_t at = j + k * 2 * lanes;
          center[k] = {shift_at(at), shift_at(at + lanes)};
          a[k] = {hn::LoadU(d, first + at), hn::LoadU(d, first + at + lanes)};
          b[k] = {hn::LoadU(d, second + at), hn::LoadU(d, second + at + lanes)};
        }
        const auto add = [&](int64_t i) NORMD_INLINE_LAMBDA {
          for (int k = 0; k < kPairs; ++k) {
            if (fetches) source.Fetch(i + k * 2 * lanes + together * stride);
            source.AddTwo(i + k * 2 * lanes, center[k], a[k], b[k]);
          }
        };
        int64_t i = begin + j;
        for (; kPairs == 1 && i + stride < end; i += 2 * stride) {
          add(i);
          add(i + stride);
        }
        for (; i < end; i += stride) add(i);
        for (int k = 0; k < kPairs; ++k) {
          const int64_t at = j + k * 2 * lanes;
          hn::StoreU(a[k].a, d, first + at);
          hn::StoreU(a[k].b, d, first + at + lanes);
          hn::StoreU(b[k].a, d, second + at);
          hn::StoreU(b[k].b, d, second + at + lanes);
        }
      }
    }
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, kPairsAtOnce> kSeveral;
  const int64_t paired = columns / (2 * lanes) * (2 * lanes);
  if (matrix.near) {
    const int64_t wide = columns / (kSeveral * 2 * lanes) * (kSeveral * 2 * lanes);
    add_up(kSeveral, 0, wide, matrix.rows, /*fetches=*/false);
    add_up(kOne, wide, paired, matrix.rows, /*fetches=*/false);
  } else {
    // Rows are read side by side, so that their sums stay in registers for a while, a tile of
    // columns after the other, so that these and the next ones stay in L1. The next ones are
    // fetched by hand, since a vector a row gives the processor no pattern to follow.
    const int64_t row_bytes = std::min(kTile, columns) * kElementBytes * Source::kInputs;
    const int64_t together = std::clamp(kNearBytes / row_bytes, kFewest, kMost);
    for (int64_t left = 0; left < paired; left += kTile) {
      add_up(kOne, left, std::min(left + kTile, paired), together, /*fetches=*/true);
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
