// LayerNorm and its like: a set is one contiguous row, with a weight and a bias for
// each of its elements. A row is read from memory once: it is still in the cache when it
// is written.
//
// Rows are taken some at a time: while these are written, the next ones are summed. A thread
// goes on so through all units that it does one after the other.
//
// A unit is some rows. The gradients of weight and bias are summed in floats over a unit, then
// in doubles over the units in their order.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stop_token>
#include <utility>

#include "kernels/cpu/call.h"
#include "kernels/cpu/coefficients.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/schedule.h"

namespace normd::cpu {
namespace {

constexpr int64_t kUnitBytes = int64_t{1} << 18;  // of a forward
// Of rows that are taken together: these and the next ones stay in L1.
constexpr int64_t kTogetherBytes = int64_t{1} << 14;
// Where their parameters outgrow L1, so many rows share them.
constexpr int64_t kNearBytes = int64_t{1} << 14;
constexpr int64_t kFewestSharing = 8;
// Whose statistics are a vector.
constexpr int64_t kRowsAtOnce = 8;
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

  // `bytes_of_all`: tensors.
  void CutForForward(int64_t bytes_of_all) {
    unit_rows = std::clamp<int64_t>(kUnitBytes / row_bytes(), 1, rows);
    Take(1, bytes_of_all);
  }

  // A parameter's gradient gets a value from each sample.
  void CutForBackward(int64_t bytes_of_all) {
    const int64_t rows_of_sample = parameters / length, samples = rows / rows_of_sample;
    unit_rows = rows_of_sample *
                std::min(samples, std::clamp((samples + kUnitsTogether - 1) / kUnitsTogether,
                                             kFewestSamples, kMostSamples));
    Take(2, bytes_of_all);
  }

  int64_t row_bytes() const { return length * element_bytes; }
  int64_t units() const { return (rows + unit_rows - 1) / unit_rows; }
  // Of the unit, or after the last of all.
  int64_t FirstRow(int64_t unit) const { return std::min(rows, unit * unit_rows); }
  // Where a row's parameters begin: groups take turns.
  int64_t ParameterOf(int64_t row) const { return row * length % parameters; }

  int64_t rows, length, element_bytes;
  int64_t inner;       // elements with the same weight
  int64_t parameters;  // elements of one sample
  int64_t unit_rows = 1;
  int64_t together = 1;  // rows that are summed while the ones before are written
  int64_t ahead = 0;     // as in ForwardTensors

 private:
  // Rows are of `inputs` tensors.
  void Take(int64_t inputs, int64_t bytes_of_all) {
    const int64_t bytes = inputs * row_bytes();
    ahead = kNextBytes / element_bytes;
    const int64_t cached = LargestReadTwice() / bytes;
    if (cached == 0) return;
    const int64_t parameter_bytes = 2 * length * std::max<int64_t>(4, element_bytes);
    const int64_t sharing = parameter_bytes > kNearBytes ? kFewestSharing : 1;
    together = std::min({cached, kMostRows, std::max(sharing, kTogetherBytes / bytes)});
    if (together > kRowsAtOnce) together -= together % kRowsAtOnce;
    // The same columns of the next row. What is read in the order of memory needs no such help.
    if (sharing > 1 && bytes_of_all > LargestNearBytes()) ahead = length;
  }
};

// RowConstants of kMostRows rows.
class ConstantsOfMostRows {
 public:
  operator RowConstants() {  // NOLINT
    return {values_[0], values_[1], values_[2], values_[3], values_[4]};
  }

 private:
  alignas(64) double values_[5][kMostRows];
};

// Weight or bias of each element of a sample, in the computing type: the caller's
// own array if it is that already.
class Expanded {
 public:
  // `in_pairs`: as in the kernels; null: as it is. Without `data` it is `otherwise`, or, if that is
  // 0, null as well.
  Expanded(const NormProblem& problem, const Geometry& geometry, const void* data, double otherwise,
           decltype(ForwardKernels::in_pairs) in_pairs)
      : width_(static_cast<int64_t>(SizeOf(problem.parameter_dtype()))), data_(data) {
    if (data == nullptr && otherwise == 0) return;
    const size_t bytes = static_cast<size_t>(geometry.parameters * width_);
    if (data == nullptr || geometry.inner != 1) {
      const int64_t inner = geometry.inner, count = geometry.parameters / inner;
      const Parameter values(problem.dtype, data, otherwise);
      memory_ = Scratch(bytes);
      for (int64_t c = 0; c < count; ++c) {
        if (width_ == 8) {
          std::fill_n(memory_.Get<double>() + c * inner, inner, values[c]);
        } else {
          std::fill_n(memory_.Get<float>() + c * inner, inner, static_cast<float>(values[c]));
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

  const void* From(int64_t i) const {
    return data_ == nullptr ? nullptr : static_cast<const char*>(data_) + i * width_;
  }

 private:
  int64_t width_;
  const void* data_;
  Scratch memory_;
};

// From `row` on.
RowStatistics StatisticsOf(const NormProblem& problem, const Statistics& statistics, int64_t row) {
  const bool has_mean = problem.center && statistics.mean != nullptr;
  return {has_mean ? statistics.mean + row : nullptr, statistics.var + row, 1, problem.eps};
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
        bias_(problem_, geometry_, call.affine.bias, 0, in_pairs_),
        along_{.length = geometry_.length,
               .parameters = geometry_.parameters,
               .weight = weight_.From(0),
               .bias = bias_.From(0),
               .in_pairs = in_pairs_ != nullptr,
               .center = problem_.center} {
    bytes_ = call.bytes();
    tensors_ = call.tensors();
    geometry_.CutForForward(bytes_);
    tensors_.ahead = geometry_.ahead;
  }

  Outcome Execute(const Context& context) {
    return RunSpans(geometry_.units(), bytes_, context,
                    [&](const Span& units) { Apply(units, context.stop); });
  }

 private:
  void Apply(const Span& units, const std::stop_token& stop) {
    ConstantsOfMostRows constants[2];
    const int64_t last = geometry_.FirstRow(units.end);
    Rows now;
    for (int64_t first = geometry_.FirstRow(units.begin), turn = 0; !stop.stop_requested();
         ++turn) {
      const Rows next{.begin = first * geometry_.length,
                      .parameter = geometry_.ParameterOf(first),
                      .count = std::min(geometry_.together, last - first),
                      .constants = constants[turn % 2]};
      if (call_.by_batch()) {
        kernels_.forward_rows(tensors_, along_, now, next, call_.moments.mean + first,
                              call_.moments.m2 + first);
        CheckMoments(first, next.count);
      } else if (now.count != 0) {
        kernels_.forward_rows(tensors_, along_, now, {}, nullptr, nullptr);
      }
      if (next.count == 0) break;
      first += next.count;
      if (call_.y == nullptr) continue;
      kernels_.constants_of_rows(StatisticsFrom(first - next.count), next.count, next.constants);
      now = next;
    }
  }

  void CheckMoments(int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row) {
      double& mean = call_.moments.mean[row];
      double& m2 = call_.moments.m2[row];
      SetMoments moments =
          CenteredAsAsked(problem_, {static_cast<double>(geometry_.length), mean, m2});
      if (!AreSound(problem_, moments.m2)) moments = ExactMomentsOf(problem_, call_.x, row);
      mean = moments.mean;
      m2 = moments.m2;
    }
  }

  RowStatistics StatisticsFrom(int64_t row) const {
    if (call_.by_batch()) {
      return {call_.moments.mean + row, call_.moments.m2 + row,
              static_cast<double>(geometry_.length), problem_.eps};
    }
    return StatisticsOf(problem_, call_.statistics, row);
  }

  const ForwardCall& call_;
  const NormProblem& problem_;
  const ForwardKernels& kernels_;
  Geometry geometry_;
  const decltype(ForwardKernels::in_pairs) in_pairs_;
  const Expanded weight_;
  const Expanded bias_;
  const AlongRows along_;
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
    bytes_ = call.bytes();
    geometry_.CutForBackward(bytes_);
    tensors_ = call.tensors();
    tensors_.ahead = geometry_.ahead;
  }

  Outcome Execute(const Context& context) {
    if (!call_.wants_elements() && !wants_parameters()) return Outcome::kOk;
    const int64_t units = geometry_.units();
    if (wants_parameters()) {
      sums_ = Scratch(static_cast<size_t>(std::min(units, kUnitsTogether) * sums() * width()));
      if (units > kUnitsTogether || geometry_.inner != 1) {
        totals_ = Scratch(static_cast<size_t>(sums()) * sizeof(double));
      }
    }
    for (int64_t first = 0; first < units; first += kUnitsTogether) {
      const int64_t count = std::min(kUnitsTogether, units - first);
      const Outcome outcome = RunSpans(
          count, bytes_, context, [&](const Span& units) { Apply(first, units, context.stop); });
      if (outcome != Outcome::kOk) return outcome;
      if (wants_parameters()) AddUp(count, first == 0, first + count == units);
    }
    if (wants_parameters() && geometry_.inner != 1) WriteParameterGradients();
    return Outcome::kOk;
  }

 private:
  // `units` after the `first_unit`: their sums for weight and bias have these places.
  void Apply(int64_t first_unit, const Span& units, const std::stop_token& stop) {
    AlongRows along{.length = geometry_.length,
                    .parameters = geometry_.parameters,
                    .weight = weight_.From(0),
                    .wants_bias = args_.grad_bias != nullptr,
                    .in_pairs = in_pairs_ != nullptr,
                    .constant = !args_.statistics_of_batch,
                    .center = problem_.center};
    ConstantsOfMostRows constants[2];
    Rows now;
    int64_t turn = 0;
    const auto go_on = [&](const Rows& next, int64_t row) {
      kernels_.backward_rows(tensors_, along, now, next,
                             StatisticsOf(problem_, args_.statistics, row));
      if (call_.wants_elements()) now = next;
    };
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      if (wants_parameters()) {
        std::byte* const sums =
            sums_.Get<std::byte>(static_cast<size_t>(unit * this->sums() * width()));
        along.grad_weight = sums;
        along.grad_bias = sums + geometry_.parameters * width();
      }
      const int64_t last = geometry_.FirstRow(first_unit + unit + 1);
      int64_t fresh = geometry_.parameters / geometry_.length;  // the unit's first sample
      for (int64_t row = geometry_.FirstRow(first_unit + unit); row < last;
           row += geometry_.together) {
        if (stop.stop_requested()) return;
        go_on({.begin = row * geometry_.length,
               .parameter = geometry_.ParameterOf(row),
               .count = std::min(geometry_.together, last - row),
               .constants = constants[turn++ % 2],
               .fresh = fresh},
              row);
        fresh = std::max<int64_t>(0, fresh - geometry_.together);
      }
    }
    go_on({}, 0);
  }

  // Of so many units: the first ones or the last, or both.
  void AddUp(int64_t units, bool first, bool last) {
    const auto add_up = [&](int64_t sum, void* gradient) {
      if (gradient == nullptr) return;
      for (int64_t row = 0; row < geometry_.parameters; row += geometry_.length) {
        Totals totals{};
        if (!first) totals.before = TotalsFrom(sum + row);
        if (last && geometry_.inner == 1) {
          totals.rounded = static_cast<std::byte*>(gradient) + row * width();
        } else {
          totals.after = TotalsFrom(sum + row);
        }
        kernels_.add_up(sums_.Get(static_cast<size_t>((sum + row) * width())), units, sums(),
                        geometry_.length, in_pairs_ != nullptr, totals);
      }
    };
    add_up(0, args_.grad_weight);
    add_up(geometry_.parameters, args_.grad_bias);
  }

  bool wants_parameters() const {
    return args_.grad_weight != nullptr || args_.grad_bias != nullptr;
  }

  // Of a unit, and the bytes of one.
  int64_t sums() const { return 2 * geometry_.parameters; }
  int64_t width() const { return static_cast<int64_t>(SizeOf(problem_.parameter_dtype())); }

  // Where several elements have the same parameter.
  void WriteParameterGradients() const {
    const ParameterGradient grad_weight(problem_.dtype, args_.grad_weight);
    const ParameterGradient grad_bias(problem_.dtype, args_.grad_bias);
    const auto total = [&](int64_t sum) {
      const double* const of_elements = TotalsFrom(sum);
      return std::accumulate(of_elements, of_elements + geometry_.inner, 0.0);
    };
    for (int64_t c = 0; c < problem_.channels; ++c) {
      if (args_.grad_weight != nullptr) grad_weight.Set(c, total(c * geometry_.inner));
      if (args_.grad_bias != nullptr) {
        grad_bias.Set(c, total(geometry_.parameters + c * geometry_.inner));
      }
    }
  }

  double* TotalsFrom(int64_t sum) const {
    return totals_.Get<double>(static_cast<size_t>(sum) * sizeof(double));
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
  Scratch sums_;    // [unit][grad_weight or grad_bias][element], in the computing type
  Scratch totals_;  // [grad_weight or grad_bias][element], doubles
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
    ConstantsOfMostRows constants;
    kernels.constants_of_rows(StatisticsOf(call.problem, call.args.statistics, row), 1, constants);
    kernels.forward_rows(tensors,
                         {.length = end - begin,
                          .parameters = end - begin,
                          .weight = weight.From(parameter),
                          .bias = bias.From(parameter)},
                         {.begin = begin - first, .count = 1, .constants = constants}, {}, nullptr,
                         nullptr);
  });
}

Outcome BackwardByRows(const BackwardCall& call, const Context& context) {
  return BackwardJob(call).Execute(context);
}

}  // namespace normd::cpu
