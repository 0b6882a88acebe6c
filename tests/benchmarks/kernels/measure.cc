#include <cstdlib>
#include <cstring>

#include <malloc.h>
#include <sys/mman.h>
#include <time.h>

#include "kernels/dtype.h"
#include "kernels/half.h"
#include "tests/benchmarks/kernels/contender.h"

extern "C" {

void bench_free(Contender* contender) { delete contender; }

double bench_run(Contender* contender, int64_t count, int32_t processor_time) {
  const auto now = [&] {
    timespec time;
    clock_gettime(processor_time != 0 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double begin = now();
  for (int64_t i = 0; i < count; ++i) contender->Run();
  return now() - begin;
}

void* bench_allocate(int64_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t size = (static_cast<size_t>(bytes) + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = std::aligned_alloc(kHugePage, size);
  if (memory == nullptr) return nullptr;
  madvise(memory, size, MADV_HUGEPAGE);
  std::memset(memory, 0, size);
  return memory;
}

void bench_deallocate(void* memory, int64_t) { std::free(memory); }

void bench_fill(void* memory, int32_t dtype, int64_t count, double mean, uint32_t seed) {
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;  // of four uniform values: normal enough
    for (int k = 0; k < 4; ++k) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<double>(state >> 40) / (1 << 24) - 0.5;
    }
    const float value = static_cast<float>(mean + sum * 1.73);
    switch (static_cast<normd::DType>(dtype)) {
      case normd::DType::kFloat32: static_cast<float*>(memory)[i] = value; break;
      case normd::DType::kFloat64: static_cast<double*>(memory)[i] = value; break;
      case normd::DType::kFloat16:
        static_cast<normd::Float16*>(memory)[i] = normd::ToFloat16(value);
        break;
      case normd::DType::kBFloat16:
        static_cast<normd::BFloat16*>(memory)[i] = normd::ToBFloat16(value);
        break;
    }
  }
}

void bench_keep_memory(int32_t keep) {
  mallopt(M_MMAP_THRESHOLD, keep ? 1 << 30 : 128 << 10);
  mallopt(M_TRIM_THRESHOLD, keep ? 0x7fffffff : 128 << 10);
}
}
