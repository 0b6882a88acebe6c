#include "client/normctl/float_types.h"

#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "absl/base/casts.h"

namespace normd::normctl {
namespace {

// The element of `dtype` at `from`; every 16- and 32-bit value is a double.
double Load(DataType dtype, const char* from) {
  switch (dtype) {
    case DataType::kFloat64: {
      double value;
      std::memcpy(&value, from, sizeof(value));
      return value;
    }
    case DataType::kFloat16:
    case DataType::kBFloat16: {
      uint16_t bits;
      std::memcpy(&bits, from, sizeof(bits));
      return dtype == DataType::kFloat16 ? FloatFromFloat16(bits) : FloatFromBFloat16(bits);
    }
    default: {
      float value;
      std::memcpy(&value, from, sizeof(value));
      return value;
    }
  }
}

void Store(DataType dtype, double value, char* to) {
  switch (dtype) {
    case DataType::kFloat64: std::memcpy(to, &value, sizeof(value)); return;
    case DataType::kFloat16:
    case DataType::kBFloat16: {
      // By way of float32, as PyTorch converts float64.
      const auto narrow = static_cast<float>(value);
      const uint16_t bits =
          dtype == DataType::kFloat16 ? Float16FromFloat(narrow) : BFloat16FromFloat(narrow);
      std::memcpy(to, &bits, sizeof(bits));
      return;
    }
    default: {
      const auto narrow = static_cast<float>(value);
      std::memcpy(to, &narrow, sizeof(narrow));
      return;
    }
  }
}

}  // namespace

uint16_t BFloat16FromFloat(float value) {
  const auto bits = absl::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);  // keep it quiet
  // Half of the last place that stays, and one more when that place is odd.
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float FloatFromBFloat16(uint16_t bits) {
  return absl::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

uint16_t Float16FromFloat(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  const float magnitude = std::fabs(value);
  // From half a place past the largest, 65504, on.
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) {
    // Below the smallest normal, 2^-14, places are 2^-24 apart. 1024 of them are
    // that normal itself, whose bits are 1024.
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  const auto bits = absl::bit_cast<uint32_t>(magnitude);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - ((127 - 15) << 10));
}

float FloatFromFloat16(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 0x1f;
  const int mantissa = bits & 0x3ff;
  if (exponent == 0x1f) {
    return mantissa != 0 ? std::copysign(NAN, sign) : sign * INFINITY;
  }
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
}

Tensor ConvertTo(DataType dtype, const Tensor& tensor) {
  if (tensor.dtype() == dtype) return tensor;
  const size_t from_size = SizeOf(tensor.dtype());
  const size_t to_size = SizeOf(dtype);
  const size_t count = tensor.bytes().size() / from_size;
  std::string converted(count * to_size, '\0');
  for (size_t i = 0; i < count; ++i) {
    Store(dtype, Load(tensor.dtype(), tensor.bytes().data() + i * from_size),
          &converted[i * to_size]);
  }
  return Tensor::Own(dtype, tensor.shape(), std::move(converted), tensor.memory_format());
}

}  // namespace normd::normctl
