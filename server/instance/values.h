// Values: an immutable array of parameters or statistics.
#ifndef NORMD_SERVER_INSTANCE_VALUES_H_
#define NORMD_SERVER_INSTANCE_VALUES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "kernels/dtype.h"

namespace normd {

// float32 or float64 values, shared by copying and never changed once made: a
// snapshot of an instance costs no copy of what did not change. Thread-safe.
// A default-constructed Values is absent, which is not the same as being of
// size 0.
class Values {
 public:
  Values() = default;

  // `count` values of `dtype` (kFloat32 or kFloat64), all `value`.
  static Values Filled(DType dtype, int64_t count, double value);
  // Little-endian bytes; their number is a multiple of the element's size.
  static Values FromBytes(DType dtype, std::string_view bytes);
  // `fill` is called once and writes all `count` values, zeroed before.
  static Values Make(DType dtype, int64_t count, absl::FunctionRef<void(void* data)> fill);
  // value(i) for each i, rounded to `dtype`.
  static Values Map(DType dtype, int64_t count, absl::FunctionRef<double(int64_t i)> value);

  bool present() const { return data_ != nullptr; }
  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  // Null when absent.
  const void* data() const { return data_.get(); }
  // What these values are known by: no others have the same while a pointer to it is left.
  std::shared_ptr<const void> token() const { return data_; }
  std::string_view bytes() const {
    return {reinterpret_cast<const char*>(data_.get()), size_ * SizeOf(dtype_)};
  }
  // Precondition: 0 <= i < size().
  double operator[](int64_t i) const;

 private:
  std::shared_ptr<const std::byte[]> data_;
  int64_t size_ = 0;
  DType dtype_ = DType::kFloat32;
};

// Equal presence, dtype, size and bits.
bool operator==(const Values& a, const Values& b);

}  // namespace normd

#endif  // NORMD_SERVER_INSTANCE_VALUES_H_
