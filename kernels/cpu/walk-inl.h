// Walks over elements with the coefficients that each of them has. An operation
// (Normalize, Gradient) is the same wherever its coefficients come from:
//
//   Op::Element, Op::Type, Op::D          what is stored; float or double, and its vectors' tag
//   op.Begin(i)                           elements from i on follow, without gaps
//   op.Vectors(i, end, at)                whole vectors from i on that end by `end`, with
//                                         the coefficients at(i); returns where it stopped
//   op.Partial(i, n, coefficients)        n elements, n < Lanes()
//   op.End()
//   Op::kShortPlane                      vectors; what has fewer is a short plane: see WalkPlanes()
//   op.FetchAheadBy(n)                    elements n after those read are fetched
//   op.UntilLine(i), op.PastLine(i)       elements from i to a cache line of what is written, or
//                                         from one to i: what Vectors() may not write. 0: nothing
#if defined(NORMD_KERNELS_CPU_WALK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_WALK_INL_H_
#undef NORMD_KERNELS_CPU_WALK_INL_H_
#else
#define NORMD_KERNELS_CPU_WALK_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/coefficients-inl.h"
#include "kernels/cpu/coefficients.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/set_constants-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class D>
HWY_INLINE hn::Vec<D> PartialVector(D d, const hn::TFromD<D>* from, size_t n) {
  return LoadPartial(d, from, n);
}

// A vector of each coefficient.
template <class D>
struct VectorCoefficients {
  hn::Vec<D> shift, scale, offset, slope;
};

// Those of `first` where the mask says so, else those of `second`.
template <class D>
HWY_INLINE VectorCoefficients<D> Either(hn::Mask<D> mask, const VectorCoefficients<D>& first,
                                        const VectorCoefficients<D>& second) {
  return {hn::IfThenElse(mask, first.shift, second.shift),
          hn::IfThenElse(mask, first.scale, second.scale),
          hn::IfThenElse(mask, first.offset, second.offset),
          hn::IfThenElse(mask, first.slope, second.slope)};
}

template <class D>
struct PairCoefficients {
  VectorCoefficients<D> a, b;
};

// Where an operation gets its coefficients: the same for all elements, or by element. They follow
// each other from i to Stretch(i, end), and begin anew there. TwoAt(i): those of two vectors.
// HasPairs(i): whether PairAt() has those of pairs (elements-inl.h), from i on. kShifted: the shift
// is not 0.
template <class D, bool kShifted>
struct Uniform {
  HWY_INLINE VectorCoefficients<D> operator()(int64_t) const {
    return {kShifted ? values.shift : hn::Zero(D()), values.scale, values.offset, values.slope};
  }
  HWY_INLINE int64_t Stretch(int64_t, int64_t end) const { return end; }
  HWY_INLINE PairCoefficients<D> TwoAt(int64_t i) const { return {(*this)(i), (*this)(i)}; }
  HWY_INLINE bool HasPairs(int64_t) const { return true; }
  HWY_INLINE PairCoefficients<D> PairAt(int64_t i) const { return TwoAt(i); }
  VectorCoefficients<D> values;
};
// The columns begin again after the last, for the next row.
template <class D, class Source>
struct Varying {
  using T = hn::TFromD<D>;

  HWY_INLINE VectorCoefficients<D> operator()(int64_t i) const {
    return source.Load(D(), i - start);
  }
  HWY_INLINE PairCoefficients<D> TwoAt(int64_t i) const {
    const int64_t column = i - start;
    return {source.Load(D(), column),
            source.Load(D(), column + static_cast<int64_t>(hn::Lanes(D())))};
  }
  HWY_INLINE bool HasPairs(int64_t i) const {
    return paired != nullptr && (i - start) % (2 * static_cast<int64_t>(hn::Lanes(D()))) == 0;
  }
  HWY_INLINE PairCoefficients<D> PairAt(int64_t i) const {
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(D()));
    const T* from = paired + kKinds * (i - start);
    return {VectorsAt(from), VectorsAt(from + kKinds * lanes)};
  }
  static HWY_INLINE VectorCoefficients<D> VectorsAt(const T* from) {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    return {Source::kShifted ? hn::LoadU(d, from) : hn::Zero(d), hn::LoadU(d, from + lanes),
            hn::LoadU(d, from + 2 * lanes), hn::LoadU(d, from + 3 * lanes)};
  }

  HWY_INLINE int64_t Stretch(int64_t i, int64_t end) const {
    if (i - start == columns) start = i;
    return std::min(end, start + columns);
  }

  const Source source;
  mutable int64_t start;  // of the row that was begun last
  const int64_t columns;  // of it
  const T* const paired;  // InPairs(); null: none
};

// Coefficients as arrays; a forward's slope is never read. kIsShifted: not all shifts are 0.
template <class T, bool kIsShifted = true>
struct ArrayCoefficients {
  static constexpr bool kIsArrays = true;
  static constexpr bool kShifted = kIsShifted;

  explicit ArrayCoefficients(const Coefficients& from)
      : shift(static_cast<const T*>(from.shift)),
        scale(static_cast<const T*>(from.scale)),
        offset(static_cast<const T*>(from.offset)),
        slope(static_cast<const T*>(from.slope == nullptr ? from.offset : from.slope)),
        paired(static_cast<const T*>(from.paired)) {}

  // Those at `i`, in each lane.
  template <class D>
  HWY_INLINE VectorCoefficients<D> Broadcast(D d, int64_t i) const {
    return {hn::Set(d, shift[i]), hn::Set(d, scale[i]), hn::Set(d, offset[i]),
            hn::Set(d, slope[i])};
  }

  // Those from `i` on, a lane each.
  template <class D>
  HWY_INLINE VectorCoefficients<D> Load(D d, int64_t i) const {
    return {kShifted ? hn::LoadU(d, shift + i) : hn::Zero(d), hn::LoadU(d, scale + i),
            hn::LoadU(d, offset + i), hn::LoadU(d, slope + i)};
  }

  template <class D>
  HWY_INLINE VectorCoefficients<D> LoadPartial(D d, int64_t i, size_t n) const {
    return {kShifted ? PartialVector(d, shift + i, n) : hn::Zero(d), PartialVector(d, scale + i, n),
            PartialVector(d, offset + i, n), PartialVector(d, slope + i, n)};
  }

  const T* shift;
  const T* scale;
  const T* offset;
  const T* slope;
  const T* paired;
};

// Writes kKinds * columns values: the coefficients of columns in the order of pairs, those of a
// pair's first vector, a vector of each kind, then those of its second.
template <class E, class T, bool kShifted>
void InPairs(int64_t columns, const ArrayCoefficients<T, kShifted>& arrays, T* paired) {
  const Tag<E> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t j = 0; j + 2 * lanes <= columns; j += 2 * lanes) {
    int64_t kind = 0;
    for (const T* array : {arrays.shift, arrays.scale, arrays.offset, arrays.slope}) {
      const bool is_read = (kind != 0 || kShifted) &&
                           (kind != 3 || arrays.slope != arrays.offset);  // not a forward's
      T* const to = paired + kKinds * j + kind++ * lanes;
      if (!is_read) continue;
      const auto pair = LoadPairValues<E>(d, array + j);
      hn::StoreU(pair.a, d, to);
      hn::StoreU(pair.b, d, to + kKinds * lanes);
    }
  }
}

// LayerNorm's forward: scalars of a row, weight and bias along it.
template <class T>
struct RowCoefficients {
  static constexpr bool kIsArrays = false;
  static constexpr bool kShifted = true;

  // Those of the r-th of `rows`, whose own begin at `parameter` in the arrays along rows.
  RowCoefficients(const AlongRows& along, const Rows& rows, int64_t r, int64_t parameter)
      : shift(static_cast<const T*>(rows.constants.shift)[r]),
        invstd(static_cast<const T*>(rows.constants.invstd)[r]),
        lost(static_cast<const T*>(rows.constants.lost)[r]),
        weight(static_cast<const T*>(along.weight) + parameter),
        bias(along.bias == nullptr ? nullptr : static_cast<const T*>(along.bias) + parameter) {}

  template <class D>
  HWY_INLINE VectorCoefficients<D> Make(D d, hn::Vec<D> w, hn::Vec<D> b) const {
    return {hn::Set(d, shift), hn::Mul(w, hn::Set(d, invstd)), hn::MulAdd(w, hn::Set(d, lost), b),
            b};
  }

  template <class D>
  HWY_INLINE VectorCoefficients<D> Load(D d, int64_t i) const {
    return Make(d, hn::LoadU(d, weight + i),
                bias == nullptr ? hn::Zero(d) : hn::LoadU(d, bias + i));
  }

  template <class D>
  HWY_INLINE VectorCoefficients<D> LoadPartial(D d, int64_t i, size_t n) const {
    return Make(d, PartialVector(d, weight + i, n),
                bias == nullptr ? hn::Zero(d) : PartialVector(d, bias + i, n));
  }

  const T shift, invstd, lost;
  const T* weight;
  const T* bias;
};

// Of vectors one after the other, from `left` elements before the end of a plane on. Planes are no
// smaller than a vector.
template <class D, class Source>
struct AcrossPlanes {
  HWY_INLINE VectorCoefficients<D> operator()(int64_t) const {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    auto values = current;
    if (left < lanes) {
      const auto first = hn::FirstN(d, static_cast<size_t>(left));
      current = source.Broadcast(d, ++plane);
      values = Either<D>(first, values, current);
      left += plane_size;
    }
    left -= lanes;
    return values;
  }
  HWY_INLINE PairCoefficients<D> TwoAt(int64_t i) const {
    const auto first = (*this)(i);
    return {first, (*this)(i)};
  }
  HWY_INLINE int64_t Stretch(int64_t, int64_t end) const { return end; }

  const Source& source;
  const int64_t plane_size;
  mutable int64_t plane;
  mutable int64_t left;
  mutable VectorCoefficients<D> current;  // the plane's
};

template <class Op>
void WalkPlanes(Op& op, const Planes& planes, const Coefficients& coefficients) {
  using T = typename Op::Type;
  const hn::ScalableTag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const ArrayCoefficients<T> arrays(coefficients);

  int64_t i = planes.begin;
  const int64_t end = planes.begin + planes.count;
  int64_t plane = planes.first_plane;
  int64_t plane_end = i - planes.skip + planes.plane_size;
  // Parts of vectors, of one plane each.
  const auto partial = [&](int64_t until) {
    while (i < until) {
      const int64_t n = std::min(std::min(until, plane_end) - i, lanes);
      op.Partial(i, static_cast<size_t>(n), arrays.Broadcast(d, plane));
      i += n;
      if (i == plane_end) {
        ++plane;
        plane_end += planes.plane_size;
      }
    }
  };

  op.Begin(i);
  partial(std::min(end, i + op.UntilLine(i)));
  const int64_t last = end - op.PastLine(end);
  // Of short planes, finding where each one's vectors end would take longer than what is done to
  // them.
  if constexpr (kAlwaysShifts<typename Op::Element>) {
    if (planes.plane_size < Op::kShortPlane * lanes && i + lanes <= last) {
      const AcrossPlanes<typename Op::D, ArrayCoefficients<T>> at{
          arrays, planes.plane_size, plane, plane_end - i, arrays.Broadcast(d, plane)};
      i = op.Vectors(i, last, at);
      plane = at.plane;
      plane_end = i + at.left;
    }
  }
  while (i + lanes <= last) {
    if (i == plane_end) {
      ++plane;
      plane_end += planes.plane_size;
    }
    auto values = arrays.Broadcast(d, plane);
    bool shifted = kAlwaysShifts<typename Op::Element> || arrays.shift[plane] != 0;
    int64_t stop = std::min(plane_end, last);
    if (i + lanes > plane_end) {  // a vector across two planes
      const auto first = hn::FirstN(d, static_cast<size_t>(plane_end - i));
      values = Either<typename Op::D>(first, values, arrays.Broadcast(d, ++plane));
      plane_end += planes.plane_size;
      stop = i + lanes;
      shifted = true;
    }
    i = shifted ? op.Vectors(i, stop, Uniform<typename Op::D, true>{values})
                : op.Vectors(i, stop,
                             Uniform<typename Op::D, kAlwaysShifts<typename Op::Element>>{values});
  }
  if (i == plane_end) {
    ++plane;
    plane_end += planes.plane_size;
  }
  partial(end);
  op.End();
}

// `source` has Load() and LoadPartial() as ArrayCoefficients, an index a column.
template <class Op, class Source>
void WalkColumns(Op& op, int64_t begin, Matrix matrix, const Source& source) {
  const hn::ScalableTag<typename Op::Type> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  // The coefficients of wide rows do not stay in L1: these are walked some rows at a
  // time, a tile of columns after the other. The next tile is fetched by hand, since
  // pieces this short give the processor no pattern to follow.
  constexpr int64_t kTile = 1024;
  // Where all rows together are worth the memory for coefficients in pairs.
  constexpr int64_t kRowsWorthPairs = 16, kMostPaired = 8192;
  const int64_t columns = matrix.columns;
  const bool wide = columns > 2 * kTile && matrix.rows > 1;
  const int64_t together = wide ? 8 : 1;
  if (wide) op.FetchAheadBy(kTile);
  using T = typename Op::Type;
  Scratch memory;
  const T* paired = nullptr;
  if constexpr (kPairsInterleave<typename Op::Element> && Source::kIsArrays) {
    paired = source.paired;
    if (paired == nullptr && matrix.rows >= kRowsWorthPairs && matrix.columns <= kMostPaired) {
      memory = Scratch(static_cast<size_t>(kKinds * matrix.columns) * sizeof(T));
      InPairs<typename Op::Element>(matrix.columns, source, memory.Get<T>());
      paired = memory.Get<T>();
    }
  }
  // Rows one after the other are as good as one, where no vector belongs to two of them.
  const int64_t all = matrix.rows * columns;
  if (!wide && matrix.stride == columns && columns % (2 * lanes) == 0 && op.UntilLine(begin) == 0 &&
      op.PastLine(begin + all) == 0) {
    matrix.rows = 1;
    matrix.columns = matrix.stride = all;
  }
  const int64_t tile = wide ? kTile : matrix.columns;
  for (int64_t first = 0; first < matrix.rows; first += together) {
    for (int64_t left = 0; left < matrix.columns; left += tile) {
      const int64_t right = std::min(left + tile, matrix.columns);
      const int64_t last = std::min(first + together, matrix.rows);
      for (int64_t row = first; row < last; ++row) {
        const int64_t start = begin + row * matrix.stride;
        const auto partial = [&](int64_t from, int64_t to) {
          for (; from < to; from += lanes) {
            const size_t n = static_cast<size_t>(std::min(to - from, lanes));
            op.Partial(start + from, n, source.LoadPartial(d, from, n));
          }
        };
        op.Begin(start + left);
        int64_t j = std::min(right, left + op.UntilLine(start + left));
        partial(left, j);
        const int64_t end = std::max(j, right - op.PastLine(start + right));
        const Varying<typename Op::D, Source> at{source, start, columns, paired};
        j = op.Vectors(start + j, start + end, at) - start;
        partial(j, right);
        op.End();
      }
    }
  }
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
