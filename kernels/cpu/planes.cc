// Contiguous tensors, channel by channel: BatchNorm, GroupNorm and InstanceNorm of
// NCHW.
//
// A set is `runs` runs of `subs` planes each, a plane being the positions of one
// channel; a run of each set follows the other's:
//
//   per channel        a channel is a set: its plane in each sample, subs = 1
//   per sample group   one run, subs = channels of a group
//
// A unit is some neighbouring sets, small enough to be still in the cache when they
// are read for the second time. Where tensors outgrow the cache, one is written while the
// next is summed, in turns of 4 KiB, so that memory is read and written at once, as in a copy;
// else the next is fetched meanwhile.
//
// Planes of a few vectors (7x7) are written as columns, one a position, each with its
// channel's coefficients: a vector then never has to be put together of two planes'.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/cpu/call.h"
#include "kernels/cpu/coefficients.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/schedule.h"

namespace normd::cpu {
namespace {

constexpr int64_t kSmallestUnitBytes = int64_t{1} << 17;  // 128 KiB
constexpr int64_t kChunkBytes = int64_t{1} << 20;
constexpr int64_t kLargestTinyPlane = 64;
constexpr int64_t kFewestTinyRuns = 4;
constexpr int64_t kAheadBytes = int64_t{1} << 13;  // within a run
constexpr int64_t kFewestRunBytes = 1024;          // of a unit that is not all the tensor
constexpr int64_t kMostRowBytes = 3200;            // of columns whose coefficients stay in L1

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// The k-th of `parts` nearly equal parts of [0, n), cut at multiples of `grain`.
Range Part(int64_t n, int64_t parts, int64_t k, int64_t grain) {
  const auto cut = [&](int64_t i) { return i == parts ? n : n * i / parts / grain * grain; };
  return {cut(k), cut(k + 1)};
}

// Elements in the order of memory, `skip` elements after the beginning of a plane. Their
// coefficients are those of `planes` planes, over and over.
struct Stretch {
  int64_t size;
  int64_t skip;
  int64_t plane;
  int64_t planes;
};

struct Geometry {
  // `tensors`: how many are read in each of both steps.
  Geometry(const NormProblem& problem, int64_t tensors) {
    const bool per_channel = problem.reduction == Reduction::kPerChannel;
    sets = problem.num_sets();
    runs = per_channel ? problem.batch : 1;
    subs = per_channel ? 1 : problem.channels / problem.groups;
    plane = problem.positions;
    channels = problem.channels;
    element_bytes = static_cast<int64_t>(SizeOf(problem.dtype));
    const int64_t set_bytes = runs * run_length() * element_bytes * tensors;
    const int64_t largest = std::max(kSmallestUnitBytes, LargestReadTwice());
    const int64_t unit_bytes = std::clamp(sets * set_bytes / 16, kSmallestUnitBytes, largest);
    unit_sets = std::clamp<int64_t>(unit_bytes / set_bytes, 1, sets);
    by_columns = per_channel && plane < kLargestTinyPlane && runs >= kFewestTinyRuns &&
                 set_bytes <= 2 * kChunkBytes;
    if (by_columns) unit_sets = std::min(unit_sets, kMostRowBytes / (plane * element_bytes));
    // Where it can be had, each unit begins at a cache line: loads that lie on two cost twice.
    const int64_t on_lines = kLineBytes / std::gcd(kLineBytes, run_length() * element_bytes);
    // Of many short runs a unit takes more than the L2 holds: runs of a few lines, far from each
    // other, cost more than reading a second time from where they came.
    if (runs > 1 && set_bytes <= 2 * kChunkBytes) {
      const int64_t run_bytes = run_length() * element_bytes;
      const int64_t fewest = (kFewestRunBytes / run_bytes + on_lines - 1) / on_lines * on_lines;
      unit_sets = std::max(unit_sets, std::min(fewest, sets / 16));
    }
    if (unit_sets > on_lines) unit_sets -= unit_sets % on_lines;
    units = (sets + unit_sets - 1) / unit_sets;
    outgrows_l2 = unit_sets > 1 && unit_sets * set_bytes > LargestInL2();
    if (set_bytes > 2 * kChunkBytes) {
      const int64_t wanted = std::min<int64_t>(set_bytes / kChunkBytes, 64);
      run_chunks = std::min(runs, wanted);
      pieces = std::max<int64_t>(1, std::min(wanted / run_chunks, run_length() / 4096));
    }
  }

  int64_t run_length() const { return subs * plane; }
  int64_t chunks() const { return run_chunks * pieces; }
  // Whether columns are worth it where memory is read once: it is then not read in its
  // order, and only for halves does computing cost more than that.
  bool WritesColumnsAtOnce() const { return by_columns && element_bytes == 2; }
  int64_t plane_count() const { return sets * subs; }  // with a coefficient each
  int64_t ChannelOf(int64_t plane_index) const { return plane_index % channels; }

  Range SetsOf(int64_t unit) const {
    return {unit * unit_sets, std::min(sets, (unit + 1) * unit_sets)};
  }
  Range RunsOf(int64_t chunk) const { return Part(runs, run_chunks, chunk / pieces, 1); }
  // Elements of each run; all but where a single large set is cut.
  Range ElementsOf(int64_t chunk) const { return Part(run_length(), pieces, chunk % pieces, 64); }
  int64_t OffsetOf(int64_t run, int64_t set) const { return (run * sets + set) * run_length(); }

  // Whether units are written while others are summed: past the cache (`stream`).
  bool Overlaps(bool stream) const { return stream && chunks() == 1 && !by_columns; }

  // Where sums come from memory: to the same set's next run, or within the only one.
  int64_t AheadOfSums() const {
    return runs > 1 ? sets * run_length() : kAheadBytes / element_bytes;
  }

  // Elements from a unit to the next, if both are small and it is not in the L2 already; to the
  // next run, if the unit itself does not stay there.
  int64_t Ahead(int64_t unit, int64_t bytes) const {
    if (outgrows_l2) return sets * run_length();
    const bool fetches = bytes > LargestInL2() && unit + 1 < units && chunks() == 1;
    return fetches ? unit_sets * run_length() : 0;
  }

  // The same where others are summed meanwhile. `reads_more`: a tensor that was not summed.
  int64_t AheadOfWriting(bool reads_more) const {
    if (outgrows_l2) return sets * run_length();
    return reads_more ? AheadOfSums() : 0;
  }
  // Where nothing was summed before: to the next run, if these come from far away.
  int64_t AheadAtOnce(int64_t unit, int64_t bytes) const {
    return bytes > LargestNearBytes() ? sets * run_length() : Ahead(unit, bytes);
  }

  // The whole tensor.
  Stretch All(const NormProblem& problem) const { return {problem.size(), 0, plane, sets * subs}; }

  // Calls visit(begin, matrix, coefficients) with a unit as columns.
  template <class Visit>
  void AsColumns(int64_t unit, const CoefficientArrays& arrays, const CoefficientKernels& kernels,
                 Visit visit) const {
    const Range own = SetsOf(unit);
    const Matrix matrix{runs, own.size() * plane, sets * plane};
    const Scratch spread(static_cast<size_t>(SpreadValues(matrix.columns)) * sizeof(double));
    visit(OffsetOf(0, own.begin), matrix,
          kernels.spread(arrays.From(own.begin), own.size(), plane, spread.Get()));
  }

  // Calls visit(planes) for each contiguous range of a chunk.
  template <class Visit>
  void ForEachRange(int64_t unit, int64_t chunk, Visit visit) const {
    const Range own = SetsOf(unit);
    const Range elements = ElementsOf(chunk);
    const Range part = RunsOf(chunk);
    for (int64_t run = part.begin; run < part.end; ++run) {
      visit(Planes{.begin = OffsetOf(run, own.begin) + elements.begin,
                   .count = pieces == 1 ? own.size() * run_length() : elements.size(),
                   .plane_size = plane,
                   .first_plane = own.begin * subs + elements.begin / plane,
                   .skip = elements.begin % plane});
    }
  }

  int64_t sets, runs, subs, plane, channels, element_bytes;
  int64_t unit_sets, units;
  int64_t run_chunks = 1, pieces = 1;
  bool by_columns = false;
  bool outgrows_l2 = false;
};

// A unit's elements, written a piece at a time in the order of memory.
class Writing {
 public:
  Writing() = default;  // nothing
  template <class Write>
  Writing(const Geometry& geometry, int64_t unit, Write write)
      : geometry_(&geometry), write_(std::move(write)), sets_(geometry.SetsOf(unit)) {}

  // Another `elements`, but for a few.
  void Advance(int64_t elements) {
    if (geometry_ == nullptr) return;
    const Geometry& g = *geometry_;
    for (due_ += elements; due_ >= kGrain && run_ < g.runs;) {
      const int64_t run_begin = g.OffsetOf(run_, sets_.begin);
      const int64_t run_size = sets_.size() * g.run_length();
      const int64_t stop =
          std::min(run_size, (run_begin + at_ + due_) / kGrain * kGrain - run_begin);
      write_(Planes{.begin = run_begin + at_,
                    .count = stop - at_,
                    .plane_size = g.plane,
                    .first_plane = sets_.begin * g.subs + at_ / g.plane,
                    .skip = at_ % g.plane});
      due_ -= stop - at_;
      at_ = stop;
      if (at_ == run_size) {
        at_ = 0;
        ++run_;
      }
    }
  }
  void Finish() {
    if (geometry_ == nullptr) return;
    Advance(sets_.size() * geometry_->runs * geometry_->run_length() + kGrain);
  }

 private:
  // Pieces end with a cache line, and a byte of the mask.
  static constexpr int64_t kGrain = 64;

  const Geometry* geometry_ = nullptr;
  std::function<void(const Planes&)> write_;
  Range sets_{};
  int64_t run_ = 0, at_ = 0;  // the next element, within its run
  int64_t due_ = 0;           // elements asked for and not yet written
};

// Units one after the other: while one is summed, the one before is written.
template <class Job>
Outcome RunOverlapped(Job& job, const Geometry& geometry, int64_t bytes, const Context& context) {
  return RunSpans(geometry.units, bytes, context, [&](const Span& units) {
    Writing writing;
    const Meanwhile meanwhile = [&](int64_t elements) { writing.Advance(elements); };
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      if (context.stop.stop_requested()) return;
      job.Reduce(unit, 0, meanwhile);
      writing.Finish();
      job.Finish(unit);
      writing = Writing(geometry, unit, [&](const Planes& planes) { job.Write(planes); });
    }
    writing.Finish();
  });
}

// As in Runs, where all tensors are so large: what comes fast needs less under way, and each turn
// costs some time itself.
int64_t TurnBytes(int64_t bytes) {
  return bytes <= LargestNearBytes() ? 2 * kBytesInTurn : kBytesInTurn;
}

const void* At(const NormProblem& problem, const void* data, int64_t element) {
  return static_cast<const char*>(data) + element * static_cast<int64_t>(SizeOf(problem.dtype));
}

// Walks them where nothing is to be summed first.
template <class Visit>
Outcome InOrder(const Stretch& stretch, int64_t bytes, const Context& context, Visit visit) {
  const int64_t parts = std::max<int64_t>(1, bytes / kSmallestUnitBytes);
  const int64_t period = stretch.planes * stretch.plane;
  return RunParts(parts, bytes, context, [&](int64_t part) {
    const Range range = Part(stretch.size, parts, part, 64);
    for (int64_t begin = range.begin; begin < range.end;) {
      const int64_t within = (stretch.skip + begin) % period;
      const int64_t count = std::min(range.end - begin, period - within);
      visit(Planes{.begin = begin,
                   .count = count,
                   .plane_size = stretch.plane,
                   .first_plane = within / stretch.plane,
                   .skip = within % stretch.plane});
      begin += count;
    }
  });
}

class ForwardJob {
 public:
  explicit ForwardJob(const ForwardCall& call)
      : call_(call),
        problem_(call.problem),
        kernels_(ForwardKernelsFor(problem_.dtype)),
        geometry_(problem_, 1),
        weight_(problem_.dtype, call.affine.weight, 1),
        bias_(problem_.dtype, call.affine.bias, 0),
        constants_(problem_, CoefficientKernelsFor(problem_.dtype), geometry_.sets),
        arrays_(problem_.dtype, geometry_.plane_count(), 3) {
    bytes_ = call.bytes();
    tensors_ = call.tensors();
  }

  Outcome Execute(const Context& context) {
    tensors_.stream &= bytes_ > LargestCachedBytes(context.executor.concurrency());
    if (reduces()) partial_.resize(static_cast<size_t>(geometry_.sets * geometry_.chunks()));
    if (reduces() && applies() && geometry_.Overlaps(tensors_.stream)) {
      return RunOverlapped(*this, geometry_, bytes_, context);
    }
    if (reduces() || geometry_.WritesColumnsAtOnce()) {
      return Run(*this, {geometry_.units, geometry_.chunks(), bytes_}, context);
    }
    SetCoefficientsOf({0, geometry_.sets});
    tensors_.ahead = AheadInOrder(bytes_, problem_);
    return InOrder(geometry_.All(problem_), bytes_, context, [this](const Planes& planes) {
      kernels_.normalize_planes(tensors_, planes, arrays_.From(0));
    });
  }

  bool reduces() const { return call_.by_batch(); }
  bool applies() const { return call_.y != nullptr; }

  void Reduce(int64_t unit, int64_t chunk, const Meanwhile& meanwhile = {}) {
    const Range sets = geometry_.SetsOf(unit);
    const Range runs = geometry_.RunsOf(chunk);
    const Range elements = geometry_.ElementsOf(chunk);
    // Either one set in many chunks, or some in one: partial_ is in order.
    kernels_.moments_of_runs(
        At(problem_, call_.x, geometry_.OffsetOf(runs.begin, sets.begin) + elements.begin),
        sets.size(),
        {runs.size(), elements.size(), geometry_.sets * geometry_.run_length(),
         meanwhile ? geometry_.AheadOfSums() : 0, TurnBytes(bytes_)},
        partial_.data() + sets.begin * geometry_.chunks() + chunk, meanwhile);
  }

  void Finish(int64_t unit) {
    const Range sets = geometry_.SetsOf(unit);
    for (int64_t set = sets.begin; set < sets.end && reduces(); ++set) {
      PartialMoments total;
      for (int64_t chunk = 0; chunk < geometry_.chunks(); ++chunk) {
        total.Merge(partial_[static_cast<size_t>(set * geometry_.chunks() + chunk)]);
      }
      SetMoments moments = CenteredAsAsked(problem_, total);
      if (!AreSound(problem_, moments.m2)) moments = ExactMomentsOf(problem_, call_.x, set);
      call_.moments.mean[set] = moments.mean;
      call_.moments.m2[set] = moments.m2;
    }
    SetCoefficientsOf(sets);
  }

  void Apply(int64_t unit, int64_t chunk) {
    ForwardTensors tensors = tensors_;
    tensors.ahead = reduces() ? geometry_.Ahead(unit, bytes_) : geometry_.AheadAtOnce(unit, bytes_);
    if (geometry_.by_columns) {
      geometry_.AsColumns(
          unit, arrays_, CoefficientKernelsFor(problem_.dtype),
          [&](int64_t begin, const Matrix& matrix, const Coefficients& coefficients) {
            kernels_.normalize_columns(tensors, begin, matrix, coefficients);
          });
      return;
    }
    geometry_.ForEachRange(unit, chunk, [&](const Planes& planes) {
      kernels_.normalize_planes(tensors, planes, arrays_.From(0));
    });
  }
  void Write(const Planes& planes) {
    ForwardTensors tensors = tensors_;
    tensors.ahead = geometry_.AheadOfWriting(/*reads_more=*/tensors.residual != nullptr);
    kernels_.normalize_planes(tensors, planes, arrays_.From(0));
  }

 private:
  void SetCoefficientsOf(const Range& sets) {
    if (reduces()) {
      constants_.Find(sets.begin, sets.size(), call_.moments);
    } else {
      constants_.Find(sets.begin, sets.size(), call_.statistics, /*of_batch=*/false);
    }
    constants_.SetForward(sets.begin, sets.size(), weight_, bias_, arrays_,
                          sets.begin * geometry_.subs);
  }

  const ForwardCall& call_;
  const NormProblem& problem_;
  const ForwardKernels& kernels_;
  const Geometry geometry_;
  const Parameter weight_;
  const Parameter bias_;
  ChannelConstants constants_;  // a plane
  CoefficientArrays arrays_;
  ForwardTensors tensors_;
  int64_t bytes_;
  std::vector<PartialMoments> partial_;  // [set][chunk]
};

class BackwardJob {
 public:
  explicit BackwardJob(const BackwardCall& call)
      : call_(call),
        args_(call.args),
        problem_(call.problem),
        kernels_(BackwardKernelsFor(problem_.dtype)),
        geometry_(problem_, 2),
        weight_(problem_.dtype, args_.weight, 1),
        constants_(problem_, CoefficientKernelsFor(problem_.dtype), geometry_.sets),
        arrays_(problem_.dtype, geometry_.plane_count(), 4) {
    bytes_ = call.bytes();
    tensors_ = call.tensors();
    apply_tensors_ = tensors_;
    if (!args_.statistics_of_batch) apply_tensors_.x = nullptr;  // dx = dy * scale
  }

  Outcome Execute(const Context& context) {
    if (!reduces() && !applies()) return Outcome::kOk;
    for (BackwardTensors* tensors : {&tensors_, &apply_tensors_}) {
      tensors->stream &= bytes_ > LargestCachedBytes(context.executor.concurrency());
    }
    constants_.Find(0, geometry_.sets, args_.statistics, args_.statistics_of_batch);
    if (!reduces()) SetCoefficients({0, geometry_.sets}, nullptr, nullptr);
    if (!reduces() && !geometry_.WritesColumnsAtOnce()) {
      apply_tensors_.ahead = AheadInOrder(bytes_, problem_);
      return InOrder(geometry_.All(problem_), bytes_, context, [this](const Planes& planes) {
        kernels_.gradient_of_planes(apply_tensors_, planes, arrays_.From(0));
      });
    }
    if (reduces()) {
      sums_.resize(static_cast<size_t>(geometry_.sets * entries_of_set()));
      grad_weight_.resize(static_cast<size_t>(geometry_.plane_count()));
      grad_bias_.resize(static_cast<size_t>(geometry_.plane_count()));
    }
    const Outcome outcome =
        reduces() && applies() && geometry_.Overlaps(tensors_.stream)
            ? RunOverlapped(*this, geometry_, bytes_, context)
            : Run(*this, {geometry_.units, geometry_.chunks(), bytes_}, context);
    if (outcome == Outcome::kOk && reduces()) WriteParameterGradients();
    return outcome;
  }

  bool reduces() const { return call_.wants_sums(); }
  bool applies() const { return call_.wants_elements(); }

  void Reduce(int64_t unit, int64_t chunk, const Meanwhile& meanwhile = {}) {
    const Range sets = geometry_.SetsOf(unit);
    const Range runs = geometry_.RunsOf(chunk);
    const Range elements = geometry_.ElementsOf(chunk);
    const Runs of_set{runs.size(), elements.size(), geometry_.sets * geometry_.run_length(),
                      meanwhile ? geometry_.AheadOfSums() : 0, TurnBytes(bytes_)};
    std::vector<double> shift;
    for (int64_t set = sets.begin; set < sets.end; ++set) {
      shift.push_back(ConstantsOf(set).shift);
    }
    if (geometry_.subs == 1) {  // sums_ is in order, as partial_ is above
      kernels_.sums_of_runs(tensors_, geometry_.OffsetOf(runs.begin, sets.begin) + elements.begin,
                            sets.size(), of_set, shift.data(),
                            sums_.data() + EntryOf(sets.begin, chunk, 0), meanwhile);
      return;
    }
    for (int64_t set = sets.begin; set < sets.end; ++set) {
      for (int64_t begin = elements.begin; begin < elements.end;) {
        const int64_t sub = begin / geometry_.plane;
        const int64_t end = std::min(elements.end, (sub + 1) * geometry_.plane);
        kernels_.sums_of_runs(
            tensors_, geometry_.OffsetOf(runs.begin, set) + begin, 1,
            {of_set.count, end - begin, of_set.stride, of_set.ahead, of_set.turn_bytes},
            &shift[static_cast<size_t>(set - sets.begin)], &sums_[EntryOf(set, chunk, sub)],
            meanwhile);
        begin = end;
      }
    }
  }

  void Finish(int64_t unit) {
    if (!reduces()) return;
    const Range sets = geometry_.SetsOf(unit);
    const int64_t subs = geometry_.subs;
    std::vector<double> sum_g(static_cast<size_t>(sets.size() * subs)), sum_gx(sum_g);
    for (int64_t set = sets.begin; set < sets.end; ++set) {
      const SetConstants constants = ConstantsOf(set);
      const auto first = static_cast<size_t>((set - sets.begin) * subs);
      for (int64_t sub = 0; sub < subs; ++sub) {
        const int64_t plane = set * subs + sub;
        GradientSums sums;
        for (int64_t chunk = 0; chunk < geometry_.chunks(); ++chunk) {
          const Range elements = geometry_.ElementsOf(chunk);
          if (elements.end <= sub * geometry_.plane ||
              elements.begin >= (sub + 1) * geometry_.plane)
            continue;
          const GradientSums& part = sums_[EntryOf(set, chunk, sub)];
          sums.dy += part.dy;
          sums.dy_d += part.dy_d;
        }
        grad_bias_[static_cast<size_t>(plane)] = sums.dy;
        grad_weight_[static_cast<size_t>(plane)] = GradWeight(constants, sums);
        const double weight = weight_[geometry_.ChannelOf(plane)];
        sum_g[first] += weight * sums.dy;
        sum_gx[first] += weight * grad_weight_[static_cast<size_t>(plane)];
      }
      std::fill_n(&sum_g[first], subs, double{sum_g[first]});
      std::fill_n(&sum_gx[first], subs, double{sum_gx[first]});
    }
    SetCoefficients(sets, sum_g.data(), sum_gx.data());
  }

  void Apply(int64_t unit, int64_t chunk) {
    BackwardTensors tensors = apply_tensors_;
    tensors.ahead = geometry_.Ahead(unit, bytes_);
    if (geometry_.by_columns) {
      geometry_.AsColumns(
          unit, arrays_, CoefficientKernelsFor(problem_.dtype),
          [&](int64_t begin, const Matrix& matrix, const Coefficients& coefficients) {
            kernels_.gradient_of_columns(tensors, begin, matrix, coefficients);
          });
      return;
    }
    geometry_.ForEachRange(unit, chunk, [&](const Planes& planes) {
      kernels_.gradient_of_planes(tensors, planes, arrays_.From(0));
    });
  }
  void Write(const Planes& planes) {
    BackwardTensors tensors = apply_tensors_;
    tensors.ahead = geometry_.AheadOfWriting(/*reads_more=*/false);
    kernels_.gradient_of_planes(tensors, planes, arrays_.From(0));
  }

 private:
  // A plane that is cut between two pieces has an entry in each.
  int64_t entries_of_set() const {
    return geometry_.run_chunks * (geometry_.subs + geometry_.pieces - 1);
  }
  size_t EntryOf(int64_t set, int64_t chunk, int64_t sub) const {
    const int64_t of_run = geometry_.subs + geometry_.pieces - 1;
    return static_cast<size_t>(set * entries_of_set() + chunk / geometry_.pieces * of_run + sub +
                               chunk % geometry_.pieces);
  }

  SetConstants ConstantsOf(int64_t set) const { return constants_[set * geometry_.subs]; }

  void SetCoefficients(const Range& sets, const double* sum_g, const double* sum_gx) {
    constants_.SetBackward(sets.begin, sets.size(), weight_, sum_g, sum_gx, arrays_,
                           sets.begin * geometry_.subs);
  }

  void WriteParameterGradients() {
    const int64_t samples = geometry_.plane_count() / geometry_.channels,
                  channels = geometry_.channels;
    const DType dtype = problem_.dtype;
    ParameterGradient(dtype, args_.grad_weight).SetSums(grad_weight_.data(), samples, channels);
    ParameterGradient(dtype, args_.grad_bias).SetSums(grad_bias_.data(), samples, channels);
  }

  const BackwardCall& call_;
  const BackwardArgs& args_;
  const NormProblem& problem_;
  const BackwardKernels& kernels_;
  const Geometry geometry_;
  const Parameter weight_;
  ChannelConstants constants_;  // a plane
  CoefficientArrays arrays_;
  BackwardTensors tensors_;
  BackwardTensors apply_tensors_;
  int64_t bytes_;
  std::vector<GradientSums> sums_;   // see EntryOf()
  std::vector<double> grad_weight_;  // a plane
  std::vector<double> grad_bias_;    // a plane
};

}  // namespace

Outcome ForwardByPlanes(const ForwardCall& call, const Context& context) {
  return ForwardJob(call).Execute(context);
}

Outcome RangeByPlanes(const RangeCall& call, const Context& context) {
  const NormProblem& problem = call.problem;
  const bool per_channel = problem.reduction == Reduction::kPerChannel;
  const int64_t first = call.args.first / problem.positions;
  const int64_t skip = call.args.first % problem.positions;
  int64_t planes = (skip + call.args.count - 1) / problem.positions + 1;
  if (per_channel) planes = std::min(planes, problem.channels);  // then they repeat
  const Parameter weight(problem.dtype, call.args.affine.weight, 1);
  const Parameter bias(problem.dtype, call.args.affine.bias, 0);
  CoefficientArrays arrays(problem.dtype, planes, 3);
  for (int64_t i = 0; i < planes; ++i) {
    const int64_t c = (first + i) % problem.channels;
    const int64_t set = per_channel ? c : (first + i) / (problem.channels / problem.groups);
    SetForward(arrays, i, call.ConstantsOf(set), weight[c], bias[c]);
  }
  const ForwardKernels& kernels = ForwardKernelsFor(problem.dtype);
  ForwardTensors tensors = call.tensors();
  tensors.ahead = AheadInOrder(call.bytes(), problem);
  return InOrder(
      {call.args.count, skip, problem.positions, planes}, call.bytes(), context,
      [&](const Planes& part) { kernels.normalize_planes(tensors, part, arrays.From(0)); });
}

Outcome BackwardByPlanes(const BackwardCall& call, const Context& context) {
  return BackwardJob(call).Execute(context);
}

}  // namespace normd::cpu
