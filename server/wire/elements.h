// Single elements of a tensor's bytes, for the rare paths that read them one by one.
#ifndef NORMD_SERVER_WIRE_ELEMENTS_H_
#define NORMD_SERVER_WIRE_ELEMENTS_H_

#include <cstddef>
#include <cstring>

#include "kernels/dtype.h"
#include "kernels/half.h"

namespace normd {

// Element i of little-endian `bytes`.
inline double ReadElement(const char* bytes, DType dtype, size_t i) {
  const auto read = [&](auto value) {
    std::memcpy(&value, bytes + i * sizeof(value), sizeof(value));
    return value;
  };
  switch (dtype) {
    case DType::kFloat32: return read(float{});
    case DType::kFloat64: return read(double{});
    case DType::kFloat16: return ToFloat(read(Float16{}));
    case DType::kBFloat16: return ToFloat(read(BFloat16{}));
  }
  return 0;
}

// Rounds `value` to the type and writes it as element i.
inline void WriteElement(char* bytes, DType dtype, size_t i, double value) {
  const auto write = [&](auto element) {
    std::memcpy(bytes + i * sizeof(element), &element, sizeof(element));
  };
  switch (dtype) {
    case DType::kFloat32: return write(static_cast<float>(value));
    case DType::kFloat64: return write(value);
    case DType::kFloat16: return write(ToFloat16(static_cast<float>(value)));
    case DType::kBFloat16: return write(ToBFloat16(static_cast<float>(value)));
  }
}

}  // namespace normd

#endif  // NORMD_SERVER_WIRE_ELEMENTS_H_
