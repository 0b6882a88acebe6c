// Forward's inner loops for each instruction set.
#include "kernels/cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/forward_kernels.cc"
#include "hwy/foreach_target.h"  // compiles this file once for each
//
#include "hwy/highway.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments-inl.h"
#include "kernels/cpu/normalize-inl.h"
#include "kernels/cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {

template <class E>
inline constexpr ForwardKernels kForwardKernels = {
    .moments_of_runs = MomentsOfRuns<E>,
    .moments_of_columns = MomentsOfColumns<E>,
    .merge_columns = MergeMomentsOfColumns,
    .normalize_planes = NormalizePlanes<E>,
    .normalize_columns = NormalizeColumns<E>,
    .in_pairs = kPairsInterleave<E> ? RowInPairs<E> : nullptr,
    .constants_of_rows = ConstantsOfRows<E>,
    .forward_rows = ForwardRows<E>,
};

const ForwardKernels* ForwardTable(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &kForwardKernels<float>;
    case DType::kFloat64: return &kForwardKernels<double>;
    case DType::kFloat16: return &kForwardKernels<Float16>;
    case DType::kBFloat16: return &kForwardKernels<BFloat16>;
  }
  return nullptr;
}

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normd::cpu {
HWY_EXPORT(ForwardTable);
HWY_EXPORT(TargetName);

const ForwardKernels& ForwardKernelsFor(DType dtype) {
  return *HWY_DYNAMIC_DISPATCH(ForwardTable)(dtype);
}

const char* InstructionSet() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }
}  // namespace normd::cpu
#endif
