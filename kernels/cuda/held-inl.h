// The kernels of sets that stay in registers (plan.h): a thread has the same octets from the
// sums to what is written, and each tensor is read once.
#ifndef NORMD_KERNELS_CUDA_HELD_INL_H_
#define NORMD_KERNELS_CUDA_HELD_INL_H_

#include "kernels/cuda/apply-inl.h"

namespace normd::cuda {

// A block and a thread of it among sets.
struct HeldPlace {
  NORMD_DEVICE HeldPlace(const Held& held, int64_t sets)
      : group(static_cast<int>(threadIdx.x) / held.threads),
        thread(static_cast<int>(threadIdx.x) % held.threads),
        set(static_cast<int64_t>(blockIdx.x) * held.together + group),
        slots(set < sets ? static_cast<int>(held.runs.slots()) : 0) {}

  // `kRow`: sets are single runs of whole octets.
  template <bool kRow>
  NORMD_DEVICE Walk::Place Octet(const Held& held, int k) const {
    const int slot = thread + k * held.threads;
    if (slot >= slots) return {0, 0, 0};
    const Runs& runs = held.runs;
    if constexpr (kRow) return {set * runs.unit_stride + slot * kOctet, 0, kOctet};
    const int octets = static_cast<int>(runs.octets());
    const int run = runs.count == 1 ? 0 : slot / octets;
    return PlaceIn(runs.length, set * runs.unit_stride + run * runs.run_stride,
                   slot - run * octets);
  }
  NORMD_DEVICE bool IsFirst() const { return thread == 0; }

  // The set's first.
  NORMD_DEVICE int64_t Channel(const Held& held, const NormProblem& problem) const {
    if (problem.reduction == Reduction::kPerChannel) return set;
    if (problem.groups == 1) return 0;
    int64_t group;
    Divide(set, problem.groups, group);
    return group * held.unit_channels;
  }

  int group, thread;
  int64_t set;
  int slots;  // none past the last set
};

// Shared memory of both: a sum a thread; and of each set of the block what it comes to, and
// what follows from that.
template <class E, class V>
struct HeldShared {
  using T = typename E::Compute;
  struct OfSet {
    V sums;
    T shift;
    SetConstants constants;
    SetCoefficients<T> coefficients;
  };
  static constexpr int64_t Bytes(int threads, int sets) {
    return threads * static_cast<int64_t>(sizeof(V)) + sets * static_cast<int64_t>(sizeof(OfSet));
  }

  NORMD_DEVICE explicit HeldShared(unsigned char* shared)
      : merging(reinterpret_cast<V*>(shared)),
        sets(reinterpret_cast<OfSet*>(merging + blockDim.x)) {}

  V* merging;
  OfSet* sets;
};

// Calls visit(set, in the block) in a thread for each set of the block: side by side in one
// warp, since what they do is long and in double.
template <class Visit>
NORMD_DEVICE void ForEachHeldSet(const Held& held, int64_t sets, Visit visit) {
  const int group = static_cast<int>(threadIdx.x);
  const int64_t set = static_cast<int64_t>(blockIdx.x) * held.together + group;
  if (group < held.together && set < sets) visit(set, group);
}

// Block (sets). `inverse`: 1 / the values of a set, for the mean; the variance is what who has
// the moments alone would find.
template <class E, int kOctets, bool kRow>
NORMD_KERNEL_OF(512, 1)
void HeldForward(ForwardOp<E> op, NormProblem problem, Held held, double inverse, bool careful,
                 Moments moments) {
  using T = typename E::Compute;
  NORMD_SHARED(shared);
  const HeldShared<E, ShiftedSums> memory(shared);
  AwaitKernelBefore();
  const HeldPlace place(held, problem.num_sets());
  Octet<E> x[kOctets];
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    const Walk::Place at = place.template Octet<kRow>(held, k);
    if (!at.empty()) x[k] = LoadOctet<E>(op.x, at.i);
  }
  const int64_t begin = place.set * held.runs.unit_stride;
  const T shift = place.slots == 0 ? T{0} : AsShift(LoadOne<E>(op.x, begin));
  SlotSums<E> own;
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    const Walk::Place at = place.template Octet<kRow>(held, k);
    if (!at.empty()) own.Add(x[k], WholeIf<kRow>(at));
  }
  ShiftedSums sums;
  if (own.IsSound(careful)) {
    if (own.count != 0) sums = AroundShift<T>(shift, own.count, own.own, own.sum, own.squares);
  } else {
#pragma unroll
    for (int k = 0; k < kOctets; ++k) {
      AddInDouble<E>(sums, shift, x[k], place.template Octet<kRow>(held, k));
    }
  }
  sums = MergeOver(held.threads, 1, sums, memory.merging);
  if (place.IsFirst()) {
    memory.sets[place.group].sums = sums;
    memory.sets[place.group].shift = shift;
  }
  __syncthreads();
  ForEachHeldSet(held, problem.num_sets(), [&](int64_t set, int group) {
    auto& of_set = memory.sets[group];
    const double mean = of_set.sums.sum * inverse;
    const double m2 = MultiplyAdd(-of_set.sums.sum, mean, of_set.sums.squares);
    of_set.coefficients = FinishSet<T>(problem,
                                       {static_cast<double>(problem.set_size()),
                                        static_cast<double>(of_set.shift) + mean, m2 < 0 ? 0 : m2},
                                       set, moments);
  });
  __syncthreads();
  const SetCoefficients<T> coefficients = memory.sets[place.group].coefficients;
  if (op.y == nullptr || place.slots == 0) return;
  const ApplyToUnit<ForwardOp<E>> apply(op, coefficients, problem.positions, begin,
                                        place.Channel(held, problem), held.unit_channels);
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    const Walk::Place at = place.template Octet<kRow>(held, k);
    if (!at.empty()) apply(WholeIf<kRow>(at), {x[k]});
  }
}

// Block (sets). `weigh_elements`: sets are rows with a weight an element. Where channels are
// the sets, their gradients are finished; else `sums`, if not null, are those of each set.
template <class E, int kOctets, bool kRow>
NORMD_KERNEL_OF(512, 1)
void HeldBackward(BackwardOp<E> op, NormProblem problem, Held held, Statistics statistics,
                  bool weigh_elements, ParameterGradients<typename E::Compute> gradients,
                  GradientSums* sums) {
  using T = typename E::Compute;
  using Pair = typename GradientTensors<E>::Pair;
  NORMD_SHARED(shared);
  const HeldShared<E, GradientSums> memory(shared);
  AwaitKernelBefore();
  const HeldPlace place(held, problem.num_sets());
  const int64_t begin = place.set * held.runs.unit_stride;
  const GradientTensors<E> tensors{op.x, op.grad_y, op.relu_mask};
  Pair pair[kOctets];
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    const Walk::Place at = place.template Octet<kRow>(held, k);
    if (!at.empty()) pair[k] = tensors.Load(at.i);
  }
  ForEachHeldSet(held, problem.num_sets(), [&](int64_t set, int group) {
    auto& of_set = memory.sets[group];
    of_set.constants = SetConstants(problem, statistics, set, op.of_batch);
    of_set.shift = static_cast<T>(of_set.constants.shift);
  });
  __syncthreads();
  const T shift = place.slots == 0 ? T{0} : memory.sets[place.group].shift;
  PairSums<E> own;
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    const Walk::Place at = place.template Octet<kRow>(held, k);
    if (!weigh_elements || op.weight == nullptr) {
      if (!at.empty()) own.Add(pair[k], WholeIf<kRow>(at), shift, nullptr);
    } else if (!at.empty()) {
      const Eight<T> weight =
          LoadEight(op.weight, at.i - begin + place.Channel(held, problem), at.low, at.high, T{1});
      own.Add(pair[k], WholeIf<kRow>(at), shift, &weight);
    }
  }
  const GradientSums total = MergeOver(
      held.threads, 1, GradientSums{static_cast<double>(own.dy), static_cast<double>(own.dy_d)},
      memory.merging);
  if (place.IsFirst()) memory.sets[place.group].sums = total;
  __syncthreads();
  ForEachHeldSet(held, problem.num_sets(), [&](int64_t set, int group) {
    auto& of_set = memory.sets[group];
    const SetConstants& constants = of_set.constants;
    of_set.coefficients = ToCoefficients<T>(constants);
    if (op.of_batch) {
      GradientSums of_elements;
      AddToSet(problem, constants, set, weigh_elements ? nullptr : op.weight, of_set.sums,
               of_elements);
      FinishGradient(problem, constants, of_elements, &of_set.coefficients);
    }
    if (problem.reduction == Reduction::kPerChannel) {
      gradients.Write(set, {of_set.sums.dy, GradWeight(constants, of_set.sums)});
    } else if (sums != nullptr) {
      sums[set] = of_set.sums;
    }
  });
  __syncthreads();
  if (place.slots == 0) return;
  const SetCoefficients<T> coefficients = memory.sets[place.group].coefficients;
  const ApplyToUnit<BackwardOp<E>> apply(op, coefficients, problem.positions, begin,
                                         place.Channel(held, problem), held.unit_channels);
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    const Walk::Place at = place.template Octet<kRow>(held, k);
    if (!at.empty()) apply(WholeIf<kRow>(at), pair[k]);
  }
}

// Rows that are sets with a weight an element: dx, and the sums of dy and of dy * x^ of each
// column over a part of the rows. Block (part). A thread has the same octet of columns in
// every row, and fetches the next row's while it has one. Shared: for each thread a
// RowSums, or where a block has several rows at a time its sums.
template <class T>
struct RowSums {
  T g = 0, gx = 0;
};
template <class T>
NORMD_DEVICE void MergeInto(RowSums<T>& total, const RowSums<T>& other) {
  total.g += other.g;
  total.gx += other.gx;
}
template <class E>
NORMD_KERNEL_OF(512, 1)
void HeldRows(BackwardOp<E> op, NormProblem problem, RowBlocks cut,
              const SetCoefficients<typename E::Compute>* sets, GradientSums* partials) {
  using T = typename E::Compute;
  using Pair = typename GradientTensors<E>::Pair;
  NORMD_SHARED(shared);
  AwaitKernelBefore();
  const int group = static_cast<int>(threadIdx.x) / cut.threads;
  const int64_t column = static_cast<int64_t>(threadIdx.x) % cut.threads * kOctet;
  const bool has_column = column < problem.channels;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * cut.rows;
  const int64_t last = first + cut.rows < problem.batch ? first + cut.rows : problem.batch;
  const GradientTensors<E> tensors{op.x, op.grad_y, op.relu_mask};
  Eight<T> weight{};
  if (has_column) weight = LoadEight(op.weight, column, 0, kOctet, T{1});
  const T one_of_row = T{1} / static_cast<T>(problem.channels);
  T dy[kOctet] = {};
  T dy_x[kOctet] = {};
  Pair next{};
  SetCoefficients<T> next_set{};
  const auto fetch = [&](int64_t row) {
    if (row >= last || !has_column) return;
    next = tensors.Load(row * problem.channels + column);
    next_set = sets[row];
  };
  fetch(first + group);
  auto* const merging = reinterpret_cast<RowSums<T>*>(shared);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  int turn = 0;
  for (int64_t begin = first; begin < last; begin += cut.together, turn ^= 1) {
    const int64_t row = begin + group;
    const Pair pair = next;
    const SetCoefficients<T> set = next_set;
    fetch(row + cut.together);
    const bool any = row < last && has_column;
    RowSums<T> sums;
    T normalized[kOctet];
    if (any) {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        normalized[k] = MultiplyAdd(pair.x[k] - set.shift, set.invstd, set.offset);
        const T passed = pair.Dy(k);
        dy[k] += passed;
        dy_x[k] = MultiplyAdd(passed, normalized[k], dy_x[k]);
        const T g = passed * weight[k];
        sums.g += g;
        sums.gx = MultiplyAdd(g, normalized[k], sums.gx);
      }
    }
    // By turns: who is here again has passed the last barrier, and so have all who read this.
    sums = MergeOver<true>(cut.threads, 1, sums, merging + turn * warps);
    if (!any) continue;
    const T mean_g = problem.center ? sums.g * one_of_row : T{0};
    const T mean_gx = sums.gx * one_of_row;
    T to[kOctet], through[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const T passed = pair.Dy(k);
      to[k] = (MultiplyAdd(passed, weight[k], -mean_g) - normalized[k] * mean_gx) * set.invstd;
      through[k] = passed;
    }
    const int64_t i = row * problem.channels + column;
    if (op.grad_x != nullptr) StoreOctet(op.grad_x, i, 0, kOctet, Octet<E>::Of(to));
    if (op.grad_residual != nullptr)
      StoreOctet(op.grad_residual, i, 0, kOctet, Octet<E>::Of(through));
  }
  // Of the rows that the block had at a time.
  auto* const of_threads = reinterpret_cast<T*>(shared);
  const int threads = static_cast<int>(blockDim.x);
  if (cut.together > 1) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      of_threads[2 * k * threads + threadIdx.x] = dy[k];
      of_threads[(2 * k + 1) * threads + threadIdx.x] = dy_x[k];
    }
    __syncthreads();
  }
  if (group != 0 || !has_column) return;
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    GradientSums total{static_cast<double>(dy[k]), static_cast<double>(dy_x[k])};
    for (int other = 1; other < cut.together; ++other) {
      const int at = static_cast<int>(threadIdx.x) + other * cut.threads;
      total.dy += static_cast<double>(of_threads[2 * k * threads + at]);
      total.dy_d += static_cast<double>(of_threads[(2 * k + 1) * threads + at]);
    }
    partials[blockIdx.x * problem.channels + column + k] = total;
  }
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_HELD_INL_H_
