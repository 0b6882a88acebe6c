// From constants and parameters to the coefficients of channels and of columns.
#if defined(NORMD_KERNELS_CPU_COEFFICIENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_COEFFICIENTS_INL_H_
#undef NORMD_KERNELS_CPU_COEFFICIENTS_INL_H_
#else
#define NORMD_KERNELS_CPU_COEFFICIENTS_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/set_constants-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rounded to the computing type. A NaN's low bits must be clear: see RoundedToBFloat16().
template <class T, class D64>
HWY_INLINE void StoreCoefficients(D64 d, hn::Vec<D64> v, void* to, int64_t i) {
  const auto quiet = hn::Set(d, std::numeric_limits<double>::quiet_NaN());
  StoreDoubles(d, hn::IfThenElse(hn::IsNaN(v), quiet, v), static_cast<T*>(to) + i);
}

// Of a parameter in the computing type; null: `otherwise` everywhere.
template <class T, class D64>
HWY_INLINE hn::Vec<D64> LoadParameter(D64 d, const void* from, int64_t i, double otherwise) {
  if (from == nullptr) return hn::Set(d, otherwise);
  return LoadDoubles(d, static_cast<const T*>(from) + i);
}

template <class T, class D64>
HWY_INLINE void CoefficientsAt(D64 d, int64_t i, const Channels& of,
                               const MutableCoefficients& to) {
  StoreCoefficients<T>(d, hn::LoadU(d, of.constants.shift + i), to.shift, i);
  if (to.scale == nullptr) return;
  const auto residual = hn::LoadU(d, of.constants.residual + i);
  const auto invstd = hn::LoadU(d, of.constants.invstd + i);
  const auto scale = hn::Mul(invstd, LoadParameter<T>(d, of.weight, i, 1));
  StoreCoefficients<T>(d, scale, to.scale, i);
  if (to.slope == nullptr) {
    const auto bias = LoadParameter<T>(d, of.bias, i, 0);
    StoreCoefficients<T>(d, hn::Sub(bias, hn::Mul(residual, scale)), to.offset, i);
    return;
  }
  // SetGradient.
  auto slope = hn::Zero(d), offset = slope;
  if (of.sum_gx != nullptr) {
    const auto inverse = hn::Set(d, 1 / of.elements);
    const auto gx = hn::Mul(hn::LoadU(d, of.sum_gx + i), inverse);
    slope = hn::Neg(hn::Mul(hn::Mul(invstd, invstd), gx));
    if (of.center) offset = hn::Mul(invstd, hn::Mul(hn::LoadU(d, of.sum_g + i), inverse));
    offset = hn::Neg(hn::Add(hn::Mul(residual, slope), offset));
  }
  StoreCoefficients<T>(d, slope, to.slope, i);
  StoreCoefficients<T>(d, offset, to.offset, i);
}

template <class E>
void CoefficientsOfChannels(const Channels& of, int64_t count, const MutableCoefficients& to) {
  ForEachDouble(count, [&](auto d, int64_t i)
                           NORMD_INLINE_LAMBDA { CoefficientsAt<ComputeType<E>>(d, i, of, to); });
}

template <class E>
void GradientsOfChannels(const Channels& of, int64_t count, const double* dy, const double* dy_d,
                         double* grad_weight, double* g, double* gx) {
  ForEachDouble(count, [&](auto d, int64_t i) NORMD_INLINE_LAMBDA {
    const auto weight = LoadParameter<ComputeType<E>>(d, of.weight, i, 1);
    const auto sum = hn::LoadU(d, dy + i);
    // GradWeight().
    const auto centered =
        hn::Sub(hn::LoadU(d, dy_d + i), hn::Mul(hn::LoadU(d, of.constants.residual + i), sum));
    const auto gradient = hn::Mul(centered, hn::LoadU(d, of.constants.invstd + i));
    hn::StoreU(gradient, d, grad_weight + i);
    hn::StoreU(hn::Mul(weight, sum), d, g + i);
    hn::StoreU(hn::Mul(weight, gradient), d, gx + i);
  });
}

// Of Coefficients in the order of pairs.
inline constexpr int64_t kKinds = 4;

// A vector of columns that are the positions of planes, one plane after the other. The first lies
// `skip` columns after the beginning of a plane; each other is kStep, one or two, further on.
// Planes are no smaller than a vector, so that there are two of them, or three.
template <class D, int kStep>
class ColumnsOfPlanes {
 public:
  using T = hn::TFromD<D>;

  HWY_INLINE ColumnsOfPlanes(int64_t planes, int64_t plane_size, int64_t plane, int64_t skip)
      : first_(plane),
        second_(std::min(plane + 1, planes - 1)),
        third_(std::min(plane + 2, planes - 1)) {
    const D d;
    const auto size = hn::Set(d, static_cast<T>(plane_size));
    const auto position =
        hn::MulAdd(hn::Iota(d, T{0}), hn::Set(d, T{kStep}), hn::Set(d, static_cast<T>(skip)));
    in_second_ = hn::Ge(position, size);
    in_third_ = hn::Ge(position, hn::Add(size, size));
  }

  // Each one's plane's value.
  HWY_INLINE hn::Vec<D> ValuesOf(const T* values) const {
    const D d;
    auto v = hn::IfThenElse(in_second_, hn::Set(d, values[second_]), hn::Set(d, values[first_]));
    if (kStep > 1) v = hn::IfThenElse(in_third_, hn::Set(d, values[third_]), v);
    return v;
  }

 private:
  int64_t first_, second_, third_;
  hn::Mask<D> in_second_, in_third_;
};

template <class E>
Coefficients SpreadOverPlanes(const Coefficients& of_planes, int64_t planes, int64_t plane_size,
                              void* memory) {
  using T = ComputeType<E>;
  using D = Tag<E>;
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t columns = planes * plane_size;
  const int64_t stride = (columns + lanes + 15) / 16 * 16;
  const T* const shift = static_cast<const T*>(of_planes.shift);
  const bool shifted = kAlwaysShifts<E> || AreShifted(planes, shift);
  const T* from[kKinds] = {shifted ? shift : nullptr, static_cast<const T*>(of_planes.scale),
                           static_cast<const T*>(of_planes.offset),
                           static_cast<const T*>(of_planes.slope)};
  T* to[kKinds] = {};
  T* next = static_cast<T*>(memory);
  for (int64_t kind = 0; kind < kKinds; ++kind, next += stride) {
    if (from[kind] != nullptr) to[kind] = next;
  }
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
  int64_t plane = 0, skip = 0;
  for (int64_t j = 0; j < columns; j += lanes) {
    const auto spread = [&](auto step, int64_t begin, auto place) NORMD_INLINE_LAMBDA {
      const ColumnsOfPlanes<D, step> at(planes, plane_size, plane, begin);
      for (int64_t kind = 0; kind < kKinds; ++kind) {
        if (from[kind] != nullptr) hn::StoreU(at.ValuesOf(from[kind]), d, place(kind));
      }
    };
    spread(kOne, skip, [&](int64_t kind) { return to[kind] + j; });
    if (kPairsInterleave<E> && j % (2 * lanes) == 0 && j + 2 * lanes <= columns) {
      T* const pairs = next + kKinds * j;
      spread(kTwo, skip, [&](int64_t kind) { return pairs + kind * lanes; });
      spread(kTwo, skip + 1, [&](int64_t kind) { return pairs + (kKinds + kind) * lanes; });
    }
    for (skip += lanes; skip >= plane_size; skip -= plane_size) ++plane;
  }
  return {.shift = to[0],
          .scale = to[1],
          .offset = to[2],
          .slope = to[3],
          .paired = kPairsInterleave<E> ? next : nullptr};
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
