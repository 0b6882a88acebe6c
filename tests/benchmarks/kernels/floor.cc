// The machine's own limits: the same bytes read and written, with nothing computed (Floor), or
// with the arithmetic that no implementation can leave out (Bound).
#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "kernels/cpu/cache.h"
#include "kernels/dtype.h"
#include "kernels/thread_pool.h"
#include "tests/benchmarks/kernels/contender.h"

#if defined(__x86_64__)
// GCC 12 takes its own undefined vectors for ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#define NORMD_WIDE __attribute__((target("avx512f,avx512vl,avx512bw")))
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

// Two vectors of float32, of as many elements that are neighbours in memory.
struct Two {
  __m512 a, b;
};

#define NORMD_WIDE_INLINE NORMD_WIDE inline __attribute__((always_inline))
template <DType type>
NORMD_WIDE_INLINE Two Load(const char* from) {
  if constexpr (type == DType::kFloat32) {
    return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 64)};
  } else if constexpr (type == DType::kFloat16) {
    const auto half = [&](int i) NORMD_WIDE {
      return _mm512_cvtph_ps(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + int64_t{32} * i)));
    };
    return {half(0), half(1)};
  } else {
    const __m512i words = _mm512_loadu_si512(from);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)))};
  }
}

// To the nearest bfloat16, ties to even, in the upper half of each word; NaN stays one.
NORMD_WIDE_INLINE __m512i RoundedToUpper(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                               _mm512_set1_epi32(0x7fc00000));
}

template <bool kStream>
NORMD_WIDE_INLINE void StoreVector(char* to, __m512i v) {
  kStream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v) : _mm512_storeu_si512(to, v);
}

// Returns a bit for each element: whether it is not 0.
template <DType type, bool kStream>
NORMD_WIDE_INLINE uint32_t Store(char* to, Two v) {
  if constexpr (type == DType::kFloat32) {
    const __m512i a = _mm512_castps_si512(v.a), b = _mm512_castps_si512(v.b);
    StoreVector<kStream>(to, a);
    StoreVector<kStream>(to + 64, b);
    const uint32_t low = _mm512_test_epi32_mask(a, a);
    return low | static_cast<uint32_t>(_mm512_test_epi32_mask(b, b)) << 16;
  } else {
    __m512i both;
    if constexpr (type == DType::kFloat16) {
      const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
      both = _mm512_inserti64x4(low, _mm512_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT), 1);
    } else {
      const __m512i low = _mm512_srli_epi32(RoundedToUpper(v.a), 16);
      both = _mm512_mask_mov_epi16(low, 0xaaaaaaaa, RoundedToUpper(v.b));
    }
    StoreVector<kStream>(to, both);
    return _mm512_test_epi16_mask(both, both);
  }
}

constexpr int64_t BytesOfTwo(DType type) { return type == DType::kFloat32 ? 128 : 64; }

// The sum of x and of its squares; or of y and of x y.
template <DType type, bool kProducts>
NORMD_WIDE void SumWide(const char* x, const char* y, int64_t bytes) {
  constexpr int64_t kTwo = BytesOfTwo(type);
  __m512 sum[4] = {}, square[4] = {};
  const auto add = [&](int64_t i, int k) NORMD_WIDE {
    const Two v = Load<type>(x + i);
    const Two w = kProducts ? Load<type>(y + i) : v;
    sum[k] = _mm512_add_ps(sum[k], w.a);
    sum[k + 1] = _mm512_add_ps(sum[k + 1], w.b);
    square[k] = _mm512_fmadd_ps(v.a, w.a, square[k]);
    square[k + 1] = _mm512_fmadd_ps(v.b, w.b, square[k + 1]);
  };
  for (int64_t i = 0; i + 2 * kTwo <= bytes; i += 2 * kTwo) {
    add(i, 0);
    add(i + kTwo, 2);
  }
  const __m512 all = _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), sum[2]), sum[3]);
  const __m512 squares =
      _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(square[0], square[1]), square[2]), square[3]);
  alignas(64) uint64_t lanes[8];
  _mm512_store_ps(lanes, _mm512_add_ps(all, squares));
  g_sink.store(lanes[0] ^ lanes[7], std::memory_order_relaxed);
}

enum class Formula { kForward, kForwardAddRelu, kBackward };

// a x + b, max(a x + b + y, 0), or a y + (b x + c). `mask`: of the second, a bit an element.
template <DType type, Formula formula, bool kStream>
NORMD_WIDE void WriteWide(char* to, const char* x, const char* y, int64_t bytes, int64_t ahead,
                          uint8_t* mask) {
  const __m512 a = _mm512_set1_ps(0.75F), b = _mm512_set1_ps(0.25F), c = _mm512_set1_ps(0.125F);
  for (int64_t i = 0; i + BytesOfTwo(type) <= bytes; i += BytesOfTwo(type)) {
    for (int64_t line = 0; ahead != 0 && line < BytesOfTwo(type); line += 64) {
      _mm_prefetch(x + i + line + ahead, _MM_HINT_T1);
      if (formula != Formula::kForward) _mm_prefetch(y + i + line + ahead, _MM_HINT_T1);
    }
    const auto value = [&](__m512 v, __m512 w) NORMD_WIDE {
      if (formula == Formula::kBackward) return _mm512_fmadd_ps(w, a, _mm512_fmadd_ps(v, b, c));
      const __m512 normalized = _mm512_fmadd_ps(v, a, b);
      if (formula == Formula::kForward) return normalized;
      return _mm512_max_ps(_mm512_add_ps(normalized, w), _mm512_setzero_ps());
    };
    const Two v = Load<type>(x + i);
    const Two w = formula == Formula::kForward ? v : Load<type>(y + i);
    const uint32_t bits = Store<type, kStream>(to + i, {value(v.a, w.a), value(v.b, w.b)});
    if constexpr (formula == Formula::kForwardAddRelu) {
      std::memcpy(mask + i / BytesOfTwo(type) * 4, &bits, 4);
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

template <DType type>
using Constant = std::integral_constant<DType, type>;

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
        stream_(stream),
        mask_(bench.fused != 0 && bench.operation != kBackward
                  ? static_cast<size_t>(bytes_ / element_bytes_ / 8 + 64)
                  : 0) {
    const char* grad = static_cast<const char*>(bench.grad_y);
    const char* residual = static_cast<const char*>(bench.residual);
    from_[0] = static_cast<const char*>(bench.x);
    from_[1] = grad != nullptr && bench.operation == kBackward ? grad : residual;
    to_[0] = static_cast<char*>(bench.y);
    to_[1] = static_cast<char*>(bench.residual);
  }

  // The ReLU's, which a backward needs: of the elements from `begin` bytes on.
  uint8_t* MaskAt(int64_t begin) const { return mask_.data() + begin / element_bytes_ / 8; }

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

  // The outputs from `first` on, from all inputs. A second output costs its writes alone.
  void Write(int64_t begin, int64_t bytes, int64_t ahead, int first = 0) const {
    const char* from[2] = {from_[0] + begin, inputs_ > 1 ? from_[1] + begin : nullptr};
    for (int out = first; out < outputs_; ++out) {
      const char* source[2] = {from[out == 0 ? 0 : 1], from[1]};
      Combine(to_[out] + begin, source, out == 0 ? inputs_ : 1, bytes, out == 0 ? ahead : 0);
    }
  }

  ThreadPool executor_;
  int threads_;
  int64_t element_bytes_, bytes_;
  int inputs_, outputs_;
  bool stream_;
  const char* from_[2];
  char* to_[2];
  mutable std::vector<uint8_t> mask_;

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
      if (!mask_.empty()) {
        std::memset(MaskAt(begin), 1, static_cast<size_t>(bytes / element_bytes_ / 8));
      }
    });
  }

 private:
  int reads_;
};

// As any kernel must that has to know a set's sums before it can write its first element:
// a piece of the tensors is read and summed, then read again, scaled and written, while the next
// piece is fetched. A piece is some sets that fit the cache together; in NHWC, where all sets end
// at once, it is all there is, and the second pass walks back from the end. Computed is the
// least that there is to it in float32, as if memory were one long vector: no sets, no shift, no
// weights. Eval has nothing to sum. A fused forward writes the ReLU's mask, a bit an element.
class Bound final : public Passes {
 public:
  Bound(const BenchCase& bench, int inputs, int outputs, bool stream)
      : Passes(bench, inputs, outputs, stream),
        type_(static_cast<DType>(bench.dtype)),
        backward_(bench.operation == kBackward),
        sums_(bench.operation != kEval) {
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
      for (int64_t run = 0; sums_ && run < runs_; ++run) Sum(begin(run), bytes);
      const bool last = unit + 1 == units;
      for (int64_t run = 0; run < runs_; ++run) Apply(begin(run), bytes, last ? 0 : bytes);
    });
  }

 private:
  static constexpr int64_t kSmallestUnit = int64_t{1} << 17;
  static constexpr int64_t kChunk = int64_t{1} << 20;

  void RunWhole() {
    const int64_t chunks = (bytes_ + kChunk - 1) / kChunk;
    const auto size = [&](int64_t chunk) { return std::min(kChunk, bytes_ - chunk * kChunk); };
    if (sums_) {
      executor_.ParallelFor(chunks, [&](int64_t chunk) { Sum(chunk * kChunk, size(chunk)); });
    }
    executor_.ParallelFor(chunks, [&](int64_t i) {
      const int64_t chunk = sums_ ? chunks - 1 - i : i;
      Apply(chunk * kChunk, size(chunk), 0);
    });
  }

  // Calls visit(integral_constant<DType>) where the machine has vectors for it.
  template <class Visit>
  bool ForType(Visit visit) const {
    if (!HasWide()) return false;
    switch (type_) {
      case DType::kFloat32: return visit(Constant<DType::kFloat32>()), true;
      case DType::kFloat16: return visit(Constant<DType::kFloat16>()), true;
      case DType::kBFloat16: return visit(Constant<DType::kBFloat16>()), true;
      default: return false;
    }
  }

  void Sum(int64_t begin, int64_t bytes) const {
#if defined(__x86_64__)
    const bool summed = ForType([&](auto type) {
      const char* x = from_[0] + begin;
      backward_ ? SumWide<type, true>(x, from_[1] + begin, bytes)
                : SumWide<type, false>(x, nullptr, bytes);
    });
    if (summed) return;
#endif
    for (int input = 0; input < (backward_ ? inputs_ : 1); ++input) Read(input, begin, bytes);
  }

  void Apply(int64_t begin, int64_t bytes, int64_t ahead) const {
#if defined(__x86_64__)
    const bool applied = ForType([&](auto type) {
      const bool stream = stream_ && reinterpret_cast<uintptr_t>(to_[0] + begin) % 64 == 0;
      stream ? ApplyWide<type, true>(begin, bytes, ahead)
             : ApplyWide<type, false>(begin, bytes, ahead);
    });
    if (applied && outputs_ > 1) Write(begin, bytes, 0, /*first=*/1);
    if (applied) return;
#endif
    Write(begin, bytes, ahead);
  }

#if defined(__x86_64__)
  template <DType type, bool kStream>
  void ApplyWide(int64_t begin, int64_t bytes, int64_t ahead) const {
    char* to = to_[0] + begin;
    const char* x = from_[0] + begin;
    const char* y = inputs_ > 1 ? from_[1] + begin : nullptr;
    if (backward_) {
      WriteWide<type, Formula::kBackward, kStream>(to, x, y, bytes, ahead, nullptr);
    } else if (inputs_ > 1) {
      WriteWide<type, Formula::kForwardAddRelu, kStream>(to, x, y, bytes, ahead, MaskAt(begin));
    } else {
      WriteWide<type, Formula::kForward, kStream>(to, x, nullptr, bytes, ahead, nullptr);
    }
  }
#endif

  DType type_;
  bool backward_, sums_;
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
