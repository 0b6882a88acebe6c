// The kernels between the passes: from partial sums to moments, to the coefficients of a
// set, and to the gradients of the parameters. Of neighbours, whose partial sums lie beside
// each other, a block takes several.
#ifndef NORMD_KERNELS_CUDA_FINISH_INL_H_
#define NORMD_KERNELS_CUDA_FINISH_INL_H_

#include "kernels/cuda/reduce-inl.h"

namespace normd::cuda {

// Moments of `count` values in all, as sums around a shift that all who merge them share.
struct SpreadSums {
  double count = 0;
  double sum = 0;      // count * (mean - shift)
  double squares = 0;  // m2 + count * (mean - shift)^2

  NORMD_DEVICE void Add(const PartialMoments& part, double shift) {
    if (part.count == 0) return;
    const double delta = part.mean - shift;
    const double moved = part.count * delta;
    count += part.count;
    sum += moved;
    squares += MultiplyAdd(moved, delta, part.m2);
  }
  NORMD_DEVICE PartialMoments Around(double shift) const {
    return FromShiftedSums(count, shift, {sum, squares});
  }
};
NORMD_DEVICE void MergeInto(SpreadSums& total, const SpreadSums& other) {
  total.count += other.count;
  total.sum += other.sum;
  total.squares += other.squares;
}

// Writes the moments of a set, and answers its coefficients.
template <class T>
NORMD_DEVICE SetCoefficients<T> FinishSet(const NormProblem& problem, const PartialMoments& total,
                                          int64_t set, const Moments& moments) {
  const SetMoments of_set = CenteredAsAsked(problem, total);
  moments.mean[set] = of_set.mean;
  moments.m2[set] = of_set.m2;
  return ToCoefficients<T>(SetConstants(problem, of_set.mean,
                                        of_set.m2 / static_cast<double>(problem.set_size()),
                                        /*of_batch=*/true));
}

// What is known of channels that are sets is applied to their coefficients once, and need not
// be for each element: y = (x - shift) * invstd + offset. Null where there is none, or where
// channels are not the sets.
template <class T>
struct ChannelAffine {
  const T* weight = nullptr;
  const T* bias = nullptr;

  NORMD_DEVICE SetCoefficients<T> AppliedTo(SetCoefficients<T> set, int64_t channel) const {
    const T w = weight == nullptr ? T{1} : weight[channel];
    const T b = bias == nullptr ? T{0} : bias[channel];
    set.invstd *= w;
    set.offset = MultiplyAdd(set.offset, w, b);
    return set;
  }
};

// How partial sums lie. Unit u belongs to set SetOf(u) and to channel u % channels.
template <class V>
struct PartialSums {
  V* sums;
  int64_t units;
  int64_t units_per_set;
  int64_t unit_step;
  int64_t splits;
  bool unit_by_unit;  // those of a unit beside each other; else those of a split

  PartialSums(V* memory, const Plan& plan)
      : sums(memory),
        units(plan.units()),
        units_per_set(plan.units_per_set),
        unit_step(plan.unit_step),
        splits(plan.splits),
        unit_by_unit(plan.geometry == Geometry::kRuns) {}
  PartialSums(V* memory, int64_t channels, int64_t parts)
      : sums(memory),
        units(channels),
        units_per_set(1),
        unit_step(1),
        splits(parts),
        unit_by_unit(false) {}

  NORMD_DEVICE V& At(int64_t unit, int64_t split) const {
    return sums[unit_by_unit ? unit * splits + split : split * units + unit];
  }
  NORMD_DEVICE int64_t UnitOf(int64_t set, int64_t k) const {
    return unit_step == 1 ? set * units_per_set + k : set + k * unit_step;
  }
  NORMD_DEVICE int64_t OfEachSet() const { return units_per_set * splits; }
  // The k-th of a set: of unit k % units_per_set.
  NORMD_DEVICE V OfSet(int64_t set, int64_t k) const {
    if (units_per_set == 1) return At(set, k);
    int64_t unit;
    const int64_t split = Divide(k, units_per_set, unit);
    return At(UnitOf(set, unit), split);
  }
  NORMD_DEVICE int64_t SetOf(int64_t unit) const {
    return unit_step == 1 ? unit / units_per_set : unit % unit_step;
  }
};

// The threads of a block that merge the partial sums of one set or channel: a warp, where
// these lie beside each other; else so many as are `across` from each other, beside others
// that do the same for its neighbours.
struct Finishing {
  static constexpr int kThreads = 256;

  // For so many partial sums of each.
  constexpr Finishing(bool beside, int64_t count)
      : by_warp(beside), across(beside ? kThreads / 32 : (count > 8 ? 4 : kThreads)) {}

  bool by_warp;
  int across;
};
struct Finisher {
  NORMD_DEVICE explicit Finisher(const Finishing& finishing) : how(finishing) {
    const int thread = static_cast<int>(threadIdx.x);
    index = static_cast<int64_t>(blockIdx.x) * how.across +
            (how.by_warp ? thread / kWarp : thread % how.across);
    first = how.by_warp ? thread % kWarp : thread / how.across;
    step = how.by_warp ? kWarp : Finishing::kThreads / how.across;
  }
  template <class V>
  NORMD_DEVICE V Merge(const V& value, unsigned char* shared) const {
    if (how.by_warp) return MergeOver(kWarp, 1, value, static_cast<V*>(nullptr));
    if (how.across == Finishing::kThreads) return value;
    return MergeOverBlock(value, how.across, reinterpret_cast<V*>(shared));
  }

  Finishing how;
  int64_t index;  // of the set or channel
  int first;      // of its partial sums, and on by
  int step;
};

// Adds one(k) for k = first, first + step, ... below `count` by add(value): several are
// loaded before the first is added.
template <class One, class Add>
NORMD_DEVICE void ForPartials(int64_t count, int64_t first, int64_t step, One one, Add add) {
  constexpr int kBatch = 4;
  int64_t k = first;
  for (; k + (kBatch - 1) * step < count; k += kBatch * step) {
    decltype(one(k)) values[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) values[b] = one(k + b * step);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) add(values[b], k + b * step);
  }
  for (; k < count; k += step) add(one(k), k);
}

// Block (sets). Shared: SpreadSums a thread.
template <class T>
NORMD_KERNEL void FinishMoments(NormProblem problem, Finishing how,
                                PartialSums<PartialMoments> partials, Moments moments,
                                ChannelAffine<T> affine, SetCoefficients<T>* sets) {
  NORMD_SHARED(shared);
  AwaitKernelBefore();
  const Finisher at(how);
  const bool any = at.index < problem.num_sets();
  const auto one = [&](int64_t k) { return partials.OfSet(at.index, k); };
  SpreadSums sums;
  double shift = 0;
  if (any) {
    shift = AsShift(one(0).mean);
    ForPartials(partials.OfEachSet(), at.first, at.step, one,
                [&](const PartialMoments& part, int64_t) { sums.Add(part, shift); });
  }
  sums = at.Merge(sums, shared);
  if (any && at.first == 0) {
    sets[at.index] =
        affine.AppliedTo(FinishSet<T>(problem, sums.Around(shift), at.index, moments), at.index);
  }
}

// Thread (set).
template <class T>
NORMD_KERNEL void PrepareSets(NormProblem problem, Statistics statistics, bool of_batch,
                              ChannelAffine<T> affine, SetCoefficients<T>* sets) {
  AwaitKernelBefore();
  const int64_t set = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (set >= problem.num_sets()) return;
  sets[set] =
      affine.AppliedTo(ToCoefficients<T>(SetConstants(problem, statistics, set, of_batch)), set);
}

// Adds the sums of a unit to those of its set: of g, and of g * x^. `weight`: null where
// it is 1, or in the sums already.
template <class T>
NORMD_DEVICE void AddToSet(const NormProblem& problem, const SetConstants& constants, int64_t unit,
                           const T* weight, const GradientSums& sums, GradientSums& total) {
  const double w = weight == nullptr ? 1 : static_cast<double>(weight[unit % problem.channels]);
  total.dy += w * sums.dy;
  total.dy_d += w * GradWeight(constants, sums);
}

template <class T>
NORMD_DEVICE void FinishGradient(const NormProblem& problem, const SetConstants& constants,
                                 const GradientSums& total, SetCoefficients<T>* coefficients) {
  const SetGradient gradient(problem, constants, total.dy, total.dy_d);
  coefficients->slope = static_cast<T>(gradient.slope);
  coefficients->offset = static_cast<T>(gradient.offset);
}

// Gradients of a channel's parameters, where wanted.
template <class T>
struct ParameterGradients {
  T* weight = nullptr;
  T* bias = nullptr;

  // From sums of dy and of dy * x^.
  NORMD_DEVICE void Write(int64_t channel, const GradientSums& total) const {
    if (weight != nullptr) weight[channel] = static_cast<T>(total.dy_d);
    if (bias != nullptr) bias[channel] = static_cast<T>(total.dy);
  }
};

// Block (sets): what the elements of a set share of dx. Shared: GradientSums a thread.
template <class T>
NORMD_KERNEL void FinishSets(NormProblem problem, Finishing how, Statistics statistics,
                             PartialSums<GradientSums> partials, const T* weight,
                             SetCoefficients<T>* sets) {
  NORMD_SHARED(shared);
  AwaitKernelBefore();
  const Finisher at(how);
  const bool any = at.index < problem.num_sets();
  const int64_t set = any ? at.index : 0;
  const SetConstants constants(problem, statistics, set, /*of_batch=*/true);
  const bool one_unit = partials.units_per_set == 1;  // then converted once
  GradientSums total;
  if (any) {
    ForPartials(
        partials.OfEachSet(), at.first, at.step, [&](int64_t k) { return partials.OfSet(set, k); },
        [&](const GradientSums& sums, int64_t k) {
          if (one_unit) {
            MergeInto(total, sums);
          } else {
            AddToSet(problem, constants, partials.UnitOf(set, k % partials.units_per_set), weight,
                     sums, total);
          }
        });
  }
  total = at.Merge(total, shared);
  if (!any || at.first != 0) return;
  GradientSums of_set = total;
  if (one_unit) {
    of_set = {};
    AddToSet(problem, constants, set, weight, total, of_set);
  }
  FinishGradient(problem, constants, of_set, sets + set);
}

// Block (channels): the gradients of its parameters. Shared: GradientSums a thread.
// `normalized`: the sums are of dy * x^, not of dy * (x - shift). `sets`: not null where
// channels are the sets, whose coefficients are finished too, by `weight`.
template <class T>
NORMD_KERNEL void FinishChannels(NormProblem problem, Finishing how, Statistics statistics,
                                 bool of_batch, PartialSums<GradientSums> partials, bool normalized,
                                 ParameterGradients<T> gradients, const T* weight,
                                 SetCoefficients<T>* sets) {
  NORMD_SHARED(shared);
  AwaitKernelBefore();
  const Finisher at(how);
  const int64_t channel = at.index;
  const int64_t samples = partials.units / problem.channels;
  const bool one_set = normalized || problem.reduction == Reduction::kPerChannel;
  GradientSums total;  // of dy, and of dy * x^ or what a channel's one set sums
  if (channel < problem.channels) {
    const auto unit_of = [&](int64_t k, int64_t& split) {
      int64_t sample = 0;
      split = samples == 1 ? k : Divide(k, samples, sample);
      return sample * problem.channels + channel;
    };
    ForPartials(
        samples * partials.splits, at.first, at.step,
        [&](int64_t k) {
          int64_t split;
          const int64_t unit = unit_of(k, split);
          return partials.At(unit, split);
        },
        [&](const GradientSums& sums, int64_t k) {
          total.dy += sums.dy;
          if (one_set) {
            total.dy_d += sums.dy_d;
          } else {
            int64_t split;
            const int64_t set = partials.SetOf(unit_of(k, split));
            total.dy_d += GradWeight(SetConstants(problem, statistics, set, of_batch), sums);
          }
        });
  }
  total = at.Merge(total, shared);
  if (at.first != 0 || channel >= problem.channels) return;
  if (one_set && !normalized) {
    const SetConstants constants(problem, statistics, channel, of_batch);
    if (sets != nullptr) {
      GradientSums of_set;
      AddToSet(problem, constants, channel, weight, total, of_set);
      FinishGradient(problem, constants, of_set, sets + channel);
    }
    total.dy_d = GradWeight(constants, total);
  }
  gradients.Write(channel, total);
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_FINISH_INL_H_
