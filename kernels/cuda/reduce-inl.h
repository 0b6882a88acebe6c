// The kernels that reduce: moments of x, and the sums of a backward pass, over runs
// and over columns (plan.h).
//
// A thread sums some tens of values, shifted, in the computing type; what they come to
// is merged in double, within the thread, over the block, and over the blocks of a unit
// (finish-inl.h), always in the same order.
#ifndef NORMD_KERNELS_CUDA_REDUCE_INL_H_
#define NORMD_KERNELS_CUDA_REDUCE_INL_H_

#include "kernels/cuda/elements-inl.h"
#include "kernels/cuda/plan.h"
#include "kernels/moments.h"
#include "kernels/set_constants.h"

namespace normd::cuda {

// What the elements of a set are normalized by, in the computing type:
//   forward   y = ((x - shift) * invstd + lost) * weight + bias
//   backward  dx = dy * invstd * weight + (x - shift) * slope + offset
template <class T>
struct SetCoefficients {
  T shift, invstd, lost, slope, offset;
};

template <class T>
NORMD_DEVICE SetCoefficients<T> ToCoefficients(const SetConstants& set) {
  return {static_cast<T>(set.shift), static_cast<T>(set.invstd),
          static_cast<T>(-set.residual * set.invstd), T{0}, T{0}};
}

NORMD_DEVICE void MergeInto(PartialMoments& total, const PartialMoments& other) {
  total.Merge(other);
}
NORMD_DEVICE void MergeInto(GradientSums& total, const GradientSums& other) {
  total.dy += other.dy;
  total.dy_d += other.dy_d;
}

// Of each `threads` neighbours of the block, all values of those whose number differs by
// a multiple of `stride`, merged pairwise in a fixed order. Both are powers of two, and
// the block is a multiple of `threads`. `shared` has room for a value a thread of it.
template <class V>
NORMD_DEVICE V MergeOver(int threads, int stride, const V& value, V* shared) {
  const int thread = static_cast<int>(threadIdx.x) % threads;
  V* const ours = shared + (static_cast<int>(threadIdx.x) - thread);
  ours[thread] = value;
  __syncthreads();
  for (int half = threads / 2; half >= stride; half /= 2) {
    if (thread < half) MergeInto(ours[thread], ours[thread + half]);
    __syncthreads();
  }
  const V merged = ours[thread % stride];
  __syncthreads();  // `shared` may be used again
  return merged;
}

template <class V>
NORMD_DEVICE V MergeOverBlock(const V& value, int stride, V* shared) {
  return MergeOver(static_cast<int>(blockDim.x), stride, value, shared);
}

// `count` values, which add(total, k) adds, by the block's first ThreadsFor(count)
// threads, in an order that depends on `count` alone; only for the first of them.
template <class V, class Add>
NORMD_DEVICE V MergeInOrder(int64_t count, V* shared, Add add) {
  const int threads = ThreadsFor(count);
  V total;
  if (static_cast<int>(threadIdx.x) < threads) {
    for (int64_t k = threadIdx.x; k < count; k += threads) add(total, k);
  }
  return MergeOver(threads, 1, total, shared);
}

// Whether rounding hides nothing that matters: sums are finite, the shift was not so far
// from the values that their squares are mostly its, and squares, where no eps hides it
// (`careful`), are not below what the computing type can hold.
template <class T>
NORMD_DEVICE bool IsSound(int count, T sum, T squares, bool careful) {
  const T n = static_cast<T>(count);
  return squares - squares == 0 && sum * (sum / n) <= squares * static_cast<T>(0.9375) &&
         !(careful && squares < static_cast<T>(1e-30) * n);
}

// From sums of d = x - shift and of d * d over `count` values.
template <class T>
NORMD_DEVICE PartialMoments FromShiftedSums(int count, T shift, T sum, T squares) {
  const double n = count;
  const double mean = static_cast<double>(sum) / n;
  const double m2 = static_cast<double>(squares) - static_cast<double>(sum) * mean;
  return {n, static_cast<double>(shift) + mean, m2 > 0 ? m2 : 0};
}

// The shift of what comes next: the mean so far.
template <class T>
NORMD_DEVICE T NextShift(const PartialMoments& moments) {
  const T shift = static_cast<T>(moments.mean);
  return shift - shift == 0 ? shift : T{0};
}

// A thread's way through the slots of a unit: octets first, first + step, ...
struct Walk {
  NORMD_DEVICE Walk(const Runs& runs, int64_t unit, int64_t first, int64_t past, int64_t step)
      : octets(runs.octets()),
        length(runs.length),
        run_stride(runs.run_stride),
        begin(unit * runs.unit_stride),
        slot(first),
        last(past),
        by(step) {
    run = Divide(first, octets, octet);
    by_runs = Divide(step, octets, by_octets);
  }

  NORMD_DEVICE bool More() const { return slot < last; }
  NORMD_DEVICE void Next() {
    slot += by;
    run += by_runs;
    octet += by_octets;
    if (octet >= octets) {
      octet -= octets;
      ++run;
    }
  }

  // Elements i + low .. i + high - 1 are the unit's; none where low >= high.
  struct Place {
    int64_t i;
    int low, high;
  };
  NORMD_DEVICE Place Here() const {
    const int64_t from = begin + run * run_stride;
    const int64_t i = from / kOctet * kOctet + octet * kOctet;
    const int64_t ahead = from - i;
    const int64_t left = from + length - i;
    return {i, ahead > 0 ? static_cast<int>(ahead) : 0,
            left < kOctet ? (left > 0 ? static_cast<int>(left) : 0) : kOctet};
  }

  int64_t octets, length, run_stride, begin, slot, last, by, run, octet, by_runs, by_octets;
};

// Slots that are summed before they are merged in double.
constexpr int kSlotsInBlock = 8;

// The moments of a thread's slots. Octets come from load(walk, place), which is called
// again for those whose sums are not sound.
template <class E, class Load>
NORMD_DEVICE PartialMoments MomentsOfSlots(Walk walk, bool careful, Load load) {
  using T = typename E::Compute;
  PartialMoments total;
  T shift = 0;
  bool first = true;
  while (walk.More()) {
    const Walk begin = walk;
    T sum = 0, squares = 0;
    int count = 0;
#pragma unroll 2
    for (int k = 0; k < kSlotsInBlock && walk.More(); ++k, walk.Next()) {
      const Walk::Place at = walk.Here();
      if (at.low >= at.high) continue;
      const Octet<E> x = load(walk, at);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        if (first && j == at.low) {
          shift = x[j];
          first = false;
        }
        const bool ours = j >= at.low && j < at.high;
        const T d = ours ? x[j] - shift : T{0};
        sum += d;
        squares = MultiplyAdd(d, d, squares);
      }
      count += at.high - at.low;
    }
    if (count == 0) continue;
    if (IsSound(count, sum, squares, careful)) {
      total.Merge(FromShiftedSums(count, shift, sum, squares));
    } else {
      // Once more in double, around their own mean.
      PartialMoments exact{static_cast<double>(count), 0, 0};
      for (int pass = 0; pass < 2; ++pass) {
        Walk again = begin;
        for (int k = 0; k < kSlotsInBlock && again.More(); ++k, again.Next()) {
          const Walk::Place at = again.Here();
          if (at.low >= at.high) continue;
          const Octet<E> x = load(again, at);
          for (int j = at.low; j < at.high; ++j) {
            const double value = static_cast<double>(x[j]);
            const double d = value - exact.mean;
            if (pass == 0) {
              exact.m2 += value;
            } else {
              exact.m2 += d * d;
            }
          }
        }
        if (pass == 0) {
          exact.mean = exact.m2 / exact.count;
          exact.m2 = 0;
        }
      }
      total.Merge(exact);
    }
    shift = NextShift<T>(total);
  }
  return total;
}

// Block (unit, split). Shared: PartialMoments a thread.
template <class E>
NORMD_KERNEL void MomentsOfRuns(const void* x, int64_t size, Runs runs, int64_t splits,
                                bool careful, PartialMoments* partials) {
  NORMD_SHARED(shared);
  const int64_t unit = blockIdx.x;
  const int64_t part = CeilDiv(runs.slots(), splits);
  const int64_t first = blockIdx.y * part;
  const int64_t last = first + part < runs.slots() ? first + part : runs.slots();
  const Walk walk(runs, unit, first + threadIdx.x, last, blockDim.x);
  PartialMoments moments =
      MomentsOfSlots<E>(walk, careful, [&](const Walk&, const Walk::Place& at) {
        return LoadOctet<E>(x, size, at.i, at.low, at.high);
      });
  moments = MergeOverBlock(moments, 1, reinterpret_cast<PartialMoments*>(shared));
  if (threadIdx.x == 0) partials[blockIdx.y * runs.units + unit] = moments;
}

// Where a block and a thread of it are in the columns.
struct ColumnPlace {
  NORMD_DEVICE ColumnPlace(const Columns& cut, int64_t splits, int64_t block) {
    const int64_t tile = block % cut.tiles();
    split = block / cut.tiles() % splits;
    sample = block / cut.tiles() / splits;
    const int threads_across = cut.tile_threads;
    column = (tile * threads_across + threadIdx.x % threads_across) * cut.width;
    step = blockDim.x / threads_across;
    const int64_t part = CeilDiv(cut.rows, splits);
    row = split * part + threadIdx.x / threads_across;
    last = (split + 1) * part < cut.rows ? (split + 1) * part : cut.rows;
    if (column >= cut.columns) last = row;  // nothing to do, but to wait with the others
    is_first = threadIdx.x / threads_across == 0;
  }

  int64_t sample, split, column, row, last, step;
  bool is_first;  // of the threads that share its columns
};

// Columns c .. c + kWidth - 1 of a row: element (row * columns + c).
template <class E, int kWidth>
struct Cells {
  using T = typename E::Compute;

  NORMD_DEVICE Cells(const void* data, int64_t size, int64_t i) {
    if constexpr (kWidth == kOctet) {
      const Octet<E> octet = LoadOctet<E>(data, size, i, 0, kOctet);
#pragma unroll
      for (int w = 0; w < kWidth; ++w) value[w] = octet[w];
    } else {
      value[0] = E::Load(static_cast<const typename E::Storage*>(data)[i]);
    }
  }

  T value[kWidth];
};

// Block (tile, split, sample). Shared: PartialMoments a thread.
template <class E, int kWidth>
NORMD_KERNEL void MomentsOfColumns(const void* x, int64_t size, Columns cut, int64_t splits,
                                   bool careful, PartialMoments* partials) {
  using T = typename E::Compute;
  NORMD_SHARED(shared);
  ColumnPlace at(cut, splits, blockIdx.x);
  PartialMoments total[kWidth];
  T shift[kWidth] = {};
  bool first = true;
  while (at.row < at.last) {
    const int64_t begin = at.row;
    T sum[kWidth] = {};
    T squares[kWidth] = {};
    int count = 0;
#pragma unroll 4
    for (; count < kRowsInBlock && at.row < at.last; ++count, at.row += at.step) {
      const int64_t i = (at.sample * cut.rows + at.row) * cut.columns + at.column;
      const Cells<E, kWidth> cells(x, size, i);
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        if (first) shift[w] = cells.value[w];
        const T d = cells.value[w] - shift[w];
        sum[w] += d;
        squares[w] = MultiplyAdd(d, d, squares[w]);
      }
      first = false;
    }
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      if (IsSound(count, sum[w], squares[w], careful)) {
        total[w].Merge(FromShiftedSums(count, shift[w], sum[w], squares[w]));
      } else {
        const auto* column = static_cast<const typename E::Storage*>(x) + at.column + w +
                             at.sample * cut.rows * cut.columns;
        PartialMoments exact{static_cast<double>(count), 0, 0};
        for (int64_t row = begin; row < at.row; row += at.step) {
          exact.mean += static_cast<double>(E::Load(column[row * cut.columns]));
        }
        exact.mean /= exact.count;
        for (int64_t row = begin; row < at.row; row += at.step) {
          const double d = static_cast<double>(E::Load(column[row * cut.columns])) - exact.mean;
          exact.m2 += d * d;
        }
        total[w].Merge(exact);
      }
      shift[w] = NextShift<T>(total[w]);
    }
  }
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    const PartialMoments merged =
        MergeOverBlock(total[w], cut.tile_threads, reinterpret_cast<PartialMoments*>(shared));
    if (at.is_first && at.column + w < cut.columns) {
      partials[at.split * cut.units() + at.sample * cut.columns + at.column + w] = merged;
    }
  }
}

// What the sums of a backward pass read. dy is what the mask, if any, lets through.
template <class E>
struct GradientTensors {
  const void* x;
  const void* grad_y;
  const uint8_t* relu_mask;
  int64_t size;

  // dy and x of an octet.
  struct Pair {
    Octet<E> x, dy;
    uint32_t bits;
    NORMD_DEVICE typename E::Compute Dy(int k) const {
      return (bits >> k & 1) != 0 ? dy[k] : typename E::Compute{0};
    }
  };
  NORMD_DEVICE Pair Load(int64_t i, int low, int high) const {
    return {LoadOctet<E>(x, size, i, low, high), LoadOctet<E>(grad_y, size, i, low, high),
            relu_mask == nullptr ? 0xffu : relu_mask[i / kOctet]};
  }
};

// The sums of a thread's slots in unit `unit`. Pairs come from load(walk, place).
// `weight`: each element's dy counts by the weight of its channel; then the units are the
// sets, which are rows.
template <class E, class Load>
NORMD_DEVICE GradientSums SumsOfSlots(Walk walk, int64_t unit, typename E::Compute shift,
                                      const typename E::Compute* weight, int64_t groups,
                                      Load load) {
  using T = typename E::Compute;
  // Weight of element i: weight[i - weights_before].
  const int64_t weights_before =
      weight == nullptr ? 0 : unit * walk.length - unit % groups * walk.length;
  GradientSums total;
  while (walk.More()) {
    T dy = 0, dy_d = 0;
#pragma unroll 2
    for (int k = 0; k < kSlotsInBlock && walk.More(); ++k, walk.Next()) {
      const Walk::Place at = walk.Here();
      if (at.low >= at.high) continue;
      const auto pair = load(walk, at);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        if (j < at.low || j >= at.high) continue;
        T g = pair.Dy(j);
        if (weight != nullptr) g *= weight[at.i + j - weights_before];
        dy += g;
        dy_d = MultiplyAdd(g, pair.x[j] - shift, dy_d);
      }
    }
    total.dy += static_cast<double>(dy);
    total.dy_d += static_cast<double>(dy_d);
  }
  return total;
}

// Block (unit, split). Shared: GradientSums a thread.
template <class E>
NORMD_KERNEL void SumsOfRuns(GradientTensors<E> tensors, Runs runs, int64_t splits,
                             int64_t units_per_set,
                             const SetCoefficients<typename E::Compute>* sets,
                             const typename E::Compute* weight, int64_t groups,
                             GradientSums* partials) {
  NORMD_SHARED(shared);
  const int64_t unit = blockIdx.x;
  const int64_t part = CeilDiv(runs.slots(), splits);
  const int64_t first = blockIdx.y * part;
  const int64_t last = first + part < runs.slots() ? first + part : runs.slots();
  const Walk walk(runs, unit, first + threadIdx.x, last, blockDim.x);
  GradientSums total = SumsOfSlots<E>(
      walk, unit, sets[unit / units_per_set].shift, weight, groups,
      [&](const Walk&, const Walk::Place& at) { return tensors.Load(at.i, at.low, at.high); });
  total = MergeOverBlock(total, 1, reinterpret_cast<GradientSums*>(shared));
  if (threadIdx.x == 0) partials[blockIdx.y * runs.units + unit] = total;
}

// Block (tile, split, sample). Shared: GradientSums a thread. `row_width`: 0, or the
// channels of a set, when each row has sets of its own; then dy_d is of dy * x^.
template <class E, int kWidth>
NORMD_KERNEL void SumsOfColumns(GradientTensors<E> tensors, Columns cut, int64_t splits,
                                int64_t units_per_set, int64_t row_width,
                                const SetCoefficients<typename E::Compute>* sets,
                                GradientSums* partials) {
  using T = typename E::Compute;
  NORMD_SHARED(shared);
  ColumnPlace at(cut, splits, blockIdx.x);
  T shift[kWidth] = {};
  if (row_width == 0 && at.row < at.last) {
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      shift[w] = sets[(at.sample * cut.columns + at.column + w) / units_per_set].shift;
    }
  }
  GradientSums total[kWidth];
  while (at.row < at.last) {
    T dy[kWidth] = {};
    T dy_d[kWidth] = {};
#pragma unroll 4
    for (int k = 0; k < kRowsInBlock && at.row < at.last; ++k, at.row += at.step) {
      const int64_t row = at.sample * cut.rows + at.row;
      const int64_t i = row * cut.columns + at.column;
      const Cells<E, kWidth> x(tensors.x, tensors.size, i);
      const Cells<E, kWidth> g(tensors.grad_y, tensors.size, i);
      const uint32_t bits =
          tensors.relu_mask == nullptr
              ? 0xffu
              : static_cast<uint32_t>(tensors.relu_mask[i / kOctet]) >> i % kOctet;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        const T passed = (bits >> w & 1) != 0 ? g.value[w] : T{0};
        T d;
        if (row_width == 0) {
          d = x.value[w] - shift[w];
        } else {
          const auto& set = sets[row * (cut.columns / row_width) + (at.column + w) / row_width];
          d = MultiplyAdd(x.value[w] - set.shift, set.invstd, set.lost);
        }
        dy[w] += passed;
        dy_d[w] = MultiplyAdd(passed, d, dy_d[w]);
      }
    }
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      total[w].dy += static_cast<double>(dy[w]);
      total[w].dy_d += static_cast<double>(dy_d[w]);
    }
  }
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    const GradientSums merged =
        MergeOverBlock(total[w], cut.tile_threads, reinterpret_cast<GradientSums*>(shared));
    if (at.is_first && at.column + w < cut.columns) {
      partials[at.split * cut.units() + at.sample * cut.columns + at.column + w] = merged;
    }
  }
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_REDUCE_INL_H_
