// The kernels that write: y, or dx and the residual's gradient, an octet at a time. The
// last blocks' first: the end of x is what a pass before has left in the L2 cache.
#ifndef NORMD_KERNELS_CUDA_APPLY_INL_H_
#define NORMD_KERNELS_CUDA_APPLY_INL_H_

#include "kernels/cuda/finish-inl.h"

namespace normd::cuda {

// y = relu((x - shift) * scale + offset + residual), and the mask. kPlain: with no residual,
// activation and mask, for which registers would be taken.
template <class E, bool kPlain = false>
struct ForwardOp {
  using Element = E;
  using T = typename E::Compute;
  struct Coefficients {
    T shift, scale, offset;
  };

  NORMD_DEVICE Coefficients At(const SetCoefficients<T>& set, int64_t channel) const {
    const T w = weight == nullptr ? T{1} : weight[channel];
    const T b = bias == nullptr ? T{0} : bias[channel];
    return {set.shift, set.invstd * w, MultiplyAdd(set.offset, w, b)};
  }

  // Of channels `channel` + low to high - 1 of one set.
  NORMD_DEVICE void FindRow(const SetCoefficients<T>& set, int64_t channel, int low, int high,
                            Coefficients (&each)[kOctet]) const {
    const Eight<T> w = LoadEight(weight, channel, low, high, T{1});
    const Eight<T> b = LoadEight(bias, channel, low, high, T{0});
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      each[k] = {set.shift, set.invstd * w[k], MultiplyAdd(set.offset, w[k], b[k])};
    }
  }

  constexpr bool IsNothing() const { return y == nullptr; }
  constexpr bool IsPlain() const { return residual == nullptr && !relu && relu_mask == nullptr; }
  constexpr ForwardOp<E, true> Plain() const {
    return {size, x, y, nullptr, false, nullptr, weight, bias};
  }
  // What an octet of y is made of.
  static constexpr int kTensors = 1;
  struct Loaded {
    Octet<E> x;
  };
  NORMD_DEVICE Loaded Load(int64_t i) const { return {LoadOctet<E>(x, i)}; }
  NORMD_DEVICE int HighOf(int64_t i) const {
    return size - i < kOctet ? static_cast<int>(size - i) : kOctet;
  }

  // `of(k)`: the coefficients of element i + k.
  template <class Of>
  NORMD_DEVICE void Apply(int64_t i, int low, int high, const Loaded& loaded, const Of& of) const {
    const Octet<E>& from = loaded.x;
    T to[kOctet];
    if constexpr (kPlain) {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        const Coefficients c = of(k);
        to[k] = MultiplyAdd(from[k] - c.shift, c.scale, c.offset);
      }
      StoreOctet(y, i, low, high, Octet<E>::Of(to));
      return;
    }
    Octet<E> added{};
    if (residual != nullptr) added = LoadOctet<E>(residual, i);
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
      to[k] = value;
    }
    StoreOctet(y, i, low, high, Octet<E>::Of(to));
    if (relu_mask != nullptr) relu_mask[i / kOctet] = static_cast<uint8_t>(bits);
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

// dx = dy * scale + (x - shift) * slope + offset, and the residual's gradient. kPlain: with no
// mask and no residual.
template <class E, bool kPlain = false>
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

  // Of channels `channel` + low to high - 1 of one set.
  NORMD_DEVICE void FindRow(const SetCoefficients<T>& set, int64_t channel, int low, int high,
                            Coefficients (&each)[kOctet]) const {
    const Eight<T> w = LoadEight(weight, channel, low, high, T{1});
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      each[k] = {set.shift, set.invstd * w[k], set.slope, set.offset};
    }
  }

  constexpr bool IsNothing() const { return grad_x == nullptr && grad_residual == nullptr; }
  constexpr bool IsPlain() const { return relu_mask == nullptr && grad_residual == nullptr; }
  constexpr BackwardOp<E, true> Plain() const {
    return {size, x, grad_y, grad_x, nullptr, nullptr, weight, of_batch};
  }
  // What an octet of dx is made of. Only gradients through the statistics take x.
  static constexpr int kTensors = 2;
  using Loaded = typename GradientTensors<E>::Pair;
  NORMD_DEVICE Loaded Load(int64_t i) const {
    Loaded loaded{};
    if (of_batch && grad_x != nullptr) loaded.x = LoadOctet<E>(x, i);
    loaded.dy = LoadOctet<E>(grad_y, i);
    loaded.bits = kPlain || relu_mask == nullptr ? 0xffu : relu_mask[i / kOctet];
    return loaded;
  }
  NORMD_DEVICE int HighOf(int64_t i) const {
    return size - i < kOctet ? static_cast<int>(size - i) : kOctet;
  }

  // `of(k)`: the coefficients of element i + k.
  template <class Of>
  NORMD_DEVICE void Apply(int64_t i, int low, int high, const Loaded& loaded, const Of& of) const {
    T to[kOctet], passed[kOctet];
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const Coefficients c = of(k);
      const T g = kPlain ? loaded.dy[k] : loaded.Dy(k);
      const T value =
          of_batch ? MultiplyAdd(g, c.scale, MultiplyAdd(loaded.x[k] - c.shift, c.slope, c.offset))
                   : g * c.scale;
      to[k] = value;
      if constexpr (!kPlain) passed[k] = g;
    }
    // After all that is read: dx may be x or dy, and the residual's gradient dy.
    if (grad_x != nullptr) StoreOctet(grad_x, i, low, high, Octet<E>::Of(to));
    if (!kPlain && grad_residual != nullptr)
      StoreOctet(grad_residual, i, low, high, Octet<E>::Of(passed));
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

// What finds an element's channel and set, from the host.
struct ElementFinder {
  explicit ElementFinder(const NormProblem& problem)
      : per_channel(problem.reduction == Reduction::kPerChannel),
        inner(ChannelsAreNeighbours(problem) ? 1 : problem.positions),
        channels(problem.channels),
        rows_a_sample(ChannelsAreNeighbours(problem) ? problem.positions : 1),
        set_width(per_channel ? 1 : problem.channels / problem.groups),
        groups(problem.groups) {}

  bool per_channel;
  Divisor inner;  // neighbours of the same channel
  Divisor channels;
  Divisor rows_a_sample;  // of channels, where these are neighbours
  Divisor set_width;
  int64_t groups;
};

// The channel and the set of an element, and from it on to the next ones.
struct ElementPlace {
  NORMD_DEVICE ElementPlace(const ElementFinder& finder, int64_t i) : find(finder) {
    const int64_t plane = find.inner.Divide(i, rest);
    outer = find.channels.Divide(plane, channel);
    FindSet();
  }

  NORMD_DEVICE void Next() {
    if (++rest < find.inner.value) return;
    rest = 0;
    if (++channel == find.channels.value) {
      channel = 0;
      ++outer;
    }
    FindSet();
  }

  NORMD_DEVICE void FindSet() {
    if (find.per_channel) {
      set = channel;
      return;
    }
    int64_t unused;
    set = find.rows_a_sample.Divide(outer, unused) * find.groups +
          find.set_width.Divide(channel, unused);
  }

  const ElementFinder& find;
  int64_t rest;   // past the first of its channel's neighbours
  int64_t outer;  // samples, or rows of channels, before
  int64_t channel, set;
};

// Blocks that a multiprocessor has registers for, where a thread loads so many octets.
template <class E>
constexpr int ApplyBlocks(int octets) {
  return sizeof(typename E::Bits) < 8 && sizeof(Octet<E>) * static_cast<size_t>(octets) <= 64 ? 3
                                                                                              : 2;
}

// Any problem, or its elements from `first` on. Thread (octet, from the last), so many octets
// a thread, which are loaded before the first is used.
template <class Op, int kOctets>
NORMD_KERNEL_OF(256, ApplyBlocks<typename Op::Element>(kOctets* Op::kTensors))
void ApplyFlat(Op op, ElementFinder find, int64_t first,
               const SetCoefficients<typename Op::T>* sets) {
  AwaitKernelBefore();
  const int64_t last = (op.size - 1) / kOctet;
  const int64_t begin =
      last - (static_cast<int64_t>(blockIdx.x) * kOctets * blockDim.x + threadIdx.x);
  typename Op::Loaded loaded[kOctets];
#pragma unroll
  for (int b = 0; b < kOctets; ++b) {
    const int64_t octet = begin - static_cast<int64_t>(b) * blockDim.x;
    if (octet >= 0) loaded[b] = op.Load(octet * kOctet);
  }
#pragma unroll
  for (int b = 0; b < kOctets; ++b) {
    const int64_t octet = begin - static_cast<int64_t>(b) * blockDim.x;
    if (octet < 0) return;
    const int64_t i = octet * kOctet;
    const int high = op.HighOf(i);
    ElementPlace place(find, first + i);
    const auto one = op.At(sets[place.set], place.channel);
    if (place.rest + high <= find.inner.value) {
      op.Apply(i, 0, high, loaded[b], [&](int) { return one; });
    } else if (find.inner.value >= kOctet) {
      // Of two channels.
      const int of_first = static_cast<int>(find.inner.value - place.rest);
      place.rest = find.inner.value - 1;
      place.Next();
      const auto other = op.At(sets[place.set], place.channel);
      op.Apply(i, 0, high, loaded[b], [&](int k) { return k < of_first ? one : other; });
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
      op.Apply(i, 0, high, loaded[b], [&](int k) { return each[k]; });
    }
  }
}

// Applies to octets of a unit that begins at element `begin` with channel `channel`, of which
// it has `channels`.
template <class Op>
class ApplyToUnit {
  using T = typename Op::T;

 public:
  NORMD_DEVICE ApplyToUnit(const Op& op, const SetCoefficients<T>& of_set, int64_t positions,
                           int64_t begin, int64_t channel, int64_t channels)
      : op_(op),
        of_set_(of_set),
        positions_(positions),
        begin_(begin),
        channel_(channel),
        channels_(channels) {
    if (channels == 1) one_ = op.At(of_set, channel);
  }

  NORMD_DEVICE void operator()(const Walk::Place& at, const typename Op::Loaded& loaded) const {
    if (channels_ == 1) {
      op_.Apply(at.i, at.low, at.high, loaded, [&](int) { return one_; });
      return;
    }
    typename Op::Coefficients each[kOctet];
    if (positions_ == 1) {
      op_.FindRow(of_set_, channel_ + at.i - begin_, at.low, at.high, each);
    } else {
      int64_t rest;
      int64_t next = channel_ + Divide(at.i + at.low - begin_, positions_, rest);
#pragma unroll
      for (int k = 0; k < kOctet; ++k) {
        each[k] = {};
        if (k < at.low || k >= at.high) continue;
        each[k] = op_.At(of_set_, next);
        if (++rest == positions_) {
          rest = 0;
          ++next;
        }
      }
    }
    op_.Apply(at.i, at.low, at.high, loaded, [&](int k) { return each[k]; });
  }

 private:
  const Op& op_;
  const SetCoefficients<T> of_set_;
  const int64_t positions_, begin_, channel_, channels_;
  typename Op::Coefficients one_ = {};
};

// Where channels are neighbours, and an octet of them is always of one set, or of a set
// each. Block (tile, split, sample) as in the sums: a thread's channels are always the
// same, so that what is known of them is found once, by a thread for each column of the tile.
// `row_sets`: each row has sets of its own. Shared: kOctet coefficients a thread.
template <class Op>
NORMD_KERNEL void ApplyColumns(Op op, NormProblem problem, Columns cut, bool row_sets,
                               const SetCoefficients<typename Op::T>* sets) {
  using E = typename Op::Element;
  using Coefficients = typename Op::Coefficients;
  constexpr int kBatch = BatchFor<E>(2 * Op::kTensors);
  NORMD_SHARED(shared);
  AwaitKernelBefore();
  const ColumnPlace at(cut, gridDim.x - 1 - blockIdx.x);
  // Of column k at k % kOctet * across + k / kOctet: neighbouring threads read neighbours.
  auto* const of_tile = reinterpret_cast<Coefficients*>(shared);
  const int across = cut.tile_threads;
  if (!row_sets) {
    for (int k = static_cast<int>(threadIdx.x); k < across * kOctet;
         k += static_cast<int>(blockDim.x)) {
      const int64_t column = at.tile_column + k;
      if (column < cut.columns) {
        of_tile[k % kOctet * across + k / kOctet] =
            op.At(sets[cut.SetOf(at.sample, column)], cut.Channel(column));
      }
    }
    __syncthreads();
  }
  Coefficients each[kOctet];
#pragma unroll
  for (int k = 0; k < kOctet; ++k) {
    each[k] = row_sets ? Coefficients{}
                       : of_tile[k * across + (static_cast<int>(threadIdx.x) & (across - 1))];
  }
  ForEachFetched<kBatch>(
      at.rows, [&](int row) { return op.Load(at.element + row * at.stride); },
      [&](int row, const typename Op::Loaded& loaded) {
        if (row_sets) {
          op.FindRow(sets[at.RowAt(cut, row) * problem.groups + at.column / cut.set_width],
                     at.column, 0, kOctet, each);
        }
        op.Apply(at.element + row * at.stride, 0, kOctet, loaded, [&](int k) { return each[k]; });
      });
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_APPLY_INL_H_
