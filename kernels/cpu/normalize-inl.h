// y = activation((x - shift) * scale + offset + residual), wherever the
// coefficients come from.
#if defined(NORMD_KERNELS_CPU_NORMALIZE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_NORMALIZE_INL_H_
#undef NORMD_KERNELS_CPU_NORMALIZE_INL_H_
#else
#define NORMD_KERNELS_CPU_NORMALIZE_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/relu_mask-inl.h"
#include "kernels/cpu/walk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Elements before `to` + n is aligned as StoreElements(stream) wants it.
template <class E>
HWY_INLINE int64_t ElementsUntilAligned(const E* to) {
  const uintptr_t bytes = hn::Lanes(Tag<E>()) * sizeof(E);
  const uintptr_t past = reinterpret_cast<uintptr_t>(to) % bytes;
  return static_cast<int64_t>(past == 0 ? 0 : (bytes - past) / sizeof(E));
}

// kFused: there is a residual or an activation.
template <class E, bool kFused>
class Normalize {
 public:
  using Element = E;
  using Type = ComputeType<E>;
  using D = Tag<E>;
  using V = hn::Vec<D>;

  explicit Normalize(const ForwardTensors& tensors)
      : x_(static_cast<const E*>(tensors.x)),
        y_(static_cast<E*>(tensors.y)),
        residual_(static_cast<const E*>(tensors.residual)),
        relu_(tensors.relu),
        mask_(tensors.relu_mask),
        stream_(tensors.stream),
        ahead_(tensors.ahead) {}

  void FetchAheadBy(int64_t elements) { ahead_ = elements; }
  int64_t UntilAligned(int64_t i) const { return stream_ ? ElementsUntilAligned(y_ + i) : 0; }

  void Begin(int64_t i) {
    if constexpr (kFused) bits_.Begin(mask_, i);
  }

  template <class At>
  HWY_INLINE int64_t Vectors(int64_t i, int64_t end, const At& at) {
    const Tensors tensors{x_, y_, residual_, relu_, mask_ != nullptr, ahead_};
    return stream_ ? Loop<true>(i, end, at, tensors, bits_)
                   : Loop<false>(i, end, at, tensors, bits_);
  }

  // Not where stores bypass the cache: two streams of them take twice the time of one. Nor
  // with a mask, which is written in the order of memory.
  bool TakesTwo() const { return !kFused && !stream_; }
  template <class At>
  HWY_INLINE int64_t VectorsOfTwo(int64_t i, int64_t end, int64_t stride, const At& at) {
    return LoopOfTwo(i, end, stride, at, x_, y_, ahead_);
  }

  HWY_NOINLINE void Partial(int64_t i, size_t n, const VectorCoefficients<D>& c) {
    const D d;
    V y = Scaled(LoadPartial(d, x_ + i, n), c);
    if constexpr (kFused) {
      if (residual_ != nullptr) y = hn::Add(y, LoadPartial(d, residual_ + i, n));
      if (relu_) y = Activate(y, n, mask_ != nullptr, bits_);
    }
    StorePartial(d, y, y_ + i, n);
  }

  void End() {
    if constexpr (kFused) bits_.End();
  }

 private:
  struct Tensors {
    const E* x;
    E* y;
    const E* residual;
    bool relu;
    bool masks;
    int64_t ahead;
  };

  static HWY_INLINE V Scaled(V x, const VectorCoefficients<D>& c) {
    return hn::MulAdd(hn::Sub(x, c.shift), c.scale, c.offset);
  }

  // The tensors by value: what is stored might otherwise be thought to change them.
  template <bool kStream, class At>
  static HWY_INLINE int64_t Loop(int64_t i, int64_t end, const At& at, const Tensors t,
                                 MaskWriter& writer) {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    MaskWriter bits = writer;
    const auto finish = [&](V y, V residual) NORMD_INLINE_LAMBDA {
      if constexpr (kFused) {
        if (t.residual != nullptr) y = hn::Add(y, residual);
        if (t.relu) y = Activate(y, static_cast<size_t>(lanes), t.masks, bits);
      }
      return y;
    };
    const auto residual_at = [&](int64_t k) NORMD_INLINE_LAMBDA {
      return kFused && t.residual != nullptr ? LoadElements(d, t.residual + k) : hn::Zero(d);
    };
    const auto at_one = [&](int64_t k) NORMD_INLINE_LAMBDA {
      const VectorCoefficients<D> c = at(k);
      if (t.ahead != 0) FetchAhead(t.x + k + t.ahead);
      return finish(Scaled(LoadElements(d, t.x + k), c), residual_at(k));
    };
    if constexpr (kPairsInterleave<E>) {
      if (kStream && i + lanes <= end && !IsAlignedForPair(d, t.y + i)) {
        StoreElements(d, at_one(i), t.y + i, kStream);
        i += lanes;
      }
      // A mask's bits follow elements one after the other.
      const bool in_pairs = at.HasPairs(i) && !(kFused && t.masks);
      for (; in_pairs && i + 2 * lanes <= end; i += 2 * lanes) {
        const PairCoefficients<D> c = at.PairAt(i);
        if (t.ahead != 0) FetchAhead(t.x + i + t.ahead);
        const Pair<D> x = LoadPair(d, t.x + i);
        Pair<D> residual{hn::Zero(d), hn::Zero(d)};
        if (kFused && t.residual != nullptr) residual = LoadPair(d, t.residual + i);
        const Pair<D> y{finish(Scaled(x.a, c.a), residual.a), finish(Scaled(x.b, c.b), residual.b)};
        StorePair(d, y, t.y + i, kStream);
      }
      for (; i + 2 * lanes <= end; i += 2 * lanes) {
        const V first = at_one(i);
        StoreTwo(d, first, at_one(i + lanes), t.y + i, kStream);
      }
    }
    for (; i + lanes <= end; i += lanes) StoreElements(d, at_one(i), t.y + i, kStream);
    if constexpr (kFused) writer = bits;
    return i;
  }

  template <class At>
  static HWY_INLINE int64_t LoopOfTwo(int64_t i, int64_t end, int64_t stride, const At& at,
                                      const E* const x, E* const y, const int64_t ahead) {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    const auto y_at = [&](int64_t k, const VectorCoefficients<D>& c) NORMD_INLINE_LAMBDA {
      if (ahead != 0) FetchAhead(x + k + ahead);
      return Scaled(LoadElements(d, x + k), c);
    };
    const auto step = [&]() NORMD_INLINE_LAMBDA {
      const VectorCoefficients<D> c = at(i);
      StoreElements(d, y_at(i, c), y + i, /*stream=*/false);
      StoreElements(d, y_at(i + stride, c), y + i + stride, /*stream=*/false);
      i += lanes;
    };
    if constexpr (kPairsInterleave<E>) {
      const bool in_pairs = at.HasPairs(i);
      for (; in_pairs && i + 2 * lanes <= end; i += 2 * lanes) {
        const PairCoefficients<D> c = at.PairAt(i);
        for (const int64_t k : {i, i + stride}) {
          if (ahead != 0) FetchAhead(x + k + ahead);
          const Pair<D> values = LoadPair(d, x + k);
          StorePair(d, Pair<D>{Scaled(values.a, c.a), Scaled(values.b, c.b)}, y + k,
                    /*stream=*/false);
        }
      }
      for (; i + 2 * lanes <= end; i += 2 * lanes) {
        const VectorCoefficients<D> a = at(i), b = at(i + lanes);
        for (const int64_t k : {i, i + stride}) {
          StoreTwo(d, y_at(k, a), y_at(k + lanes, b), y + k, /*stream=*/false);
        }
      }
    }
    while (i + lanes <= end) step();
    return i;
  }

  // The first n lanes count.
  static HWY_INLINE V Activate(V y, size_t n, bool masks, MaskWriter& bits) {
    const D d;
    const auto passes = hn::Not(hn::Le(y, hn::Zero(d)));  // NaN passes
    if (masks) bits.Append(BitsOf(d, passes) & ((uint64_t{1} << n) - 1), n);
    return hn::IfThenElseZero(passes, y);
  }

  const E* x_;
  E* y_;
  const E* residual_;
  bool relu_;
  uint8_t* mask_;
  bool stream_;
  int64_t ahead_;
  MaskWriter bits_;
};

// Calls run(operation) with the operation that the tensors ask for.
template <class E, class Run>
HWY_INLINE void WithNormalize(const ForwardTensors& tensors, Run run) {
  if (tensors.relu || tensors.residual != nullptr) {
    Normalize<E, true> op(tensors);
    run(op);
  } else {
    Normalize<E, false> op(tensors);
    run(op);
  }
}

template <class E>
void NormalizePlanes(const ForwardTensors& tensors, const Planes& planes,
                     const Coefficients& coefficients) {
  WithNormalize<E>(tensors, [&](auto& op) { WalkPlanes(op, planes, coefficients); });
}

template <class E>
void NormalizeColumns(const ForwardTensors& tensors, int64_t begin, const Matrix& matrix,
                      const Coefficients& coefficients) {
  const ArrayCoefficients<ComputeType<E>> source(coefficients);
  WithNormalize<E>(tensors, [&](auto& op) { WalkColumns(op, begin, matrix, source); });
}

// Of a row, computed at once: whole pairs, a few kilobytes of what lies along it.
template <class E>
HWY_INLINE int64_t TileOfRow() {
  return 64 * static_cast<int64_t>(hn::Lanes(Tag<E>()));
}

// Calls run(r, two, begin, end) for each tile of columns of each of the rows, which are as long;
// with `two`, of that and the next, where these have the same weight.
template <class E, class Run>
HWY_INLINE void ForEachTile(const Row* rows, int64_t count, bool side_by_side, Run run) {
  const int64_t length = rows[0].count, tile = TileOfRow<E>();
  for (int64_t begin = 0; begin < length; begin += tile) {
    const int64_t end = std::min(begin + tile, length);
    for (int64_t r = 0; r < count;) {
      const bool two = side_by_side && r + 1 < count && rows[r].weight == rows[r + 1].weight;
      run(r, two, begin, end);
      r += two ? 2 : 1;
    }
  }
}

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

// kRows rows side by side, so that weight and bias are loaded once for all of them.
template <class E, int kRows>
class RowNormalize {
 public:
  using T = ComputeType<E>;
  using D = Tag<E>;
  using V = hn::Vec<D>;

  RowNormalize(const ForwardTensors& tensors, const Row* rows)
      : weight_(static_cast<const T*>(rows[0].weight)),
        bias_(static_cast<const T*>(rows[0].bias)),
        in_pairs_(rows[0].in_pairs),
        stream_(tensors.stream),
        ahead_(tensors.ahead) {
    for (int r = 0; r < kRows; ++r) {
      const Row& row = rows[r];
      x_[r] = static_cast<const E*>(tensors.x) + row.begin;
      y_[r] = static_cast<E*>(tensors.y) + row.begin;
      shift_[r] = static_cast<T>(row.shift);
      invstd_[r] = static_cast<T>(row.invstd);
      lost_[r] = static_cast<T>(row.lost);
      stream_ = stream_ && IsAlignedForPair(D(), y_[r]);
    }
  }

  // Columns [j, end), all of them pairs but the row's last.
  void Run(int64_t j, int64_t end) const {
    if (in_pairs_ || !kPairsInterleave<E>) {
      stream_ ? Loop<true, T>(*this, j, end) : Loop<false, T>(*this, j, end);
    } else {
      stream_ ? Loop<true, E>(*this, j, end) : Loop<false, E>(*this, j, end);
    }
  }

 private:
  // By value: what is stored might otherwise be thought to change it. Order: whose pairs'
  // values are put together from weight and bias.
  template <bool kStream, class Order>
  static void Loop(const RowNormalize rows, int64_t j, const int64_t end) {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    for (; j + 2 * lanes <= end; j += 2 * lanes) {
      const Pair<D> weight = LoadPairValues<Order>(d, rows.weight_ + j);
      const Pair<D> bias = LoadPairValues<Order>(d, rows.bias_ + j);
      for (int r = 0; r < kRows; ++r) {
        if (rows.ahead_ != 0) FetchPairAhead(d, rows.x_[r] + j + rows.ahead_);
        const Pair<D> x = LoadPair(d, rows.x_[r] + j);
        StorePair(d, Pair<D>{rows.Y(r, x.a, weight.a, bias.a), rows.Y(r, x.b, weight.b, bias.b)},
                  rows.y_[r] + j, kStream);
      }
    }
    for (; j < end; j += lanes) {
      const size_t n = static_cast<size_t>(std::min(lanes, end - j));
      const V weight = LoadPartial(d, rows.weight_ + j, n);
      const V bias = LoadPartial(d, rows.bias_ + j, n);
      for (int r = 0; r < kRows; ++r) {
        const V x = LoadPartial(d, rows.x_[r] + j, n);
        StorePartial(d, rows.Y(r, x, weight, bias), rows.y_[r] + j, n);
      }
    }
  }

  HWY_INLINE V Y(int r, V x, V weight, V bias) const {
    const D d;
    const V deviation = hn::Sub(x, hn::Set(d, shift_[r]));
    return hn::MulAdd(hn::MulAdd(deviation, hn::Set(d, invstd_[r]), hn::Set(d, lost_[r])), weight,
                      bias);
  }

  const T* weight_;
  const T* bias_;
  bool in_pairs_;
  bool stream_;
  int64_t ahead_;
  const E* x_[kRows];
  E* y_[kRows];
  T shift_[kRows], invstd_[kRows], lost_[kRows];
};

template <class E>
void NormalizeRows(const ForwardTensors& tensors, const Row* rows, int64_t count) {
  if (tensors.relu || tensors.residual != nullptr) {
    Normalize<E, true> op(tensors);
    for (int64_t r = 0; r < count; ++r) {
      WalkColumns(op, rows[r].begin, {1, rows[r].count, rows[r].count},
                  RowCoefficients<ComputeType<E>>(rows[r]));
    }
    return;
  }
  const bool side_by_side = RowsSideBySide(tensors.stream, sizeof(E)) == 2;
  ForEachTile<E>(rows, count, side_by_side, [&](int64_t r, bool two, int64_t begin, int64_t end) {
    if (two) {
      RowNormalize<E, 2>(tensors, rows + r).Run(begin, end);
    } else {
      RowNormalize<E, 1>(tensors, rows + r).Run(begin, end);
    }
  });
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
