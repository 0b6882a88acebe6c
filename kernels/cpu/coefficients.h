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
#include <vector>

#include "kernels/cpu/cache.h"
#include "kernels/cpu/kernels.h"
#include "kernels/problem.h"
#include "kernels/set_constants.h"

namespace normd::cpu {

// Memory for a while, aligned to a cache line. Throws std::bad_alloc.
class Scratch {
 public:
  Scratch() = default;
  // Aligned by hand: an aligned new costs several times what a plain one does.
  explicit Scratch(size_t bytes) : memory_(new std::byte[bytes + kLineBytes]) {
    const auto address = reinterpret_cast<intptr_t>(memory_.get());
    first_ = memory_.get() + (kLineBytes - address % kLineBytes);
  }

  template <class T = void>
  T* Get(size_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(first_ + offset_bytes);
  }

 private:
  std::unique_ptr<std::byte[]> memory_;
  std::byte* first_ = nullptr;
};

// A parameter of channels, the caller's own array; `otherwise` where there is none.
class Parameter {
 public:
  Parameter(DType dtype, const void* data, double otherwise)
      : is_double_(dtype == DType::kFloat64), data_(data), otherwise_(otherwise) {}

  double operator[](int64_t c) const {
    if (data_ == nullptr) return otherwise_;
    return is_double_ ? static_cast<const double*>(data_)[c]
                      : static_cast<double>(static_cast<const float*>(data_)[c]);
  }
  // From the c-th on, in the computing type; null: none.
  const void* From(int64_t c) const {
    if (data_ == nullptr) return nullptr;
    return static_cast<const char*>(data_) + c * (is_double_ ? 8 : 4);
  }

 private:
  bool is_double_;
  const void* data_;
  double otherwise_;
};

inline void AddEach(int64_t count, const double* __restrict more, double* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += more[i];
}

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
  // The sums of values [samples][channels], the first of which become those.
  void SetSums(double* values, int64_t samples, int64_t channels) const {
    if (data_ == nullptr) return;
    for (int64_t sample = 1; sample < samples; ++sample) {
      AddEach(channels, values + sample * channels, values);
    }
    if (is_double_) {
      std::copy_n(values, channels, static_cast<double*>(data_));
    } else {
      std::copy_n(values, channels, static_cast<float*>(data_));
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
    if (is_double_) {
      memory_.Get<double>()[kind * count_ + i] = value;
    } else {
      // A NaN's low bits must be clear: see RoundedToBFloat16().
      memory_.Get<float>()[kind * count_ + i] =
          std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(value);
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

  MutableCoefficients To(int64_t i) {
    return {At(kShift, i), At(kScale, i), At(kOffset, i), kinds_ == 4 ? At(kSlope, i) : nullptr};
  }

 private:
  void* At(int kind, int64_t i) const {
    return memory_.Get(static_cast<size_t>(kind * count_ + i) * (is_double_ ? 8 : 4));
  }

  bool is_double_;
  int64_t count_;
  int kinds_;
  Scratch memory_;
};

// What channels are normalized by; where each sample has sets of its own, those of all samples.
// Filled in for some sets at a time, of different ones also by several threads at once.
class ChannelConstants {
 public:
  // Of `sets` sets.
  ChannelConstants(const NormProblem& problem, const CoefficientKernels& kernels, int64_t sets)
      : problem_(problem),
        kernels_(kernels),
        channels_of_set_(
            problem.reduction == Reduction::kPerChannel ? 1 : problem.channels / problem.groups),
        count_(sets * channels_of_set_),
        memory_(static_cast<size_t>(3 * count_) * sizeof(double)) {}

  // Of sets whose moments were found.
  void Find(int64_t first_set, int64_t sets, const Moments& moments) {
    Find(first_set, sets, moments.mean + first_set, moments.m2 + first_set,
         static_cast<double>(problem_.set_size()), /*of_batch=*/true);
  }
  // Of those that are `skipped` further on among the statistics.
  void Find(int64_t first_set, int64_t sets, const Statistics& statistics, bool of_batch,
            int64_t skipped = 0) {
    const int64_t at = first_set + skipped;
    const double* mean = statistics.mean == nullptr ? nullptr : statistics.mean + at;
    Find(first_set, sets, mean, statistics.var + at, /*elements=*/1, of_batch);
  }

  SetConstants operator[](int64_t channel) const {
    const SetConstantArrays at = From(channel);
    return {*at.shift, *at.residual, *at.invstd};
  }

  // The coefficients of all channels of these sets, from the i-th in the arrays on.
  void SetForward(int64_t first_set, int64_t sets, const Parameter& weight, const Parameter& bias,
                  CoefficientArrays& arrays, int64_t i) const {
    ForEachRun(first_set, sets, [&](int64_t done, int64_t c, int64_t count, Channels channels) {
      channels.weight = weight.From(c);
      channels.bias = bias.From(c);
      kernels_.coefficients_of_channels(channels, count, arrays.To(i + done));
    });
  }
  // The shifts alone, which their sums need.
  void SetShifts(int64_t first_set, int64_t sets, CoefficientArrays& arrays, int64_t i) const {
    ForEachRun(first_set, sets, [&](int64_t done, int64_t, int64_t count, const Channels& of) {
      kernels_.coefficients_of_channels(of, count, {.shift = arrays.To(i + done).shift});
    });
  }
  // The sums as in SetGradient, of a set, but a value for each of its channels; null: 0, both.
  void SetBackward(int64_t first_set, int64_t sets, const Parameter& weight, const double* sum_g,
                   const double* sum_gx, CoefficientArrays& arrays, int64_t i) const {
    ForEachRun(first_set, sets, [&](int64_t done, int64_t c, int64_t count, Channels channels) {
      channels.weight = weight.From(c);
      if (sum_g != nullptr) {
        channels.sum_g = sum_g + done;
        channels.sum_gx = sum_gx + done;
        channels.elements = static_cast<double>(problem_.set_size());
        channels.center = problem_.center;
      }
      kernels_.coefficients_of_channels(channels, count, arrays.To(i + done));
    });
  }

  // What a set's channels add to its sums, from their own: of dy and of dy * (x - shift). Those of
  // dy are the gradients of the biases, too.
  void FindGradients(int64_t first_set, int64_t sets, const Parameter& weight, const double* dy,
                     const double* dy_d, double* grad_weight, double* g, double* gx) const {
    ForEachRun(first_set, sets, [&](int64_t done, int64_t c, int64_t count, Channels channels) {
      channels.weight = weight.From(c);
      kernels_.gradients_of_channels(channels, count, dy + done, dy_d + done, grad_weight + done,
                                     g + done, gx + done);
    });
  }

  // From the channel on.
  SetConstantArrays From(int64_t channel) const {
    double* const shift = memory_.Get<double>() + channel;
    return {shift, shift + count_, shift + 2 * count_};
  }

 private:
  // Of sets whose statistics begin there; the variance is m2 / elements.
  void Find(int64_t first_set, int64_t sets, const double* mean, const double* m2, double elements,
            bool of_batch) {
    const SetConstantArrays constants = From(first_set * channels_of_set_);
    kernels_.constants_of_sets({problem_.center ? mean : nullptr, m2, elements, problem_.eps,
                                of_batch && problem_.reduction == Reduction::kPerChannel},
                               sets, constants);
    for (double* values : {constants.shift, constants.residual, constants.invstd}) {
      SpreadEach(values, sets, channels_of_set_);
    }
  }

  // Calls visit(done, c, count, channels) for each run of these sets' channels that have
  // neighbouring parameters, from channel c's on; `done` come before it.
  template <class Visit>
  void ForEachRun(int64_t first_set, int64_t sets, Visit visit) const {
    const int64_t first = first_set * channels_of_set_, all = sets * channels_of_set_;
    for (int64_t done = 0, count = 0; done < all; done += count) {
      const int64_t c = (first + done) % problem_.channels;
      count = std::min(all - done, problem_.channels - c);
      visit(done, c, count, Channels{.constants = From(first + done), .weight = nullptr});
    }
  }

  const NormProblem& problem_;
  const CoefficientKernels& kernels_;
  int64_t channels_of_set_;
  int64_t count_;  // of channels
  Scratch memory_;
};

// Those of one channel.
inline void SetForward(CoefficientArrays& arrays, int64_t i, const SetConstants& set, double weight,
                       double bias) {
  const double scale = set.invstd * weight;
  arrays.Set(CoefficientArrays::kShift, i, set.shift);
  arrays.Set(CoefficientArrays::kScale, i, scale);
  arrays.Set(CoefficientArrays::kOffset, i, bias - set.residual * scale);
}

}  // namespace normd::cpu

#endif  // NORMD_KERNELS_CPU_COEFFICIENTS_H_
