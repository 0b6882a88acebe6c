// Element types of tensors.
#ifndef NORMD_KERNELS_DTYPE_H_
#define NORMD_KERNELS_DTYPE_H_

#include <cstddef>
#include <cstdint>

namespace normd {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Bytes of one element.
constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kFloat64: return 8;
    case DType::kFloat16: return 2;
    case DType::kBFloat16: return 2;
  }
  return 0;
}

// PyTorch's name: "float32".
constexpr const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
  }
  return "?";
}

// Type of weight, bias and their gradients for data of `dtype`: float32, but
// float64 for float64 data. Also the type that a kernel computes in.
constexpr DType ParameterTypeFor(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace normd

#endif  // NORMD_KERNELS_DTYPE_H_
