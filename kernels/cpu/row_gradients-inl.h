// Rows, backward: the sums of some rows are taken while the gradients of those before are written,
// as in rows-inl.h.
#if defined(NORMD_KERNELS_CPU_ROW_GRADIENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_ROW_GRADIENTS_INL_H_
#undef NORMD_KERNELS_CPU_ROW_GRADIENTS_INL_H_
#else
#define NORMD_KERNELS_CPU_ROW_GRADIENTS_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/backward-inl.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments-inl.h"
#include "kernels/cpu/rows-inl.h"
#include "kernels/cpu/sums-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A row as both steps of its backward read it. Pairs, but for a mask: its bits follow elements
// one after the other.
template <class E, bool kMasked, bool kShifted>
class RowInput {
 public:
  using T = ComputeType<E>;
  using D = Tag<E>;
  using V = hn::Vec<D>;

  // The row begins at `begin`, what lies along it at `parameter`.
  RowInput(const BackwardTensors& tensors, int64_t begin, const AlongRows& along, int64_t parameter,
           const RowConstants& of, int64_t row)
      : invstd(ConstantOf<E>(of.invstd, row)),
        input_(tensors),
        begin_(begin),
        ahead_(tensors.ahead),
        weight_(static_cast<const T*>(along.weight) + parameter),
        shift_(ConstantOf<E>(of.shift, row)) {}

  HWY_INLINE Pair<D> Weight(int64_t j) const {
    return {hn::LoadU(D(), weight_ + j), hn::LoadU(D(), weight_ + j + hn::Lanes(D()))};
  }
  HWY_INLINE V PartialWeight(int64_t j, size_t n) const { return LoadPartial(D(), weight_ + j, n); }

  HWY_INLINE Pair<D> GradY(int64_t j) const {
    const int64_t i = begin_ + j;
    if constexpr (!kMasked) return input_.GradYPair(i);
    return {input_.GradY(i), input_.GradY(i + static_cast<int64_t>(hn::Lanes(D())))};
  }
  // x - shift.
  HWY_INLINE Pair<D> Deviation(int64_t j) const {
    const D d;
    const E* from = input_.x + begin_ + j;
    Pair<D> x;
    if constexpr (kMasked) {
      x = {LoadElements(d, from), LoadElements(d, from + hn::Lanes(d))};
    } else {
      x = LoadPair(d, from);
    }
    return {Shifted(x.a), Shifted(x.b)};
  }
  HWY_INLINE V PartialGradY(int64_t j, size_t n) const {
    return input_.PartialGradY(begin_ + j, n);
  }
  HWY_INLINE V PartialDeviation(int64_t j, size_t n) const {
    return Shifted(input_.PartialX(begin_ + j, n));
  }
  HWY_INLINE void Fetch(int64_t j) const {
    FetchPairNear(D(), input_.grad_y + begin_ + j + ahead_);
    FetchPairNear(D(), input_.x + begin_ + j + ahead_);
  }

  const V invstd;

 private:
  HWY_INLINE V Shifted(V x) const {
    if constexpr (kShifted) return hn::Sub(x, shift_);
    return x;
  }

  GradientInput<E, kMasked> input_;
  int64_t begin_, ahead_;
  const T* weight_;
  V shift_;
};

// Which sums along rows are wanted.
enum class Along { kNone, kWeight, kWeightAndBias };

// The sums over a tile of a row, of dy * weight, and what it adds to those along rows.
template <class E, bool kMasked, bool kShifted, Along kAlong>
class TileGradients {
 public:
  using T = ComputeType<E>;
  using D = Tag<E>;
  using V = hn::Vec<D>;

  TileGradients(const BackwardTensors& tensors, int64_t begin, const AlongRows& along,
                int64_t parameter, const RowConstants& of, int64_t row)
      : input_(tensors, begin, along, parameter, of, row),
        grad_weight_(static_cast<T*>(along.grad_weight) + (kWeight ? parameter : 0)),
        grad_bias_(static_cast<T*>(along.grad_bias) + (kBias ? parameter : 0)),
        lost_(ConstantOf<E>(of.lost, row)) {}

  struct Added {
    Pair<D> grad_weight, grad_bias;
  };
  HWY_INLINE Added Two(int64_t j) {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    input_.Fetch(j);
    const Pair<D> dy = input_.GradY(j), deviation = input_.Deviation(j), weight = input_.Weight(j);
    Weighted(dy.a, deviation.a, weight.a, dy_a_, dy_d_a_);
    Weighted(dy.b, deviation.b, weight.b, dy_b_, dy_d_b_);
    Added added{dy, dy};
    if constexpr (kWeight) {
      added.grad_weight = {WithWeight(dy.a, deviation.a, hn::LoadU(d, grad_weight_ + j)),
                           WithWeight(dy.b, deviation.b, hn::LoadU(d, grad_weight_ + j + lanes))};
    }
    if constexpr (kBias) {
      added.grad_bias = {hn::Add(hn::LoadU(d, grad_bias_ + j), dy.a),
                         hn::Add(hn::LoadU(d, grad_bias_ + j + lanes), dy.b)};
    }
    return added;
  }
  HWY_INLINE void Store(int64_t j, const Added& added) const {
    if constexpr (kWeight) StoreTwoAt(grad_weight_ + j, added.grad_weight);
    if constexpr (kBias) StoreTwoAt(grad_bias_ + j, added.grad_bias);
  }
  HWY_INLINE void Part(int64_t j, size_t n) {
    const D d;
    const V dy = input_.PartialGradY(j, n), deviation = input_.PartialDeviation(j, n);
    Weighted(dy, deviation, input_.PartialWeight(j, n), dy_a_, dy_d_a_);
    if constexpr (kWeight) {
      StorePartial(d, WithWeight(dy, deviation, LoadPartial(d, grad_weight_ + j, n)),
                   grad_weight_ + j, n);
    }
    if constexpr (kBias) {
      StorePartial(d, hn::Add(LoadPartial(d, grad_bias_ + j, n), dy), grad_bias_ + j, n);
    }
  }

  // Of dy * weight, and of that times x - shift.
  HWY_INLINE hn::Vec<WideTag> First() const { return Doubles(D(), hn::Add(dy_a_, dy_b_)); }
  HWY_INLINE hn::Vec<WideTag> Second() const { return Doubles(D(), hn::Add(dy_d_a_, dy_d_b_)); }

 private:
  static constexpr bool kWeight = kAlong != Along::kNone;
  static constexpr bool kBias = kAlong == Along::kWeightAndBias;

  static HWY_INLINE void StoreTwoAt(T* to, const Pair<D>& values) {
    hn::StoreU(values.a, D(), to);
    hn::StoreU(values.b, D(), to + hn::Lanes(D()));
  }
  static HWY_INLINE void Weighted(V dy, V deviation, V weight, V& sum, V& product) {
    const V weighted = hn::Mul(dy, weight);
    sum = hn::Add(sum, weighted);
    product = hn::MulAdd(weighted, deviation, product);
  }
  HWY_INLINE V WithWeight(V dy, V deviation, V sum) const {
    return hn::MulAdd(dy, hn::MulAdd(deviation, input_.invstd, lost_), sum);
  }

  const RowInput<E, kMasked, kShifted> input_;
  T* const grad_weight_;
  T* const grad_bias_;
  const V lost_;
  V dy_a_ = hn::Zero(D()), dy_b_ = dy_a_, dy_d_a_ = dy_a_, dy_d_b_ = dy_a_;
};

// Writes the gradients of a row. kPlain: that of x is all that is wanted, and the statistics are
// not constant; then kStream says whether to write past the cache.
template <class E, bool kMasked, bool kShifted, bool kPlain, bool kStream>
class WriteGradients {
 public:
  using T = ComputeType<E>;
  using D = Tag<E>;
  using V = hn::Vec<D>;

  WriteGradients(const BackwardTensors& tensors, int64_t begin, const AlongRows& along,
                 int64_t parameter, const RowConstants& of, int64_t row)
      : input_(tensors, begin, along, parameter, of, row),
        grad_x_(tensors.grad_x == nullptr ? nullptr : static_cast<E*>(tensors.grad_x) + begin),
        grad_residual_(tensors.grad_residual == nullptr
                           ? nullptr
                           : static_cast<E*>(tensors.grad_residual) + begin),
        wants_x_(tensors.grad_x != nullptr),
        wants_residual_(tensors.grad_residual != nullptr),
        constant_(along.constant),
        stream_(tensors.stream && IsAlignedForPair(D(), grad_x_) &&
                IsAlignedForPair(D(), grad_residual_)),
        slope_(ConstantOf<E>(of.slope, row)),
        offset_(ConstantOf<E>(of.offset, row)) {}

  struct Gradients {
    Pair<D> dx, dy;
  };
  HWY_INLINE Gradients Two(int64_t j) const {
    const Pair<D> dy = input_.GradY(j);
    if (!kPlain && !wants_x_) return {dy, dy};
    const Pair<D> deviation = kPlain || !constant_ ? input_.Deviation(j) : dy;
    const Pair<D> weight = input_.Weight(j);
    return {{Dx(dy.a, deviation.a, weight.a), Dx(dy.b, deviation.b, weight.b)}, dy};
  }
  HWY_INLINE void Store(int64_t j, const Gradients& of) const {
    if (kPlain || wants_x_) StoreOne(of.dx, grad_x_ + j);
    if (!kPlain && wants_residual_) StoreOne(of.dy, grad_residual_ + j);
  }
  HWY_INLINE void Part(int64_t j, size_t n) const {
    const D d;
    const V dy = input_.PartialGradY(j, n);
    if (kPlain || wants_x_) {
      const V deviation = kPlain || !constant_ ? input_.PartialDeviation(j, n) : dy;
      const V dx = Dx(dy, deviation, input_.PartialWeight(j, n));
      if (kStream && n == hn::Lanes(d)) {
        StoreElements(d, dx, grad_x_ + j, kStream);
      } else {
        StorePartial(d, dx, grad_x_ + j, n);
      }
    }
    if (!kPlain && wants_residual_) StorePartial(d, dy, grad_residual_ + j, n);
  }

 private:
  HWY_INLINE V Dx(V dy, V deviation, V weight) const {
    const V scale = hn::Mul(weight, input_.invstd);
    if (!kPlain && constant_) return hn::Mul(dy, scale);
    return hn::MulAdd(dy, scale, hn::MulAdd(deviation, slope_, offset_));
  }
  HWY_INLINE void StoreOne(const Pair<D>& v, E* to) const {
    const bool stream = kPlain ? kStream : stream_;
    if constexpr (kMasked) {
      StoreTwo(D(), v.a, v.b, to, stream);
    } else {
      StorePair(D(), v, to, stream);
    }
  }

  const RowInput<E, kMasked, kShifted> input_;
  E* const grad_x_;
  E* const grad_residual_;
  const bool wants_x_, wants_residual_, constant_, stream_;
  const V slope_, offset_;
};

// The part of the gradients that all elements of a row share, as SetGradient, from the constants
// that are there: divisions and a root take longer than all else that is done once a row.
template <class E>
HWY_INLINE void SharedGradients(const AlongRows& along, int64_t count, const SumsInLanes<2>& sums,
                                const RowConstants& of) {
  using T = ComputeType<E>;
  const WideTag d;
  const auto inverse = hn::Set(d, 1 / static_cast<double>(along.length));
  for (int64_t row = 0; row < count; row += static_cast<int64_t>(hn::Lanes(d))) {
    const auto invstd = LoadDoubles(d, static_cast<const T*>(of.invstd) + row);
    const auto lost = LoadDoubles(d, static_cast<const T*>(of.lost) + row);
    const auto sum_g = sums.Totals(row, 0);
    // The mean of dy * weight * normalized, times invstd.
    const auto mean_gx = hn::Mul(
        hn::Mul(hn::MulAdd(sums.Totals(row, 1), invstd, hn::Mul(lost, sum_g)), invstd), inverse);
    auto offset = hn::Neg(hn::Mul(lost, mean_gx));
    if (along.center) offset = hn::Sub(offset, hn::Mul(invstd, hn::Mul(sum_g, inverse)));
    StoreDoubles(d, hn::Neg(hn::Mul(invstd, mean_gx)), static_cast<T*>(of.slope) + row);
    StoreDoubles(d, offset, static_cast<T*>(of.offset) + row);
  }
}

// Not inlined: all of them in one function are more than a compiler with sanitizers can take.
template <class E, bool kMasked, bool kShifted, Along kAlong, bool kPlain, bool kStream>
HWY_NOINLINE void WriteAndSumGradients(const BackwardTensors& tensors, const AlongRows& along,
                                       const Rows& now, const Rows& next, SumsInLanes<2>& sums) {
  using T = ComputeType<E>;
  const auto zero = [](void* sums_along, int64_t first, int64_t last) {
    T* const values = static_cast<T*>(sums_along);
    std::fill(values + first, values + last, T{0});
  };
  SumAndWrite(
      Tag<E>(), along, now, next, sums,
      [&](int64_t row, int64_t parameter, int64_t begin, int64_t end) NORMD_INLINE_LAMBDA {
        if (row < next.fresh) {
          const int64_t first = parameter + begin, last = parameter + end;
          if (kAlong != Along::kNone) zero(along.grad_weight, first, last);
          if (kAlong == Along::kWeightAndBias) zero(along.grad_bias, first, last);
        }
        return TileGradients<E, kMasked, kShifted, kAlong>(tensors, next.begin + row * along.length,
                                                           along, parameter, next.constants, row);
      },
      [&](int64_t row, int64_t parameter) NORMD_INLINE_LAMBDA {
        return WriteGradients<E, kMasked, kShifted, kPlain, kStream>(
            tensors, now.begin + row * along.length, along, parameter, now.constants, row);
      });
}

template <class E>
void BackwardRows(const BackwardTensors& tensors, const AlongRows& along, const Rows& now,
                  const Rows& next, const RowStatistics& statistics) {
  const Tag<E> d;
  ConstantsOfRows<E>(statistics, next.count, next.constants);
  SumsInLanes<2> sums(next.count);
  const bool plain =
      tensors.grad_x != nullptr && tensors.grad_residual == nullptr && !along.constant;
  const E* const to = static_cast<const E*>(tensors.grad_x) + now.begin;
  const bool stream =
      tensors.stream && IsAlignedForPair(d, to) && IsAlignedForPair(d, to + along.length);
  const auto run_along = [&]<bool kMasked, bool kShifted, Along kAlong, bool kPlain, bool kStream>()
                             NORMD_INLINE_LAMBDA {
                               WriteAndSumGradients<E, kMasked, kShifted, kAlong, kPlain, kStream>(
                                   tensors, along, now, next, sums);
                             };
  // What is rare is not worth a loop of its own without a bias.
  const auto run =
      [&]<bool kMasked, bool kShifted, bool kPlain, bool kStream>() NORMD_INLINE_LAMBDA {
        constexpr Along kLeast = kPlain ? Along::kWeight : Along::kWeightAndBias;
        if (along.grad_weight == nullptr) {
          run_along.template operator()<kMasked, kShifted, Along::kNone, kPlain, kStream>();
        } else if (along.wants_bias) {
          run_along
              .template operator()<kMasked, kShifted, Along::kWeightAndBias, kPlain, kStream>();
        } else {
          run_along.template operator()<kMasked, kShifted, kLeast, kPlain, kStream>();
        }
      };
  if (tensors.relu_mask != nullptr) {
    run.template operator()<true, true, false, false>();
  } else if (!plain) {
    run.template operator()<false, true, false, false>();
  } else if (AreShifted<E>(now) || AreShifted<E>(next)) {
    stream ? run.template operator()<false, true, true, true>()
           : run.template operator()<false, true, true, false>();
  } else {
    constexpr bool kShifted = kAlwaysShifts<E>;
    stream ? run.template operator()<false, kShifted, true, true>()
           : run.template operator()<false, kShifted, true, false>();
  }
  SharedGradients<E>(along, next.count, sums, next.constants);
}

template <class E>
void AddUp(const void* data, int64_t parts, int64_t stride, int64_t count, bool in_pairs,
           const Totals& totals) {
  using T = ComputeType<E>;
  const hn::ScalableTag<double> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const T* const from = static_cast<const T*>(data);
  const double* const before = totals.before;
  T* const rounded = static_cast<T*>(totals.rounded);
  const auto load = [&](int64_t j) NORMD_INLINE_LAMBDA {
    return before == nullptr ? hn::Zero(d) : hn::LoadU(d, before + j);
  };
  const auto store = [&](V v, int64_t j) NORMD_INLINE_LAMBDA {
    rounded == nullptr ? hn::StoreU(v, d, totals.after + j) : StoreDoubles(d, v, rounded + j);
  };
  // `a` are elements at even places, `b` at odd ones.
  [[maybe_unused]] const auto load_pair = [&](int64_t j, V& a, V& b) NORMD_INLINE_LAMBDA {
    a = b = hn::Zero(d);
    if constexpr (kPairsInterleave<E>) {
      if (before != nullptr) hn::LoadInterleaved2(d, before + j, a, b);
    }
  };
  [[maybe_unused]] const auto store_pair = [&](V a, V b, int64_t j) NORMD_INLINE_LAMBDA {
    if constexpr (kPairsInterleave<E>) {
      if (rounded == nullptr) return hn::StoreInterleaved2(a, b, d, totals.after + j);
      const hn::Rebind<float, decltype(d)> df;
      hn::StoreInterleaved2(hn::DemoteTo(df, a), hn::DemoteTo(df, b), df, rounded + j);
    }
  };
  const bool interleave = kPairsInterleave<E> && in_pairs;
  int64_t j = 0;
  for (; j + 4 * lanes <= count; j += 4 * lanes) {
    // In pairs: two vectors of even elements, then two of odd ones.
    V v0, v1, v2, v3;
    if (interleave) {
      load_pair(j, v0, v2);
      load_pair(j + 2 * lanes, v1, v3);
    } else {
      v0 = load(j);
      v1 = load(j + lanes);
      v2 = load(j + 2 * lanes);
      v3 = load(j + 3 * lanes);
    }
    for (int64_t part = 0; part < parts; ++part) {
      const T* at = from + part * stride + j;
      v0 = hn::Add(v0, LoadDoubles(d, at));
      v1 = hn::Add(v1, LoadDoubles(d, at + lanes));
      v2 = hn::Add(v2, LoadDoubles(d, at + 2 * lanes));
      v3 = hn::Add(v3, LoadDoubles(d, at + 3 * lanes));
    }
    if (interleave) {
      store_pair(v0, v2, j);
      store_pair(v1, v3, j + 2 * lanes);
    } else {
      store(v0, j);
      store(v1, j + lanes);
      store(v2, j + 2 * lanes);
      store(v3, j + 3 * lanes);
    }
  }
  for (; j < count; ++j) {
    double sum = before == nullptr ? 0 : before[j];
    for (int64_t part = 0; part < parts; ++part) {
      sum += static_cast<double>(from[part * stride + j]);
    }
    rounded == nullptr ? void(totals.after[j] = sum) : void(rounded[j] = static_cast<T>(sum));
  }
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
