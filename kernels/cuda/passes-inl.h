// The kernels of a call, in their order: the one place that launches.
#ifndef NORMD_KERNELS_CUDA_PASSES_INL_H_
#define NORMD_KERNELS_CUDA_PASSES_INL_H_

#include <algorithm>
#include <cstddef>

#include "kernels/cuda/device.h"
#include "kernels/cuda/held-inl.h"

namespace normd::cuda {

// Scratch, cut into arrays.
class ScratchCut {
 public:
  explicit ScratchCut(void* memory) : memory_(static_cast<std::byte*>(memory)) {}

  template <class T>
  T* Take(int64_t count) {
    std::byte* const at = memory_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  std::byte* memory_;
  size_t used_ = 0;
};

constexpr bool IsCareful(const NormProblem& problem) {
  return problem.eps <= 1e-20 && problem.dtype != DType::kFloat64;
}

// What a call of either kind keeps between its kernels.
template <class T, class Sums>
struct CallScratch {
  CallScratch(void* memory, const NormProblem& problem, int64_t partials, int64_t more_partials) {
    ScratchCut cut(memory);
    sets = cut.Take<SetCoefficients<T>>(problem.num_sets());
    sums = cut.Take<Sums>(partials);
    more_sums = cut.Take<Sums>(more_partials);
    bytes = cut.used();
  }
  SetCoefficients<T>* sets;
  Sums* sums;
  Sums* more_sums;
  size_t bytes;
};

// Launch: a callable (kernel, blocks, blocks_y, threads, shared bytes, arguments...).
template <class E, class Launch>
class Passes {
  using T = typename E::Compute;

 public:
  explicit Passes(const Launch& launch) : launch_(launch) {}

  void Forward(const ForwardWork& work) const {
    const NormProblem& problem = work.problem;
    const bool by_batch = work.moments.mean != nullptr;
    const Plan plan = PlanFor(problem, /*by_plane=*/false);
    const ForwardOp<E> op{.size = work.count,
                          .x = work.x,
                          .y = work.y,
                          .residual = work.epilogue.residual,
                          .relu = work.epilogue.activation == Activation::kRelu,
                          .relu_mask = work.epilogue.relu_mask,
                          .weight = static_cast<const T*>(work.weight),
                          .bias = static_cast<const T*>(work.bias)};
    const CallScratch<T, PartialMoments> scratch(work.scratch, problem,
                                                 by_batch ? PartialsOf(plan) : 0, 0);
    const PartialSums partials(scratch.sums, plan);
    ForwardOp<E> apply = op;
    ChannelAffine<T> affine;
    if (problem.reduction == Reduction::kPerChannel) {
      affine = {op.weight, op.bias};
      apply.weight = apply.bias = nullptr;
    }
    if (!by_batch) {
      Prepare(problem, work.statistics, work.statistics_of_batch, affine, scratch.sets);
      Apply(apply, problem, work.first, scratch.sets);
      return;
    }
    // A byte of the mask belongs to one octet of one set.
    const bool may_stay = plan.geometry == Geometry::kRuns &&
                          (work.epilogue.relu_mask == nullptr || plan.runs.length % kOctet == 0);
    const Held held = may_stay ? HeldFor(plan, problem, 1) : Held{};
    if (held.threads != 0) {
      WithOctets<1>(held.octets, [&]<int kOctets>(Octets<kOctets>) {
        const int threads = held.threads * held.together;
        launch_(held.row() ? HeldForward<E, kOctets, true> : HeldForward<E, kOctets, false>,
                CeilDiv(problem.num_sets(), held.together), 1, threads,
                HeldShared<E, ShiftedSums>::Bytes(threads, held.together), op, problem, held,
                1.0 / static_cast<double>(problem.set_size()), IsCareful(problem), work.moments);
      });
      return;
    }
    MomentsOfSets(problem, work.x, plan, scratch.sums);
    const Finishing how(partials.unit_by_unit, plan.units_per_set * plan.splits);
    LaunchFinish<SpreadSums>(FinishMoments<T>, problem.num_sets(), how, problem, how, partials,
                             work.moments, affine, scratch.sets);
    Apply(apply, problem, 0, scratch.sets);
  }

  void Backward(const BackwardWork& work) const {
    const NormProblem& problem = work.problem;
    const BackwardArgs& args = work.args;
    const auto* weight = static_cast<const T*>(args.weight);
    const GradientTensors<E> tensors{args.x, args.grad_y, args.relu_mask};
    const BackwardPlans plans = PlansOf(work);
    const CallScratch<T, GradientSums> scratch(
        work.scratch, problem, plans.sets ? PartialsOf(plans.plan) : 0, plans.RowPartials());
    const BackwardOp<E> op{.size = problem.size(),
                           .x = args.x,
                           .grad_y = args.grad_y,
                           .grad_x = args.grad_x,
                           .grad_residual = args.grad_residual,
                           .relu_mask = args.relu_mask,
                           .weight = weight,
                           .of_batch = args.statistics_of_batch};
    const ParameterGradients<T> gradients{static_cast<T*>(args.grad_weight),
                                          static_cast<T*>(args.grad_bias)};
    const PartialSums sums(scratch.sums, plans.plan);
    const PartialSums row_sums(scratch.more_sums, problem.channels, plans.row_parts());
    const auto finish_channels = [&](const PartialSums<GradientSums>& partials,
                                     SetCoefficients<T>* sets) {
      const int64_t samples = partials.units / problem.channels;
      const Finishing how(partials.unit_by_unit && samples == 1, samples * partials.splits);
      LaunchFinish<GradientSums>(FinishChannels<T>, problem.channels, how, problem, how,
                                 args.statistics, args.statistics_of_batch, partials, plans.rows,
                                 gradients, weight, sets);
    };
    if (plans.rows) {
      Prepare(problem, args.statistics, args.statistics_of_batch, {}, scratch.sets);
      if (plans.row_blocks.threads != 0) {
        const int threads = plans.row_blocks.threads * plans.row_blocks.together;
        const int64_t shared =
            threads * std::max<int64_t>(sizeof(GradientSums),
                                        plans.row_blocks.together > 1 ? 2 * kOctet * sizeof(T) : 0);
        launch_(HeldRows<E>, plans.row_blocks.parts, 1, threads, shared, op, problem,
                plans.row_blocks, scratch.sets, scratch.more_sums);
        finish_channels(row_sums, nullptr);
        return;
      }
      // Before anything is written: dx may be x or dy.
      SumsOfColumnsBy(tensors, plans.row_columns, problem.channels / problem.groups, scratch.sets,
                      scratch.more_sums);
      finish_channels(row_sums, nullptr);
    }
    const bool per_channel = problem.reduction == Reduction::kPerChannel;
    const bool of_units = plans.parameters && !plans.rows;  // gradients from the sets' sums
    const Held held = plans.sets && plans.writes ? HeldFor(plans.plan, problem, 2) : Held{};
    if (held.threads != 0) {
      WithOctets<2>(held.octets, [&]<int kOctets>(Octets<kOctets>) {
        const int threads = held.threads * held.together;
        launch_(held.row() ? HeldBackward<E, kOctets, true> : HeldBackward<E, kOctets, false>,
                CeilDiv(problem.num_sets(), held.together), 1, threads,
                HeldShared<E, GradientSums>::Bytes(threads, held.together), op, problem, held,
                args.statistics, plans.rows_are_sets, gradients, of_units ? scratch.sums : nullptr);
      });
      if (of_units && !per_channel) {
        PartialSums of_sets = sums;
        of_sets.splits = 1;
        finish_channels(of_sets, nullptr);
      }
      return;
    }
    BackwardOp<E> apply = op;
    ChannelAffine<T> affine;
    if (per_channel) {
      affine.weight = weight;
      apply.weight = nullptr;
    }
    if (!plans.rows) {
      Prepare(problem, args.statistics, args.statistics_of_batch, affine, scratch.sets);
    }
    const bool sets_wanted = args.statistics_of_batch && args.grad_x != nullptr;
    if (plans.sets) {
      SumsOf(tensors, problem, plans.plan, plans.rows_are_sets ? weight : nullptr, scratch.sets,
             scratch.sums);
      // Where channels are the sets, one kernel finishes both.
      if (sets_wanted && !per_channel) {
        const Finishing how(sums.unit_by_unit, sums.units_per_set * sums.splits);
        LaunchFinish<GradientSums>(FinishSets<T>, problem.num_sets(), how, problem, how,
                                   args.statistics, sums, plans.rows_are_sets ? nullptr : weight,
                                   scratch.sets);
      }
      if (of_units || (sets_wanted && per_channel)) {
        finish_channels(sums, sets_wanted && per_channel ? scratch.sets : nullptr);
      }
    }
    if (plans.writes) Apply(apply, problem, 0, scratch.sets);
  }

  static size_t ScratchBytes(const ForwardWork& work) {
    const Plan plan = PlanFor(work.problem, /*by_plane=*/false);
    const bool by_batch = work.moments.mean != nullptr;
    return CallScratch<T, PartialMoments>(nullptr, work.problem, by_batch ? PartialsOf(plan) : 0, 0)
        .bytes;
  }

  static size_t ScratchBytes(const BackwardWork& work) {
    const BackwardPlans plans = PlansOf(work);
    return CallScratch<T, GradientSums>(
               nullptr, work.problem, plans.sets ? PartialsOf(plans.plan) : 0, plans.RowPartials())
        .bytes;
  }

 private:
  // The sums of a backward pass. Where a set is a row with a weight an element, its
  // sums and those of the parameters have nothing in common.
  struct BackwardPlans {
    Plan plan;
    bool rows_are_sets;
    bool parameters;       // some gradient of these is wanted
    bool sets;             // sums over `plan` are
    bool rows;             // sums over `row_columns` are
    bool writes;           // dx, or the residual's gradient
    RowBlocks row_blocks;  // if rows, may have none
    Columns row_columns;

    int64_t row_parts() const {
      return row_blocks.threads != 0 ? row_blocks.parts : row_columns.splits;
    }
    int64_t RowPartials() const { return rows ? row_columns.units() * row_parts() : 0; }
  };
  static BackwardPlans PlansOf(const BackwardWork& work) {
    const NormProblem& problem = work.problem;
    const BackwardArgs& args = work.args;
    BackwardPlans plans{.plan = PlanFor(problem, /*by_plane=*/true)};
    plans.rows_are_sets = problem.reduction == Reduction::kPerSampleGroup && problem.positions == 1;
    plans.parameters = args.grad_weight != nullptr || args.grad_bias != nullptr;
    plans.sets = (args.statistics_of_batch && args.grad_x != nullptr) ||
                 (plans.parameters && !plans.rows_are_sets);
    plans.rows = plans.parameters && plans.rows_are_sets;
    if (plans.rows && args.statistics_of_batch) plans.row_blocks = CutRows(problem);
    plans.row_columns = CutColumns(1, problem.batch, problem.channels, problem.channels, false);
    plans.row_columns = plans.row_columns.Split(SplitsOfColumns(plans.row_columns));
    plans.writes = args.grad_x != nullptr || args.grad_residual != nullptr;
    return plans;
  }

  // Calls visit(Octets<n>{}) with n = `octets`, which a thread holds of so many tensors.
  template <int kOctets>
  struct Octets {};
  template <int kTensors, int kOctets = 1, class Visit>
  static void WithOctets(int octets, Visit visit) {
    if constexpr (2 * kOctets <= MostHeld(sizeof(typename E::Bits), kTensors)) {
      if (octets > kOctets) return WithOctets<kTensors, 2 * kOctets>(octets, visit);
    }
    visit(Octets<kOctets>{});
  }

  static int64_t PartialsOf(const Plan& plan) { return plan.units() * plan.splits; }

  void Prepare(const NormProblem& problem, const Statistics& statistics, bool of_batch,
               const ChannelAffine<T>& affine, SetCoefficients<T>* sets) const {
    constexpr int kThreadsOfBlock = 64;
    launch_(PrepareSets<T>, CeilDiv(problem.num_sets(), kThreadsOfBlock), 1, kThreadsOfBlock, 0,
            problem, statistics, of_batch, affine, sets);
  }

  // A kernel that finishes `count` sets or channels, merging values V.
  template <class V, class Kernel, class... Arguments>
  void LaunchFinish(Kernel kernel, int64_t count, const Finishing& how,
                    const Arguments&... arguments) const {
    launch_(kernel, CeilDiv(count, how.across), 1, how.kThreads, how.kThreads * sizeof(V),
            arguments...);
  }

  // Shared memory of a block that merges columns.
  template <class V>
  static int64_t ColumnBytes(const Columns& cut) {
    return kThreads / kWarp * cut.tile_threads * cut.width * static_cast<int64_t>(sizeof(V));
  }

  void MomentsOfSets(const NormProblem& problem, const void* x, const Plan& plan,
                     PartialMoments* partials) const {
    const bool careful = IsCareful(problem);
    if (plan.geometry == Geometry::kRuns) {
      const int threads = ThreadsFor(CeilDiv(plan.runs.slots(), plan.splits));
      launch_(plan.runs.whole() ? MomentsOfRuns<E, true> : MomentsOfRuns<E, false>, plan.runs.units,
              plan.splits, threads, threads * sizeof(ShiftedSums), x, plan.runs, plan.splits,
              careful, partials);
      return;
    }
    const auto kernel =
        plan.columns.width == kOctet ? MomentsOfColumns<E, kOctet> : MomentsOfColumns<E, 1>;
    launch_(kernel, plan.columns.blocks(), 1, kThreads, ColumnBytes<ShiftedSums>(plan.columns), x,
            plan.columns, careful, partials);
  }

  void SumsOf(const GradientTensors<E>& tensors, const NormProblem& problem, const Plan& plan,
              const T* weight, const SetCoefficients<T>* sets, GradientSums* partials) const {
    if (plan.geometry == Geometry::kColumns) {
      SumsOfColumnsBy(tensors, plan.columns, 0, sets, partials);
      return;
    }
    const int threads = ThreadsFor(CeilDiv(plan.runs.slots(), plan.splits));
    launch_(plan.runs.whole() ? SumsOfRuns<E, true> : SumsOfRuns<E, false>, plan.runs.units,
            plan.splits, threads, threads * sizeof(GradientSums), tensors, plan.runs, plan.splits,
            plan.units_per_set, sets, weight, problem.groups, partials);
  }

  void SumsOfColumnsBy(const GradientTensors<E>& tensors, const Columns& cut, int64_t row_width,
                       const SetCoefficients<T>* sets, GradientSums* partials) const {
    const auto kernel = cut.width == kOctet ? SumsOfColumns<E, kOctet> : SumsOfColumns<E, 1>;
    launch_(kernel, cut.blocks(), 1, kThreads, ColumnBytes<GradientSums>(cut), tensors, cut,
            row_width, sets, partials);
  }

  template <class Op>
  void Apply(const Op& op, const NormProblem& problem, int64_t first,
             const SetCoefficients<T>* sets) const {
    if (op.IsNothing()) return;
    if (op.IsPlain()) {
      ApplyWith(op.Plain(), problem, first, sets);
    } else {
      ApplyWith(op, problem, first, sets);
    }
  }

  template <class Op>
  void ApplyWith(const Op& op, const NormProblem& problem, int64_t first,
                 const SetCoefficients<T>* sets) const {
    const bool whole = op.size == problem.size();
    const bool per_channel = problem.reduction == Reduction::kPerChannel;
    const int64_t width = per_channel ? 1 : problem.channels / problem.groups;
    const bool one_set = per_channel || width % kOctet == 0;
    if (whole && ChannelsAreNeighbours(problem) && one_set) {
      const bool row_sets = !per_channel && problem.positions == 1;
      const Columns cut = per_channel || row_sets ? CutColumns(1, problem.batch * problem.positions,
                                                               problem.channels, width, per_channel)
                                                  : CutColumns(problem.batch, problem.positions,
                                                               problem.channels, width, false);
      if (cut.width == kOctet) {
        // Eight rows a thread, or four where that leaves few blocks.
        const int64_t rows = kThreads / cut.tile_threads;
        const int64_t parts = std::max(CeilDiv(cut.rows, 8 * rows),
                                       std::min(CeilDiv(kFullGrid / 2, cut.samples * cut.tiles()),
                                                CeilDiv(cut.rows, 4 * rows)));
        const Columns split = cut.Split(parts);
        const int64_t shared =
            cut.tile_threads * kOctet * static_cast<int64_t>(sizeof(typename Op::Coefficients));
        launch_(ApplyColumns<Op>, split.blocks(), 1, kThreads, shared, op, problem, split, row_sets,
                sets);
        return;
      }
    }
    const ElementFinder find(problem);
    const int64_t octets = CeilDiv(op.size, kOctet);
    constexpr int kBatch = BatchFor<E>(Op::kTensors);
    if (octets >= kBatch * kFullGrid / 2 * kThreads) {
      launch_(ApplyFlat<Op, kBatch>, CeilDiv(octets, kBatch * kThreads), 1, kThreads, 0, op, find,
              first, sets);
    } else {
      launch_(ApplyFlat<Op, 1>, CeilDiv(octets, kThreads), 1, kThreads, 0, op, find, first, sets);
    }
  }

  const Launch& launch_;
};

// Calls visit(E{}) with the element of `dtype`.
template <class Visit>
auto WithElement(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat64: return visit(Float64{});
    case DType::kFloat16: return visit(Half{});
    case DType::kBFloat16: return visit(BHalf{});
    case DType::kFloat32: break;
  }
  return visit(Float32{});
}

template <class Launch, class Work>
size_t ScratchBytesOf(const Work& work) {
  return WithElement(work.problem.dtype,
                     [&]<class E>(E) { return Passes<E, Launch>::ScratchBytes(work); });
}

template <class Launch>
void Run(const Launch& launch, const ForwardWork& work) {
  WithElement(work.problem.dtype, [&]<class E>(E) { Passes<E, Launch>(launch).Forward(work); });
}

template <class Launch>
void Run(const Launch& launch, const BackwardWork& work) {
  WithElement(work.problem.dtype, [&]<class E>(E) { Passes<E, Launch>(launch).Backward(work); });
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_PASSES_INL_H_
