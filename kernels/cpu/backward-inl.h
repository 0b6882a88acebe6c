// Backward's two steps: the sums of dy and dy * (x - shift), and the gradient
//   dx = dy * scale + ((x - shift) * slope + offset),
// where dy is what the ReLU's mask lets through of it.
#if defined(NORMD_KERNELS_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_BACKWARD_INL_H_
#undef NORMD_KERNELS_CPU_BACKWARD_INL_H_
#else
#define NORMD_KERNELS_CPU_BACKWARD_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/column_sums-inl.h"
#include "kernels/cpu/elements-inl.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments-inl.h"
#include "kernels/cpu/normalize-inl.h"
#include "kernels/cpu/relu_mask-inl.h"
#include "kernels/cpu/sums-inl.h"
#include "kernels/cpu/walk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The tensors that are read, as vectors. kMasked: there is a ReLU mask.
template <class E, bool kMasked>
struct GradientInput {
  using D = Tag<E>;
  using V = hn::Vec<D>;

  explicit GradientInput(const BackwardTensors& tensors)
      : x(static_cast<const E*>(tensors.x)),
        grad_y(static_cast<const E*>(tensors.grad_y)),
        mask(tensors.relu_mask) {}

  HWY_INLINE V X(int64_t i) const { return LoadElements(D(), x + i); }
  HWY_INLINE V GradY(int64_t i) const {
    const V dy = LoadElements(D(), grad_y + i);
    if constexpr (kMasked) return hn::IfThenElseZero(ReadMask(D(), mask, i), dy);
    return dy;
  }
  HWY_INLINE Pair<D> XPair(int64_t i) const { return LoadPair(D(), x + i); }
  // For more than one use.
  HWY_INLINE Pair<D> GradYPair(int64_t i) const {
    if constexpr (kPairsInterleave<E>) {
      return PairOfWords(D(), GradYWords(i));
    } else {
      return {InRegister(GradY(i)), InRegister(GradY(i + static_cast<int64_t>(hn::Lanes(D()))))};
    }
  }
  // Those of a pair, as they are stored.
  HWY_INLINE auto GradYWords(int64_t i) const {
    const WordsTag<D> d;
    const auto words = LoadWords(D(), grad_y + i);
    if constexpr (kMasked) return hn::IfThenElseZero(ReadMask(d, mask, i), words);
    return words;
  }
  HWY_INLINE V PartialX(int64_t i, size_t n) const { return LoadPartial(D(), x + i, n); }
  HWY_INLINE V PartialGradY(int64_t i, size_t n) const {
    const V dy = LoadPartial(D(), grad_y + i, n);
    if constexpr (kMasked) return hn::IfThenElseZero(ReadMask(D(), mask, i), dy);
    return dy;
  }

  const E* x;
  const E* grad_y;
  const uint8_t* mask;
};

// Calls run(input) with the input that the tensors ask for.
template <class E, class Run>
HWY_INLINE auto WithInput(const BackwardTensors& tensors, Run run) {
  if (tensors.relu_mask != nullptr) return run(GradientInput<E, true>(tensors));
  return run(GradientInput<E, false>(tensors));
}

// A run over which dy and dy * (x - shift) are summed. kShifted: by more than 0.
template <class E, bool kMasked, bool kShifted>
struct GradientRun {
  using D = Tag<E>;
  using V = hn::Vec<D>;
  struct Sums {
    Accumulators<D> first, second;
  };

  template <int k>
  HWY_INLINE void Add(int64_t i, Sums& sums) const {
    Collect<k>(input.GradY(begin + i), input.X(begin + i), sums);
  }
  template <int k, class M>
  HWY_INLINE void Add(int64_t i, Sums& sums, M mask) const {
    const V gradient = input.GradY(begin + i);
    const V product = hn::Mul(gradient, Deviation(input.X(begin + i)));
    V& dy = sums.first.template At<k>();
    V& dy_d = sums.second.template At<k>();
    dy = hn::Add(dy, hn::IfThenElseZero(mask, gradient));
    dy_d = hn::Add(dy_d, hn::IfThenElseZero(mask, product));
  }
  template <int k>
  HWY_INLINE void AddTwo(int64_t i, Sums& sums) const {
    if (ahead != 0) {
      FetchPairAhead(D(), input.grad_y + begin + i + ahead);
      FetchPairAhead(D(), input.x + begin + i + ahead);
    }
    const Pair<D> gradient = input.GradYPair(begin + i);
    const Pair<D> x = input.XPair(begin + i);
    Collect<k>(gradient.a, x.a, sums);
    Collect<k + 1>(gradient.b, x.b, sums);
  }
  template <int k>
  HWY_INLINE void Collect(V gradient, V x, Sums& sums) const {
    V& dy = sums.first.template At<k>();
    V& dy_d = sums.second.template At<k>();
    dy = hn::Add(dy, gradient);
    dy_d = hn::MulAdd(gradient, Deviation(x), dy_d);
  }
  HWY_INLINE V Deviation(V x) const { return kShifted ? hn::Sub(x, shift) : x; }
  HWY_INLINE void Skip(int64_t n) { begin += n; }

  GradientInput<E, kMasked> input;
  int64_t begin;
  V shift;
  int64_t ahead;
};

// Calls add(run) with the run that begins there.
template <class E, bool kMasked, class Add>
HWY_INLINE void WithGradientRun(const GradientInput<E, kMasked>& input, int64_t begin, double shift,
                                int64_t ahead, Add add) {
  const auto center = hn::Set(Tag<E>(), static_cast<ComputeType<E>>(shift));
  if (kAlwaysShifts<E> || shift != 0) {
    GradientRun<E, kMasked, true> run{input, begin, center, ahead};
    add(run);
  } else {
    GradientRun<E, kMasked, kAlwaysShifts<E>> run{input, begin, center, ahead};
    add(run);
  }
}

// A run shorter than a vector.
template <class E, bool kMasked>
GradientSums SumsOfShortRun(const GradientInput<E, kMasked>& input, int64_t begin, int64_t length,
                            double shift) {
  GradientSums sums;
  for (int64_t i = begin; i < begin + length; ++i) {
    if (kMasked && (input.mask[i / 8] >> (i % 8) & 1) == 0) continue;
    const double dy = static_cast<double>(ScalarAt(input.grad_y, i));
    sums.dy += dy;
    sums.dy_d += dy * (static_cast<double>(ScalarAt(input.x, i)) - shift);
  }
  return sums;
}

template <class E>
GradientSums SumsOfSet(const BackwardTensors& tensors, int64_t begin, const Runs& runs,
                       double shift, const Meanwhile& meanwhile) {
  return WithInput<E>(tensors, [&](auto input) {
    GradientSums total;
    const Tag<E> d;
    if (runs.length < static_cast<int64_t>(hn::Lanes(d))) {
      for (int64_t run = 0; run < runs.count; ++run) {
        const auto sums = SumsOfShortRun(input, begin + run * runs.stride, runs.length, shift);
        total.dy += sums.dy;
        total.dy_d += sums.dy_d;
      }
      return total;
    }
    Turns turns(meanwhile, runs, 2 * sizeof(E));
    TwoSums<Tag<E>> sums;
    sums.Clear();
    ForEachPiece(
        d, runs,
        [&](int64_t run, int64_t from, int64_t n) NORMD_INLINE_LAMBDA {
          WithGradientRun(input, begin + run * runs.stride + from, shift, runs.ahead,
                          [&](auto& piece)
                              NORMD_INLINE_LAMBDA { AddRunInTurns(d, n, piece, sums, turns); });
        },
        [&](int64_t) NORMD_INLINE_LAMBDA {
          total.dy += SumInDouble(d, sums.first);
          total.dy_d += SumInDouble(d, sums.second);
          sums.Clear();
        });
    return total;
  });
}

template <class E>
void SumsOfSetsTogether(const BackwardTensors& tensors, int64_t begin, int64_t sets,
                        const Runs& runs, const double* shift, GradientSums* totals,
                        const Meanwhile& meanwhile) {
  WithInput<E>(tensors, [&](auto input) {
    const Tag<E> d;
    Turns turns(meanwhile, runs, 2 * sizeof(E));
    WaitingSums<Tag<E>> waiting(sets);
    for (int64_t set = 0; set < sets; ++set) totals[set] = {};
    ForEachShortRun(
        d, sets, runs,
        [&](int64_t run, int64_t set) NORMD_INLINE_LAMBDA {
          TwoSums<Tag<E>> sums;
          sums.Clear();
          WithGradientRun(input, begin + run * runs.stride + set * runs.length, shift[set],
                          runs.ahead, [&](auto& gradients) NORMD_INLINE_LAMBDA {
                            AddRunInTurns(d, runs.length, gradients, sums, turns);
                          });
          waiting.Add(set, sums);
        },
        [&](int64_t) NORMD_INLINE_LAMBDA {
          for (int64_t set = 0; set < sets; ++set) {
            totals[set].dy += waiting.Take(set, 0);
            totals[set].dy_d += waiting.Take(set, 1);
          }
        });
  });
}

// Of columns: dy, and dy * (x - shift).
template <class E, bool kMasked, bool kIsShifted>
struct ColumnGradients {
  using D = Tag<E>;
  using V = hn::Vec<D>;
  static constexpr int64_t kInputs = 2;
  static constexpr bool kShifted = kIsShifted;

  HWY_INLINE void Fetch(int64_t i) const {
    FetchPairNear(D(), input.grad_y + begin + i);
    FetchPairNear(D(), input.x + begin + i);
  }
  HWY_INLINE void AddTwo(int64_t i, const Pair<D>& shift, Pair<D>& dy, Pair<D>& dy_d) const {
    const Pair<D> gradient = input.GradYPair(begin + i);
    const Pair<D> x = input.XPair(begin + i);
    Collect(gradient.a, hn::Sub(x.a, shift.a), dy.a, dy_d.a);
    Collect(gradient.b, hn::Sub(x.b, shift.b), dy.b, dy_d.b);
  }
  template <class Keep>
  HWY_INLINE void Add(int64_t i, V shift, Keep keep, V& dy, V& dy_d) const {
    Collect(keep(input.GradY(begin + i)), keep(hn::Sub(input.X(begin + i), shift)), dy, dy_d);
  }
  static HWY_INLINE void Collect(V gradient, V deviation, V& dy, V& dy_d) {
    dy = hn::Add(dy, gradient);
    dy_d = hn::MulAdd(gradient, deviation, dy_d);
  }

  GradientInput<E, kMasked> input;
  int64_t begin;
};

// Calls add(sum, product) with the sums of each column over some rows after others. There is a
// vector's columns or more. `scratch`: 3 * columns values; the shifts may be the first of them.
template <class E, class Add>
void SumColumnsByBlocks(const BackwardTensors& tensors, int64_t begin, const Matrix& matrix,
                        const ComputeType<E>* shifts, ComputeType<E>* scratch, Add add) {
  using T = ComputeType<E>;
  const int64_t columns = matrix.columns;
  T* const shift = scratch;
  T* const sum = shift + columns;
  T* const product = sum + columns;
  ToPairs<E>(columns, shifts, shift);
  WithInput<E>(tensors, [&](auto input) {
    constexpr bool kMasked = std::is_same_v<decltype(input), GradientInput<E, true>>;
    for (int64_t block = 0; block < matrix.rows; block += kBlockRows<E>) {
      const Matrix rows{std::min(kBlockRows<E>, matrix.rows - block), columns, matrix.stride,
                        matrix.near};
      std::fill_n(sum, 2 * columns, T{0});  // and the products
      WithShifts<E>(columns, shift, [&](auto is_shifted) NORMD_INLINE_LAMBDA {
        SumColumns<E>(ColumnGradients<E, kMasked, is_shifted>{input, begin + block * matrix.stride},
                      rows, shift, sum, product);
      });
      FromPairs<E>(columns, sum);
      FromPairs<E>(columns, product);
      add(sum, product);
    }
  });
}

template <class E>
void SumsOfColumns(const BackwardTensors& tensors, int64_t begin, const Matrix& matrix,
                   const void* shift, void* scratch, double* HWY_RESTRICT dy,
                   double* HWY_RESTRICT dy_d) {
  using T = ComputeType<E>;
  const int64_t columns = matrix.columns;
  const T* const shifts = static_cast<const T*>(shift);
  if (columns < static_cast<int64_t>(hn::Lanes(Tag<E>()))) {
    WithInput<E>(tensors, [&](auto input) {
      for (int64_t row = 0; row < matrix.rows; ++row) {
        for (int64_t j = 0; j < columns; ++j) {
          const auto sums = SumsOfShortRun(input, begin + row * matrix.stride + j, 1, shifts[j]);
          dy[j] += sums.dy;
          dy_d[j] += sums.dy_d;
        }
      }
    });
    return;
  }
  SumColumnsByBlocks<E>(tensors, begin, matrix, shifts, static_cast<T*>(scratch),
                        [&](const T* sum, const T* product) {
                          for (int64_t j = 0; j < columns; ++j) dy[j] += sum[j];
                          for (int64_t j = 0; j < columns; ++j) dy_d[j] += product[j];
                        });
}

// As MomentsOfTinySets().
template <class E>
void SumsOfTinySets(const BackwardTensors& tensors, int64_t begin, int64_t sets, const Runs& runs,
                    const double* shift, GradientSums* sums) {
  using T = ComputeType<E>;
  const Tag<E> d;
  const int64_t columns = sets * runs.length;
  const Scratch memory(static_cast<size_t>(3 * columns) * sizeof(T));
  T* const shifts = memory.Get<T>();
  for (int64_t set = 0; set < sets; ++set) {
    std::fill_n(shifts + set * runs.length, runs.length, static_cast<T>(shift[set]));
    sums[set] = {};
  }
  SumColumnsByBlocks<E>(tensors, begin, {runs.count, columns, runs.stride}, shifts, shifts,
                        [&](const T* sum, const T* product) {
                          for (int64_t set = 0; set < sets; ++set) {
                            const int64_t first = set * runs.length;
                            sums[set].dy += SumOfArray(d, sum + first, runs.length);
                            sums[set].dy_d += SumOfArray(d, product + first, runs.length);
                          }
                        });
}

template <class E>
void SumsOfRuns(const BackwardTensors& tensors, int64_t begin, int64_t sets, const Runs& runs,
                const double* shift, GradientSums* sums, const Meanwhile& meanwhile) {
  if (AreTiny(Tag<E>(), sets, runs)) {
    SumsOfTinySets<E>(tensors, begin, sets, runs, shift, sums);
    return;
  }
  if (AreReadTogether(Tag<E>(), sets, runs)) {
    SumsOfSetsTogether<E>(tensors, begin, sets, runs, shift, sums, meanwhile);
    return;
  }
  for (int64_t set = 0; set < sets; ++set) {
    sums[set] = SumsOfSet<E>(tensors, begin + set * runs.length, runs, shift[set], meanwhile);
  }
}

// The walk's operation. kMasked: there is a ReLU mask.
template <class E, bool kMasked>
class Gradient {
 public:
  using Element = E;
  using Type = ComputeType<E>;
  using D = Tag<E>;
  using V = hn::Vec<D>;
  static constexpr int64_t kShortPlane = 8;

  explicit Gradient(const BackwardTensors& tensors)
      : input_(tensors),
        grad_x_(static_cast<E*>(tensors.grad_x)),
        grad_residual_(static_cast<E*>(tensors.grad_residual)),
        stream_(tensors.stream && tensors.grad_x != nullptr),
        // Both outputs are streamed only if one peel aligns them both.
        stream_residual_(stream_ && (reinterpret_cast<uintptr_t>(tensors.grad_residual) -
                                     reinterpret_cast<uintptr_t>(tensors.grad_x)) %
                                            64 ==
                                        0),
        ahead_(tensors.ahead) {}

  void FetchAheadBy(int64_t elements) { ahead_ = elements; }
  int64_t UntilLine(int64_t i) const { return stream_ ? ElementsUntilLine(grad_x_ + i) : 0; }
  int64_t PastLine(int64_t i) const { return stream_ ? ElementsPastLine(grad_x_ + i) : 0; }
  void Begin(int64_t) {}
  void End() {}

  template <class At>
  HWY_INLINE int64_t Vectors(int64_t i, int64_t end, const At& at) {
    const Outputs out{grad_x_, grad_residual_, stream_, stream_residual_};
    if (input_.x == nullptr) return Loop<false, false>(i, end, at, input_, out, ahead_);
    const bool is_plain =
        grad_x_ != nullptr && grad_residual_ == nullptr && !stream_ && ahead_ == 0;
    if (is_plain) return Loop<true, true>(i, end, at, input_, out, ahead_);
    return Loop<true, false>(i, end, at, input_, out, ahead_);
  }

  HWY_NOINLINE void Partial(int64_t i, size_t n, const VectorCoefficients<D>& c) {
    const D d;
    const V dy = input_.PartialGradY(i, n);
    if (grad_x_ != nullptr) {
      const V dx =
          input_.x == nullptr ? Dx<false>(dy, dy, c) : Dx<true>(dy, input_.PartialX(i, n), c);
      StorePartial(d, dx, grad_x_ + i, n);
    }
    if (grad_residual_ != nullptr) StorePartial(d, dy, grad_residual_ + i, n);
  }

 private:
  using Input = GradientInput<E, kMasked>;
  struct Outputs {
    E* grad_x;
    E* grad_residual;
    bool stream;
    bool stream_residual;
  };

  // Without x, which may not be there, the statistics are constants.
  template <bool kNeedsX>
  static HWY_INLINE V Dx(V dy, V x, const VectorCoefficients<D>& c) {
    if constexpr (!kNeedsX) return hn::Mul(dy, c.scale);
    return hn::MulAdd(dy, c.scale, hn::MulAdd(hn::Sub(x, c.shift), c.slope, c.offset));
  }
  template <bool kNeedsX>
  static HWY_INLINE V X(const Input& input, int64_t i) {
    return kNeedsX ? input.X(i) : hn::Zero(D());
  }
  template <bool kNeedsX>
  static HWY_INLINE void Fetch(const Input& input, int64_t i, int64_t ahead) {
    if (ahead == 0) return;
    FetchAhead(input.grad_y + i + ahead);
    if (kNeedsX) FetchAhead(input.x + i + ahead);
  }

  // What is stored of a pair.
  template <bool kNeedsX>
  static HWY_INLINE auto WordsOfPair(const Input& input, int64_t i, const PairCoefficients<D>& c) {
    const D d;
    const Pair<D> dy = PairOfWords(d, input.GradYWords(i));
    Pair<D> x{hn::Zero(d), hn::Zero(d)};
    if (kNeedsX) x = input.XPair(i);
    return RoundedToWords(d, Pair<D>{Dx<kNeedsX>(dy.a, x.a, c.a), Dx<kNeedsX>(dy.b, x.b, c.b)});
  }

  // All by value: what is stored might otherwise be thought to change it. kPlain: grad_x is all
  // that is wanted, and nothing is fetched ahead nor bypasses the cache.
  template <bool kNeedsX, bool kPlain, class At>
  static HWY_INLINE int64_t Loop(int64_t i, int64_t end, const At& at, const Input input,
                                 const Outputs out, const int64_t ahead) {
    const D d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    const bool wants_x = kPlain || out.grad_x != nullptr;
    const bool wants_residual = !kPlain && out.grad_residual != nullptr;
    const bool stream = !kPlain && out.stream;
    const auto fetch = [&]() NORMD_INLINE_LAMBDA {
      if (!kPlain) Fetch<kNeedsX>(input, i, ahead);
    };
    const auto dx = [&](V dy, int64_t k, const VectorCoefficients<D>& c)
                        NORMD_INLINE_LAMBDA { return Dx<kNeedsX>(dy, X<kNeedsX>(input, k), c); };
    const auto one = [&]() NORMD_INLINE_LAMBDA {
      const V dy = input.GradY(i);
      fetch();
      if (wants_x) StoreElements(d, dx(dy, i, at(i)), out.grad_x + i, stream);
      if (wants_residual) StoreElements(d, dy, out.grad_residual + i, out.stream_residual);
      i += lanes;
    };
    if constexpr (kPairsInterleave<E>) {
      if (stream && i + lanes <= end && !IsAlignedForPair(d, out.grad_x + i)) one();
    }
    while (i + lanes <= end) {
      const int64_t stop = at.Stretch(i, end);
      if constexpr (kPairsInterleave<E>) {
        const bool in_pairs = at.HasPairs(i);
        for (; in_pairs && i + 2 * lanes <= stop; i += 2 * lanes) {
          fetch();
          const auto words = input.GradYWords(i);
          if (wants_x) {
            StoreWords(d, WordsOfPair<kNeedsX>(input, i, at.PairAt(i)), out.grad_x + i, stream);
          }
          if (wants_residual) StoreWords(d, words, out.grad_residual + i, out.stream_residual);
        }
      }
      // Two halves of a cache line. Of larger types, no faster.
      for (; sizeof(E) == 2 && i + 2 * lanes <= stop; i += 2 * lanes) {
        fetch();
        const V first = input.GradY(i), second = input.GradY(i + lanes);
        if (wants_x) {
          const PairCoefficients<D> c = at.TwoAt(i);
          StoreTwo(d, dx(first, i, c.a), dx(second, i + lanes, c.b), out.grad_x + i, stream);
        }
        if (wants_residual) {
          StoreTwo(d, first, second, out.grad_residual + i, out.stream_residual);
        }
      }
      while (i + lanes <= stop) one();
    }
    return i;
  }

  Input input_;
  E* grad_x_;
  E* grad_residual_;
  bool stream_;
  bool stream_residual_;
  int64_t ahead_;
};

template <class E, class Run>
HWY_INLINE void WithGradient(const BackwardTensors& tensors, Run run) {
  if (tensors.relu_mask != nullptr) {
    Gradient<E, true> op(tensors);
    run(op);
  } else {
    Gradient<E, false> op(tensors);
    run(op);
  }
}

template <class E>
void GradientOfPlanes(const BackwardTensors& tensors, const Planes& planes,
                      const Coefficients& coefficients) {
  WithGradient<E>(tensors, [&](auto& op) { WalkPlanes(op, planes, coefficients); });
}

template <class E>
void GradientOfColumns(const BackwardTensors& tensors, int64_t begin, const Matrix& matrix,
                       const Coefficients& coefficients) {
  using T = ComputeType<E>;
  WithGradient<E>(tensors, [&](auto& op) {
    WithShifts<E>(matrix.columns, static_cast<const T*>(coefficients.shift), [&](auto is_shifted) {
      WalkColumns(op, begin, matrix, ArrayCoefficients<T, is_shifted>(coefficients));
    });
  });
}

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
