// How a problem is cut for a GPU. From the problem alone, never from the device: the
// same bits on every GPU.
#ifndef NORMD_KERNELS_CUDA_PLAN_H_
#define NORMD_KERNELS_CUDA_PLAN_H_

#include <algorithm>
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
// Rows of a column that are summed in the computing type.
inline constexpr int kRowsInBlock = 32;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A power of two from 32 to kThreads, for so many things to do.
constexpr int ThreadsFor(int64_t things) {
  int threads = 32;
  while (threads < kThreads && threads < things) threads *= 2;
  return threads;
}

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
};

// A matrix whose columns are reduced, `samples` times one below the other. Unit
// sample * columns + column.
struct Columns {
  int64_t samples = 1;
  int64_t rows = 0;  // of each sample
  int64_t columns = 0;
  int width = 1;         // columns that a thread takes: 1 or kOctet
  int tile_threads = 1;  // threads of a block beside each other; a power of two

  constexpr int64_t tiles() const { return CeilDiv(columns, int64_t{width} * tile_threads); }
  constexpr int64_t units() const { return samples * columns; }
};

enum class Geometry : uint8_t { kRuns, kColumns };

// How the elements of a set, or of a channel in it, lie.
struct Plan {
  Geometry geometry = Geometry::kRuns;
  Runs runs;
  Columns columns;
  int64_t splits = 1;         // partial sums a unit; partial `s` of unit u is at s * units + u
  int64_t units_per_set = 1;  // neighbours

  constexpr int64_t units() const {
    return geometry == Geometry::kRuns ? runs.units : columns.units();
  }
};

constexpr bool ChannelsAreNeighbours(const NormProblem& problem) {
  return problem.format == MemoryFormat::kChannelsLast || problem.positions == 1;
}

constexpr Columns CutColumns(int64_t samples, int64_t rows, int64_t columns) {
  Columns cut{.samples = samples, .rows = rows, .columns = columns};
  cut.width = columns % kOctet == 0 ? kOctet : 1;
  const int64_t wanted = std::min<int64_t>(columns / cut.width, 32);
  while (cut.tile_threads < wanted) cut.tile_threads *= 2;
  return cut;
}

constexpr int64_t SplitsOfRuns(const Runs& runs) {
  // Four octets a thread or more.
  const int64_t most = CeilDiv(runs.slots(), int64_t{4} * kThreads);
  return std::clamp<int64_t>(kFullGrid / runs.units, 1, most);
}

constexpr int64_t SplitsOfColumns(const Columns& columns) {
  const int64_t tiles = columns.samples * columns.tiles();
  const int64_t rows_a_block = kThreads / columns.tile_threads;
  return std::clamp<int64_t>(kFullGrid / tiles, 1, CeilDiv(columns.rows, 4 * rows_a_block));
}

// Whether rows that are sets with a weight an element may stay on a device while their
// columns are summed (residence.h). A thread must meet the same columns in every row; rows of
// less than a warp leave too little to do at once; and longer ones no device can hold.
constexpr bool RowsMayStay(const Runs& rows) {
  return rows.length % kOctet == 0 && rows.slots() >= 32 && rows.slots() <= 2048;
}

// Parts of the rows, if they may: a column of a part is summed row by row. Of eight rows or
// more: a sum has as many bytes as two to eight elements.
constexpr int64_t SplitsOfRows(const Columns& columns) {
  const int64_t wanted = std::max<int64_t>(kFullGrid / columns.tiles(), 256);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, CeilDiv(columns.rows, 8));
  return CeilDiv(columns.rows, CeilDiv(columns.rows, splits));
}

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
    plan.columns = per_channel ? CutColumns(1, problem.batch * positions, problem.channels)
                               : CutColumns(problem.batch, positions, problem.channels);
    plan.units_per_set = width;
    plan.splits = SplitsOfColumns(plan.columns);
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

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_PLAN_H_
