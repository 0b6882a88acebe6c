// The inner loops of the CPU backend, one table a data type, compiled for each
// instruction set and chosen at run time. They see memory, not norms: runs of
// contiguous values, columns of a matrix, planes with a coefficient each. Which of
// them a problem needs, and on which thread, is decided in planes.cc, columns.cc
// and rows.cc.
//
// "Coefficients" and scratch are arrays of the type that is computed in: float,
// or double for float64 tensors. Offsets, counts and strides are in elements.
#ifndef NORMD_KERNELS_CPU_KERNELS_H_
#define NORMD_KERNELS_CPU_KERNELS_H_

#include <cstdint>
#include <functional>

#include "kernels/dtype.h"
#include "kernels/moments.h"
#include "kernels/set_constants.h"

namespace normd::cpu {

// Where memory is read and written in turns: what a processor can have under way.
inline constexpr int64_t kBytesInTurn = 4096;

// `count` runs of `length` contiguous elements, `stride` apart.
struct Runs {
  int64_t count;
  int64_t length;
  int64_t stride;
  int64_t ahead = 0;                  // as in ForwardTensors
  int64_t turn_bytes = kBytesInTurn;  // read between two calls of Meanwhile
};

// `rows` rows of `columns` contiguous elements, `stride` apart.
struct Matrix {
  int64_t rows;
  int64_t columns;
  int64_t stride;
  bool near = false;  // in the L2: fetching ahead by hand costs more than it brings
};

// What an element is made into, with d = x - shift:
//   forward    y  = d * scale + offset
//   backward   dx = dy * scale + (d * slope + offset)
// shift is near the mean (shift.h), so that d is exact where |mean| >> deviation;
// what it misses is in offset.
struct Coefficients {
  const void* shift = nullptr;
  const void* scale = nullptr;
  const void* offset = nullptr;
  const void* slope = nullptr;  // backward only
  // All of them, of columns, in the order of pairs (walk-inl.h). Null: not at hand.
  const void* paired = nullptr;
};

// Values of memory that spread() needs for so many columns.
constexpr int64_t SpreadValues(int64_t columns) { return 8 * (columns + 64); }

// A dense range of planes of `plane_size` elements, each with the coefficients at
// its index. plane_size is kSmallestPlane or more, so that a vector meets two
// planes at most.
inline constexpr int64_t kSmallestPlane = 16;
struct Planes {
  int64_t begin;  // offset of the first element, in the tensor
  int64_t count;  // elements
  int64_t plane_size;
  int64_t first_plane;  // index of the first element's plane, in the coefficients
  int64_t skip;         // elements of that plane before `begin`
};

// What lies along the rows of a LayerNorm: arrays of a sample's elements, which its rows take in
// turn.
struct AlongRows {
  int64_t length = 0;      // of a row
  int64_t parameters = 0;  // of the arrays: a row or several
  const void* weight = nullptr;
  const void* bias = nullptr;   // null: 0
  void* grad_weight = nullptr;  // both or none
  void* grad_bias = nullptr;
  bool wants_bias = true;  // else grad_bias may be left as it is
  bool in_pairs = false;   // the arrays are in the order of in_pairs()
  bool constant = false;   // constant statistics: dx = dy * (weight * invstd)
  bool center = true;      // as in NormProblem
};

// What rows are normalized by, arrays with a value a row, of kMostRows each.
//   forward    y  = (d * invstd + lost) * weight + bias,   lost = (shift - mean) * invstd
//   backward   dx = dy * (weight * invstd) + (d * slope + offset)
// and, in backward, grad_weight += dy * (d * invstd + lost), grad_bias += dy.
struct RowConstants {
  void* shift = nullptr;
  void* invstd = nullptr;
  void* lost = nullptr;
  void* slope = nullptr;  // these two: backward only
  void* offset = nullptr;
};

// Where rows are summed, the `ahead` of what comes next.
inline constexpr int64_t kNextBytes = 512;

// Neighbouring rows.
inline constexpr int64_t kMostRows = 64;
struct Rows {
  int64_t begin = 0;      // of the first, in the tensors
  int64_t parameter = 0;  // of the first, in the arrays along rows
  int64_t count = 0;      // kMostRows or fewer
  RowConstants constants = {};
  // The sums along rows begin with so many of the first ones: whatever is there is no sum yet.
  int64_t fresh = 0;
};

// A value a row. The variance is m2 / elements.
struct RowStatistics {
  const double* mean;  // null: 0
  const double* m2;
  double elements;
  double eps;
};

// A value a set. The variance is m2 / elements.
struct SetStatistics {
  const double* mean;  // null: 0
  const double* m2;
  double elements;
  double eps;
  bool zero_if_constant;  // 1 / 0 is 0: see SetConstants
};

// SetConstants, an array of each.
struct SetConstantArrays {
  double* shift;
  double* residual;
  double* invstd;
};

// What coefficients are made of, arrays with a value a channel.
struct Channels {
  SetConstantArrays constants;    // of its set
  const void* weight;             // in the computing type; null: 1
  const void* bias = nullptr;     // forward only; null: 0
  const double* sum_g = nullptr;  // backward only: as in SetGradient, of its set; null: 0, both
  const double* sum_gx = nullptr;
  double elements = 1;  // of a set
  bool center = true;   // as in NormProblem
};

// Coefficients to be written, a value a channel.
struct MutableCoefficients {
  void* shift = nullptr;
  void* scale = nullptr;  // null: the shifts alone
  void* offset = nullptr;
  void* slope = nullptr;  // null: forward's
};

struct ForwardTensors {
  const void* x = nullptr;
  void* y = nullptr;
  const void* residual = nullptr;
  bool relu = false;
  uint8_t* relu_mask = nullptr;
  bool stream = false;  // write past the cache
  // From an element read to one that will be wanted in a while: fetched into the
  // cache, by rows into L1. 0: none.
  int64_t ahead = 0;
};

struct BackwardTensors {
  const void* x = nullptr;  // null: not needed (constant statistics)
  const void* grad_y = nullptr;
  void* grad_x = nullptr;  // null: not wanted
  void* grad_residual = nullptr;
  const uint8_t* relu_mask = nullptr;
  bool stream = false;
  int64_t ahead = 0;
};

// Called now and then while sums are taken, with the number of elements that were read since: so
// that memory is written while it is read. May be empty.
using Meanwhile = std::function<void(int64_t elements)>;

// Where sums of several parts go.
struct Totals {
  const double* before;  // added to them; null: nothing
  double* after;
  void* rounded;  // not null: in the computing type, instead of `after`
};

// What both directions need before they write.
struct CoefficientKernels {
  void (*constants_of_sets)(const SetStatistics& statistics, int64_t count,
                            const SetConstantArrays& to);
  void (*coefficients_of_channels)(const Channels& channels, int64_t count,
                                   const MutableCoefficients& to);
  // From the sums of dy and of dy * (x - shift): GradWeight(), weight * dy, weight * grad_weight.
  void (*gradients_of_channels)(const Channels& channels, int64_t count, const double* dy,
                                const double* dy_d, double* grad_weight, double* g, double* gx);
  // The coefficients of `planes` planes as those of columns, one a position. `memory`:
  // SpreadValues(planes * plane_size) values, where a cache line begins.
  Coefficients (*spread)(const Coefficients& of_planes, int64_t planes, int64_t plane_size,
                         void* memory);
};

struct ForwardKernels {
  // Of each of `sets` sets whose runs follow each other: set s has the runs that begin
  // s * runs.length further on.
  void (*moments_of_runs)(const void* x, int64_t sets, const Runs& runs, PartialMoments* moments,
                          const Meanwhile& meanwhile);
  // Of each column; `scratch`: 3 * columns values.
  void (*moments_of_columns)(const void* x, const Matrix& matrix, void* scratch, double* mean,
                             double* m2);
  // PartialMoments::Merge() of each column; all have the same counts.
  void (*merge_columns)(int64_t columns, double count, double* mean, double* m2, double more_count,
                        const double* more_mean, const double* more_m2);
  void (*normalize_planes)(const ForwardTensors& tensors, const Planes& planes,
                           const Coefficients& coefficients);
  // The matrix's first element is `begin` elements into the tensors.
  void (*normalize_columns)(const ForwardTensors& tensors, int64_t begin, const Matrix& matrix,
                            const Coefficients& coefficients);
  // Writes an array along a row in the order in which rows are computed. Null: as it is.
  void (*in_pairs)(const void* values, int64_t count, void* to);
  void (*constants_of_rows)(const RowStatistics& statistics, int64_t count, const RowConstants& to);
  // Writes rows, and in the same loop finds the moments of the next ones; of either there may be
  // none.
  void (*forward_rows)(const ForwardTensors& tensors, const AlongRows& along, const Rows& now,
                       const Rows& next, double* mean, double* m2);
};

struct BackwardKernels {
  // Of each of `sets` sets as above, from element `begin` of the tensors on; `shift`: a
  // value a set.
  void (*sums_of_runs)(const BackwardTensors& tensors, int64_t begin, int64_t sets,
                       const Runs& runs, const double* shift, GradientSums* sums,
                       const Meanwhile& meanwhile);
  // Added to sums of each column; `scratch`: 3 * columns values.
  void (*sums_of_columns)(const BackwardTensors& tensors, int64_t begin, const Matrix& matrix,
                          const void* shift, void* scratch, double* dy, double* dy_d);
  // Adds up `parts` arrays, `stride` apart, in doubles. Totals are not in pairs.
  void (*add_up)(const void* parts_data, int64_t parts, int64_t stride, int64_t count,
                 bool in_pairs, const Totals& totals);
  void (*gradient_of_planes)(const BackwardTensors& tensors, const Planes& planes,
                             const Coefficients& coefficients);
  void (*gradient_of_columns)(const BackwardTensors& tensors, int64_t begin, const Matrix& matrix,
                              const Coefficients& coefficients);
  // Writes the gradients of rows, and in the same loop takes the sums of the next ones, adding to
  // the gradients along rows, if wanted; of either there may be none. `statistics`: of the next.
  // Fills in the next ones' constants.
  void (*backward_rows)(const BackwardTensors& tensors, const AlongRows& along, const Rows& now,
                        const Rows& next, const RowStatistics& statistics);
};

// Of this machine's best instruction set.
const CoefficientKernels& CoefficientKernelsFor(DType dtype);
const ForwardKernels& ForwardKernelsFor(DType dtype);
const BackwardKernels& BackwardKernelsFor(DType dtype);

// Its name: "AVX3" (AVX-512), "AVX2", "SSE4", "SCALAR".
const char* InstructionSet();

}  // namespace normd::cpu

#endif  // NORMD_KERNELS_CPU_KERNELS_H_
