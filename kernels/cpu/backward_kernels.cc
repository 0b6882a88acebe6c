// Backward's inner loops for each instruction set.
#include "kernels/cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/backward_kernels.cc"
#include "hwy/foreach_target.h"  // compiles this file once for each
//
#include "hwy/highway.h"
#include "kernels/cpu/backward-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/row_gradients-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {

template <class E>
inline constexpr BackwardKernels kBackwardKernels = {
    .sums_of_runs = SumsOfRuns<E>,
    .sums_of_columns = SumsOfColumns<E>,
    .add_up = AddUp<E>,
    .gradient_of_planes = GradientOfPlanes<E>,
    .gradient_of_columns = GradientOfColumns<E>,
    .backward_rows = BackwardRows<E>,
};

const BackwardKernels* BackwardTable(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &kBackwardKernels<float>;
    case DType::kFloat64: return &kBackwardKernels<double>;
    case DType::kFloat16: return &kBackwardKernels<Float16>;
    case DType::kBFloat16: return &kBackwardKernels<BFloat16>;
  }
  return nullptr;
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normd::cpu {
HWY_EXPORT(BackwardTable);

const BackwardKernels& BackwardKernelsFor(DType dtype) {
  return *HWY_DYNAMIC_DISPATCH(BackwardTable)(dtype);
}
}  // namespace normd::cpu
#endif
