// The kernels that write: y, or dx and the residual's gradient, an octet at a time. The
// last blocks' first: the end of x is what a pass before has left in the L2 cache.
#ifndef NORMD_KERNELS_CUDA_APPLY_INL_H_
#define NORMD_KERNELS_CUDA_APPLY_INL_H_

#include "kernels/cuda/finish-inl.h"

namespace normd::cuda {

// y = relu((x - shift) * scale + offset + residual), and the mask.
template <class E>
struct ForwardOp {
  using Element = E;
  using T = typename E::Compute;
  struct Coefficients {
    T shift, scale, offset;
  };

  NORMD_DEVICE Coefficients At(const SetCoefficients<T>& set, int64_t channel) const {
    const T w = weight == nullptr ? T{1} : weight[channel];
    const T b = bias == nullptr ? T{0} : bias[channel];
    return {set.shift, set.invstd * w, MultiplyAdd(set.lost, w, b)};
  }

  // `of(k)`: the coefficients of element i + k.
  template <class Of>
  NORMD_DEVICE void Apply(int64_t i, int low, int high, const Octet<E>& from, const Of& of) const {
    Octet<E> added{}, to;
    if (residual != nullptr) added = LoadOctet<E>(residual, size, i, low, high);
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const Coefficients c = of(k);
      T value = MultiplyAdd(from[k] - c.shift, c.scale, c.offset);
      if (residual != nullptr) value += added[k];
      if (relu) {
        const bool passes = !(value <= T{0});
        bits |= static_cast<uint32_t>(passes) << k;
        if (!passes) value = T{0};
      }
      to.Set(k, value);
    }
    StoreOctet(y, i, low, high, to);
    if (relu_mask != nullptr) relu_mask[i / kOctet] = static_cast<uint8_t>(bits);
  }

  template <class Of>
  NORMD_DEVICE void Apply(int64_t i, int high, const Of& of) const {
    Apply(i, 0, high, LoadOctet<E>(x, size, i, 0, high), of);
  }

  int64_t size;
  const void* x;
  void* y;
  const void* residual;
  bool relu;
  uint8_t* relu_mask;  // null: not wanted
  const T* weight;
  const T* bias;
};

// dx = dy * scale + (x - shift) * slope + offset, and the residual's gradient.
template <class E>
struct BackwardOp {
  using Element = E;
  using T = typename E::Compute;
  struct Coefficients {
    T shift, scale, slope, offset;
  };

  NORMD_DEVICE Coefficients At(const SetCoefficients<T>& set, int64_t channel) const {
    const T w = weight == nullptr ? T{1} : weight[channel];
    return {set.shift, set.invstd * w, set.slope, set.offset};
  }

  // `of(k)`: the coefficients of element i + k. `from`: x, which only gradients through
  // the statistics take.
  template <class Of>
  NORMD_DEVICE void Apply(int64_t i, int low, int high, const Octet<E>& from, const Octet<E>& dy,
                          const Of& of) const {
    Octet<E> to, passed;
    const uint32_t bits = relu_mask == nullptr ? 0xffu : relu_mask[i / kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const Coefficients c = of(k);
      const T g = (bits >> k & 1) != 0 ? dy[k] : T{0};
      const T value =
          of_batch ? MultiplyAdd(g, c.scale, MultiplyAdd(from[k] - c.shift, c.slope, c.offset))
                   : g * c.scale;
      to.Set(k, value);
      passed.Set(k, g);
    }
    // After all that is read: dx may be x or dy, and the residual's gradient dy.
    if (grad_x != nullptr) StoreOctet(grad_x, i, low, high, to);
    if (grad_residual != nullptr) StoreOctet(grad_residual, i, low, high, passed);
  }

  template <class Of>
  NORMD_DEVICE void Apply(int64_t i, int high, const Of& of) const {
    const Octet<E> dy = LoadOctet<E>(grad_y, size, i, 0, high);
    Octet<E> from{};
    if (of_batch && grad_x != nullptr) from = LoadOctet<E>(x, size, i, 0, high);
    Apply(i, 0, high, from, dy, of);
  }

  int64_t size;
  const void* x;
  const void* grad_y;
  void* grad_x;
  void* grad_residual;
  const uint8_t* relu_mask;
  const T* weight;
  bool of_batch;
};

// The channel and the set of an element, and from it on to the next ones.
struct ElementPlace {
  NORMD_DEVICE ElementPlace(const NormProblem& problem, int64_t i)
      : neighbours(ChannelsAreNeighbours(problem)),
        per_channel(problem.reduction == Reduction::kPerChannel),
        channels(problem.channels),
        inner(neighbours ? 1 : problem.positions),
        rows_a_sample(neighbours ? problem.positions : 1),
        groups(problem.groups) {
    const int64_t plane = inner == 1 ? i : Divide(i, inner, rest);
    if (inner == 1) rest = 0;
    outer = Divide(plane, channels, channel);
    FindSet();
  }

  NORMD_DEVICE void Next() {
    if (++rest < inner) return;
    rest = 0;
    if (++channel == channels) {
      channel = 0;
      ++outer;
    }
    FindSet();
  }

  NORMD_DEVICE void FindSet() {
    int64_t unused;
    if (per_channel) {
      set = channel;
      return;
    }
    const int64_t sample = rows_a_sample == 1 ? outer : Divide(outer, rows_a_sample, unused);
    const int64_t group = groups == 1 ? 0 : Divide(channel, channels / groups, unused);
    set = sample * groups + group;
  }

  bool neighbours, per_channel;
  int64_t channels;
  int64_t inner;          // neighbours of the same channel
  int64_t rows_a_sample;  // of channels, where these are neighbours
  int64_t groups;
  int64_t rest;   // past the first of its channel's neighbours
  int64_t outer;  // samples, or rows of channels, before
  int64_t channel, set;
};

// Any problem, or its elements from `first` on. Thread (octet, from the last), and on by
// the size of the grid.
template <class Op>
NORMD_KERNEL void ApplyFlat(Op op, NormProblem problem, int64_t first,
                            const SetCoefficients<typename Op::T>* sets) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kOctet;
  const int64_t after = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kOctet;
  for (int64_t i = (op.size - 1) / kOctet * kOctet - after; i >= 0; i -= step) {
    const int high = op.size - i < kOctet ? static_cast<int>(op.size - i) : kOctet;
    ElementPlace place(problem, first + i);
    if (place.rest + high <= place.inner) {
      const auto all = op.At(sets[place.set], place.channel);
      op.Apply(i, high, [&](int) { return all; });
    } else {
      typename Op::Coefficients each[kOctet];
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        if (k < high) {
          each[k] = op.At(sets[place.set], place.channel);
          if (k + 1 < high) place.Next();
        } else {
          each[k] = {};
        }
      }
      op.Apply(i, high, [&](int k) { return each[k]; });
    }
  }
}

// Where channels are neighbours, and an octet of them is always of one set, or of a set
// each. Block (tile, split, sample) as in the sums: a thread's channels are always the
// same, so that what is known of them is loaded once. `row_sets`: each row has sets of
// its own.
template <class Op>
NORMD_KERNEL void ApplyColumns(Op op, NormProblem problem, Columns cut, int64_t splits,
                               bool row_sets, const SetCoefficients<typename Op::T>* sets) {
  ColumnPlace at(cut, splits, gridDim.x - 1 - blockIdx.x);
  if (at.row >= at.last) return;
  const bool per_channel = problem.reduction == Reduction::kPerChannel;
  const int64_t width = per_channel ? 1 : problem.channels / problem.groups;
  const int64_t group = at.column / width;
  typename Op::Coefficients each[kOctet];
  const auto find = [&](int64_t first_set) {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      each[k] = op.At(sets[first_set + (per_channel ? k : 0)], at.column + k);
    }
  };
  if (!row_sets) find(per_channel ? at.column : at.sample * problem.groups + group);
  for (; at.row < at.last; at.row += at.step) {
    const int64_t row = at.sample * cut.rows + at.row;
    if (row_sets) find(row * problem.groups + group);
    op.Apply(row * cut.columns + at.column, kOctet, [&](int k) { return each[k]; });
  }
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_APPLY_INL_H_
