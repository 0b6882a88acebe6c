// From statistics and parameters to the coefficients of kernels.h.
#ifndef NORMD_KERNELS_CPU_COEFFICIENTS_H_
#define NORMD_KERNELS_CPU_COEFFICIENTS_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "kernels/cpu/kernels.h"
#include "kernels/problem.h"
#include "kernels/set_constants.h"

namespace normd::cpu {

// Memory for a while, aligned to a cache line. Throws std::bad_alloc.
class Scratch {
 public:
  Scratch() = default;
  // Aligned by hand: an aligned new costs several times what a plain one does.
  explicit Scratch(size_t bytes) : memory_(new std::byte[bytes + kCacheLine]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    first_ = memory_.get() + (kCacheLine - address % kCacheLine);
  }

  template <class T = void>
  T* Get(size_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(first_ + offset_bytes);
  }

 private:
  static constexpr size_t kCacheLine = 64;
  std::unique_ptr<std::byte[]> memory_;
  std::byte* first_ = nullptr;
};

// A parameter of each channel, of which there may be none.
class Parameter {
 public:
  Parameter(DType dtype, const void* data, double otherwise)
      : is_double_(dtype == DType::kFloat64), data_(data), otherwise_(otherwise) {}

  double operator[](int64_t c) const {
    if (data_ == nullptr) return otherwise_;
    return is_double_ ? static_cast<const double*>(data_)[c] : static_cast<const float*>(data_)[c];
  }

 private:
  bool is_double_;
  const void* data_;
  double otherwise_;
};

// Writes the gradient of a parameter; null: not wanted.
class ParameterGradient {
 public:
  ParameterGradient(DType dtype, void* data) : is_double_(dtype == DType::kFloat64), data_(data) {}

  void Set(int64_t c, double value) const {
    if (data_ == nullptr) return;
    if (is_double_) {
      static_cast<double*>(data_)[c] = value;
    } else {
      static_cast<float*>(data_)[c] = static_cast<float>(value);
    }
  }

 private:
  bool is_double_;
  void* data_;
};

// Makes of the first `count` values as many groups of `times` equal ones.
template <class T>
void SpreadEach(T* values, int64_t count, int64_t times) {
  for (int64_t i = count - 1; i >= 0 && times > 1; --i) {
    std::fill_n(values + i * times, times, T{values[i]});
  }
}

// `count` values each of the coefficients, in the computing type.
class CoefficientArrays {
 public:
  static constexpr int kShift = 0, kScale = 1, kOffset = 2, kSlope = 3;

  // `kinds`: 3 for forward, 4 for backward.
  CoefficientArrays(DType dtype, int64_t count, int kinds)
      : is_double_(dtype == DType::kFloat64),
        count_(count),
        kinds_(kinds),
        memory_(static_cast<size_t>(count * kinds) * (is_double_ ? 8 : 4)) {}

  void Set(int kind, int64_t i, double value) {
    SetEach(kind, i, 1, [&](int64_t) { return value; });
  }

  // Those from the i-th on: value_of(0), value_of(1) and so on.
  template <class ValueOf>
  void SetEach(int kind, int64_t i, int64_t count, const ValueOf& value_of) {
    if (is_double_) {
      SetEachOf(memory_.Get<double>() + kind * count_ + i, count, value_of);
    } else {
      SetEachOf(memory_.Get<float>() + kind * count_ + i, count, value_of);
    }
  }

  // SpreadEach() of all kinds, from the first-th on.
  void Spread(int64_t first, int64_t count, int64_t times) {
    for (int kind = 0; kind < kinds_; ++kind) {
      if (is_double_) {
        SpreadEach(memory_.Get<double>() + kind * count_ + first, count, times);
      } else {
        SpreadEach(memory_.Get<float>() + kind * count_ + first, count, times);
      }
    }
  }

  // Repeats the first `period` of the `count` values from `first` on, through all.
  void Repeat(int64_t first, int64_t period, int64_t count) {
    const size_t bytes = is_double_ ? 8 : 4;
    for (int kind = 0; kind < kinds_ && period < count; ++kind) {
      std::byte* values =
          memory_.Get<std::byte>(static_cast<size_t>(kind * count_ + first) * bytes);
      for (int64_t done = period; done < count; done += period) {
        const int64_t more = std::min(period, count - done);
        std::memcpy(values + static_cast<size_t>(done) * bytes, values,
                    static_cast<size_t>(more) * bytes);
      }
    }
  }

  // From the i-th on.
  Coefficients From(int64_t i) const {
    return {At(kShift, i), At(kScale, i), At(kOffset, i), kinds_ == 4 ? At(kSlope, i) : nullptr};
  }

  const void* At(int kind, int64_t i) const {
    return memory_.Get(static_cast<size_t>(kind * count_ + i) * (is_double_ ? 8 : 4));
  }

 private:
  template <class T, class ValueOf>
  static void SetEachOf(T* to, int64_t count, const ValueOf& value_of) {
    for (int64_t i = 0; i < count; ++i) {
      const double value = value_of(i);
      // A NaN's low bits must be clear: see StoreElements() for bfloat16.
      to[i] = std::isnan(value) ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(value);
    }
  }

  bool is_double_;
  int64_t count_;
  int kinds_;
  Scratch memory_;
};

// SetConstants of many sets, found a vector of them at a time.
class ManyConstants {
 public:
  explicit ManyConstants(int64_t count)
      : count_(count), memory_(static_cast<size_t>(3 * count) * sizeof(double)) {}

  // Those of `count` sets, from the first-th on, whose statistics begin there; the variance is
  // m2 / elements. Find: constants_of_sets() of kernels.h.
  template <class Find>
  void FindFor(int64_t first, int64_t count, const Find& find, const NormProblem& problem,
               const double* mean, const double* m2, double elements, bool of_batch) {
    find({problem.center ? mean : nullptr, m2, elements, problem.eps,
          of_batch && problem.reduction == Reduction::kPerChannel},
         count, {At(0, first), At(1, first), At(2, first)});
  }

  // Makes of those of `count` sets as many groups of `times` equal ones.
  void Spread(int64_t first, int64_t count, int64_t times) {
    for (int kind = 0; kind < 3; ++kind) SpreadEach(At(kind, first), count, times);
  }

  SetConstants operator[](int64_t i) const { return {*At(0, i), *At(1, i), *At(2, i)}; }

 private:
  double* At(int64_t kind, int64_t i) const { return memory_.Get<double>() + kind * count_ + i; }

  int64_t count_;
  Scratch memory_;
};

inline void SetForward(CoefficientArrays& arrays, int64_t i, const SetConstants& set, double weight,
                       double bias) {
  const double scale = set.invstd * weight;
  arrays.Set(CoefficientArrays::kShift, i, set.shift);
  arrays.Set(CoefficientArrays::kScale, i, scale);
  arrays.Set(CoefficientArrays::kOffset, i, bias - set.residual * scale);
}

inline void SetBackward(CoefficientArrays& arrays, int64_t i, const SetConstants& set,
                        double weight, const SetGradient& gradient) {
  arrays.Set(CoefficientArrays::kShift, i, set.shift);
  arrays.Set(CoefficientArrays::kScale, i, set.invstd * weight);
  arrays.Set(CoefficientArrays::kOffset, i, gradient.offset);
  arrays.Set(CoefficientArrays::kSlope, i, gradient.slope);
}

}  // namespace normd::cpu

#endif  // NORMD_KERNELS_CPU_COEFFICIENTS_H_
