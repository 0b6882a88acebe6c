// The kernels between the passes: from partial sums to moments, to the coefficients of a
// set, and to the gradients of the parameters.
#ifndef NORMD_KERNELS_CUDA_FINISH_INL_H_
#define NORMD_KERNELS_CUDA_FINISH_INL_H_

#include "kernels/cuda/reduce-inl.h"

namespace normd::cuda {

// `writes`: the moments too.
template <class T>
NORMD_DEVICE void FinishSet(const NormProblem& problem, const PartialMoments& partial, int64_t set,
                            bool writes, const Moments& moments, SetCoefficients<T>* coefficients) {
  const SetMoments of_set = CenteredAsAsked(problem, partial);
  if (writes) {
    moments.mean[set] = of_set.mean;
    moments.m2[set] = of_set.m2;
  }
  *coefficients = ToCoefficients<T>(
      SetConstants(problem, of_set.mean, of_set.m2 / static_cast<double>(problem.set_size()),
                   /*of_batch=*/true));
}

// Block (set). Shared: PartialMoments a thread.
template <class T>
NORMD_KERNEL void FinishMoments(NormProblem problem, const PartialMoments* partials, int64_t units,
                                int64_t units_per_set, int64_t splits, Moments moments,
                                SetCoefficients<T>* sets) {
  NORMD_SHARED(shared);
  const int64_t set = blockIdx.x;
  const PartialMoments total = MergeInOrder(
      units_per_set * splits, reinterpret_cast<PartialMoments*>(shared),
      [&](PartialMoments& into, int64_t k) {
        into.Merge(partials[k / units_per_set * units + set * units_per_set + k % units_per_set]);
      });
  if (threadIdx.x == 0) FinishSet(problem, total, set, true, moments, sets + set);
}

// Thread (set).
template <class T>
NORMD_KERNEL void PrepareSets(NormProblem problem, Statistics statistics, bool of_batch,
                              SetCoefficients<T>* sets) {
  const int64_t set = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (set >= problem.num_sets()) return;
  sets[set] = ToCoefficients<T>(SetConstants(problem, statistics, set, of_batch));
}

// How FinishSets and FinishChannels find sums. Unit u belongs to set u / units_per_set
// and to channel u % channels.
struct PartialSums {
  const GradientSums* sums;
  int64_t units;
  int64_t units_per_set;
  int64_t splits;

  NORMD_DEVICE const GradientSums& At(int64_t unit, int64_t split) const {
    return sums[split * units + unit];
  }
};

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

// Block (set): what the elements of a set share of dx. Shared: GradientSums a thread.
template <class T>
NORMD_KERNEL void FinishSets(NormProblem problem, Statistics statistics, PartialSums partials,
                             const T* weight, SetCoefficients<T>* sets) {
  NORMD_SHARED(shared);
  const int64_t set = blockIdx.x;
  const SetConstants constants(problem, statistics, set, /*of_batch=*/true);
  const GradientSums total =
      MergeInOrder(partials.units_per_set * partials.splits,
                   reinterpret_cast<GradientSums*>(shared), [&](GradientSums& into, int64_t k) {
                     const int64_t unit = set * partials.units_per_set + k % partials.units_per_set;
                     AddToSet(problem, constants, unit, weight,
                              partials.At(unit, k / partials.units_per_set), into);
                   });
  if (threadIdx.x == 0) FinishGradient(problem, constants, total, sets + set);
}

// Block (channel): the gradients of its parameters. Shared: GradientSums a thread.
// `normalized`: the sums are of dy * x^, not of dy * (x - shift).
template <class T>
NORMD_KERNEL void FinishChannels(NormProblem problem, Statistics statistics, bool of_batch,
                                 PartialSums partials, bool normalized, T* grad_weight,
                                 T* grad_bias) {
  NORMD_SHARED(shared);
  const int64_t channel = blockIdx.x;
  const int64_t samples = partials.units / problem.channels;
  GradientSums total;  // of dy, and of dy * x^
  for (int64_t k = threadIdx.x; k < samples * partials.splits; k += blockDim.x) {
    const int64_t unit = k % samples * problem.channels + channel;
    const GradientSums& sums = partials.At(unit, k / samples);
    total.dy += sums.dy;
    total.dy_d +=
        normalized
            ? sums.dy_d
            : GradWeight(SetConstants(problem, statistics, unit / partials.units_per_set, of_batch),
                         sums);
  }
  total = MergeOverBlock(total, 1, reinterpret_cast<GradientSums*>(shared));
  if (threadIdx.x == 0) {
    if (grad_weight != nullptr) grad_weight[channel] = static_cast<T>(total.dy_d);
    if (grad_bias != nullptr) grad_bias[channel] = static_cast<T>(total.dy);
  }
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_FINISH_INL_H_
