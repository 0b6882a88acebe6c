// From statistics to coefficients, for each instruction set.
#include "kernels/cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/coefficient_kernels.cc"
#include "hwy/foreach_target.h"  // compiles this file once for each
//
#include "hwy/highway.h"
#include "kernels/cpu/coefficients-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/set_constants-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {

template <class E>
inline constexpr CoefficientKernels kCoefficientKernels = {
    .constants_of_sets = ConstantsOfSets<E>,
    .coefficients_of_channels = CoefficientsOfChannels<E>,
    .gradients_of_channels = GradientsOfChannels<E>,
    .spread = SpreadOverPlanes<E>,
};

const CoefficientKernels* CoefficientTable(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &kCoefficientKernels<float>;
    case DType::kFloat64: return &kCoefficientKernels<double>;
    case DType::kFloat16: return &kCoefficientKernels<Float16>;
    case DType::kBFloat16: return &kCoefficientKernels<BFloat16>;
  }
  return nullptr;
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normd::cpu {
HWY_EXPORT(CoefficientTable);

const CoefficientKernels& CoefficientKernelsFor(DType dtype) {
  return *HWY_DYNAMIC_DISPATCH(CoefficientTable)(dtype);
}
}  // namespace normd::cpu
#endif
