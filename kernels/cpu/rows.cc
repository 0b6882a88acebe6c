// LayerNorm and its like: a set is one contiguous row, with a weight and a bias for
// each of its elements. A row is read from memory once: it is still in the nearest
// cache when it is written.
//
// A unit is some rows. The gradients of weight and bias are summed in floats over a
// few rows, then in doubles over a unit, then over the units in their order.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/call.h"
#include "kernels/cpu/coefficients.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/schedule.h"

namespace normd::cpu {
namespace {

constexpr int64_t kUnitBytes = int64_t{1} << 18;
constexpr int64_t kLongestAheadBytes = int64_t{1} << 17;
constexpr int64_t kShortestAheadBytes = int64_t{1} << 13;
constexpr int64_t kMostBackwardUnits = 64;
constexpr int64_t kRowsInFloat = 64;

struct Geometry {
  explicit Geometry(const NormProblem& problem) {
    rows = problem.num_sets();
    length = problem.set_size();
    element_bytes = static_cast<int64_t>(SizeOf(problem.dtype));
    inner = problem.positions;
    parameters = problem.channels * inner;
    unit_rows = std::clamp<int64_t>(kUnitBytes / (length * element_bytes), 1, rows);
  }

  // Few enough units that their sums are a small part of the data.
  void CutForBackward() {
    unit_rows = std::max(unit_rows, std::min<int64_t>(rows, 16));
    unit_rows = std::max(unit_rows, (rows + kMostBackwardUnits - 1) / kMostBackwardUnits);
  }

  // Rows whose parameters are the same and which fit the cache together. Not where stores
  // bypass the cache, whose speed halves with two streams of them, unless halves keep the
  // processor busier than memory.
  int64_t RowsTogether(bool stream) const {
    const bool may = parameters == length && length * element_bytes <= kLongestAheadBytes;
    return may && (!stream || element_bytes == 2) ? kRowsTogether : 1;
  }
  // To the next row, or a later one if rows are short, which is fetched while this one is
  // written.
  int64_t Ahead() const {
    const int64_t row_bytes = length * element_bytes;
    if (row_bytes > kLongestAheadBytes) return 0;
    return (kShortestAheadBytes + row_bytes - 1) / row_bytes * length;
  }

  // The same while a row is summed: long rows would else leave memory idle meanwhile.
  int64_t AheadOfSums() const { return length * element_bytes < kShortestAheadBytes ? 0 : Ahead(); }

  int64_t units() const { return (rows + unit_rows - 1) / unit_rows; }
  int64_t FirstRow(int64_t unit) const { return unit * unit_rows; }
  int64_t LastRow(int64_t unit) const { return std::min(rows, (unit + 1) * unit_rows); }
  // Where a row's parameters begin: groups take turns.
  int64_t ParameterOf(int64_t row) const { return row * length % parameters; }

  int64_t rows, length, element_bytes;
  int64_t inner;       // elements with the same weight
  int64_t parameters;  // elements of one sample
  int64_t unit_rows;
};

// Weight or bias of each element of a sample, in the computing type: the caller's
// own array if it is that already.
class Expanded {
 public:
  Expanded(const NormProblem& problem, const Geometry& geometry, const void* data, double otherwise)
      : width_(static_cast<int64_t>(SizeOf(problem.parameter_dtype()))), data_(data) {
    if (data != nullptr && geometry.inner == 1) return;
    const Parameter values(problem.dtype, data, otherwise);
    memory_ = Scratch(static_cast<size_t>(geometry.parameters * width_));
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
        weight_(problem_, geometry_, call.affine.weight, 1),
        bias_(problem_, geometry_, call.affine.bias, 0) {
    bytes_ = call.bytes();
    tensors_ = call.tensors();
    tensors_.ahead = geometry_.Ahead();
  }

  Outcome Execute(const Context& context) {
    return RunParts(geometry_.units(), bytes_, context, [this](int64_t unit) { Apply(unit); });
  }

 private:
  void Apply(int64_t unit) {
    Row rows[kRowsTogether];
    const int64_t together = geometry_.RowsTogether(tensors_.stream);
    for (int64_t first = geometry_.FirstRow(unit); first < geometry_.LastRow(unit);
         first += together) {
      const int64_t count = std::min(together, geometry_.LastRow(unit) - first);
      const int64_t parameter = geometry_.ParameterOf(first);
      for (int64_t r = 0; r < count; ++r) {
        rows[r] = RowOf(ConstantsOf(first + r), (first + r) * geometry_.length, geometry_.length,
                        weight_.From(parameter), bias_.From(parameter));
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
    kernels_.moments_of_runs(begin, 1, {1, geometry_.length, 0, geometry_.AheadOfSums()}, &of_row);
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
  const Geometry geometry_;
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
        weight_(problem_, geometry_, args_.weight, 1) {
    geometry_.CutForBackward();
    bytes_ = call.bytes();
    tensors_ = call.tensors();
    tensors_.ahead = geometry_.Ahead();
  }

  Outcome Execute(const Context& context) {
    if (wants_parameters()) {
      totals_.resize(static_cast<size_t>(geometry_.units() * 2 * geometry_.parameters));
    }
    if (!call_.wants_elements() && !wants_parameters()) return Outcome::kOk;
    const Outcome outcome =
        RunParts(geometry_.units(), bytes_, context, [this](int64_t unit) { Apply(unit); });
    if (outcome == Outcome::kOk && wants_parameters()) WriteParameterGradients();
    return outcome;
  }

 private:
  void Apply(int64_t unit) {
    const bool is_double = problem_.dtype == DType::kFloat64;
    const int64_t width = is_double ? 8 : 4;
    const int64_t values = 2 * geometry_.parameters;  // grad_weight, grad_bias
    Scratch sums;
    if (wants_parameters()) {
      sums = Scratch(static_cast<size_t>(values * width));
      std::memset(sums.Get(), 0, static_cast<size_t>(values * width));
    }
    const auto flush = [&] {
      double* total = totals_.data() + unit * values;
      if (is_double) {
        Add(sums.Get<double>(), values, total);
      } else {
        Add(sums.Get<float>(), values, total);
      }
      std::memset(sums.Get(), 0, static_cast<size_t>(values * width));
    };

    int64_t pending = 0;
    Row rows[kRowsTogether];
    const int64_t together = geometry_.RowsTogether(tensors_.stream);
    for (int64_t first = geometry_.FirstRow(unit); first < geometry_.LastRow(unit);
         first += together) {
      const int64_t count = std::min(together, geometry_.LastRow(unit) - first);
      const int64_t parameter = geometry_.ParameterOf(first);
      for (int64_t r = 0; r < count; ++r) {
        rows[r] = GradientRow(first + r);
        if (wants_parameters()) {
          rows[r].grad_weight = sums.Get(static_cast<size_t>(parameter * width));
          rows[r].grad_bias =
              sums.Get(static_cast<size_t>((geometry_.parameters + parameter) * width));
        }
      }
      kernels_.gradient_of_rows(tensors_, rows, count);
      pending += count;
      if (wants_parameters() && pending >= kRowsInFloat) {
        flush();
        pending = 0;
      }
    }
    if (wants_parameters() && pending != 0) flush();
  }

  template <class T>
  static void Add(const T* __restrict__ values, int64_t count, double* __restrict__ total) {
    for (int64_t i = 0; i < count; ++i) total[i] += static_cast<double>(values[i]);
  }

  // With the sums over it taken.
  Row GradientRow(int64_t row) const {
    const SetConstants set(problem_, args_.statistics, row, args_.statistics_of_batch);
    Row of_row = RowOf(set, row * geometry_.length, geometry_.length,
                       weight_.From(geometry_.ParameterOf(row)));
    of_row.constant = !args_.statistics_of_batch;
    if (args_.statistics_of_batch && args_.grad_x != nullptr) {
      const GradientSums g = kernels_.sums_of_row(tensors_, of_row);
      const SetGradient gradient(problem_, set, g.dy, GradWeight(set, g));
      of_row.slope = gradient.slope;
      of_row.offset = gradient.offset;
    }
    return of_row;
  }

  bool wants_parameters() const {
    return args_.grad_weight != nullptr || args_.grad_bias != nullptr;
  }

  void WriteParameterGradients() const {
    const ParameterGradient grad_weight(problem_.dtype, args_.grad_weight);
    const ParameterGradient grad_bias(problem_.dtype, args_.grad_bias);
    std::vector<double> total(static_cast<size_t>(2 * geometry_.parameters));
    for (int64_t unit = 0; unit < geometry_.units(); ++unit) {
      const double* of_unit = totals_.data() + unit * 2 * geometry_.parameters;
      for (size_t i = 0; i < total.size(); ++i) total[i] += of_unit[i];
    }
    for (int64_t c = 0; c < problem_.channels; ++c) {
      double weight = 0, bias = 0;
      for (int64_t i = c * geometry_.inner; i < (c + 1) * geometry_.inner; ++i) {
        weight += total[static_cast<size_t>(i)];
        bias += total[static_cast<size_t>(geometry_.parameters + i)];
      }
      grad_weight.Set(c, weight);
      grad_bias.Set(c, bias);
    }
  }

  const BackwardCall& call_;
  const BackwardArgs& args_;
  const NormProblem& problem_;
  const BackwardKernels& kernels_;
  Geometry geometry_;
  const Expanded weight_;
  BackwardTensors tensors_;
  int64_t bytes_;
  std::vector<double> totals_;  // [unit][grad_weight or grad_bias][element]
};

}  // namespace

Outcome ForwardByRows(const ForwardCall& call, const Context& context) {
  return ForwardJob(call).Execute(context);
}

Outcome RangeByRows(const RangeCall& call, const Context& context) {
  const Geometry geometry(call.problem);
  const Expanded weight(call.problem, geometry, call.args.affine.weight, 1);
  const Expanded bias(call.problem, geometry, call.args.affine.bias, 0);
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
