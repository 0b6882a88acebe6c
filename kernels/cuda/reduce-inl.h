// The kernels that reduce: moments of x, and the sums of a backward pass, over runs
// and over columns (plan.h).
//
// A thread sums some tens of values in the computing type, shifted by one of them. What they
// come to it adds up in double, around a shift that all threads of the block share, so that
// threads and warps are merged by additions alone, always in the same order. That shift is one
// of the values too: their squares around it are then at most 1 + count times those around the
// mean, of which double has enough.
#ifndef NORMD_KERNELS_CUDA_REDUCE_INL_H_
#define NORMD_KERNELS_CUDA_REDUCE_INL_H_

#include <algorithm>

#include "kernels/cuda/elements-inl.h"
#include "kernels/cuda/plan.h"
#include "kernels/moments.h"
#include "kernels/set_constants.h"

namespace normd::cuda {

// What the elements of a set are normalized by, in the computing type:
//   forward   y = ((x - shift) * invstd + offset) * weight + bias
//   backward  dx = dy * invstd * weight + (x - shift) * slope + offset
// and before the sums of backward are known as in forward.
template <class T>
struct alignas(16) SetCoefficients {
  T shift, invstd, slope, offset;
};

template <class T>
NORMD_DEVICE SetCoefficients<T> ToCoefficients(const SetConstants& set) {
  return {static_cast<T>(set.shift), static_cast<T>(set.invstd), T{0},
          static_cast<T>(-set.residual * set.invstd)};
}

// Sums of d = x - shift and of d * d.
struct ShiftedSums {
  double sum = 0;
  double squares = 0;
};

NORMD_DEVICE void MergeInto(ShiftedSums& total, const ShiftedSums& other) {
  total.sum += other.sum;
  total.squares += other.squares;
}
NORMD_DEVICE void MergeInto(GradientSums& total, const GradientSums& other) {
  total.dy += other.dy;
  total.dy_d += other.dy_d;
}

constexpr int kWarp = 32;

// Of each warp's lanes those whose number differs by a multiple of `stride`, merged pairwise.
template <class V>
NORMD_DEVICE void MergeLanes(int stride, V& value) {
  for (int lanes = kWarp / 2; lanes >= stride; lanes /= 2) {
    MergeInto(value, FromOtherLane(value, lanes));
  }
}

// Of each `threads` neighbours of the block, all values of those whose number differs by a
// multiple of `stride`, merged in a fixed order. `threads` is a multiple of a warp, and stride
// a power of two up to a warp. `shared` has room for a value a thread of the block.
// `kAnew`: whether nobody reads `shared` any more.
template <bool kAnew = false, class V>
NORMD_DEVICE V MergeOver(int threads, int stride, V value, V* shared) {
  MergeLanes(stride, value);
  if (threads == kWarp) return value;
  const int thread = static_cast<int>(threadIdx.x);
  const int warps = threads / kWarp;
  if (!kAnew) __syncthreads();
  if (thread % kWarp < stride) shared[thread / kWarp * stride + thread % kWarp] = value;
  __syncthreads();
  const V* const ours = shared + thread / threads * warps * stride + thread % stride;
  V merged = ours[0];
  for (int warp = 1; warp < warps; ++warp) MergeInto(merged, ours[warp * stride]);
  return merged;
}

template <class V>
NORMD_DEVICE V MergeOverBlock(const V& value, int stride, V* shared) {
  return MergeOver(static_cast<int>(blockDim.x), stride, value, shared);
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

// From sums around `own`, of `count` values, to those around `shift`.
template <class T>
NORMD_DEVICE ShiftedSums AroundShift(double shift, int count, T own, T sum, T squares) {
  const double delta = static_cast<double>(own) - shift;
  const double s = static_cast<double>(sum);
  const double moved = count * delta;
  return {s + moved, MultiplyAdd(delta, 2 * s + moved, static_cast<double>(squares))};
}

// The moments of `count` values from their sums around `shift`. With Inf or NaN the mean is
// what a sum would have given.
NORMD_DEVICE PartialMoments FromShiftedSums(double count, double shift, const ShiftedSums& sums) {
  if (count == 0) return {};
  const double mean = sums.sum / count;
  const double m2 = MultiplyAdd(-sums.sum, mean, sums.squares);
  return {count, shift + mean, m2 < 0 ? 0 : m2};
}

// A value to shift by.
template <class T>
NORMD_DEVICE T AsShift(T value) {
  return value - value == 0 ? value : T{0};
}

// A thread's way through the slots of a unit: slots first, first + step, ...
struct Walk {
  NORMD_DEVICE Walk(const Runs& runs, int64_t unit, int64_t first, int64_t step)
      : octets(runs.octets()),
        length(runs.length),
        run_stride(runs.run_stride),
        begin(unit * runs.unit_stride) {
    run = Divide(first, octets, octet);
    by_runs = Divide(step, octets, by_octets);
  }

  NORMD_DEVICE void Next() {
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
    NORMD_DEVICE bool empty() const { return low >= high; }
    NORMD_DEVICE bool full() const { return low == 0 && high == kOctet; }
  };
  NORMD_DEVICE Place Here() const;

  int64_t octets, length, run_stride, begin, run, octet, by_runs, by_octets;
};

// The octet `octet` of a run of `length` elements that begins at element `from`.
NORMD_DEVICE Walk::Place PlaceIn(int64_t length, int64_t from, int64_t octet) {
  const int64_t i = from / kOctet * kOctet + octet * kOctet;
  const int64_t ahead = from - i;
  const int64_t left = from + length - i;
  return {i, ahead > 0 ? static_cast<int>(ahead) : 0,
          left < kOctet ? (left > 0 ? static_cast<int>(left) : 0) : kOctet};
}
NORMD_DEVICE Walk::Place Walk::Here() const {
  return PlaceIn(length, begin + run * run_stride, octet);
}

// Slot `slot` of unit `unit`.
NORMD_DEVICE Walk::Place PlaceAt(const Runs& runs, int64_t unit, int64_t slot) {
  int64_t octet;
  const int64_t run = Divide(slot, runs.octets(), octet);
  return PlaceIn(runs.length, unit * runs.unit_stride + run * runs.run_stride, octet);
}

// An element of unit `unit`, where its slot `slot` lies or next to it.
NORMD_DEVICE int64_t ElementAt(const Runs& runs, int64_t unit, int64_t slot) {
  int64_t octet;
  const int64_t run = Divide(slot, runs.octets(), octet);
  const int64_t from = unit * runs.unit_stride + run * runs.run_stride;
  const int64_t i = from / kOctet * kOctet + octet * kOctet;
  const int64_t last = from + runs.length - 1;
  return i < from ? from : (i > last ? last : i);
}

// Elements of unit `unit` in the slots before `slot`.
NORMD_DEVICE int64_t ElementsBefore(const Runs& runs, int64_t unit, int64_t slot) {
  int64_t octet;
  const int64_t run = Divide(slot, runs.octets(), octet);
  if (run >= runs.count) return runs.count * runs.length;
  const int64_t from = unit * runs.unit_stride + run * runs.run_stride;
  const int64_t in_run = octet * kOctet - (octet == 0 ? 0 : from % kOctet);
  return run * runs.length + (in_run < runs.length ? in_run : runs.length);
}

// Octets that a thread loads before it uses the first, of each of so many tensors.
template <class E>
constexpr int BatchFor(int tensors) {
  const int most = static_cast<int>(128 / sizeof(Octet<E>)) / tensors;
  return most > 4 ? 4 : (most < 1 ? 1 : most);
}

// Slots that are summed before they are merged in double.
constexpr int kSlotsInBlock = 8;

// Element `low` of an octet, without an address.
template <class E>
NORMD_DEVICE typename E::Compute ElementOf(const Octet<E>& octet, int low) {
  typename E::Compute value = octet[0];
#pragma unroll
  for (int j = 1; j < kOctet; ++j) {
    if (j == low) value = octet[j];
  }
  return value;
}

// Sums in the computing type, around the first value that is added.
template <class E>
struct SlotSums {
  using T = typename E::Compute;

  NORMD_DEVICE void Add(const Octet<E>& x, const Walk::Place& at) {
    if (at.empty()) return;
    if (count == 0) own = ElementOf(x, at.low);
    if (at.full()) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) AddOne(x[j] - own);
    } else {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) AddOne(j >= at.low && j < at.high ? x[j] - own : T{0});
    }
    count += at.high - at.low;
  }
  NORMD_DEVICE void AddOne(T d) {
    sum += d;
    squares = MultiplyAdd(d, d, squares);
  }
  NORMD_DEVICE bool IsSound(bool careful) const {
    return count == 0 || cuda::IsSound(count, sum, squares, careful);
  }

  T own = 0, sum = 0, squares = 0;
  int count = 0;
};

template <class E>
NORMD_DEVICE void AddInDouble(ShiftedSums& total, double shift, const Octet<E>& x,
                              const Walk::Place& at) {
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    if (j < at.low || j >= at.high) continue;
    const double d = static_cast<double>(x[j]) - shift;
    total.sum += d;
    total.squares = MultiplyAdd(d, d, total.squares);
  }
}

// Calls use(k, values) for k = 0 to count - 1, of which values are what load(k) answers: the
// next kBatch of these are on their way while the last are used.
template <int kBatch, class Load, class Use>
NORMD_DEVICE void ForEachFetched(int count, Load load, Use use) {
  decltype(load(0)) next[kBatch];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    if (b < count) next[b] = load(b);
  }
  for (int k = 0; k < count; k += kBatch) {
    decltype(load(0)) values[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) values[b] = next[b];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (k + kBatch + b < count) next[b] = load(k + kBatch + b);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (k + b < count) use(k + b, values[b]);
    }
  }
}

// A part of a unit: slots first to last - 1, which neighbouring threads reduce.
struct Part {
  NORMD_DEVICE Part(const Runs& of, int64_t of_unit, int64_t number, int64_t slots)
      : runs(of), unit(of_unit), first(number * slots), last(first + slots) {
    if (last > runs.slots()) last = runs.slots();
    if (first > last) first = last;
  }
  NORMD_DEVICE Walk WalkOf(int64_t thread, int64_t threads) const {
    return {runs, unit, first + thread, threads};
  }
  // Slots of a thread.
  NORMD_DEVICE int SlotsOf(int64_t thread, int64_t threads) const {
    int64_t rest;
    const int64_t left = last - first - thread;
    return left <= 0 ? 0 : static_cast<int>(Divide(left - 1, threads, rest) + 1);
  }
  template <class E>
  NORMD_DEVICE typename E::Compute ShiftOf(const void* x) const {
    using T = typename E::Compute;
    if (first == last) return T{0};
    return AsShift<T>(LoadOne<E>(x, ElementAt(runs, unit, first)));
  }
  NORMD_DEVICE double count() const {
    return static_cast<double>(ElementsBefore(runs, unit, last) -
                               ElementsBefore(runs, unit, first));
  }

  const Runs& runs;
  int64_t unit, first, last;
};

// A place that is known to be all of its octet.
template <bool kWhole>
NORMD_DEVICE Walk::Place WholeIf(const Walk::Place& at) {
  return kWhole ? Walk::Place{at.i, 0, kOctet} : at;
}

// Calls use(k, value, place, last) for this thread's slots, of which value is what load(i)
// answers for the octet at i, and nothing in particular where the place is empty; several are
// loaded before the first is used, as in ForEachFetched(). `last`: of kSlotsInBlock, or of all.
// `kWhole`: all runs are of whole octets.
template <int kBatch, bool kWhole, class Load, class Use>
NORMD_DEVICE void ForEachSlot(const Part& part, Load load, Use use) {
  struct Slot {
    decltype(load(0)) value;
    Walk::Place at;
  };
  Walk walk = part.WalkOf(threadIdx.x, blockDim.x);
  const int slots = part.SlotsOf(threadIdx.x, blockDim.x);
  ForEachFetched<kBatch>(
      slots,
      [&](int) {
        Slot slot;
        slot.at = WholeIf<kWhole>(walk.Here());
        walk.Next();
        if (!slot.at.empty()) slot.value = load(slot.at.i);
        return slot;
      },
      [&](int k, const Slot& slot) {
        use(k, slot.value, WholeIf<kWhole>(slot.at),
            k % kSlotsInBlock == kSlotsInBlock - 1 || k == slots - 1);
      });
}

// The sums of this thread's slots of x around `shift`. Those whose sums are not sound are
// loaded and summed again, in double. `kWhole`: all runs are of whole octets.
template <class E, bool kWhole>
NORMD_DEVICE ShiftedSums SumsAround(const void* x, typename E::Compute shift, const Part& part,
                                    bool careful) {
  ShiftedSums total;
  SlotSums<E> sums;
  ForEachSlot<BatchFor<E>(2), kWhole>(
      part, [&](int64_t i) { return LoadOctet<E>(x, i); },
      [&](int k, const Octet<E>& octet, const Walk::Place& place, bool last) {
        sums.Add(octet, place);
        if (!last) return;
        if (sums.IsSound(careful)) {
          MergeInto(total, AroundShift(shift, sums.count, sums.own, sums.sum, sums.squares));
        } else {
          for (int again = k / kSlotsInBlock * kSlotsInBlock; again <= k; ++again) {
            const Walk::Place at =
                PlaceAt(part.runs, part.unit,
                        part.first + threadIdx.x + static_cast<int64_t>(again) * blockDim.x);
            if (!at.empty()) AddInDouble<E>(total, shift, LoadOctet<E>(x, at.i), at);
          }
        }
        sums = {};
      });
  return total;
}

// Block (unit, split). Shared: ShiftedSums a thread.
template <class E, bool kWhole>
NORMD_KERNEL void MomentsOfRuns(const void* x, Runs runs, int64_t splits, bool careful,
                                PartialMoments* partials) {
  NORMD_SHARED(shared);
  AwaitKernelBefore();
  const Part part(runs, blockIdx.x, blockIdx.y, CeilDiv(runs.slots(), splits));
  const auto shift = part.template ShiftOf<E>(x);
  const ShiftedSums sums = MergeOverBlock(SumsAround<E, kWhole>(x, shift, part, careful), 1,
                                          reinterpret_cast<ShiftedSums*>(shared));
  if (threadIdx.x == 0) {
    partials[part.unit * splits + blockIdx.y] =
        FromShiftedSums(part.count(), static_cast<double>(shift), sums);
  }
}

// Where a block and a thread of it are in the columns.
struct ColumnPlace {
  NORMD_DEVICE ColumnPlace(const Columns& cut, uint32_t block) {
    const auto tiles = static_cast<uint32_t>(cut.tiles());
    const uint32_t tile = block % tiles;
    const auto splits = static_cast<uint32_t>(cut.splits);
    split = block / tiles % splits;
    sample = block / tiles / splits;
    const auto lane = static_cast<int>(threadIdx.x) & (cut.tile_threads - 1);
    const auto down = static_cast<int>(threadIdx.x) >> cut.tile_shift;
    step = static_cast<int>(blockDim.x) >> cut.tile_shift;
    tile_column = static_cast<int64_t>(tile) * cut.tile_threads * cut.width;
    column = tile_column + lane * cut.width;
    first = split * cut.part;
    last = first + cut.part < cut.rows ? first + cut.part : cut.rows;
    // Nothing to do, but to wait with the others.
    const bool idle = column >= cut.columns || first + down >= last;
    rows = idle ? 0 : static_cast<int>((static_cast<uint32_t>(last - first) - down - 1) / step + 1);
    element = (sample * cut.rows + first + down) * cut.columns + column;
    stride = step * cut.columns;
  }

  // The tile's first column of the same channel as `column`, and how many there are.
  NORMD_DEVICE int64_t FirstOfChannel(const Columns& cut, int64_t of) const {
    return cut.folded() ? tile_column + (of - tile_column) % cut.channels : of;
  }
  NORMD_DEVICE int64_t ColumnsOfChannel(const Columns& cut, int64_t of) const {
    if (!cut.folded()) return 1;
    const int64_t past = tile_column + cut.tile_threads * cut.width;
    const int64_t in_tile = (past < cut.columns ? past : cut.columns) - tile_column;
    return CeilDiv(in_tile - (of - tile_column) % cut.channels, cut.channels);
  }
  // In the block's first row.
  NORMD_DEVICE int64_t FirstElement(const Columns& cut, int64_t of) const {
    return (sample * cut.rows + first) * cut.columns + of;
  }
  NORMD_DEVICE int64_t RowAt(const Columns& cut, int row) const {
    return sample * cut.rows + first + (static_cast<int>(threadIdx.x) >> cut.tile_shift) +
           static_cast<int64_t>(row) * step;
  }

  int64_t sample, split;
  int64_t tile_column, column;  // of the block, and of the thread
  int64_t first, last;          // rows of the block
  int rows;                     // of the thread: the k-th is at element + k * stride
  int step;                     // rows from one to the next
  int64_t element, stride;
};

// Columns c .. c + kWidth - 1 of a row: element row * columns + c and on.
template <class E, int kWidth>
struct Cells {
  using T = typename E::Compute;

  NORMD_DEVICE T operator[](int w) const {
    if constexpr (kWidth == kOctet) {
      return octet[w];
    } else {
      return octet[0];
    }
  }
  static NORMD_DEVICE Cells Load(const void* data, int64_t i) {
    Cells cells;
    if constexpr (kWidth == kOctet) {
      cells.octet = LoadOctet<E>(data, i);
    } else {
      cells.octet.SetBits(0, static_cast<const typename E::Bits*>(data)[i]);
    }
    return cells;
  }

  Octet<E> octet;
};

// Merges values[w] of the threads that have the same columns, and of a tile's columns of the
// same channel where rows are taken together, and calls write(unit, first column, value) in one
// thread for each unit. `shared` has room for kWidth values a thread.
template <int kWidth, class V, class Write>
NORMD_DEVICE void MergeColumns(const Columns& cut, const ColumnPlace& at, V (&values)[kWidth],
                               V* shared, Write write) {
  const int across = cut.tile_threads;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int warps = threads / kWarp;
  const int columns = across * kWidth;
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    MergeLanes(across, values[w]);
    if (thread % kWarp < across) {
      shared[thread / kWarp * columns + w * across + thread % kWarp] = values[w];
    }
  }
  __syncthreads();
  const auto of_column = [&](int k) -> V& { return shared[k % kWidth * across + k / kWidth]; };
  for (int k = thread; k < columns && at.tile_column + k < cut.columns; k += threads) {
    V& merged = of_column(k);
    for (int warp = 1; warp < warps; ++warp) MergeInto(merged, (&merged)[warp * columns]);
    if (!cut.folded())
      write(at.sample * cut.channels + at.tile_column + k, at.tile_column + k, merged);
  }
  if (!cut.folded()) return;
  __syncthreads();
  for (int64_t k = thread; k < columns && k < cut.channels; k += threads) {
    V merged = of_column(static_cast<int>(k));
    for (int64_t other = k + cut.channels; other < columns && at.tile_column + other < cut.columns;
         other += cut.channels) {
      MergeInto(merged, of_column(static_cast<int>(other)));
    }
    const int64_t column = at.tile_column + k;
    write(at.tile_column / columns * cut.channels + cut.Channel(column), column, merged);
  }
}

// Block (tile, split, sample). Shared: kWidth ShiftedSums a thread. What is merged is shifted by
// the block's first row of the channel; a thread sums around its own first row.
template <class E, int kWidth>
NORMD_KERNEL_OF(256, sizeof(typename E::Bits) < 8 ? 3 : 2)
void MomentsOfColumns(const void* x, Columns cut, bool careful, PartialMoments* partials) {
  using T = typename E::Compute;
  using Values = Cells<E, kWidth>;
  NORMD_SHARED(shared);
  AwaitKernelBefore();
  const ColumnPlace at(cut, blockIdx.x);
  T own[kWidth] = {};
  T sum[kWidth] = {};
  T squares[kWidth] = {};
  ForEachFetched<BatchFor<E>(2)>(
      at.rows, [&](int row) { return Values::Load(x, at.element + row * at.stride); },
      [&](int row, const Values& values) {
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          if (row == 0) own[w] = values[w];
          const T d = values[w] - own[w];
          sum[w] += d;
          squares[w] = MultiplyAdd(d, d, squares[w]);
        }
      });
  const auto shift_of = [&](int64_t column) {
    return static_cast<double>(
        AsShift(LoadOne<E>(x, at.FirstElement(cut, at.FirstOfChannel(cut, column)))));
  };
  ShiftedSums total[kWidth];
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    if (at.rows == 0) continue;
    const double shift = shift_of(at.column + w);
    if (IsSound(at.rows, sum[w], squares[w], careful)) {
      total[w] = AroundShift(shift, at.rows, own[w], sum[w], squares[w]);
      continue;
    }
    for (int row = 0; row < at.rows; ++row) {
      const double d = static_cast<double>(LoadOne<E>(x, at.element + row * at.stride + w)) - shift;
      total[w].sum += d;
      total[w].squares = MultiplyAdd(d, d, total[w].squares);
    }
  }
  MergeColumns(cut, at, total, reinterpret_cast<ShiftedSums*>(shared),
               [&](int64_t unit, int64_t column, const ShiftedSums& sums) {
                 partials[at.split * cut.units() + unit] = FromShiftedSums(
                     static_cast<double>((at.last - at.first) * at.ColumnsOfChannel(cut, column)),
                     shift_of(column), sums);
               });
}

// What the sums of a backward pass read. dy is what the mask, if any, lets through.
template <class E>
struct GradientTensors {
  const void* x;
  const void* grad_y;
  const uint8_t* relu_mask;

  // dy and x of an octet.
  struct Pair {
    Octet<E> x, dy;
    uint32_t bits;
    NORMD_DEVICE typename E::Compute Dy(int k) const {
      return (bits >> k & 1) != 0 ? dy[k] : typename E::Compute{0};
    }
  };
  NORMD_DEVICE Pair Load(int64_t i) const {
    return {LoadOctet<E>(x, i), LoadOctet<E>(grad_y, i),
            relu_mask == nullptr ? 0xffu : relu_mask[i / kOctet]};
  }
};

// Parameters of eight neighbours.
template <class T>
struct Eight {
  T value[kOctet];

  NORMD_DEVICE T operator[](int k) const { return value[k]; }
};

// values[first + k] for k from `low` to `high` - 1; `otherwise` for all where null.
template <class T>
NORMD_DEVICE Eight<T> LoadEight(const T* values, int64_t first, int low, int high, T otherwise) {
  Eight<T> eight;
  if (values == nullptr) {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) eight.value[k] = otherwise;
  } else if (low == 0 && high == kOctet && IsAligned(values + first)) {
    constexpr int kQuads = sizeof(Eight<T>) / sizeof(Quad);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      reinterpret_cast<Quad*>(&eight)[q] = reinterpret_cast<const Quad*>(values + first)[q];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      eight.value[k] = k >= low && k < high ? values[first + k] : otherwise;
    }
  }
  return eight;
}

// Sums of dy * weight and of dy * weight * (x - shift) in the computing type.
template <class E>
struct PairSums {
  using T = typename E::Compute;

  // `weight` of the elements, or null for 1.
  NORMD_DEVICE void Add(const typename GradientTensors<E>::Pair& pair, const Walk::Place& at,
                        T shift, const Eight<T>* weight) {
    if (at.empty()) return;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < at.low || j >= at.high) continue;
      T g = pair.Dy(j);
      if (weight != nullptr) g *= (*weight)[j];
      dy += g;
      dy_d = MultiplyAdd(g, pair.x[j] - shift, dy_d);
    }
  }

  T dy = 0, dy_d = 0;
};

// The sums of this thread's slots. `weight`: each element's dy counts by the weight of its
// channel; then the units are the sets, which are rows. `kWhole`: all runs are of whole octets.
template <class E, bool kWhole>
NORMD_DEVICE GradientSums SumsOfSlots(const GradientTensors<E>& tensors, const Part& part,
                                      typename E::Compute shift, const typename E::Compute* weight,
                                      int64_t groups) {
  using T = typename E::Compute;
  const Runs& runs = part.runs;
  // Weight of element i: weight[i - weights_before].
  const int64_t weights_before =
      weight == nullptr ? 0 : part.unit * runs.length - part.unit % groups * runs.length;
  GradientSums total;
  PairSums<E> sums;
  ForEachSlot<BatchFor<E>(4), kWhole>(
      part, [&](int64_t i) { return tensors.Load(i); },
      [&](int, const typename GradientTensors<E>::Pair& pair, const Walk::Place& at, bool last) {
        if (weight == nullptr) {
          sums.Add(pair, at, shift, nullptr);
        } else if (!at.empty()) {
          const Eight<T> of_octet = LoadEight(weight, at.i - weights_before, at.low, at.high, T{1});
          sums.Add(pair, at, shift, &of_octet);
        }
        if (!last) return;
        total.dy += static_cast<double>(sums.dy);
        total.dy_d += static_cast<double>(sums.dy_d);
        sums = {};
      });
  return total;
}

// Block (unit, split). Shared: GradientSums a thread.
template <class E, bool kWhole>
NORMD_KERNEL void SumsOfRuns(GradientTensors<E> tensors, Runs runs, int64_t splits,
                             int64_t units_per_set,
                             const SetCoefficients<typename E::Compute>* sets,
                             const typename E::Compute* weight, int64_t groups,
                             GradientSums* partials) {
  NORMD_SHARED(shared);
  AwaitKernelBefore();
  const Part part(runs, blockIdx.x, blockIdx.y, CeilDiv(runs.slots(), splits));
  const GradientSums total = MergeOverBlock(
      SumsOfSlots<E, kWhole>(tensors, part, sets[part.unit / units_per_set].shift, weight, groups),
      1, reinterpret_cast<GradientSums*>(shared));
  if (threadIdx.x == 0) partials[part.unit * splits + blockIdx.y] = total;
}

// Block (tile, split, sample). Shared: kWidth GradientSums a thread. `row_width`: 0, or the
// channels of a set, when each row has sets of its own; then dy_d is of dy * x^.
template <class E, int kWidth>
NORMD_KERNEL void SumsOfColumns(GradientTensors<E> tensors, Columns cut, int64_t row_width,
                                const SetCoefficients<typename E::Compute>* sets,
                                GradientSums* partials) {
  using T = typename E::Compute;
  using Values = Cells<E, kWidth>;
  struct Pair {
    Values x, dy;
    uint32_t bits;
  };
  NORMD_SHARED(shared);
  AwaitKernelBefore();
  const ColumnPlace at(cut, blockIdx.x);
  T shift[kWidth] = {};
  if (row_width == 0 && at.rows != 0) {
#pragma unroll
    for (int w = 0; w < kWidth; ++w) shift[w] = sets[cut.SetOf(at.sample, at.column + w)].shift;
  }
  T dy[kWidth] = {};
  T dy_d[kWidth] = {};
  ForEachFetched<BatchFor<E>(4)>(
      at.rows,
      [&](int row) {
        const int64_t i = at.element + row * at.stride;
        return Pair{Values::Load(tensors.x, i), Values::Load(tensors.grad_y, i),
                    tensors.relu_mask == nullptr
                        ? 0xffu
                        : static_cast<uint32_t>(tensors.relu_mask[i / kOctet]) >> i % kOctet};
      },
      [&](int row, const Pair& pair) {
        SetCoefficients<T> set{};
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          const T passed = (pair.bits >> w & 1) != 0 ? pair.dy[w] : T{0};
          T d;
          if (row_width == 0) {
            d = pair.x[w] - shift[w];
          } else {
            if (w == 0 || row_width < cut.columns) {
              set = sets[at.RowAt(cut, row) * (cut.columns / row_width) +
                         (at.column + w) / row_width];
            }
            d = MultiplyAdd(pair.x[w] - set.shift, set.invstd, set.offset);
          }
          dy[w] += passed;
          dy_d[w] = MultiplyAdd(passed, d, dy_d[w]);
        }
      });
  GradientSums total[kWidth];
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    total[w] = {static_cast<double>(dy[w]), static_cast<double>(dy_d[w])};
  }
  MergeColumns(cut, at, total, reinterpret_cast<GradientSums*>(shared),
               [&](int64_t unit, int64_t, const GradientSums& sums) {
                 partials[at.split * cut.units() + unit] = sums;
               });
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_REDUCE_INL_H_
