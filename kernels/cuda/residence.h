// Whether sets stay on the multiprocessors, in shared memory, from the sums over them to
// what is written, so that each tensor is read once. That depends on the device; what
// comes out does not: sets are reduced in the plan's parts, merged in the same order.
#ifndef NORMD_KERNELS_CUDA_RESIDENCE_H_
#define NORMD_KERNELS_CUDA_RESIDENCE_H_

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/plan.h"

namespace normd::cuda {

// Of a device; these are what every GPU from sm_75 on has at least.
struct Limits {
  int64_t shared_bytes = int64_t{48} << 10;  // that a block may have
  int multiprocessors = 1;
  // Whether blocks of a launch may wait for each other, one a multiprocessor.
  bool cooperative = false;
};

// Most threads of a block that keeps sets.
inline constexpr int kResidentThreads = 512;

struct Residence {
  Runs runs;
  int64_t units_per_set = 1;
  int64_t unit_channels = 1;  // of a unit, neighbours

  // A job is a part of a unit, which as many threads reduce as if it did not stay. Job j
  // of a set: part j / units_per_set of unit j % units_per_set.
  int64_t jobs = 0;       // of a set
  int64_t job_slots = 0;  // the last part of a unit may have fewer
  int job_threads = 1;

  int64_t blocks = 0;  // of the launch
  int threads = 1;     // of a block; job_threads of them take a job, the next ones the next
  int64_t parts = 0;   // blocks that share a set; 0: sets do not stay
  int64_t held = 0;    // jobs a block keeps at once
  int64_t shared_bytes = 0;

  // With one block a set: whether a block fetches its next set while it has another.
  bool ahead = false;
  // 0, or with one block a set: rows that a block takes one after another, and sums by
  // column. A row is `sets_a_row` sets, of which it takes one.
  int64_t rows = 0;
  int64_t sets_a_row = 1;

  constexpr bool stays() const { return parts != 0; }
};

// What a block needs: for the octets of each slot that it holds, for the sums of its columns,
// for each thread and job, and at all.
struct ResidentBytes {
  int64_t octets, columns, sum, fixed;
};

// Whether so many blocks, as long as each other, leave the multiprocessors idle for no
// more than a quarter of the time, so that a read saved is time saved.
constexpr bool Fill(int64_t blocks, int64_t multiprocessors) {
  return 4 * blocks >= 3 * CeilDiv(blocks, multiprocessors) * multiprocessors;
}

constexpr Residence JobsOf(const Plan& plan, const NormProblem& problem) {
  Residence home{.runs = plan.runs, .units_per_set = plan.units_per_set};
  home.unit_channels =
      problem.reduction == Reduction::kPerChannel ? 1 : plan.runs.length / problem.positions;
  home.jobs = plan.units_per_set * plan.splits;
  home.job_slots = CeilDiv(plan.runs.slots(), plan.splits);
  home.job_threads = ThreadsFor(home.job_slots);
  home.threads = home.job_threads * static_cast<int>(std::min<int64_t>(
                                        kResidentThreads / home.job_threads, home.jobs));
  return home;
}

constexpr int64_t SharedBytesOf(const Residence& home, const ResidentBytes& bytes, int64_t held) {
  const int64_t slot = bytes.octets * (home.ahead ? 2 : 1) + (home.rows != 0 ? bytes.columns : 0);
  return bytes.fixed + home.threads * bytes.sum + held * (home.job_slots * slot + bytes.sum);
}

// Sets of a plan of runs.
constexpr Residence ResidenceFor(const Plan& plan, const NormProblem& problem,
                                 const ResidentBytes& bytes, const Limits& limits) {
  // Sooner done by one block than by the next kernel.
  constexpr int64_t kSmallSet = int64_t{32} << 10;
  Residence home = JobsOf(plan, problem);
  const int64_t sets = problem.num_sets();
  const int64_t room = limits.shared_bytes - SharedBytesOf(home, bytes, 0);
  const int64_t most = room / (SharedBytesOf(home, bytes, 1) - SharedBytesOf(home, bytes, 0));
  if (most < 1) return home;
  if (most >= home.jobs && (home.jobs * home.job_slots * bytes.octets <= kSmallSet ||
                            Fill(sets, limits.multiprocessors))) {
    home.parts = 1;
    home.held = home.jobs;
    home.blocks = sets;
    // Where blocks come to several sets each.
    home.ahead = true;
    const int64_t at_once =
        limits.multiprocessors *
        std::min<int64_t>(kResidentThreads / home.threads,
                          limits.shared_bytes / SharedBytesOf(home, bytes, home.jobs));
    home.ahead = at_once != 0 && sets >= 4 * at_once;
    if (home.ahead) home.blocks = at_once;
  } else if (limits.cooperative) {
    const int64_t wanted = std::max<int64_t>(
        CeilDiv(home.jobs, most), std::min<int64_t>(home.jobs, limits.multiprocessors / sets));
    home.held = CeilDiv(home.jobs, wanted);
    const int64_t parts = CeilDiv(home.jobs, home.held);
    const int64_t at_once = std::min(limits.multiprocessors / parts, sets);
    if (at_once < 1) return home;
    // Jobs that all multiprocessors could have done in that time.
    const int64_t could = CeilDiv(sets, at_once) * limits.multiprocessors * home.held;
    if (4 * sets * home.jobs < 3 * could) return home;
    home.parts = parts;
    home.blocks = at_once * parts;
  }
  home.shared_bytes = SharedBytesOf(home, bytes, home.held);
  return home;
}

// Sets that are rows with a weight an element, whose columns are summed too: in `splits`
// parts of the rows, a block for each and for each set of a row.
constexpr Residence RowResidenceFor(const Plan& plan, const NormProblem& problem, int64_t splits,
                                    const ResidentBytes& bytes, const Limits& limits) {
  Residence home = JobsOf(plan, problem);
  const int64_t blocks = splits * problem.groups;
  if (!RowsMayStay(plan.runs) || !Fill(blocks, limits.multiprocessors)) return home;
  home.held = home.jobs;
  home.blocks = blocks;
  home.ahead = true;
  home.rows = CeilDiv(problem.batch, splits);
  home.sets_a_row = problem.groups;
  home.shared_bytes = SharedBytesOf(home, bytes, home.held);
  home.parts = home.shared_bytes <= limits.shared_bytes ? 1 : 0;
  return home;
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_RESIDENCE_H_
