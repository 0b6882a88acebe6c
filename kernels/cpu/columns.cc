// Tensors whose neighbours in memory are channels: all norms of channels_last, and
// BatchNorm of contiguous tensors with hardly any positions.
//
// Memory is a matrix whose columns have a channel each. There are `outer` of them
// (one, or one a sample), each normalized by itself. Rows of few channels are folded:
// k rows are taken as one of k times the columns, so that every row is whole vectors,
// and the columns of a channel are merged in the end.
//
// Sums are collected by column, never in one pass a channel. A matrix is usually too
// large for the cache, so it is read twice from memory; the second reading walks back
// from the end, where the first one ended.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels/cpu/cache.h"
#include "kernels/cpu/call.h"
#include "kernels/cpu/coefficients.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/schedule.h"

namespace normd::cpu {
namespace {

constexpr int64_t kTile = 4096;           // columns summed at once
constexpr int64_t kFewestColumns = 512;   // after folding
constexpr int64_t kWidestPair = 32;       // lanes of two vectors, a cache line of halves
constexpr int64_t kWidestInPairs = 2048;  // columns
constexpr int64_t kWidestFolded = 16384;
constexpr int64_t kLargestChunkBytes = int64_t{1} << 20;
constexpr int64_t kSmallestChunkBytes = int64_t{1} << 17;
constexpr int64_t kRowsOfSums = 128;  // summed at once
constexpr int64_t kFewChunks = 12;

// Rows of `base` columns that are best taken as one: whole pairs of vectors, unless whole vectors
// are many columns already.
int64_t FoldOf(int64_t base, int64_t rows) {
  int64_t fold = kWidestPair / std::gcd(base, kWidestPair);
  if (fold > 1 && base * fold > kWidestInPairs) fold /= 2;
  if (base * fold < kFewestColumns) fold *= (kFewestColumns - 1) / (base * fold) + 1;
  return base * fold > kWidestFolded || fold > rows ? 1 : fold;
}

struct Geometry {
  // `all_bytes`: of all tensors of the call.
  Geometry(const NormProblem& problem, int64_t all_bytes) {
    const bool per_channel = problem.reduction == Reduction::kPerChannel;
    const bool channels_last = problem.format == MemoryFormat::kChannelsLast;
    element_bytes = static_cast<int64_t>(SizeOf(problem.dtype));
    channels = problem.channels;
    inner = channels_last ? 1 : problem.positions;
    outer = per_channel ? 1 : problem.batch;
    base = channels * inner;
    const int64_t all_rows = problem.size() / base / outer;
    channels_of_set = per_channel ? 1 : channels / problem.groups;
    sets = channels / channels_of_set;

    near = all_bytes <= LargestInL2();
    const int64_t fold = FoldOf(base, all_rows);
    columns = base * fold;
    rows = all_rows / fold;
    tail_columns = all_rows % fold * base;

    tile = columns <= kTile ? columns : kTile;
    tiles = (columns + tile - 1) / tile;
    const int64_t bytes = rows * columns * element_bytes;
    const int64_t chunk_bytes = std::clamp(bytes / 64, kSmallestChunkBytes, kLargestChunkBytes);
    // What a chunk's sums cost, in memory that no cache holds, should be little beside its rows.
    const int64_t rows_worth_sums =
        std::clamp(rows / kFewChunks / kRowsOfSums, int64_t{1}, int64_t{4}) * kRowsOfSums;
    rows_of_chunk = std::max(rows_worth_sums, chunk_bytes / (tile * element_bytes));
    row_chunks = (rows + rows_of_chunk - 1) / rows_of_chunk;
  }

  int64_t chunks() const { return row_chunks * tiles; }
  int64_t ChannelOf(int64_t column) const { return column % base / inner; }
  int64_t columns_of_set() const { return channels_of_set * inner; }  // before folding
  // Elements of a matrix, the last rows that do not fill a folded one included.
  int64_t matrix_size() const { return rows * columns + tail_columns; }

  struct Chunk {
    int64_t first_column;
    int64_t partial;  // index of the first column's partial sums
    int64_t begin;    // offset of the first element, in the tensor
    Matrix matrix;
    // The incomplete row after a tile's last chunk; maybe no columns.
    int64_t tail_begin;
    Matrix tail;
  };
  Chunk ChunkAt(int64_t unit, int64_t index) const {
    const int64_t row_chunk = index / tiles;
    const int64_t first_row = row_chunk * rows_of_chunk;
    const int64_t first = index % tiles * tile;
    const int64_t width = std::min(tile, columns - first);
    const int64_t tail_width =
        row_chunk == row_chunks - 1 ? std::clamp<int64_t>(tail_columns - first, 0, width) : 0;
    const int64_t start = unit * matrix_size() + first;
    return {first,
            PartialAt(unit, row_chunk) + first,
            start + first_row * columns,
            Matrix{std::min(rows_of_chunk, rows - first_row), width, columns, near},
            start + rows * columns,
            Matrix{1, tail_width, columns, near}};
  }
  // Partial sums: a value each unit, chunk of rows, and column.
  int64_t PartialAt(int64_t unit, int64_t row_chunk) const {
    return (unit * row_chunks + row_chunk) * columns;
  }
  int64_t partial_count() const { return PartialAt(outer, 0); }

  int64_t element_bytes, channels, channels_of_set, sets, inner, outer;
  int64_t base;  // columns before folding
  int64_t columns, rows, tail_columns;
  int64_t tile, tiles, rows_of_chunk, row_chunks;
  bool near;  // as in Matrix
};

const void* At(const Geometry& geometry, const void* data, int64_t element) {
  return static_cast<const char*>(data) + element * geometry.element_bytes;
}

// Two sums of each column in each chunk of rows: see Geometry::PartialAt(). One block of memory:
// two that are freed at once are more than malloc keeps, and new pages take as long as the sums.
class Partials {
 public:
  void Allocate(const Geometry& geometry) {
    count_ = geometry.partial_count();
    memory_ = Scratch(static_cast<size_t>(2 * count_) * sizeof(double));
  }
  double* First(int64_t at) const { return memory_.Get<double>() + at; }
  double* Second(int64_t at) const { return First(count_ + at); }

 private:
  int64_t count_ = 0;
  Scratch memory_;
};

// Merges the columns that are a channel's to its first one: one half of them with the other, as
// long as there are halves. Calls merge(columns, done, more, from): so many columns, of which each
// is made of `done` of those before by now, and those `from` columns further on, of `more`.
template <class Merge>
void MergeFolded(const Geometry& geometry, Merge merge) {
  int64_t fold = geometry.columns / geometry.base;
  double of_each = 1;
  for (; fold % 2 == 0; fold /= 2, of_each *= 2) {
    const int64_t half = fold / 2 * geometry.base;
    merge(half, of_each, of_each, half);
  }
  for (int64_t k = 1; k < fold; ++k) {
    merge(geometry.base, of_each * static_cast<double>(k), of_each, k * geometry.base);
  }
}

// Makes of `count` groups of `times` values their sums.
void SumEach(double* values, int64_t count, int64_t times) {
  for (int64_t i = 0; i < count && times > 1; ++i) {
    values[i] = std::accumulate(values + i * times, values + (i + 1) * times, 0.0);
  }
}

// From coefficients of channels to those of columns.
void SpreadChannels(const Geometry& geometry, int64_t unit, CoefficientArrays& arrays) {
  const int64_t first = unit * geometry.columns;
  arrays.Spread(first, geometry.channels, geometry.inner);
  arrays.Repeat(first, geometry.base, geometry.columns);
}

class ForwardJob {
 public:
  explicit ForwardJob(const ForwardCall& call)
      : call_(call),
        problem_(call.problem),
        kernels_(ForwardKernelsFor(problem_.dtype)),
        bytes_(call.bytes()),
        geometry_(problem_, bytes_),
        weight_(problem_.dtype, call.affine.weight, 1),
        bias_(problem_.dtype, call.affine.bias, 0),
        constants_(problem_, CoefficientKernelsFor(problem_.dtype), problem_.num_sets()),
        arrays_(problem_.dtype, geometry_.outer * geometry_.columns, 3) {
    tensors_ = call.tensors();
    tensors_.ahead = AheadInOrder(bytes_, problem_);
  }

  Outcome Execute(const Context& context) {
    if (reduces()) partials_.Allocate(geometry_);
    return Run(*this, {geometry_.outer, geometry_.chunks(), bytes_}, context);
  }

  bool reduces() const { return call_.by_batch(); }
  bool applies() const { return call_.y != nullptr; }

  void Reduce(int64_t unit, int64_t index) {
    const auto chunk = geometry_.ChunkAt(unit, index);
    alignas(kLineBytes) double scratch[3 * kTile];
    kernels_.moments_of_columns(At(geometry_, call_.x, chunk.begin), chunk.matrix, scratch,
                                partials_.First(chunk.partial), partials_.Second(chunk.partial));
  }

  void Finish(int64_t unit) {
    if (reduces()) WriteMoments(unit);
    const int64_t first_set = unit * geometry_.sets;
    if (reduces()) {
      constants_.Find(first_set, geometry_.sets, call_.moments);
    } else {
      constants_.Find(first_set, geometry_.sets, call_.statistics, /*of_batch=*/false);
    }
    constants_.SetForward(first_set, geometry_.sets, weight_, bias_, arrays_,
                          unit * geometry_.columns);
    SpreadChannels(geometry_, unit, arrays_);
  }

  void Apply(int64_t unit, int64_t index) {
    const auto chunk = geometry_.ChunkAt(unit, index);
    const Coefficients coefficients = arrays_.From(unit * geometry_.columns + chunk.first_column);
    if (chunk.tail.columns != 0) {
      kernels_.normalize_columns(tensors_, chunk.tail_begin, chunk.tail, coefficients);
    }
    kernels_.normalize_columns(tensors_, chunk.begin, chunk.matrix, coefficients);
  }

 private:
  // Merges what the chunks found: first the chunks of each column, then the columns of
  // each channel, then the channels of each set.
  void WriteMoments(int64_t unit) {
    double* mean = partials_.First(geometry_.PartialAt(unit, 0));
    double* m2 = partials_.Second(geometry_.PartialAt(unit, 0));
    double count = static_cast<double>(std::min(geometry_.rows_of_chunk, geometry_.rows));
    for (int64_t chunk = 1; chunk < geometry_.row_chunks; ++chunk) {
      const int64_t first_row = chunk * geometry_.rows_of_chunk;
      const double more =
          static_cast<double>(std::min(geometry_.rows_of_chunk, geometry_.rows - first_row));
      kernels_.merge_columns(geometry_.columns, count, mean, m2, more,
                             partials_.First(geometry_.PartialAt(unit, chunk)),
                             partials_.Second(geometry_.PartialAt(unit, chunk)));
      count += more;
    }
    MergeFolded(geometry_, [&](int64_t columns, double done, double more, int64_t from) {
      kernels_.merge_columns(columns, count * done, mean, m2, count * more, mean + from, m2 + from);
    });
    count *= static_cast<double>(geometry_.columns / geometry_.base);
    if (geometry_.columns_of_set() > 1 || geometry_.tail_columns > 0)
      MergeSets(unit, count, mean, m2);
    double* const means = call_.moments.mean + unit * geometry_.sets;
    double* const m2s = call_.moments.m2 + unit * geometry_.sets;
    const double elements = static_cast<double>(problem_.set_size());
    for (int64_t set = 0; set < geometry_.sets; ++set) {
      const SetMoments moments = CenteredAsAsked(problem_, {elements, mean[set], m2[set]});
      means[set] = moments.mean;
      m2s[set] = moments.m2;
    }
    if (AllAreSound(problem_, geometry_.sets, m2s)) return;
    for (int64_t set = 0; set < geometry_.sets; ++set) {
      if (AreSound(problem_, m2s[set])) continue;
      const SetMoments moments = ExactMomentsOf(problem_, call_.x, unit * geometry_.sets + set);
      means[set] = moments.mean;
      m2s[set] = moments.m2;
    }
  }

  // From the moments of `count` rows' columns to those of sets, those of the tail among them.
  void MergeSets(int64_t unit, double count, double* mean, double* m2) const {
    const std::vector<double> tail = ValuesOfTail(unit);
    const int64_t columns = geometry_.columns_of_set();
    for (int64_t set = 0; set < geometry_.sets; ++set) {
      const int64_t first = set * columns;
      PartialMoments of_set{count, mean[first], m2[first]};
      for (int64_t j = first + 1; j < first + columns; ++j) of_set.Merge({count, mean[j], m2[j]});
      for (int64_t row = first; row < geometry_.tail_columns; row += geometry_.base) {
        for (int64_t j = row; j < std::min(row + columns, geometry_.tail_columns); ++j) {
          of_set.Merge({1, tail[static_cast<size_t>(j)], 0});
        }
      }
      mean[set] = of_set.mean;
      m2[set] = of_set.m2;
    }
  }

  // Those of the last rows, which do not fill a folded one.
  std::vector<double> ValuesOfTail(int64_t unit) const {
    const int64_t columns = geometry_.tail_columns;
    std::vector<double> values(static_cast<size_t>(columns)), m2(values);
    const int64_t begin = unit * geometry_.matrix_size() + geometry_.rows * geometry_.columns;
    kernels_.moments_of_columns(At(geometry_, call_.x, begin), {1, columns, columns}, nullptr,
                                values.data(), m2.data());
    return values;
  }

  const ForwardCall& call_;
  const NormProblem& problem_;
  const ForwardKernels& kernels_;
  const int64_t bytes_;  // of all tensors
  const Geometry geometry_;
  const Parameter weight_;
  const Parameter bias_;
  ChannelConstants constants_;  // [unit][channel]
  CoefficientArrays arrays_;    // [unit][column]
  ForwardTensors tensors_;
  Partials partials_;  // means and sums of squared deviations
};

class BackwardJob {
 public:
  explicit BackwardJob(const BackwardCall& call)
      : call_(call),
        args_(call.args),
        problem_(call.problem),
        kernels_(BackwardKernelsFor(problem_.dtype)),
        bytes_(call.bytes()),
        geometry_(problem_, bytes_),
        weight_(problem_.dtype, args_.weight, 1),
        constants_(problem_, CoefficientKernelsFor(problem_.dtype), problem_.num_sets()),
        arrays_(problem_.dtype, geometry_.outer * geometry_.columns, 4) {
    tensors_ = call.tensors();
    tensors_.ahead = AheadInOrder(bytes_, problem_);
    apply_tensors_ = tensors_;
    if (!args_.statistics_of_batch) apply_tensors_.x = nullptr;  // dx = dy * scale
  }

  Outcome Execute(const Context& context) {
    constants_.Find(0, problem_.num_sets(), args_.statistics, args_.statistics_of_batch);
    for (int64_t unit = 0; unit < geometry_.outer; ++unit) {
      if (reduces()) {
        constants_.SetShifts(unit * geometry_.sets, geometry_.sets, arrays_,
                             unit * geometry_.columns);
        SpreadChannels(geometry_, unit, arrays_);
      } else {
        SetCoefficients(unit, nullptr, nullptr);
      }
    }
    if (reduces()) {
      partials_.Allocate(geometry_);
      sums_ = Scratch(static_cast<size_t>(kSumKinds * channels_of_all()) * sizeof(double));
    }
    const Outcome outcome = Run(*this, {geometry_.outer, geometry_.chunks(), bytes_}, context);
    if (outcome == Outcome::kOk && reduces()) WriteParameterGradients();
    return outcome;
  }

  bool reduces() const { return call_.wants_sums(); }
  bool applies() const { return call_.wants_elements(); }

  void Reduce(int64_t unit, int64_t index) {
    const auto chunk = geometry_.ChunkAt(unit, index);
    alignas(kLineBytes) double scratch[3 * kTile];
    const void* shift = arrays_.From(unit * geometry_.columns + chunk.first_column).shift;
    double* dy = partials_.First(chunk.partial);
    double* dy_d = partials_.Second(chunk.partial);
    std::fill_n(dy, chunk.matrix.columns, 0);
    std::fill_n(dy_d, chunk.matrix.columns, 0);
    kernels_.sums_of_columns(tensors_, chunk.begin, chunk.matrix, shift, scratch, dy, dy_d);
    if (chunk.tail.columns != 0) {
      kernels_.sums_of_columns(tensors_, chunk.tail_begin, chunk.tail, shift, scratch, dy, dy_d);
    }
  }

  void Finish(int64_t unit) {
    if (!reduces()) return;
    double* const sum_g = SumsFrom(kSumG, unit);
    double* const sum_gx = SumsFrom(kSumGx, unit);
    MergeSums(unit, sum_g, sum_gx);
    SetCoefficients(unit, sum_g, sum_gx);
  }

  void Apply(int64_t unit, int64_t index) {
    const auto chunk = geometry_.ChunkAt(unit, index);
    const Coefficients coefficients = arrays_.From(unit * geometry_.columns + chunk.first_column);
    if (chunk.tail.columns != 0) {
      kernels_.gradient_of_columns(apply_tensors_, chunk.tail_begin, chunk.tail, coefficients);
    }
    kernels_.gradient_of_columns(apply_tensors_, chunk.begin, chunk.matrix, coefficients);
  }

 private:
  enum SumKind { kGradWeight, kGradBias, kSumG, kSumGx, kSumKinds };
  int64_t channels_of_all() const { return geometry_.outer * geometry_.channels; }
  double* SumsFrom(SumKind kind, int64_t unit) const {
    return sums_.Get<double>() + kind * channels_of_all() + unit * geometry_.channels;
  }

  void SetCoefficients(int64_t unit, const double* sum_g, const double* sum_gx) {
    constants_.SetBackward(unit * geometry_.sets, geometry_.sets, weight_, sum_g, sum_gx, arrays_,
                           unit * geometry_.columns);
    SpreadChannels(geometry_, unit, arrays_);
  }

  // From the chunks' sums to those of each channel, and of its set.
  void MergeSums(int64_t unit, double* sum_g, double* sum_gx) {
    double* dy = partials_.First(geometry_.PartialAt(unit, 0));
    double* dy_d = partials_.Second(geometry_.PartialAt(unit, 0));
    for (int64_t chunk = 1; chunk < geometry_.row_chunks; ++chunk) {
      const int64_t more = geometry_.PartialAt(unit, chunk);
      AddEach(geometry_.columns, partials_.First(more), dy);
      AddEach(geometry_.columns, partials_.Second(more), dy_d);
    }
    MergeFolded(geometry_, [&](int64_t columns, double, double, int64_t from) {
      for (double* sums : {dy, dy_d}) AddEach(columns, sums + from, sums);
    });
    const int64_t channels = geometry_.channels;
    for (double* sums : {dy, dy_d}) SumEach(sums, channels, geometry_.inner);
    std::copy_n(dy, channels, SumsFrom(kGradBias, unit));
    constants_.FindGradients(unit * geometry_.sets, geometry_.sets, weight_, dy, dy_d,
                             SumsFrom(kGradWeight, unit), sum_g, sum_gx);
    for (double* sums : {sum_g, sum_gx}) {
      SumEach(sums, geometry_.sets, geometry_.channels_of_set);
      SpreadEach(sums, geometry_.sets, geometry_.channels_of_set);
    }
  }

  void WriteParameterGradients() {
    const int64_t samples = geometry_.outer, channels = geometry_.channels;
    const DType dtype = problem_.dtype;
    ParameterGradient(dtype, args_.grad_weight)
        .SetSums(SumsFrom(kGradWeight, 0), samples, channels);
    ParameterGradient(dtype, args_.grad_bias).SetSums(SumsFrom(kGradBias, 0), samples, channels);
  }

  const BackwardCall& call_;
  const BackwardArgs& args_;
  const NormProblem& problem_;
  const BackwardKernels& kernels_;
  const int64_t bytes_;  // of all tensors
  const Geometry geometry_;
  const Parameter weight_;
  ChannelConstants constants_;  // [unit][channel]
  CoefficientArrays arrays_;    // [unit][column]
  BackwardTensors tensors_;
  BackwardTensors apply_tensors_;
  Partials partials_;  // dy and dy * (x - shift)
  Scratch sums_;       // [kind][unit][channel]
};

}  // namespace

Outcome ForwardByColumns(const ForwardCall& call, const Context& context) {
  return ForwardJob(call).Execute(context);
}

// A range is cut where a sample with sets of its own ends. Within one, rows are counted
// from the first element, so that all of them are whole but the last.
Outcome RangeByColumns(const RangeCall& call, const Context& context) {
  const NormProblem& problem = call.problem;
  const bool per_channel = problem.reduction == Reduction::kPerChannel;
  const bool channels_last = problem.format == MemoryFormat::kChannelsLast;
  const int64_t inner = channels_last ? 1 : problem.positions;
  const int64_t base = problem.channels * inner;
  const int64_t sample = per_channel ? problem.size() : problem.channels * problem.positions;
  const Parameter weight(problem.dtype, call.args.affine.weight, 1);
  const Parameter bias(problem.dtype, call.args.affine.bias, 0);
  const ForwardKernels& kernels = ForwardKernelsFor(problem.dtype);
  ForwardTensors tensors = call.tensors();
  tensors.ahead = AheadInOrder(call.bytes(), problem);

  for (int64_t done = 0; done < call.args.count;) {
    const int64_t first = call.args.first + done;
    const int64_t count = std::min(call.args.count - done, sample - first % sample);
    const int64_t first_set = per_channel ? 0 : first / sample * problem.groups;
    const int64_t repeat = std::min(base, count);
    const int64_t columns = repeat * (repeat < base ? 1 : FoldOf(base, count / base));
    const int64_t sets = per_channel ? problem.channels : problem.groups;
    ChannelConstants constants(problem, CoefficientKernelsFor(problem.dtype), sets);
    constants.Find(0, sets, call.args.statistics, call.args.statistics_of_batch, first_set);
    CoefficientArrays arrays(problem.dtype, columns, 3);
    for (int64_t j = 0; j < repeat; ++j) {
      const int64_t c = (first + j) % base / inner;
      SetForward(arrays, j, constants[c], weight[c], bias[c]);
    }
    arrays.Repeat(0, repeat, columns);
    const int64_t rows = count / columns;
    const int64_t rows_of_chunk = std::max<int64_t>(
        1, kLargestChunkBytes / (columns * static_cast<int64_t>(SizeOf(problem.dtype))));
    const Outcome outcome = RunParts(
        (rows + rows_of_chunk - 1) / rows_of_chunk, call.bytes(), context, [&](int64_t chunk) {
          const int64_t row = chunk * rows_of_chunk;
          kernels.normalize_columns(tensors, done + row * columns,
                                    {std::min(rows_of_chunk, rows - row), columns, columns},
                                    arrays.From(0));
        });
    if (outcome != Outcome::kOk) return outcome;
    if (const int64_t rest = count - rows * columns; rest > 0) {
      kernels.normalize_columns(tensors, done + rows * columns, {1, rest, rest}, arrays.From(0));
      FlushStreams();
    }
    done += count;
  }
  return Outcome::kOk;
}

Outcome BackwardByColumns(const BackwardCall& call, const Context& context) {
  return BackwardJob(call).Execute(context);
}

}  // namespace normd::cpu
