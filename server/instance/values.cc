#include "server/instance/values.h"

#include <cstring>

namespace normd {

Values Values::Make(DType dtype, int64_t count, absl::FunctionRef<void(void* data)> fill) {
  Values values;
  // One more byte, so that an array of no values is still present.
  auto data = std::make_shared<std::byte[]>(static_cast<size_t>(count) * SizeOf(dtype) + 1);
  fill(data.get());
  values.data_ = std::move(data);
  values.size_ = count;
  values.dtype_ = dtype;
  return values;
}

Values Values::Map(DType dtype, int64_t count, absl::FunctionRef<double(int64_t i)> value) {
  return Make(dtype, count, [&](void* data) {
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == DType::kFloat64) {
        static_cast<double*>(data)[i] = value(i);
      } else {
        static_cast<float*>(data)[i] = static_cast<float>(value(i));
      }
    }
  });
}

Values Values::Filled(DType dtype, int64_t count, double value) {
  return Map(dtype, count, [value](int64_t) { return value; });
}

Values Values::FromBytes(DType dtype, std::string_view bytes) {
  return Make(dtype, static_cast<int64_t>(bytes.size() / SizeOf(dtype)), [bytes](void* data) {
    if (!bytes.empty()) std::memcpy(data, bytes.data(), bytes.size());
  });
}

double Values::operator[](int64_t i) const {
  return dtype_ == DType::kFloat64 ? static_cast<const double*>(data())[i]
                                   : static_cast<const float*>(data())[i];
}

bool operator==(const Values& a, const Values& b) {
  return a.present() == b.present() && a.dtype() == b.dtype() && a.bytes() == b.bytes();
}

}  // namespace normd
