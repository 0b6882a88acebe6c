// The kernels that keep a set in shared memory (residence.h) and read each tensor once.
#ifndef NORMD_KERNELS_CUDA_RESIDENT_INL_H_
#define NORMD_KERNELS_CUDA_RESIDENT_INL_H_

#include "kernels/cuda/apply-inl.h"
#include "kernels/cuda/residence.h"

namespace normd::cuda {

// Sums of a thread's slot of columns over rows.
template <class T>
struct alignas(16) SlotSums {
  T dy[kOctet], dy_d[kOctet];
};

// Shared memory: octets of x, and with two tensors of dy, and ahead of the next set's; sums of
// columns; a sum a thread; a sum a job; the set's constants and coefficients.
template <class E, class V>
constexpr ResidentBytes ResidentBytesFor(int tensors) {
  using T = typename E::Compute;
  return {.octets = tensors * static_cast<int64_t>(sizeof(Octet<E>)),
          .columns = sizeof(SlotSums<T>),
          .sum = sizeof(V),
          .fixed = sizeof(SetConstants) + sizeof(SetCoefficients<T>)};
}

// Until all `parts` blocks that share a set have come here; what each wrote to global
// memory before can be read then. `arrived` was zero before the launch, which has to be
// cooperative.
#if defined(__CUDACC__)
NORMD_DEVICE void MeetBlocks(unsigned* arrived, unsigned parts) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1U);
    while (*static_cast<volatile unsigned*>(arrived) < parts) {
    }
    __threadfence();
  }
  __syncthreads();
}
#endif

// A block and a thread of it among sets and jobs. V: PartialMoments or GradientSums.
template <class E, class V>
class Resident {
  using T = typename E::Compute;

 public:
  NORMD_DEVICE Resident(const Residence& residence, int tensors, unsigned char* shared)
      : home_(residence),
        group_(static_cast<int>(threadIdx.x) / residence.job_threads),
        thread_(static_cast<int>(threadIdx.x) % residence.job_threads),
        groups_(residence.threads / residence.job_threads),
        first_job_(blockIdx.x % residence.parts * residence.held),
        past_job_(first_job_ + residence.held < residence.jobs ? first_job_ + residence.held
                                                               : residence.jobs),
        tensors_(tensors),
        octets_(reinterpret_cast<Octet<E>*>(shared)) {
    slot_sums_ =
        reinterpret_cast<SlotSums<T>*>(octets_ + tensors * (residence.ahead ? 2 : 1) * slots());
    auto* const end = slot_sums_ + (residence.rows != 0 ? slots() : 0);
    merging_ = reinterpret_cast<V*>(end);
    sums_ = merging_ + residence.threads;
    constants_ = reinterpret_cast<SetConstants*>(sums_ + residence.held);
    coefficients_ = reinterpret_cast<SetCoefficients<T>*>(constants_ + 1);
  }

  NORMD_DEVICE int64_t slots() const { return home_.held * home_.job_slots; }
  NORMD_DEVICE bool IsFirstOfSet() const { return first_job_ == 0; }

  // Of each of the thread's slots in the block's n-th set: x, or as the second tensor dy; and
  // the sums of its columns.
  NORMD_DEVICE Octet<E>* octets(int64_t n, int tensor) const {
    return octets_ + ((home_.ahead ? n % 2 * tensors_ : 0) + tensor) * slots();
  }
  NORMD_DEVICE SlotSums<T>* slot_sums() const { return slot_sums_; }
  NORMD_DEVICE V* merging() const { return merging_; }
  NORMD_DEVICE SetConstants* constants() const { return constants_; }
  NORMD_DEVICE SetCoefficients<T>* coefficients() const { return coefficients_; }

  // The sets of the block: first_set(), and on by set_step() to past_set().
  NORMD_DEVICE int64_t first_set() const {
    if (home_.rows == 0) return blockIdx.x / home_.parts;
    return row_part() * home_.rows * home_.sets_a_row + blockIdx.x % home_.sets_a_row;
  }
  NORMD_DEVICE int64_t set_step() const {
    return home_.rows == 0 ? gridDim.x / home_.parts : home_.sets_a_row;
  }
  NORMD_DEVICE int64_t past_set(int64_t sets) const {
    const int64_t past = (row_part() + 1) * home_.rows * home_.sets_a_row;
    return home_.rows == 0 || past > sets ? sets : past;
  }
  NORMD_DEVICE int64_t row_part() const { return blockIdx.x / home_.sets_a_row; }

  // Begins to fetch the block's n-th set, or where that was done ahead the next one.
  // tensors[k] are of `size` elements.
  NORMD_DEVICE void Fetch(int64_t n, int64_t set, int64_t past, const void* const (&tensors)[2],
                          int64_t size) const {
    if (n == 0 || !home_.ahead) FetchSet(n, set, tensors, size);
    if (!home_.ahead) return;
    if (set + set_step() < past) {
      FetchSet(n + 1, set + set_step(), tensors, size);
    } else {
      EndFetches();  // Await() counts
    }
  }
  // For the n-th set.
  NORMD_DEVICE void Await() const {
    if (home_.ahead) {
      AwaitFetches<1>();
    } else {
      AwaitFetches<0>();
    }
  }

  // Calls visit(walk, before, unit) for each of the thread's jobs: the slots of `walk` are
  // kept at slot - before.
  template <class Visit>
  NORMD_DEVICE void ForEachJob(int64_t set, Visit visit) const {
    for (int64_t job = first_job_ + group_; job < past_job_; job += groups_) {
      VisitJob(set, job, visit);
    }
  }

  // Reduces the jobs of the block, reduce(walk, before, unit) those of a thread, and where
  // wanted writes what they come to as the plan's partial sums.
  template <class Reduce>
  NORMD_DEVICE void ReduceJobs(int64_t set, V* partials, Reduce reduce) const {
    for (int64_t first = first_job_; first < past_job_; first += groups_) {
      const int64_t job = first + group_;
      V sum;
      if (job < past_job_) {
        VisitJob(set, job, [&](const Walk& walk, int64_t before, int64_t unit) {
          sum = reduce(walk, before, unit);
        });
      }
      sum = MergeOver(home_.job_threads, 1, sum, merging_);
      if (thread_ == 0 && job < past_job_) {
        sums_[job - first_job_] = sum;
        if (partials != nullptr) partials[Partial(set, job)] = sum;
      }
    }
  }

  // After ReduceJobs() and a barrier, or MeetBlocks() where blocks share the set.
  NORMD_DEVICE V SumOf(int64_t set, int64_t job, const V* partials) const {
    return home_.parts == 1 ? sums_[job] : partials[Partial(set, job)];
  }
  NORMD_DEVICE int64_t UnitOf(int64_t set, int64_t job) const {
    return set * home_.units_per_set + job % home_.units_per_set;
  }

  // Calls apply(place, at, channel, of) for each of the thread's octets, which is kept at
  // `at`; `of` as Op::Apply() takes it.
  template <class Op, class Apply>
  NORMD_DEVICE void ForEachOctet(const Op& op, const NormProblem& problem, int64_t set,
                                 Apply apply) const {
    const SetCoefficients<T> of_set = *coefficients_;
    ForEachJob(set, [&](Walk walk, int64_t before, int64_t unit) {
      const int64_t unit_channel = unit * home_.unit_channels % problem.channels;
      for (; walk.More(); walk.Next()) {
        const Walk::Place place = walk.Here();
        if (place.low >= place.high) continue;
        const int64_t at = walk.slot - before;
        int64_t channel = unit_channel;
        int64_t rest = 0;
        if (home_.unit_channels != 1) {
          channel += Divide(place.i + place.low - walk.begin, problem.positions, rest);
        }
        if (home_.unit_channels == 1 || rest + (place.high - place.low) <= problem.positions) {
          const auto all = op.At(of_set, channel);
          apply(place, at, channel, [&](int) { return all; });
          continue;
        }
        typename Op::Coefficients each[kOctet];
        int64_t next = channel;
#pragma unroll
        for (int k = 0; k < kOctet; ++k) {
          each[k] = {};
          if (k < place.low || k >= place.high) continue;
          each[k] = op.At(of_set, next);
          if (++rest == problem.positions) {
            rest = 0;
            ++next;
          }
        }
        apply(place, at, channel, [&](int k) { return each[k]; });
      }
    });
  }

 private:
  NORMD_DEVICE void FetchSet(int64_t n, int64_t set, const void* const (&tensors)[2],
                             int64_t size) const {
    ForEachJob(set, [&](Walk walk, int64_t before, int64_t) {
      for (; walk.More(); walk.Next()) {
        const Walk::Place at = walk.Here();
        if (at.low >= at.high) continue;
        for (int tensor = 0; tensor < tensors_; ++tensor) {
          FetchOctet<E>(octets(n, tensor) + (walk.slot - before), tensors[tensor], size, at.i,
                        at.low, at.high);
        }
      }
    });
    EndFetches();
  }

  template <class Visit>
  NORMD_DEVICE void VisitJob(int64_t set, int64_t job, Visit visit) const {
    int64_t in_set;
    const int64_t first = Divide(job, home_.units_per_set, in_set) * home_.job_slots;
    const int64_t all = home_.runs.slots();
    const int64_t unit = set * home_.units_per_set + in_set;
    visit(Walk(home_.runs, unit, first + thread_,
               first + home_.job_slots < all ? first + home_.job_slots : all, home_.job_threads),
          first - (job - first_job_) * home_.job_slots, unit);
  }
  NORMD_DEVICE int64_t Partial(int64_t set, int64_t job) const {
    return job / home_.units_per_set * home_.runs.units + UnitOf(set, job);
  }

  const Residence& home_;
  int group_, thread_, groups_;
  int64_t first_job_, past_job_;
  int tensors_;
  Octet<E>* octets_;
  SlotSums<T>* slot_sums_;
  V* merging_;
  V* sums_;
  SetConstants* constants_;
  SetCoefficients<T>* coefficients_;
};

// The `parts` blocks of a set beside each other, and on by the size of the grid.
template <class E>
NORMD_RESIDENT_KERNEL void ResidentForward(ForwardOp<E> op, NormProblem problem, Residence home,
                                           bool careful, Moments moments, PartialMoments* partials,
                                           unsigned* arrived) {
  NORMD_SHARED(shared);
  const Resident<E, PartialMoments> block(home, 1, shared);
  const bool shares = home.parts > 1;
  const int64_t past = block.past_set(problem.num_sets());
  int64_t n = 0;
  for (int64_t set = block.first_set(); set < past; set += block.set_step(), ++n) {
    block.Fetch(n, set, past, {op.x, nullptr}, op.size);
    block.Await();
    const Octet<E>* const xs = block.octets(n, 0);
    block.ReduceJobs(
        set, shares ? partials : nullptr, [&](const Walk& walk, int64_t before, int64_t) {
          return MomentsOfSlots<E>(walk, careful, [&](const Walk& at, const Walk::Place&) {
            return xs[at.slot - before];
          });
        });
    if (shares) {
      MeetBlocks(arrived + set, static_cast<unsigned>(home.parts));
    } else {
      __syncthreads();
    }
    const PartialMoments total = MergeInOrder(
        home.jobs, block.merging(),
        [&](PartialMoments& into, int64_t job) { into.Merge(block.SumOf(set, job, partials)); });
    if (threadIdx.x == 0) {
      FinishSet(problem, total, set, block.IsFirstOfSet(), moments, block.coefficients());
    }
    __syncthreads();
    if (op.y != nullptr) {
      block.ForEachOctet(op, problem, set,
                         [&](const Walk::Place& place, int64_t at, int64_t, const auto& of) {
                           op.Apply(place.i, place.low, place.high, xs[at], of);
                         });
    }
    __syncthreads();  // the coefficients may be changed
  }
}

// The same of x and dy. `partials` are written too where they are not null. With
// home.rows: block (part of the rows, set of a row); `row_partials` as SumsOfColumns
// writes them.
template <class E>
NORMD_RESIDENT_KERNEL void ResidentBackward(BackwardOp<E> op, NormProblem problem, Residence home,
                                            Statistics statistics, bool weigh_elements,
                                            GradientSums* partials, GradientSums* row_partials,
                                            unsigned* arrived) {
  using T = typename E::Compute;
  NORMD_SHARED(shared);
  const Resident<E, GradientSums> block(home, 2, shared);
  SetConstants* const constants = block.constants();
  SetCoefficients<T>* const coefficients = block.coefficients();
  const bool shares = home.parts > 1;
  const int64_t past = block.past_set(problem.num_sets());
  int64_t n = 0;
  for (int64_t set = block.first_set(); set < past; set += block.set_step(), ++n) {
    block.Fetch(n, set, past, {op.x, op.grad_y}, op.size);
    if (threadIdx.x == 0) {
      *constants = SetConstants(problem, statistics, set, op.of_batch);
      *coefficients = ToCoefficients<T>(*constants);
    }
    block.Await();
    const Octet<E>* const xs = block.octets(n, 0);
    const Octet<E>* const dys = block.octets(n, 1);
    __syncthreads();
    const T shift = coefficients->shift;
    block.ReduceJobs(set, partials, [&](const Walk& walk, int64_t before, int64_t unit) {
      return SumsOfSlots<E>(walk, unit, shift, weigh_elements ? op.weight : nullptr, problem.groups,
                            [&](const Walk& at, const Walk::Place& place) {
                              return typename GradientTensors<E>::Pair{
                                  xs[at.slot - before], dys[at.slot - before],
                                  op.relu_mask == nullptr ? 0xffu : op.relu_mask[place.i / kOctet]};
                            });
    });
    if (shares) {
      MeetBlocks(arrived + set, static_cast<unsigned>(home.parts));
    } else {
      __syncthreads();
    }
    if (op.of_batch) {
      const GradientSums total =
          MergeInOrder(home.jobs, block.merging(), [&](GradientSums& into, int64_t job) {
            AddToSet(problem, *constants, block.UnitOf(set, job),
                     weigh_elements ? nullptr : op.weight, block.SumOf(set, job, partials), into);
          });
      if (threadIdx.x == 0) FinishGradient(problem, *constants, total, coefficients);
      __syncthreads();
    }
    const SetCoefficients<T> of_set = *coefficients;
    block.ForEachOctet(
        op, problem, set,
        [&](const Walk::Place& place, int64_t at, int64_t channel, const auto& of) {
          const Octet<E> x = xs[at];
          const Octet<E> dy = dys[at];
          if (home.rows != 0) {
            // As SumsOfColumns: some tens of rows in the computing type, then in double.
            const bool begins = n % kRowsInBlock == 0;
            const bool ends =
                n % kRowsInBlock == kRowsInBlock - 1 || set + block.set_step() >= past;
            const uint32_t bits = op.relu_mask == nullptr ? 0xffu : op.relu_mask[place.i / kOctet];
            SlotSums<T> sums = begins ? SlotSums<T>{} : block.slot_sums()[at];
            GradientSums* const columns =
                row_partials + block.row_part() * problem.channels + channel;
#pragma unroll
            for (int k = 0; k < kOctet; ++k) {
              const T g = (bits >> k & 1) != 0 ? dy[k] : T{0};
              sums.dy[k] += g;
              sums.dy_d[k] = MultiplyAdd(
                  g, MultiplyAdd(x[k] - of_set.shift, of_set.invstd, of_set.lost), sums.dy_d[k]);
              if (ends) {
                GradientSums total = n < kRowsInBlock ? GradientSums{} : columns[k];
                total.dy += static_cast<double>(sums.dy[k]);
                total.dy_d += static_cast<double>(sums.dy_d[k]);
                columns[k] = total;
              }
            }
            if (!ends) block.slot_sums()[at] = sums;
          }
          op.Apply(place.i, place.low, place.high, x, dy, of);
        });
    __syncthreads();  // the coefficients may be changed
  }
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_RESIDENT_INL_H_
