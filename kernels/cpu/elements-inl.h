// Elements of each data type as vectors of the type that is computed in.
#if defined(NORMD_KERNELS_CPU_ELEMENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_ELEMENTS_INL_H_
#undef NORMD_KERNELS_CPU_ELEMENTS_INL_H_
#else
#define NORMD_KERNELS_CPU_ELEMENTS_INL_H_
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/half.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A lambda whose captures must stay in registers.
#undef NORMD_INLINE_LAMBDA
#define NORMD_INLINE_LAMBDA __attribute__((always_inline))

// E: float, double, Float16 or BFloat16. What it is computed in:
template <class E>
using ComputeType = std::conditional_t<std::is_same_v<E, double>, double, float>;
template <class E>
using Tag = hn::ScalableTag<ComputeType<E>>;
template <class E>
using Vector = hn::Vec<Tag<E>>;

// Whether x - shift is computed for every set. For halves, which keep the processor busier than
// memory, only where some are far from 0.
template <class E>
inline constexpr bool kAlwaysShifts = sizeof(E) != 2;

// Whether there are 32 vector registers, not 16.
inline constexpr bool kManyRegisters = HWY_TARGET == HWY_AVX3 || HWY_ARCH_ARM_A64;

// Lanes of the widest vector that a partial vector's buffer must hold.
inline constexpr size_t kMaxLanes = 64;

// Highway's own float16 conversion without F16C truncates and loses NaN.
#if HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SCALAR
inline constexpr bool kNativeFloat16 = false;
#else
inline constexpr bool kNativeFloat16 = true;
#endif

template <class DU32>
HWY_INLINE hn::Vec<hn::Rebind<float, DU32>> FloatFromHalfBits(DU32 du, hn::Vec<DU32> half) {
  const hn::Rebind<float, DU32> df;
  const auto sign = hn::ShiftLeft<16>(hn::And(half, hn::Set(du, 0x8000)));
  const auto magnitude = hn::ShiftLeft<13>(hn::And(half, hn::Set(du, 0x7fff)));
  // Scaling by 2^112 moves the exponent's bias and makes subnormals normal.
  const auto scaled = hn::Mul(hn::BitCast(df, magnitude), hn::Set(df, 0x1p112f));
  const auto special = hn::Ge(hn::BitCast(df, magnitude), hn::Set(df, 0x1p-96f));  // Inf, NaN
  const auto bits =
      hn::IfThenElse(hn::RebindMask(du, special), hn::Or(magnitude, hn::Set(du, 0x7f800000)),
                     hn::BitCast(du, scaled));
  return hn::BitCast(df, hn::Or(bits, sign));
}

template <class DU32>
HWY_INLINE hn::Vec<DU32> HalfBitsFromFloat(DU32 du, hn::Vec<hn::Rebind<float, DU32>> value) {
  const hn::Rebind<float, DU32> df;
  const hn::RebindToSigned<DU32> di;
  const auto all = hn::BitCast(du, value);
  const auto sign = hn::ShiftRight<16>(hn::And(all, hn::Set(du, 0x80000000u)));
  const auto magnitude = hn::And(all, hn::Set(du, 0x7fffffff));
  const auto less = [&](uint32_t bound) {
    return hn::RebindMask(
        du, hn::Lt(hn::BitCast(di, magnitude), hn::Set(di, static_cast<int32_t>(bound))));
  };
  // As ToFloat16() in half.h.
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1));
  const auto normal =
      hn::ShiftRight<13>(hn::Add(hn::Sub(magnitude, hn::Set(du, 0x38000000 - 0xfff)), odd));
  const auto subnormal =
      hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(df, magnitude), hn::Set(df, 0.5f))),
              hn::Set(du, 0x3f000000));
  const auto special = hn::IfThenElse(less(0x7f800001), hn::Set(du, 0x7c00), hn::Set(du, 0x7e00));
  const auto finite = hn::IfThenElse(less(0x38800000), subnormal, normal);
  return hn::Or(sign, hn::IfThenElse(less(0x477ff000), finite, special));
}

// `v`, in a register. GCC takes memory operands to be free and loads a vector again for each
// of its uses, while the processor can load two at once: a fifth of the time of some sums.
template <class V>
HWY_INLINE V InRegister(V v) {
#if HWY_TARGET == HWY_AVX3
  __asm__("" : "+v"(v.raw));
#elif HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4
  __asm__("" : "+x"(v.raw));
#endif
  return v;
}

template <class E>
HWY_INLINE void FetchAhead(const E* from) {
  __builtin_prefetch(from, /*rw=*/0, /*locality=*/2);  // into L2
}
template <class E>
HWY_INLINE void FetchNear(const E* from) {
  __builtin_prefetch(from, /*rw=*/0, /*locality=*/3);  // into L1
}

// Halves as they are stored, and the vector they stand for.
template <class E, class D>
HWY_INLINE hn::Vec<D> FromRaw(D d, hn::Vec<hn::Rebind<uint16_t, D>> bits) {
  const hn::Rebind<uint32_t, D> du32;
  if constexpr (std::is_same_v<E, BFloat16>) {
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du32, bits)));
  } else if constexpr (kNativeFloat16) {
    const hn::Rebind<hwy::float16_t, D> df16;
    return hn::PromoteTo(d, hn::BitCast(df16, bits));
  } else {
    return FloatFromHalfBits(du32, hn::PromoteTo(du32, bits));
  }
}

// Lanes(d) elements; `from` needs an element's alignment only.
template <class D, class E>
HWY_INLINE hn::Vec<D> LoadElements(D d, const E* from) {
  if constexpr (std::is_same_v<E, float> || std::is_same_v<E, double>) {
    return hn::LoadU(d, from);
  } else {
    const hn::Rebind<uint16_t, D> du16;
    return FromRaw<E>(d, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(from)));
  }
}

// Words whose upper half is `v` as bfloat16, to nearest even; the lower half is anything.
// A NaN stays one: it came from a bfloat16 or from the arithmetic and so has zeros in its
// low half.
template <class D>
HWY_INLINE hn::Vec<hn::Rebind<uint32_t, D>> RoundedToBFloat16(D, hn::Vec<D> v) {
  const hn::Rebind<uint32_t, D> du32;
  const auto bits = hn::BitCast(du32, v);
#if HWY_TARGET == HWY_AVX3  // an instruction less, where masks cost nothing
  const auto odd = hn::TestBit(bits, hn::Set(du32, 0x10000));
  return hn::Add(bits, hn::IfThenElse(odd, hn::Set(du32, 0x8000), hn::Set(du32, 0x7fff)));
#else
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du32, 1));
  return hn::Add(hn::Add(bits, hn::Set(du32, 0x7fff)), odd);
#endif
}

template <class E, class D>
HWY_INLINE hn::Vec<hn::Rebind<uint16_t, D>> ToRaw(D d, hn::Vec<D> v) {
  const hn::Rebind<uint16_t, D> du16;
  const hn::Rebind<uint32_t, D> du32;
  if constexpr (std::is_same_v<E, BFloat16>) {
    return hn::TruncateTo(du16, hn::ShiftRight<16>(RoundedToBFloat16(d, v)));
  } else if constexpr (kNativeFloat16) {
    const hn::Rebind<hwy::float16_t, D> df16;
    return hn::BitCast(du16, hn::DemoteTo(df16, v));
  } else {
    return hn::TruncateTo(du16, HalfBitsFromFloat(du32, v));
  }
}

// Past the cache if `stream`: `to` is then aligned to what a vector stores.
template <class DRaw, class VRaw, class Raw>
HWY_INLINE void StoreRaw(DRaw d, VRaw v, Raw* to, bool stream) {
  if constexpr (sizeof(Raw) * hn::MaxLanes(DRaw()) >= 16) {
    if (stream) {
      hn::Stream(v, d, to);
      return;
    }
  }
  hn::StoreU(v, d, to);
}

template <class D, class E>
HWY_INLINE void StoreElements(D d, hn::Vec<D> v, E* to, bool stream) {
  if constexpr (std::is_same_v<E, float> || std::is_same_v<E, double>) {
    StoreRaw(d, v, to, stream);
  } else {
    const hn::Rebind<uint16_t, D> du16;
    StoreRaw(du16, ToRaw<E>(d, v), reinterpret_cast<uint16_t*>(to), stream);
  }
}

// Two vectors of elements in whatever order is cheapest: of bfloat16 the elements at even
// places and those at odd ones, halves of a word; of others one after the other. For what
// treats all of them alike.
template <class E>
inline constexpr bool kPairsInterleave = HWY_TARGET != HWY_SCALAR&& std::is_same_v<E, BFloat16>;

template <class D>
struct Pair {
  hn::Vec<D> a, b;
};

// Of a pair of bfloat16, the words that are stored.
template <class D>
using WordsTag = hn::Repartition<uint16_t, D>;
template <class D>
using Words = hn::Vec<WordsTag<D>>;

template <class D>
HWY_INLINE Words<D> LoadWords(D, const BFloat16* from) {
  return InRegister(hn::LoadU(WordsTag<D>(), reinterpret_cast<const uint16_t*>(from)));
}
template <class D>
HWY_INLINE Pair<D> PairOfWords(D d, Words<D> words) {
  const hn::Rebind<uint32_t, D> du32;
  const auto both = hn::BitCast(du32, words);
  return {hn::BitCast(d, hn::ShiftLeft<16>(both)),
          hn::BitCast(d, hn::And(both, hn::Set(du32, 0xffff0000u)))};
}
template <class D>
HWY_INLINE Words<D> RoundedToWords([[maybe_unused]] D d, const Pair<D>& pair) {
  const hn::Rebind<uint32_t, D> du32;
  const WordsTag<D> du16;
#if HWY_TARGET == HWY_AVX3  // both rounded at once, where masks cost nothing
  const hn::Repartition<uint8_t, D> du8;
  HWY_ALIGN static constexpr uint8_t kOther[16] = {2,  3,  0, 1, 6,  7,  4,  5,
                                                   10, 11, 8, 9, 14, 15, 12, 13};
  const auto other = hn::LoadDup128(du8, kOther);  // half of a word
  // Two masks, not one and its inverse, which would be inverted again for each pair.
  const auto bytes_of = [&](uint32_t bits) NORMD_INLINE_LAMBDA {
    return hn::Ne(hn::BitCast(du8, hn::Set(du32, bits)), hn::Zero(du8));
  };
  const auto lower = bytes_of(0xffff), upper = bytes_of(0xffff0000u);
  const auto a = hn::BitCast(du8, pair.a), b = hn::BitCast(du8, pair.b);
  const auto high = hn::BitCast(du16, hn::IfThenElse(lower, hn::TableLookupBytes(a, other), b));
  const auto low = hn::BitCast(du16, hn::IfThenElse(upper, hn::TableLookupBytes(b, other), a));
  const auto one = hn::Set(du16, 1);
  // Above one half, or one half and odd.
  const auto up = hn::Gt(hn::OrAnd(low, high, one), hn::Set(du16, 0x8000));
  return hn::IfThenElse(up, hn::Add(high, one), high);
#else
  return hn::BitCast(du16, hn::OrAnd(hn::ShiftRight<16>(RoundedToBFloat16(d, pair.a)),
                                     RoundedToBFloat16(d, pair.b), hn::Set(du32, 0xffff0000u)));
#endif
}
// If `stream`, `to` is aligned to what a pair stores.
template <class D>
HWY_INLINE void StoreWords(D, Words<D> words, BFloat16* to, bool stream) {
  StoreRaw(WordsTag<D>(), words, reinterpret_cast<uint16_t*>(to), stream);
}

template <class D, class E>
HWY_INLINE Pair<D> LoadPair(D d, const E* from) {
  if constexpr (kPairsInterleave<E>) {
    return PairOfWords(d, LoadWords(d, from));
  } else {
    return {LoadElements(d, from), LoadElements(d, from + hn::Lanes(d))};
  }
}

// If `stream`, `to` is aligned to what a pair stores.
template <class D, class E>
HWY_INLINE void StorePair(D d, const Pair<D>& pair, E* to, bool stream) {
  if constexpr (kPairsInterleave<E>) {
    StoreWords(d, RoundedToWords(d, pair), to, stream);
  } else {
    StoreElements(d, pair.a, to, stream);
    StoreElements(d, pair.b, to + hn::Lanes(d), stream);
  }
}

// Two vectors one after the other, with the same alignment.
template <class D, class E>
HWY_INLINE void StoreTwo(D d, hn::Vec<D> first, hn::Vec<D> second, E* to, bool stream) {
#if HWY_TARGET != HWY_SCALAR  // has no ConcatOdd()
  if constexpr (kPairsInterleave<E>) {
    const hn::Repartition<uint16_t, D> du16;
    const auto halves = hn::ConcatOdd(du16, hn::BitCast(du16, RoundedToBFloat16(d, second)),
                                      hn::BitCast(du16, RoundedToBFloat16(d, first)));
    StoreRaw(du16, halves, reinterpret_cast<uint16_t*>(to), stream);
    return;
  }
#endif
  StoreElements(d, first, to, stream);
  StoreElements(d, second, to + hn::Lanes(d), stream);
}

// The lines that a pair lies on.
template <class D, class E>
HWY_INLINE void FetchPairAhead(D d, const E* from) {
  FetchAhead(from);
  if (sizeof(E) > 2) FetchAhead(from + hn::Lanes(d));
}
template <class D, class E>
HWY_INLINE void FetchPairNear(D d, const E* from) {
  FetchNear(from);
  if (sizeof(E) > 2) FetchNear(from + hn::Lanes(d));
}

// Values of the computing type that belong to the elements of a pair.
template <class E, class D>
HWY_INLINE Pair<D> LoadPairValues(D d, const hn::TFromD<D>* from) {
  Pair<D> values;
  if constexpr (kPairsInterleave<E>) {
    hn::LoadInterleaved2(d, from, values.a, values.b);
  } else {
    values = {hn::LoadU(d, from), hn::LoadU(d, from + hn::Lanes(d))};
  }
  return values;
}
template <class E, class D>
HWY_INLINE void StorePairValues(D d, const Pair<D>& values, hn::TFromD<D>* to) {
  if constexpr (kPairsInterleave<E>) {
    hn::StoreInterleaved2(values.a, values.b, d, to);
  } else {
    hn::StoreU(values.a, d, to);
    hn::StoreU(values.b, d, to + hn::Lanes(d));
  }
}

// Whether a pair may be streamed there.
template <class D, class E>
HWY_INLINE bool IsAlignedForPair(D d, const E* to) {
  const uintptr_t vectors = kPairsInterleave<E> ? 2 : 1;
  return reinterpret_cast<uintptr_t>(to) % (vectors * hn::Lanes(d) * sizeof(E)) == 0;
}

// The `n` elements at `from`, n <= Lanes(d), and zeros.
template <class D, class E>
HWY_INLINE hn::Vec<D> LoadPartial(D d, const E* from, size_t n) {
#if HWY_TARGET == HWY_AVX3  // where what a mask leaves out is not touched
  if constexpr (sizeof(E) == sizeof(hn::TFromD<D>)) {
    return hn::MaskedLoad(hn::FirstN(d, n), d, from);
  } else {
    const hn::Rebind<uint16_t, D> du16;
    return FromRaw<E>(
        d, hn::MaskedLoad(hn::FirstN(du16, n), du16, reinterpret_cast<const uint16_t*>(from)));
  }
#else
  HWY_ALIGN E buffer[kMaxLanes] = {};
  std::memcpy(buffer, from, n * sizeof(E));
  return LoadElements(d, buffer);
#endif
}

template <class D, class E>
HWY_INLINE void StorePartial(D d, hn::Vec<D> v, E* to, size_t n) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (sizeof(E) == sizeof(hn::TFromD<D>)) {
    hn::BlendedStore(v, hn::FirstN(d, n), d, to);
  } else {
    const hn::Rebind<uint16_t, D> du16;
    hn::BlendedStore(ToRaw<E>(d, v), hn::FirstN(du16, n), du16, reinterpret_cast<uint16_t*>(to));
  }
#else
  HWY_ALIGN E buffer[kMaxLanes];
  StoreElements(d, v, buffer, /*stream=*/false);
  std::memcpy(to, buffer, n * sizeof(E));
#endif
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
