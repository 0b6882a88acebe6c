// Conversion between the floating-point types of tensors.
#ifndef NORMD_CLIENT_NORMCTL_FLOAT_TYPES_H_
#define NORMD_CLIENT_NORMCTL_FLOAT_TYPES_H_

#include <cstdint>

#include "client/normd_client.h"

namespace normd::normctl {

// Rounds to nearest, ties to even, as torch.Tensor.to does; what is too large
// becomes infinite, and a NaN stays one.
uint16_t Float16FromFloat(float value);
uint16_t BFloat16FromFloat(float value);
float FloatFromFloat16(uint16_t bits);
float FloatFromBFloat16(uint16_t bits);

// The tensor with each value as `dtype`; itself where it has that already.
// Precondition: neither type is kInt64.
Tensor ConvertTo(DataType dtype, const Tensor& tensor);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_FLOAT_TYPES_H_
