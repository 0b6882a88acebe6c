// SetConstants of many sets at once. Halves are shifted only where 0 is far off.
#if defined(NORMD_KERNELS_CPU_SET_CONSTANTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_SET_CONSTANTS_INL_H_
#undef NORMD_KERNELS_CPU_SET_CONSTANTS_INL_H_
#else
#define NORMD_KERNELS_CPU_SET_CONSTANTS_INL_H_
#endif

#include <cstdint>
#include <limits>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Values of the computing type as doubles, and back.
template <class D64, class T>
HWY_INLINE hn::Vec<D64> LoadDoubles(D64 d, const T* from) {
  if constexpr (std::is_same_v<T, double>) {
    return hn::LoadU(d, from);
  } else {
    return hn::PromoteTo(d, hn::LoadU(hn::Rebind<float, D64>(), from));
  }
}
template <class D64, class T>
HWY_INLINE void StoreDoubles(D64 d, hn::Vec<D64> v, T* to) {
  if constexpr (std::is_same_v<T, double>) {
    hn::StoreU(v, d, to);
  } else {
    const hn::Rebind<float, D64> df;
    hn::StoreU(hn::DemoteTo(df, v), df, to);
  }
}

// ShiftNear() of each lane, where a variance of 0 may leave fewer bits of the mean.
template <class D>
HWY_INLINE hn::Vec<D> ShiftsNear(D d, hn::Vec<D> mean, hn::Vec<D> var) {
  using T = hn::TFromD<D>;
  constexpr int kDigits = std::numeric_limits<T>::digits - 1;
  const hn::RebindToUnsigned<D> du;
  using U = hn::TFromD<decltype(du)>;
  constexpr U kExponentOfOne = static_cast<U>(std::numeric_limits<T>::max_exponent - 1) << kDigits;
  constexpr U kExponents = static_cast<U>(2 * std::numeric_limits<T>::max_exponent - 1) << kDigits;
  // The power of two of the deviation, by half the exponent.
  const auto bits = hn::BitCast(du, hn::Max(var, hn::Zero(d)));
  const auto half = hn::Add(hn::ShiftRight<1>(bits), hn::Set(du, kExponentOfOne / 2));
  const auto power = hn::BitCast(d, hn::And(half, hn::Set(du, kExponents)));
  const auto large = hn::Mul(power, hn::Set(d, static_cast<T>(U{3} << (kDigits - 1)) / 8));
  return hn::Sub(hn::Add(mean, large), large);
}

// Whether 0 is within two deviations of the mean.
template <class D>
HWY_INLINE hn::Mask<D> IsNearZero(D d, hn::Vec<D> mean, hn::Vec<D> var) {
  return hn::Le(hn::Mul(mean, mean), hn::Mul(hn::Set(d, hn::TFromD<D>{4}), var));
}

// Whether a shift of columns is not 0.
template <class T>
bool AreShifted(int64_t columns, const T* shift) {
  const hn::ScalableTag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto any = hn::Zero(d);
  int64_t j = 0;
  for (; j + lanes <= columns; j += lanes) any = hn::Or(any, hn::LoadU(d, shift + j));
  if (j < columns) any = hn::Or(any, LoadPartial(d, shift + j, static_cast<size_t>(columns - j)));
  return !hn::AllTrue(d, hn::Eq(any, hn::Zero(d)));
}

// Calls run(std::bool_constant<whether x - shift is to be computed>).
template <class E, class Run>
HWY_INLINE void WithShifts(bool are_shifted, Run run) {
  if (kAlwaysShifts<E> || are_shifted) {
    run(std::true_type());
  } else {
    run(std::bool_constant<kAlwaysShifts<E>>());
  }
}
// The same of these. No shifts at all are 0.
template <class E, class Run>
HWY_INLINE void WithShifts(int64_t columns, const ComputeType<E>* shift, Run run) {
  WithShifts<E>(kAlwaysShifts<E> || (shift != nullptr && AreShifted(columns, shift)), run);
}

// 1 / sqrt(v) of values between 1e-30 and 1e30, by Newton's steps from an estimate, each of which
// doubles its 8 bits (Arm) or 11: to two or three units in the last place, in a quarter of the
// time.
template <class D64>
HWY_INLINE hn::Vec<D64> InverseRoots(D64 d, hn::Vec<D64> v) {
  const hn::Rebind<float, D64> df;
  auto root = hn::PromoteTo(d, hn::ApproximateReciprocalSqrt(hn::DemoteTo(df, v)));
  const auto half = hn::Mul(v, hn::Set(d, 0.5));
  for (int step = 0; step < 3; ++step) {
    root = hn::Mul(root, hn::NegMulAdd(hn::Mul(half, root), root, hn::Set(d, 1.5)));
  }
  return root;
}

template <class E, class D64>
HWY_INLINE void ConstantsOfSetsAt(D64 d, int64_t i, const SetStatistics& of,
                                  const SetConstantArrays& to) {
  const auto zero = hn::Zero(d);
  const auto mean = of.mean == nullptr ? zero : hn::LoadU(d, of.mean + i);
  // A caller who divides by himself and gives the variance gets the same.
  const auto m2 = hn::LoadU(d, of.m2 + i);
  const auto var = of.elements == 1 ? m2 : hn::Div(m2, hn::Set(d, of.elements));
  auto shift = mean;
  if constexpr (sizeof(ComputeType<E>) == sizeof(float)) {
    using Limits = std::numeric_limits<double>;
    const auto near = ShiftsNear(d, mean, var);
    const auto is_normal =
        hn::And(hn::Ge(var, hn::Set(d, Limits::min())), hn::Le(var, hn::Set(d, Limits::max())));
    shift = hn::IfThenElse(hn::And(is_normal, hn::IsFinite(near)), near, mean);
    const hn::Rebind<float, D64> df;
    shift = hn::PromoteTo(d, hn::DemoteTo(df, shift));
    if constexpr (!kAlwaysShifts<E>) shift = hn::IfThenZeroElse(IsNearZero(d, mean, var), shift);
  }
  const auto below_root = hn::Add(var, hn::Set(d, of.eps));
  const auto is_ordinary =
      hn::And(hn::Ge(below_root, hn::Set(d, 1e-30)), hn::Le(below_root, hn::Set(d, 1e30)));
  auto invstd = sizeof(ComputeType<E>) == sizeof(float) && HWY_LIKELY(hn::AllTrue(d, is_ordinary))
                    ? InverseRoots(d, below_root)
                    : hn::Div(hn::Set(d, 1.0), hn::Sqrt(below_root));
  if (of.zero_if_constant) invstd = hn::IfThenZeroElse(hn::Eq(below_root, zero), invstd);
  hn::StoreU(shift, d, to.shift + i);
  hn::StoreU(hn::IfThenElseZero(hn::IsFinite(shift), hn::Sub(mean, shift)), d, to.residual + i);
  hn::StoreU(invstd, d, to.invstd + i);
}

// Calls visit(tag of doubles, i) with the first of each vector, and in the end of each double.
template <class Visit>
HWY_INLINE void ForEachDouble(int64_t count, Visit visit) {
  const hn::ScalableTag<double> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) visit(d, i);
  const hn::CappedTag<double, 1> one;
  for (; i < count; ++i) visit(one, i);
}

template <class E>
void ConstantsOfSets(const SetStatistics& of, int64_t count, const SetConstantArrays& to) {
  ForEachDouble(count,
                [&](auto d, int64_t i) NORMD_INLINE_LAMBDA { ConstantsOfSetsAt<E>(d, i, of, to); });
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
