// How a problem is cut for a GPU. From the problem alone, never from the device: the
// same bits on every GPU.
#ifndef NORMD_KERNELS_CUDA_PLAN_H_
#define NORMD_KERNELS_CUDA_PLAN_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/problem.h"

namespace normd::cuda {

// Threads of a block of the large kernels.
inline constexpr int kThreads = 256;
// Elements that a thread takes at once: a byte of the ReLU mask, and one to four loads
// of 16 bytes.
inline constexpr int kOctet = 8;
// Blocks that fill any GPU of today about twice.
inline constexpr int64_t kFullGrid = 2048;
// Most rows of a column that are summed in the computing type.
inline constexpr int64_t kMostRows = 64;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A power of two from 32 to kThreads, for so many things to do.
constexpr int ThreadsFor(int64_t things) {
  int threads = 32;
  while (threads < kThreads && threads < things) threads *= 2;
  return threads;
}
// Warps for so many things, as threads.
constexpr int64_t WarpsFor(int64_t things) { return CeilDiv(things, 32) * 32; }

// The elements of unit u, which are reduced together: `count` runs of `length`
// neighbours; run r begins at u * unit_stride + r * run_stride.
struct Runs {
  int64_t units = 0;
  int64_t count = 1;
  int64_t length = 0;
  int64_t unit_stride = 0;
  int64_t run_stride = 0;

  // Aligned octets that a run may touch.
  constexpr int64_t octets() const {
    const bool aligned =
        length % kOctet == 0 && unit_stride % kOctet == 0 && run_stride % kOctet == 0;
    return aligned ? length / kOctet : (length + 2 * kOctet - 2) / kOctet;
  }
  constexpr int64_t slots() const { return count * octets(); }
  // Whether all runs are of whole octets.
  constexpr bool whole() const { return octets() * kOctet == length; }
};

// A matrix whose columns are reduced, `samples` times one below the other. Unit
// sample * columns + column.
//
// Where channels are no multiple of an octet, several rows of them may be one row here: then
// each channel has several columns, `channels` apart, of each tile at least one.
struct Columns {
  int64_t samples = 1;
  int64_t rows = 0;  // of each sample
  int64_t columns = 0;
  int64_t channels = 0;   // columns that follow each other before channels repeat
  int64_t set_width = 1;  // neighbouring channels of a set
  int width = 1;          // columns that a thread takes: 1 or kOctet
  int tile_threads = 1;   // threads of a block beside each other; a power of two
  int tile_shift = 0;     // its logarithm
  // Set by Split(): a sample's rows in parts.
  int64_t splits = 1;
  int64_t part = 0;

  constexpr int64_t tiles() const { return CeilDiv(columns, int64_t{width} * tile_threads); }
  constexpr int64_t blocks() const { return samples * splits * tiles(); }
  constexpr Columns Split(int64_t parts) const {
    Columns split = *this;
    split.part = CeilDiv(rows, parts);
    split.splits = CeilDiv(rows, split.part);
    return split;
  }
  // Whether rows are taken together. Then a unit is a tile's columns of a channel, number
  // tile * channels + channel.
  constexpr bool folded() const { return columns != channels; }
  constexpr int64_t units() const { return (folded() ? tiles() : samples) * channels; }
  constexpr int64_t Channel(int64_t column) const { return folded() ? column % channels : column; }
  constexpr int64_t SetOf(int64_t sample, int64_t column) const {
    return (sample * channels + Channel(column)) / set_width;
  }
};

enum class Geometry : uint8_t { kRuns, kColumns };

// How the elements of a set, or of a channel in it, lie.
struct Plan {
  Geometry geometry = Geometry::kRuns;
  Runs runs;
  Columns columns;
  int64_t splits = 1;         // partial sums a unit (finish-inl.h has where they lie)
  int64_t units_per_set = 1;  // neighbours, or
  int64_t unit_step = 1;      // so far from each other

  constexpr int64_t units() const {
    return geometry == Geometry::kRuns ? runs.units : columns.units();
  }
};

constexpr bool ChannelsAreNeighbours(const NormProblem& problem) {
  return problem.format == MemoryFormat::kChannelsLast || problem.positions == 1;
}

// `folds`: whether rows may be taken together.
constexpr Columns CutColumns(int64_t samples, int64_t rows, int64_t channels, int64_t set_width,
                             bool folds) {
  Columns cut{.samples = samples,
              .rows = rows,
              .columns = channels,
              .channels = channels,
              .set_width = set_width};
  if (folds) {
    // Rows that are a multiple of an octet together, and of a warp's octets where few are not.
    int64_t folded = 1;
    while (channels * folded % kOctet != 0) folded *= 2;
    if (folded > 1 && rows % folded == 0 && channels <= kOctet) {
      while (channels * folded % (32 * kOctet) != 0 && rows % (2 * folded) == 0) folded *= 2;
      cut.columns *= folded;
      cut.rows /= folded;
    }
  }
  cut.width = cut.columns % kOctet == 0 ? kOctet : 1;
  const int64_t wanted = std::min<int64_t>(cut.columns / cut.width, 32);
  while (cut.tile_threads < wanted) cut.tile_threads = 1 << ++cut.tile_shift;
  return cut;
}

constexpr int64_t SplitsOfRuns(const Runs& runs) {
  // Four octets a thread or more.
  const int64_t most = CeilDiv(runs.slots(), int64_t{4} * kThreads);
  return std::clamp<int64_t>(kFullGrid / runs.units, 1, most);
}

// Blocks that sum columns: each thread has rows enough to make up for the merge, and no more
// than may be summed in the computing type.
constexpr int64_t SplitsOfColumns(const Columns& columns) {
  constexpr int64_t kBlocks = 396;  // three on each of 132 multiprocessors
  const int64_t rows_a_block = kThreads / columns.tile_threads;
  const int64_t splits = std::clamp<int64_t>(kBlocks / (columns.samples * columns.tiles()), 1,
                                             CeilDiv(columns.rows, 4 * rows_a_block));
  return std::max(splits, CeilDiv(columns.rows, kMostRows * rows_a_block));
}

// Rows that are sets with a weight an element, whose columns are summed by the threads that
// have them in registers: an octet of each row a thread. None: threads is 0.
struct RowBlocks {
  int64_t parts = 0;  // of the rows, a block each
  int64_t rows = 0;   // of a part
  int threads = 0;    // that share a row
  int together = 0;   // rows of a block at a time
};

constexpr RowBlocks CutRows(const NormProblem& problem) {
  const int64_t octets = problem.channels / kOctet;
  // Fewer would leave most of a warp idle; and a thread sums an octet of columns.
  if (problem.groups != 1 || problem.channels % kOctet != 0 || octets < 24 || octets > 512) {
    return {};
  }
  RowBlocks cut{.threads = static_cast<int>(WarpsFor(octets))};
  cut.together = std::max(1, kThreads / cut.threads);
  // As many rows a thread as may be summed in the computing type, or fewer to fill a GPU.
  const int64_t parts =
      std::max<int64_t>(CeilDiv(problem.batch, kMostRows * cut.together),
                        std::min<int64_t>(264, CeilDiv(problem.batch, int64_t{4} * cut.together)));
  cut.rows = CeilDiv(problem.batch, parts);
  cut.parts = CeilDiv(problem.batch, cut.rows);
  return cut;
}

// Sets that stay in the registers of the threads that reduce them, each tensor read once.
// None: threads is 0.
struct Held {
  Runs runs;
  int64_t unit_channels = 1;  // of a unit, neighbours
  int threads = 0;            // that share a set
  int together = 0;           // sets of a block
  int octets = 0;             // that a thread holds of each tensor: a power of two

  // Whether sets are single runs of whole octets.
  constexpr bool row() const { return runs.count == 1 && runs.whole(); }
};

// `by_plane`: a sample's channel is a unit even where its group could be one, because
// gradients of weights are wanted.
constexpr Plan PlanFor(const NormProblem& problem, bool by_plane) {
  const bool per_channel = problem.reduction == Reduction::kPerChannel;
  const int64_t width = per_channel ? 1 : problem.channels / problem.groups;
  const int64_t positions = problem.positions;
  Plan plan;
  const bool row_sets = !per_channel && problem.positions == 1;
  if (ChannelsAreNeighbours(problem) && !row_sets) {
    plan.geometry = Geometry::kColumns;
    plan.columns = per_channel
                       ? CutColumns(1, problem.batch * positions, problem.channels, 1, true)
                       : CutColumns(problem.batch, positions, problem.channels, width, false);
    plan.units_per_set = plan.columns.folded() ? plan.columns.tiles() : width;
    plan.unit_step = plan.columns.folded() ? problem.channels : 1;
    plan.columns = plan.columns.Split(SplitsOfColumns(plan.columns));
    plan.splits = plan.columns.splits;
    return plan;
  }
  if (per_channel) {
    plan.runs = {.units = problem.channels,
                 .count = problem.batch,
                 .length = positions,
                 .unit_stride = positions,
                 .run_stride = problem.channels * positions};
  } else if (by_plane && !row_sets) {
    plan.runs = {
        .units = problem.batch * problem.channels, .length = positions, .unit_stride = positions};
    plan.units_per_set = width;
  } else {
    plan.runs = {.units = problem.num_sets(),
                 .length = problem.set_size(),
                 .unit_stride = problem.set_size()};
  }
  plan.splits = SplitsOfRuns(plan.runs);
  return plan;
}

constexpr int64_t UnitChannels(const Plan& plan, const NormProblem& problem) {
  return problem.reduction == Reduction::kPerChannel ? 1 : plan.runs.length / problem.positions;
}

// Octets of each of so many tensors that a thread can hold, of elements of so many bytes.
constexpr int MostHeld(size_t element, int tensors) {
  constexpr int kRegisters = 32;  // of each tensor
  return std::min(8 / tensors, kRegisters * 4 / (static_cast<int>(element) * kOctet));
}

// `tensors`: how many a thread has to hold octets of.
constexpr Held HeldFor(const Plan& plan, const NormProblem& problem, int tensors) {
  // Most threads of a block, and threads that make use of a GPU.
  constexpr int64_t kMostThreads = 512, kFull = int64_t{64} << 10;
  if (plan.geometry != Geometry::kRuns || plan.units_per_set != 1) return {};
  const int most = MostHeld(SizeOf(problem.dtype), tensors);
  const int64_t slots = plan.runs.slots();
  if (slots > most * kMostThreads) return {};
  Held held{.runs = plan.runs, .unit_channels = UnitChannels(plan, problem)};
  // Few warps a set, since they wait for each other; more where there is little to do.
  held.octets = std::min(4, most);
  if (slots > held.octets * kMostThreads) held.octets = most;
  while (held.octets > 1 && slots <= held.octets / 2 * kMostThreads &&
         problem.num_sets() * WarpsFor(CeilDiv(slots, held.octets)) < kFull) {
    held.octets /= 2;
  }
  held.threads = static_cast<int>(WarpsFor(CeilDiv(slots, held.octets)));
  held.together = std::max(1, kThreads / held.threads);
  return held;
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_PLAN_H_
