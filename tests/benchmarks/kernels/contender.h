// What is timed beside each other: ours, oneDNN, and the machine's own limit, on
// one problem. A C interface, so that bench.py can time PyTorch in the same process.
#ifndef NORMD_TESTS_BENCHMARKS_KERNELS_CONTENDER_H_
#define NORMD_TESTS_BENCHMARKS_KERNELS_CONTENDER_H_

#include <cstdint>
#include <memory>

extern "C" {

enum BenchOperation { kEval, kTrainForward, kBackward };
enum BenchLayer { kBatchNorm, kLayerNorm, kGroupNorm, kInstanceNorm, kRmsNorm };

// Tensors are (batch, channels, positions), in NCHW or NHWC; LayerNorm's and
// RMSNorm's rows are (batch, channels, 1). bench.py has the same struct.
struct BenchCase {
  int32_t operation;
  int32_t layer;
  int32_t dtype;  // as normd::DType
  int32_t channels_last;
  int32_t fused;  // residual and ReLU
  int32_t threads;
  int64_t batch, channels, height, width;
  int64_t groups;
  void* x;
  void* y;  // or grad_x
  void* grad_y;
  void* residual;  // or grad_residual
};

struct Contender;

// Null where it has no such thing.
Contender* bench_ours(const BenchCase* bench);
Contender* bench_onednn(const BenchCase* bench, int32_t blocked);
// `reads` times through memory, then `inputs` read and `outputs` written.
Contender* bench_floor(const BenchCase* bench, int32_t reads, int32_t inputs, int32_t outputs,
                       int32_t stream);
// With what must be computed, and a set read once before it is read and written: see floor.cc.
Contender* bench_bound(const BenchCase* bench, int32_t inputs, int32_t outputs, int32_t stream);
void bench_free(Contender* contender);
// Seconds that `count` runs take: of the clock, or of this thread's processor time.
double bench_run(Contender* contender, int64_t count, int32_t processor_time);

// 2 MiB aligned, on huge pages where the system has them, touched.
void* bench_allocate(int64_t bytes);
void bench_deallocate(void* memory, int64_t bytes);
// Pseudo-random normal-like values.
void bench_fill(void* memory, int32_t dtype, int64_t count, double mean, uint32_t seed);
// Whether malloc keeps large blocks for reuse instead of giving them back.
void bench_keep_memory(int32_t keep);
const char* bench_instruction_set();
}

struct Contender {
  virtual ~Contender() = default;
  virtual void Run() = 0;
};

#endif  // NORMD_TESTS_BENCHMARKS_KERNELS_CONTENDER_H_
