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
#include "kernels/cpu/cache.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/relu_mask-inl.h"
#include "kernels/cpu/set_constants-inl.h"
#include "kernels/cpu/walk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Elements before `to` that lie on its cache line: what is written past the cache is whole lines,
// since the rest of one that is begun so has to wait for memory.
template <class E>
HWY_INLINE int64_t ElementsPastLine(const E* to) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(kLineBytes) /
                              sizeof(E));
}
template <class E>
HWY_INLINE int64_t ElementsUntilLine(const E* to) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(E));
  return (kLine - ElementsPastLine(to)) % kLine;
}

// kFused: there is a residual or an activation.
template <class E, bool kFused>
class Normalize {
 public:
  using Element = E;
  using Type = ComputeType<E>;
  using D = Tag<E>;
  using V = hn::Vec<D>;
  static constexpr int64_t kShortPlane = 16;

  explicit Normalize(const ForwardTensors& tensors)
      : x_(static_cast<const E*>(tensors.x)),
        y_(static_cast<E*>(tensors.y)),
        residual_(static_cast<const E*>(tensors.residual)),
        relu_(tensors.relu),
        mask_(tensors.relu_mask),
        stream_(tensors.stream),
        ahead_(tensors.ahead) {}

  void FetchAheadBy(int64_t elements) { ahead_ = elements; }
  int64_t UntilLine(int64_t i) const { return stream_ ? ElementsUntilLine(y_ + i) : 0; }
  int64_t PastLine(int64_t i) const { return stream_ ? ElementsPastLine(y_ + i) : 0; }

  void Begin(int64_t i) {
    if constexpr (kFused) bits_.Begin(mask_, i);
  }

  template <class At>
  HWY_INLINE int64_t Vectors(int64_t i, int64_t end, const At& at) {
    const Tensors tensors{x_, y_, residual_, relu_, ahead_};
    if (stream_) return Loop<true, true>(i, end, at, tensors, bits_);
    if (ahead_ != 0) return Loop<false, true>(i, end, at, tensors, bits_);
    return Loop<false, false>(i, end, at, tensors, bits_);
  }

  HWY_NOINLINE void Partial(int64_t i, size_t n, const VectorCoefficients<D>& c) {
    const D d;
    V y = Scaled(LoadPartial(d, x_ + i, n), c);
    if constexpr (kFused) {
      if (residual_ != nullptr) y = hn::Add(y, LoadPartial(d, residual_ + i, n));
      if (relu_) y = Activate(y, n, bits_);
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
    int64_t ahead;
  };

  static HWY_INLINE V Scaled(V x, const VectorCoefficients<D>& c) {
    return hn::MulAdd(hn::Sub(x, c.shift), c.scale, c.offset);
  }

  // The tensors by value: what is stored might otherwise be thought to change them.
  template <bool kStream, bool kAhead, class At>
  static HWY_INLINE int64_t Loop(int64_t i, int64_t end, const At& at, const Tensors t,
                                 MaskWriter& writer) {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    MaskWriter bits = writer;
    const auto finish = [&](V y, V residual) NORMD_INLINE_LAMBDA {
      if constexpr (kFused) {
        if (t.residual != nullptr) y = hn::Add(y, residual);
        if (t.relu) y = Activate(y, static_cast<size_t>(lanes), bits);
      }
      return y;
    };
    const auto residual_at = [&](int64_t k) NORMD_INLINE_LAMBDA {
      return kFused && t.residual != nullptr ? LoadElements(d, t.residual + k) : hn::Zero(d);
    };
    const auto fetch = [&](int64_t k) NORMD_INLINE_LAMBDA {
      if (!kAhead || t.ahead == 0) return;
      FetchAhead(t.x + k + t.ahead);
      if (kFused && t.residual != nullptr) FetchAhead(t.residual + k + t.ahead);
    };
    const auto y_at = [&](int64_t k, const VectorCoefficients<D>& c) NORMD_INLINE_LAMBDA {
      return finish(Scaled(LoadElements(d, t.x + k), c), residual_at(k));
    };
    if constexpr (kPairsInterleave<E>) {
      if (kStream && i + lanes <= end && !IsAlignedForPair(d, t.y + i)) {
        fetch(i);
        StoreElements(d, y_at(i, at(i)), t.y + i, kStream);
        i += lanes;
      }
    }
    while (i + lanes <= end) {
      const int64_t stop = at.Stretch(i, end);
      if constexpr (kPairsInterleave<E>) {
        const bool in_pairs = at.HasPairs(i);
        for (; in_pairs && i + 2 * lanes <= stop; i += 2 * lanes) {
          const PairCoefficients<D> c = at.PairAt(i);
          fetch(i);
          const Pair<D> x = LoadPair(d, t.x + i);
          Pair<D> y{Scaled(x.a, c.a), Scaled(x.b, c.b)};
          if (kFused && t.residual != nullptr) {
            const Pair<D> residual = LoadPair(d, t.residual + i);
            y = {hn::Add(y.a, residual.a), hn::Add(y.b, residual.b)};
          }
          auto words = RoundedToWords(d, y);
          if (kFused && t.relu) words = ActivateWords(words, bits);
          StoreWords(d, words, t.y + i, kStream);
        }
      }
      // Two halves of a cache line; of larger types, no faster past the cache.
      for (; (sizeof(E) == 2 || !kAhead) && i + 2 * lanes <= stop; i += 2 * lanes) {
        const PairCoefficients<D> c = at.TwoAt(i);
        fetch(i);
        const V first = y_at(i, c.a);
        StoreTwo(d, first, y_at(i + lanes, c.b), t.y + i, kStream);
      }
      for (; i + lanes <= stop; i += lanes) {
        fetch(i);
        StoreElements(d, y_at(i, at(i)), t.y + i, kStream);
      }
    }
    if constexpr (kFused) writer = bits;
    return i;
  }

  // The first n lanes count.
  static HWY_INLINE V Activate(V y, size_t n, MaskWriter& bits) {
    const D d;
    const auto passes = hn::Not(hn::Le(y, hn::Zero(d)));  // NaN passes
    if (bits.IsWanted()) bits.Append(BitsOf(d, passes) & ((uint64_t{1} << n) - 1), n);
    return hn::IfThenElseZero(passes, y);
  }
  // The same of what is stored of a pair, which is in the order of the mask.
  template <class VWords>
  static HWY_INLINE VWords ActivateWords(VWords words, MaskWriter& bits) {
    const hn::DFromV<VWords> d;
    const hn::RebindToSigned<decltype(d)> di;
    const auto is_positive =
        hn::RebindMask(d, hn::Gt(hn::BitCast(di, words), hn::Zero(di)));  // or NaN
    const auto passes = hn::Or(is_positive, hn::Gt(words, hn::Set(d, kNegativeInf)));
    bits.Append(BitsOf(d, passes), hn::Lanes(d));
    return hn::IfThenElseZero(passes, words);
  }
  static constexpr uint16_t kNegativeInf = 0xff80;  // as bfloat16

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
  using T = ComputeType<E>;
  WithNormalize<E>(tensors, [&](auto& op) {
    WithShifts<E>(matrix.columns, static_cast<const T*>(coefficients.shift), [&](auto is_shifted) {
      WalkColumns(op, begin, matrix, ArrayCoefficients<T, is_shifted>(coefficients));
    });
  });
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
