// The machine's own limit: the same bytes read and written, and nothing computed.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "kernels/cpu/cache.h"
#include "kernels/dtype.h"
#include "kernels/thread_pool.h"
#include "tests/benchmarks/kernels/contender.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define NORMD_WIDE __attribute__((target("avx512f,avx512vl")))
#define NORMD_MIDDLE __attribute__((target("avx2")))
#endif

namespace normd {
namespace {

// AVX-512 where there is one, else what the compiler makes of plain loops.
using Read = void (*)(const char* from, int64_t bytes);
// to = a ^ b ^ c (those that are there).
using Combine = void (*)(char* to, const char* const* from, int inputs, int64_t bytes);

std::atomic<uint64_t> g_sink;

#if defined(__x86_64__)
NORMD_WIDE void ReadWide(const char* from, int64_t bytes) {
  __m512i sum[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int k = 0; k < 4; ++k) {
      sum[k] = _mm512_xor_si512(sum[k], _mm512_loadu_si512(from + i + 64 * k));
    }
  }
  const __m512i all =
      _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, all);
  g_sink.store(lanes[0] ^ lanes[7], std::memory_order_relaxed);
}

// What lies `ahead` bytes further is fetched, if that is not 0.
template <int kInputs, bool kStream>
NORMD_WIDE void CombineWide(char* to, const char* const* from, int64_t bytes, int64_t ahead) {
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    for (int k = 0; ahead != 0 && k < kInputs; ++k) {
      _mm_prefetch(from[k] + i + ahead, _MM_HINT_T1);
    }
    __m512i value = _mm512_loadu_si512(from[0] + i);
    for (int k = 1; k < kInputs; ++k) {
      value = _mm512_xor_si512(value, _mm512_loadu_si512(from[k] + i));
    }
    if (kStream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), value);
    } else {
      _mm512_storeu_si512(to + i, value);
    }
  }
  if (kStream) _mm_sfence();
}
#endif

template <int kInputs>
void CombinePlain(char* to, const char* const* from, int64_t bytes) {
  if (kInputs == 1) {
    std::memcpy(to, from[0], static_cast<size_t>(bytes));
    return;
  }
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    uint64_t value = 0;
    for (int k = 0; k < kInputs; ++k) {
      uint64_t more;
      std::memcpy(&more, from[k] + i, 8);
      value ^= more;
    }
    std::memcpy(to + i, &value, 8);
  }
}

bool HasWide() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512vl") != 0;
#else
  return false;
#endif
}

// The tensors of a case, and passes over them.
class Passes : public Contender {
 protected:
  Passes(const BenchCase& bench, int inputs, int outputs, bool stream)
      : executor_(bench.threads),
        threads_(bench.threads),
        element_bytes_(static_cast<int64_t>(SizeOf(static_cast<DType>(bench.dtype)))),
        bytes_(bench.batch * bench.channels * bench.height * bench.width * element_bytes_),
        inputs_(inputs),
        outputs_(outputs),
        stream_(stream) {
    const char* grad = static_cast<const char*>(bench.grad_y);
    const char* residual = static_cast<const char*>(bench.residual);
    from_[0] = static_cast<const char*>(bench.x);
    from_[1] = grad != nullptr && bench.operation == kBackward ? grad : residual;
    to_[0] = static_cast<char*>(bench.y);
    to_[1] = static_cast<char*>(bench.residual);
  }

  void Read(int input, int64_t begin, int64_t bytes) const {
    const char* from = from_[input] + begin;
#if defined(__x86_64__)
    if (HasWide()) return ReadWide(from, bytes);
#endif
    uint64_t sum = 0;
    for (int64_t i = 0; i + 8 <= bytes; i += 8) {
      uint64_t more;
      std::memcpy(&more, from + i, 8);
      sum ^= more;
    }
    g_sink.store(sum, std::memory_order_relaxed);
  }

  // All outputs from all inputs. A second output costs its writes alone.
  void Write(int64_t begin, int64_t bytes, int64_t ahead) const {
    const char* from[2] = {from_[0] + begin, inputs_ > 1 ? from_[1] + begin : nullptr};
    for (int out = 0; out < outputs_; ++out) {
      const char* source[2] = {from[out == 0 ? 0 : 1], from[1]};
      Combine(to_[out] + begin, source, out == 0 ? inputs_ : 1, bytes, out == 0 ? ahead : 0);
    }
  }

  ThreadPool executor_;
  int threads_;
  int64_t element_bytes_, bytes_;
  int inputs_, outputs_;

 private:
  void Combine(char* to, const char* const* from, int inputs, int64_t bytes, int64_t ahead) const {
#if defined(__x86_64__)
    if (HasWide()) {
      if (stream_ && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        inputs == 1 ? CombineWide<1, true>(to, from, bytes, ahead)
                    : CombineWide<2, true>(to, from, bytes, ahead);
      } else {
        inputs == 1 ? CombineWide<1, false>(to, from, bytes, ahead)
                    : CombineWide<2, false>(to, from, bytes, ahead);
      }
      return;
    }
#endif
    (void)ahead;
    inputs == 1 ? CombinePlain<1>(to, from, bytes) : CombinePlain<2>(to, from, bytes);
  }

  bool stream_;
  const char* from_[2];
  char* to_[2];
};

class Floor final : public Passes {
 public:
  Floor(const BenchCase& bench, int reads, int inputs, int outputs, bool stream)
      : Passes(bench, inputs, outputs, stream), reads_(reads) {}

  void Run() override {
    const int64_t part = (bytes_ / threads_ + 255) / 256 * 256;
    executor_.ParallelFor(threads_, [&](int64_t k) {
      const int64_t begin = k * part;
      const int64_t bytes = std::min(part, bytes_ - begin);
      if (bytes <= 0) return;
      for (int read = 0; read < reads_; ++read) Read(read, begin, bytes);
      Write(begin, bytes, 0);
    });
  }

 private:
  int reads_;
};

// As any kernel must that has to know a set's sums before it can write its first element:
// a piece of the tensors is read, then read again and written, while the next piece is
// fetched. A piece is some sets that fit the cache together; in NHWC, where all sets end
// at once, it is all there is, and the second pass walks back from the end.
class Bound final : public Passes {
 public:
  Bound(const BenchCase& bench, int inputs, int outputs, bool stream)
      : Passes(bench, inputs, outputs, stream) {
    const int64_t positions = bench.height * bench.width;
    const bool per_channel = bench.layer == kBatchNorm;
    whole_ = bench.channels_last != 0 && per_channel;
    runs_ = per_channel ? bench.batch : 1;
    sets_ = bench.channels;
    run_bytes_ = positions * element_bytes_;
    if (!per_channel) {
      const bool rows = bench.layer == kLayerNorm || bench.layer == kRmsNorm;
      sets_ = bench.batch * (rows ? 1 : bench.groups);
      run_bytes_ = bytes_ / sets_;
    }
    const int64_t set_bytes = runs_ * run_bytes_ * inputs;
    unit_sets_ = std::clamp<int64_t>(std::clamp(sets_ * set_bytes / 16, kSmallestUnit,
                                                std::max(kSmallestUnit, cpu::LargestReadTwice())) /
                                         set_bytes,
                                     1, sets_);
  }

  void Run() override {
    if (whole_) return RunWhole();
    const int64_t units = (sets_ + unit_sets_ - 1) / unit_sets_;
    executor_.ParallelFor(units, [&](int64_t unit) {
      const int64_t first = unit * unit_sets_;
      const int64_t bytes = std::min(unit_sets_, sets_ - first) * run_bytes_;
      const auto begin = [&](int64_t run) { return (run * sets_ + first) * run_bytes_; };
      for (int64_t run = 0; run < runs_; ++run) {
        for (int input = 0; input < inputs_; ++input) Read(input, begin(run), bytes);
      }
      const bool last = unit + 1 == units;
      for (int64_t run = 0; run < runs_; ++run) Write(begin(run), bytes, last ? 0 : bytes);
    });
  }

 private:
  static constexpr int64_t kSmallestUnit = int64_t{1} << 17;
  static constexpr int64_t kChunk = int64_t{1} << 20;

  void RunWhole() {
    const int64_t chunks = (bytes_ + kChunk - 1) / kChunk;
    const auto size = [&](int64_t chunk) { return std::min(kChunk, bytes_ - chunk * kChunk); };
    executor_.ParallelFor(chunks, [&](int64_t chunk) {
      for (int input = 0; input < inputs_; ++input) Read(input, chunk * kChunk, size(chunk));
    });
    executor_.ParallelFor(chunks, [&](int64_t i) {
      const int64_t chunk = chunks - 1 - i;
      Write(chunk * kChunk, size(chunk), 0);
    });
  }

  bool whole_;
  int64_t runs_, sets_, run_bytes_, unit_sets_;
};

}  // namespace
}  // namespace normd

extern "C" Contender* bench_floor(const BenchCase* bench, int32_t reads, int32_t inputs,
                                  int32_t outputs, int32_t stream) {
  return new normd::Floor(*bench, reads, inputs, outputs, stream != 0);
}

extern "C" Contender* bench_bound(const BenchCase* bench, int32_t inputs, int32_t outputs,
                                  int32_t stream) {
  return new normd::Bound(*bench, inputs, outputs, stream != 0);
}
