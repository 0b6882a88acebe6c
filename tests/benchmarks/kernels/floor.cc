// The machine's own limit: the same bytes read and written, and nothing computed.
#include <atomic>
#include <cstring>
#include <vector>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "kernels/dtype.h"
#include "kernels/tbb_executor.h"
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

template <int kInputs, bool kStream>
NORMD_WIDE void CombineWide(char* to, const char* const* from, int64_t bytes) {
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
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

class Floor final : public Contender {
 public:
  Floor(const BenchCase& bench, int reads, int inputs, int outputs, bool stream)
      : executor_(bench.threads),
        threads_(bench.threads),
        bytes_(bench.batch * bench.channels * bench.height * bench.width *
               static_cast<int64_t>(SizeOf(static_cast<DType>(bench.dtype)))),
        reads_(reads),
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

  void Run() override {
    const int64_t part = (bytes_ / threads_ + 255) / 256 * 256;
    executor_.ParallelFor(threads_, [&](int64_t k) {
      const int64_t begin = k * part;
      const int64_t bytes = std::min(part, bytes_ - begin);
      if (bytes <= 0) return;
      for (int read = 0; read < reads_; ++read) ReadOnce(from_[read] + begin, bytes);
      const char* from[2] = {from_[0] + begin, inputs_ > 1 ? from_[1] + begin : nullptr};
      for (int out = 0; out < outputs_; ++out) {
        // A second output costs its writes alone.
        const char* source[2] = {from[out == 0 ? 0 : 1], from[1]};
        Write(to_[out] + begin, source, out == 0 ? inputs_ : 1, bytes);
      }
    });
  }

 private:
  void ReadOnce(const char* from, int64_t bytes) const {
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

  void Write(char* to, const char* const* from, int inputs, int64_t bytes) const {
#if defined(__x86_64__)
    if (HasWide()) {
      if (stream_) {
        inputs == 1 ? CombineWide<1, true>(to, from, bytes) : CombineWide<2, true>(to, from, bytes);
      } else {
        inputs == 1 ? CombineWide<1, false>(to, from, bytes)
                    : CombineWide<2, false>(to, from, bytes);
      }
      return;
    }
#endif
    inputs == 1 ? CombinePlain<1>(to, from, bytes) : CombinePlain<2>(to, from, bytes);
  }

  TbbExecutor executor_;
  int threads_;
  int64_t bytes_;
  int reads_, inputs_, outputs_;
  bool stream_;
  const char* from_[2];
  char* to_[2];
};

}  // namespace
}  // namespace normd

extern "C" Contender* bench_floor(const BenchCase* bench, int32_t reads, int32_t inputs,
                                  int32_t outputs, int32_t stream) {
  return new normd::Floor(*bench, reads, inputs, outputs, stream != 0);
}
