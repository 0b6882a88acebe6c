// LayerNorm and its like: a set is one contiguous row, with a weight and a bias for
// each of its elements. A row is read from memory once: it is still in the cache when it
// is written.
//
// A unit is some rows, taken some at a time: those are summed, then written, while the next
// ones are fetched. The gradients of weight and bias are summed in floats over a unit, then
// in doubles over the units in their order.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/cpu/call.h"
#include "kernels/cpu/coefficients.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/schedule.h"

namespace normd::cpu {
namespace {

constexpr int64_t kUnitBytes = int64_t{1} << 18;
constexpr int64_t kMostTogether = 8;
// Of weight and bias, which stay in L1 beside a row.
constexpr int64_t kNearBytes = int64_t{1} << 14;
constexpr int64_t kShortestAheadBytes = int64_t{1} << 13;
// Of a unit of a backward: in so few floats lose little, in so many the units' sums are a
// small part of the data.
constexpr int64_t kFewestSamples = 16, kMostSamples = 64;
// Units whose sums are kept at once.
constexpr int64_t kUnitsTogether = 64;

struct Geometry {
  explicit Geometry(const NormProblem& problem) {
    rows = problem.num_sets();
    length = problem.set_size();
    element_bytes = static_cast<int64_t>(SizeOf(problem.dtype));
    inner = problem.positions;
    parameters = problem.channels * inner;
  }

  void CutForForward(bool stream) {
    unit_rows = std::clamp<int64_t>(kUnitBytes / row_bytes(), 1, rows);
    // Rows whose parameters outgrow L1 share them. Of others no more than are computed side
    // by side: the sooner a row is written, the nearer it is.
    const int64_t parameter_bytes = 2 * length * std::max<int64_t>(4, element_bytes);
    Take(parameter_bytes > kNearBytes ? kMostTogether : RowsSideBySide(stream, element_bytes), 1);
  }

  // A parameter's gradient gets a value from each sample.
  void CutForBackward() {
    const int64_t rows_of_sample = parameters / length, samples = rows / rows_of_sample;
    unit_rows = rows_of_sample *
                std::min(samples, std::clamp((samples + kUnitsTogether - 1) / kUnitsTogether,
                                             kFewestSamples, kMostSamples));
    Take(2, 2);  // those side by side
  }

  int64_t row_bytes() const { return length * element_bytes; }
  int64_t units() const { return (rows + unit_rows - 1) / unit_rows; }
  int64_t FirstRow(int64_t unit) const { return unit * unit_rows; }
  int64_t LastRow(int64_t unit) const { return std::min(rows, (unit + 1) * unit_rows); }
  // Where a row's parameters begin: groups take turns.
  int64_t ParameterOf(int64_t row) const { return row * length % parameters; }

  int64_t rows, length, element_bytes;
  int64_t inner;       // elements with the same weight
  int64_t parameters;  // elements of one sample
  int64_t unit_rows = 1;
  int64_t together = 1;  // rows that are summed before the first of them is written
  int64_t ahead = 0;     // as in ForwardTensors

 private:
  // `most` rows together, or as many as the L2 holds beside the next ones; of `inputs` tensors.
  // These are fetched, or later ones if rows are short.
  void Take(int64_t most, int64_t inputs) {
    const int64_t cached = LargestReadTwice() / (inputs * row_bytes());
    if (cached == 0) return;
    together = std::clamp<int64_t>(cached / 2, 1, most);
    ahead = std::max(together, (kShortestAheadBytes + row_bytes() - 1) / row_bytes()) * length;
  }
};

// Weight or bias of each element of a sample, in the computing type: the caller's
// own array if it is that already.
class Expanded {
 public:
  // `in_pairs`: as in the kernels; null: as it is.
  Expanded(const NormProblem& problem, const Geometry& geometry, const void* data, double otherwise,
           decltype(ForwardKernels::in_pairs) in_pairs)
      : width_(static_cast<int64_t>(SizeOf(problem.parameter_dtype()))), data_(data) {
    const size_t bytes = static_cast<size_t>(geometry.parameters * width_);
    if (data == nullptr || geometry.inner != 1) {
      const Parameter values(problem.dtype, data, otherwise);
      memory_ = Scratch(bytes);
      for (int64_t i = 0; i < geometry.parameters; ++i) {
        const double value = values[i / geometry.inner];
        if (width_ == 8) {
          memory_.Get<double>()[i] = value;
        } else {
          memory_.Get<float>()[i] = static_cast<float>(value);
        }
      }
      data_ = memory_.Get();
    }
    if (in_pairs == nullptr) return;
    Scratch paired(bytes);
    for (int64_t row = 0; row < geometry.parameters; row += geometry.length) {
      in_pairs(From(row), geometry.length, paired.Get(static_cast<size_t>(row * width_)));
    }
    memory_ = std::move(paired);
    data_ = memory_.Get();
  }

  const void* From(int64_t i) const { return static_cast<const char*>(data_) + i * width_; }

 private:
  int64_t width_;
  const void* data_;
  Scratch memory_;
};

// `count` elements of a row of `set`, with the weight and bias that begin there.
Row RowOf(const SetConstants& set, int64_t begin, int64_t count, const void* weight,
          const void* bias = nullptr) {
  return {.begin = begin,
          .count = count,
          .shift = set.shift,
          .invstd = set.invstd,
          .lost = -set.residual * set.invstd,
          .weight = weight,
          .bias = bias};
}

class ForwardJob {
 public:
  explicit ForwardJob(const ForwardCall& call)
      : call_(call),
        problem_(call.problem),
        kernels_(ForwardKernelsFor(problem_.dtype)),
        geometry_(problem_),
        // A mask is written in the order of memory.
        in_pairs_(call.tensors().relu || call.epilogue.residual != nullptr ? nullptr
                                                                           : kernels_.in_pairs),
        weight_(problem_, geometry_, call.affine.weight, 1, in_pairs_),
        bias_(problem_, geometry_, call.affine.bias, 0, in_pairs_) {
    bytes_ = call.bytes();
    tensors_ = call.tensors();
    geometry_.CutForForward(tensors_.stream);
    tensors_.ahead = geometry_.ahead;
  }

  Outcome Execute(const Context& context) {
    return RunParts(geometry_.units(), bytes_, context, [this](int64_t unit) { Apply(unit); });
  }

 private:
  void Apply(int64_t unit) {
    Row rows[kMostTogether];
    const int64_t last = geometry_.LastRow(unit);
    for (int64_t first = geometry_.FirstRow(unit); first < last; first += geometry_.together) {
      const int64_t count = std::min(geometry_.together, last - first);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t parameter = geometry_.ParameterOf(first + r);
        rows[r] = RowOf(ConstantsOf(first + r), (first + r) * geometry_.length, geometry_.length,
                        weight_.From(parameter), bias_.From(parameter));
        rows[r].in_pairs = in_pairs_ != nullptr;
      }
      if (call_.y != nullptr) kernels_.normalize_rows(tensors_, rows, count);
    }
  }

  SetConstants ConstantsOf(int64_t row) {
    if (!call_.by_batch()) {
      return SetConstants(problem_, call_.statistics, row, /*of_batch=*/false);
    }
    const void* begin =
        static_cast<const char*>(call_.x) + row * geometry_.length * geometry_.element_bytes;
    PartialMoments of_row;
    kernels_.moments_of_runs(begin, 1, {1, geometry_.length, 0}, &of_row);
    SetMoments moments = CenteredAsAsked(problem_, of_row);
    if (!AreSound(problem_, moments.m2)) moments = ExactMomentsOf(problem_, call_.x, row);
    call_.moments.mean[row] = moments.mean;
    call_.moments.m2[row] = moments.m2;
    return SetConstants(problem_, moments.mean,
                        moments.m2 / static_cast<double>(problem_.set_size()), /*of_batch=*/true);
  }

  const ForwardCall& call_;
  const NormProblem& problem_;
  const ForwardKernels& kernels_;
  Geometry geometry_;
  const decltype(ForwardKernels::in_pairs) in_pairs_;
  const Expanded weight_;
  const Expanded bias_;
  ForwardTensors tensors_;
  int64_t bytes_;
};

class BackwardJob {
 public:
  explicit BackwardJob(const BackwardCall& call)
      : call_(call),
        args_(call.args),
        problem_(call.problem),
        kernels_(BackwardKernelsFor(problem_.dtype)),
        geometry_(problem_),
        // A mask's bits lie in the order of memory.
        in_pairs_(args_.relu_mask == nullptr ? ForwardKernelsFor(problem_.dtype).in_pairs
                                             : nullptr),
        weight_(problem_, geometry_, args_.weight, 1, in_pairs_) {
    geometry_.CutForBackward();
    bytes_ = call.bytes();
    tensors_ = call.tensors();
    tensors_.ahead = geometry_.ahead;
  }

  Outcome Execute(const Context& context) {
    if (!call_.wants_elements() && !wants_parameters()) return Outcome::kOk;
    if (wants_parameters()) {
      sums_ = Scratch(
          static_cast<size_t>(std::min(geometry_.units(), kUnitsTogether) * sums() * width()));
      totals_.resize(static_cast<size_t>(sums()));
    }
    for (int64_t first = 0; first < geometry_.units(); first += kUnitsTogether) {
      const int64_t count = std::min(kUnitsTogether, geometry_.units() - first);
      const Outcome outcome =
          RunParts(count, bytes_, context, [this, first](int64_t i) { Apply(first + i, i); });
      if (outcome != Outcome::kOk) return outcome;
      if (wants_parameters()) AddUp(count);
    }
    if (wants_parameters()) WriteParameterGradients();
    return Outcome::kOk;
  }

 private:
  // Its sums for weight and bias become the `place`-th.
  void Apply(int64_t unit, int64_t place) {
    const auto sums_from = [&](int64_t i) {
      return sums_.Get(static_cast<size_t>((place * sums() + i) * width()));
    };
    if (wants_parameters()) std::memset(sums_from(0), 0, static_cast<size_t>(sums() * width()));
    Row rows[kMostTogether];
    std::vector<SetConstants> sets;
    sets.reserve(kMostTogether);
    GradientSums of_rows[kMostTogether];
    const int64_t last = geometry_.LastRow(unit);
    for (int64_t first = geometry_.FirstRow(unit); first < last; first += geometry_.together) {
      const int64_t count = std::min(geometry_.together, last - first);
      sets.clear();
      for (int64_t r = 0; r < count; ++r) {
        const int64_t parameter = geometry_.ParameterOf(first + r);
        sets.emplace_back(problem_, args_.statistics, first + r, args_.statistics_of_batch);
        rows[r] = RowOf(sets.back(), (first + r) * geometry_.length, geometry_.length,
                        weight_.From(parameter));
        rows[r].in_pairs = in_pairs_ != nullptr;
        rows[r].constant = !args_.statistics_of_batch;
        if (wants_parameters()) {
          rows[r].grad_weight = sums_from(parameter);
          rows[r].grad_bias = sums_from(geometry_.parameters + parameter);
        }
      }
      if (call_.wants_sums()) kernels_.sums_of_rows(tensors_, rows, count, of_rows);
      if (!call_.wants_elements()) continue;
      for (int64_t r = 0; r < count && args_.statistics_of_batch; ++r) {
        const SetConstants& set = sets[static_cast<size_t>(r)];
        const SetGradient gradient(problem_, set, of_rows[r].dy, GradWeight(set, of_rows[r]));
        rows[r].slope = gradient.slope;
        rows[r].offset = gradient.offset;
      }
      kernels_.gradient_of_rows(tensors_, rows, count);
    }
  }

  void AddUp(int64_t units) {
    for (int64_t row = 0; row < sums(); row += geometry_.length) {
      kernels_.add_up(sums_.Get(static_cast<size_t>(row * width())), units, sums(),
                      geometry_.length, in_pairs_ != nullptr, totals_.data() + row);
    }
  }

  bool wants_parameters() const {
    return args_.grad_weight != nullptr || args_.grad_bias != nullptr;
  }

  // Of a unit, and the bytes of one.
  int64_t sums() const { return 2 * geometry_.parameters; }
  int64_t width() const { return static_cast<int64_t>(SizeOf(problem_.parameter_dtype())); }

  void WriteParameterGradients() const {
    const double* const grad_bias = totals_.data() + geometry_.parameters;
    if (problem_.dtype == DType::kFloat64) {
      Write(totals_.data(), static_cast<double*>(args_.grad_weight));
      Write(grad_bias, static_cast<double*>(args_.grad_bias));
    } else {
      Write(totals_.data(), static_cast<float*>(args_.grad_weight));
      Write(grad_bias, static_cast<float*>(args_.grad_bias));
    }
  }

  // `to`: null if not wanted.
  template <class T>
  void Write(const double* totals, T* to) const {
    if (to == nullptr) return;
    const int64_t inner = geometry_.inner;
    for (int64_t c = 0; c < problem_.channels; ++c) {
      double sum = totals[c * inner];
      for (int64_t i = 1; i < inner; ++i) sum += totals[c * inner + i];
      to[c] = static_cast<T>(sum);
    }
  }

  const BackwardCall& call_;
  const BackwardArgs& args_;
  const NormProblem& problem_;
  const BackwardKernels& kernels_;
  Geometry geometry_;
  const decltype(ForwardKernels::in_pairs) in_pairs_;
  const Expanded weight_;
  BackwardTensors tensors_;
  int64_t bytes_;
  Scratch sums_;                // [unit][grad_weight or grad_bias][element], in the computing type
  std::vector<double> totals_;  // [grad_weight or grad_bias][element]
};

}  // namespace

Outcome ForwardByRows(const ForwardCall& call, const Context& context) {
  return ForwardJob(call).Execute(context);
}

Outcome RangeByRows(const RangeCall& call, const Context& context) {
  const Geometry geometry(call.problem);
  const Expanded weight(call.problem, geometry, call.args.affine.weight, 1, nullptr);
  const Expanded bias(call.problem, geometry, call.args.affine.bias, 0, nullptr);
  const ForwardKernels& kernels = ForwardKernelsFor(call.problem.dtype);
  const ForwardTensors tensors = call.tensors();
  const int64_t first = call.args.first, last = first + call.args.count;
  const int64_t first_row = first / geometry.length;
  const int64_t last_row = (last - 1) / geometry.length;
  return RunParts(last_row - first_row + 1, call.bytes(), context, [&](int64_t part) {
    const int64_t row = first_row + part;
    const int64_t begin = std::max(first, row * geometry.length);
    const int64_t end = std::min(last, (row + 1) * geometry.length);
    const int64_t parameter = geometry.ParameterOf(row) + begin - row * geometry.length;
    const Row of_row = RowOf(call.ConstantsOf(row), begin - first, end - begin,
                             weight.From(parameter), bias.From(parameter));
    kernels.normalize_rows(tensors, &of_row, 1);
  });
}

Outcome BackwardByRows(const BackwardCall& call, const Context& context) {
  return BackwardJob(call).Execute(context);
}

}  // namespace normd::cpu
