// The kernels of a call, in their order: the one place that launches.
#ifndef NORMD_KERNELS_CUDA_PASSES_INL_H_
#define NORMD_KERNELS_CUDA_PASSES_INL_H_

#include <algorithm>
#include <cstddef>
#include <limits>

#include "kernels/cuda/device.h"
#include "kernels/cuda/resident-inl.h"

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
    arrived = cut.Take<unsigned>(problem.num_sets());
    bytes = cut.used();
  }
  SetCoefficients<T>* sets;
  Sums* sums;
  Sums* more_sums;
  unsigned* arrived;  // blocks that share a set, of each
  size_t bytes;
};

// Launch: a callable (kernel, blocks, blocks_y, threads, shared bytes, arguments...), with
//   .Cooperative(kernel, blocks, threads, shared bytes, arguments...)
//   .Zero(memory, bytes)
//   .limits(), of the device
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
    if (const Residence home = ResidenceOf(work, plan); home.stays()) {
      LaunchResident(ResidentForward<E>, home, problem.num_sets(), scratch.arrived, op, problem,
                     home, IsCareful(problem), work.moments, scratch.sums);
      return;
    }
    if (by_batch) {
      MomentsOfSets(problem, work.x, plan, scratch.sums);
      const int threads = ThreadsFor(plan.units_per_set * plan.splits);
      launch_(FinishMoments<T>, problem.num_sets(), 1, threads, threads * sizeof(PartialMoments),
              problem, scratch.sums, plan.units(), plan.units_per_set, plan.splits, work.moments,
              scratch.sets);
    } else {
      launch_(PrepareSets<T>, CeilDiv(problem.num_sets(), kThreads), 1, kThreads, 0, problem,
              work.statistics, work.statistics_of_batch, scratch.sets);
    }
    if (op.y != nullptr) Apply(op, problem, work.first, scratch.sets);
  }

  void Backward(const BackwardWork& work) const {
    const NormProblem& problem = work.problem;
    const BackwardArgs& args = work.args;
    const auto* weight = static_cast<const T*>(args.weight);
    const GradientTensors<E> tensors{args.x, args.grad_y, args.relu_mask, problem.size()};
    const BackwardPlans plans = PlansOf(work);
    const CallScratch<T, GradientSums> scratch(
        work.scratch, problem, plans.sets ? PartialsOf(plans.plan) : 0,
        plans.rows ? plans.row_columns.units() * plans.row_splits : 0);
    const BackwardOp<E> op{.size = problem.size(),
                           .x = args.x,
                           .grad_y = args.grad_y,
                           .grad_x = args.grad_x,
                           .grad_residual = args.grad_residual,
                           .relu_mask = args.relu_mask,
                           .weight = weight,
                           .of_batch = args.statistics_of_batch};
    const PartialSums sums{scratch.sums, plans.plan.units(), plans.plan.units_per_set,
                           plans.plan.splits};
    const Residence home = ResidenceOf(plans);
    const bool rows_apart = plans.rows && home.rows == 0;
    if (!home.stays() || rows_apart) {
      launch_(PrepareSets<T>, CeilDiv(problem.num_sets(), kThreads), 1, kThreads, 0, problem,
              args.statistics, args.statistics_of_batch, scratch.sets);
    }
    // Before anything is written: dx may be x or dy.
    if (rows_apart) {
      SumsOfColumnsBy(tensors, plans.row_columns, plans.row_splits, 1,
                      problem.channels / problem.groups, plans.row_threads, scratch.sets,
                      scratch.more_sums);
    }
    if (home.stays()) {
      const bool sums_wanted = home.parts > 1 || (plans.parameters && !plans.rows);
      LaunchResident(ResidentBackward<E>, home, problem.num_sets(), scratch.arrived, op, problem,
                     home, args.statistics, plans.rows_are_sets,
                     sums_wanted ? scratch.sums : nullptr, scratch.more_sums);
    } else if (plans.sets) {
      SumsOf(tensors, problem, plans.plan, plans.rows_are_sets ? weight : nullptr, scratch.sets,
             scratch.sums);
      if (args.statistics_of_batch && args.grad_x != nullptr) {
        const int threads = ThreadsFor(sums.units_per_set * sums.splits);
        launch_(FinishSets<T>, problem.num_sets(), 1, threads, threads * sizeof(GradientSums),
                problem, args.statistics, sums, plans.rows_are_sets ? nullptr : weight,
                scratch.sets);
      }
    }
    if (plans.parameters) {
      const PartialSums of_channels =
          plans.rows ? PartialSums{scratch.more_sums, problem.channels, 1, plans.row_splits} : sums;
      const int threads = ThreadsFor(of_channels.units / problem.channels * of_channels.splits);
      launch_(FinishChannels<T>, problem.channels, 1, threads, threads * sizeof(GradientSums),
              problem, args.statistics, args.statistics_of_batch, of_channels, plans.rows,
              static_cast<T*>(args.grad_weight), static_cast<T*>(args.grad_bias));
    }
    if (!home.stays() && plans.writes) Apply(op, problem, 0, scratch.sets);
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
               nullptr, work.problem, plans.sets ? PartialsOf(plans.plan) : 0,
               plans.rows ? plans.row_columns.units() * plans.row_splits : 0)
        .bytes;
  }

 private:
  // The sums of a backward pass. Where a set is a row with a weight an element, its
  // sums and those of the parameters have nothing in common: two passes.
  struct BackwardPlans {
    NormProblem problem;
    Plan plan;
    bool rows_are_sets;
    bool parameters;  // some gradient of these is wanted
    bool sets;        // sums over `plan` are
    bool rows;        // sums over `row_columns` are
    bool writes;      // dx, or the residual's gradient
    Columns row_columns;
    int64_t row_splits;
    int row_threads;
  };
  static BackwardPlans PlansOf(const BackwardWork& work) {
    const NormProblem& problem = work.problem;
    const BackwardArgs& args = work.args;
    BackwardPlans plans{.problem = problem, .plan = PlanFor(problem, /*by_plane=*/true)};
    plans.rows_are_sets = problem.reduction == Reduction::kPerSampleGroup && problem.positions == 1;
    plans.parameters = args.grad_weight != nullptr || args.grad_bias != nullptr;
    plans.sets = (args.statistics_of_batch && args.grad_x != nullptr) ||
                 (plans.parameters && !plans.rows_are_sets);
    plans.rows = plans.parameters && plans.rows_are_sets;
    plans.row_columns = CutColumns(1, problem.batch, problem.channels);
    const bool may_stay = RowsMayStay(plans.plan.runs);
    plans.row_splits =
        may_stay ? SplitsOfRows(plans.row_columns) : SplitsOfColumns(plans.row_columns);
    plans.row_threads = may_stay ? plans.row_columns.tile_threads : kThreads;
    plans.writes = args.grad_x != nullptr || args.grad_residual != nullptr;
    return plans;
  }

  // Whether the sets of a call stay in shared memory.
  Residence ResidenceOf(const ForwardWork& work, const Plan& plan) const {
    if (plan.geometry != Geometry::kRuns || work.moments.mean == nullptr) return {};
    // Moments alone read x once anyhow.
    if (work.y == nullptr && plan.splits > 1) return {};
    // A byte of the mask belongs to one octet of one set.
    if (work.epilogue.relu_mask != nullptr && plan.runs.length % kOctet != 0) return {};
    return ResidenceFor(plan, work.problem, ResidentBytesFor<E, PartialMoments>(1),
                        launch_.limits());
  }
  Residence ResidenceOf(const BackwardPlans& plans) const {
    if (plans.plan.geometry != Geometry::kRuns || !plans.sets || !plans.writes) return {};
    if (plans.rows) {
      const Residence home =
          RowResidenceFor(plans.plan, plans.problem, plans.row_splits,
                          ResidentBytesFor<E, GradientSums>(2), launch_.limits());
      if (home.stays()) return home;
    }
    return ResidenceFor(plans.plan, plans.problem, ResidentBytesFor<E, GradientSums>(2),
                        launch_.limits());
  }

  // `arrived`: of so many sets; the kernel's last argument too.
  template <class Kernel, class... Arguments>
  void LaunchResident(Kernel kernel, const Residence& home, int64_t sets, unsigned* arrived,
                      const Arguments&... arguments) const {
    if (home.parts == 1) {
      launch_(kernel, home.blocks, 1, home.threads, home.shared_bytes, arguments..., arrived);
      return;
    }
    launch_.Zero(arrived, static_cast<size_t>(sets) * sizeof(unsigned));
    launch_.Cooperative(kernel, home.blocks, home.threads, home.shared_bytes, arguments...,
                        arrived);
  }

  static int64_t PartialsOf(const Plan& plan) { return plan.units() * plan.splits; }
  static int64_t Blocks(const Columns& cut, int64_t splits) {
    return cut.samples * splits * cut.tiles();
  }

  void MomentsOfSets(const NormProblem& problem, const void* x, const Plan& plan,
                     PartialMoments* partials) const {
    const bool careful = IsCareful(problem);
    constexpr size_t kShared = kThreads * sizeof(PartialMoments);
    if (plan.geometry == Geometry::kRuns) {
      const int threads = ThreadsFor(CeilDiv(plan.runs.slots(), plan.splits));
      launch_(MomentsOfRuns<E>, plan.runs.units, plan.splits, threads,
              threads * sizeof(PartialMoments), x, problem.size(), plan.runs, plan.splits, careful,
              partials);
    } else if (plan.columns.width == kOctet) {
      launch_(MomentsOfColumns<E, kOctet>, Blocks(plan.columns, plan.splits), 1, kThreads, kShared,
              x, problem.size(), plan.columns, plan.splits, careful, partials);
    } else {
      launch_(MomentsOfColumns<E, 1>, Blocks(plan.columns, plan.splits), 1, kThreads, kShared, x,
              problem.size(), plan.columns, plan.splits, careful, partials);
    }
  }

  void SumsOf(const GradientTensors<E>& tensors, const NormProblem& problem, const Plan& plan,
              const T* weight, const SetCoefficients<T>* sets, GradientSums* partials) const {
    if (plan.geometry == Geometry::kColumns) {
      SumsOfColumnsBy(tensors, plan.columns, plan.splits, plan.units_per_set, 0, kThreads, sets,
                      partials);
      return;
    }
    const int threads = ThreadsFor(CeilDiv(plan.runs.slots(), plan.splits));
    launch_(SumsOfRuns<E>, plan.runs.units, plan.splits, threads, threads * sizeof(GradientSums),
            tensors, plan.runs, plan.splits, plan.units_per_set, sets, weight, problem.groups,
            partials);
  }

  void SumsOfColumnsBy(const GradientTensors<E>& tensors, const Columns& cut, int64_t splits,
                       int64_t units_per_set, int64_t row_width, int threads,
                       const SetCoefficients<T>* sets, GradientSums* partials) const {
    const auto kernel = cut.width == kOctet ? SumsOfColumns<E, kOctet> : SumsOfColumns<E, 1>;
    launch_(kernel, Blocks(cut, splits), 1, threads, threads * sizeof(GradientSums), tensors, cut,
            splits, units_per_set, row_width, sets, partials);
  }

  template <class Op>
  void Apply(const Op& op, const NormProblem& problem, int64_t first,
             const SetCoefficients<T>* sets) const {
    const bool whole = op.size == problem.size();
    const bool per_channel = problem.reduction == Reduction::kPerChannel;
    const bool one_set = per_channel || problem.channels / problem.groups % kOctet == 0;
    if (whole && ChannelsAreNeighbours(problem) && problem.channels % kOctet == 0 && one_set) {
      const bool row_sets = !per_channel && problem.positions == 1;
      const Columns cut = per_channel || row_sets
                              ? CutColumns(1, problem.batch * problem.positions, problem.channels)
                              : CutColumns(problem.batch, problem.positions, problem.channels);
      const int64_t splits = SplitsOfColumns(cut);
      launch_(ApplyColumns<Op>, Blocks(cut, splits), 1, kThreads, 0, op, problem, cut, splits,
              row_sets, sets);
      return;
    }
    const int64_t octets = CeilDiv(op.size, kOctet);
    launch_(ApplyFlat<Op>, std::min(CeilDiv(octets, kThreads), 2 * kFullGrid), 1, kThreads, 0, op,
            problem, first, sets);
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
