// Elements of each type on the device: loads, stores and the type computed in.
//
// What ends in -inl.h here is compiled by nvcc for GPUs and, by the tests, as plain C++
// for a GPU that is played by the host.
#ifndef NORMD_KERNELS_CUDA_ELEMENTS_INL_H_
#define NORMD_KERNELS_CUDA_ELEMENTS_INL_H_

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define NORMD_DEVICE __device__ __forceinline__
// Two large blocks a multiprocessor or more: registers for more would leave it idle.
#define NORMD_KERNEL __global__ __launch_bounds__(256, 2)
// One that keeps its sets in shared memory: as many registers a thread.
#define NORMD_RESIDENT_KERNEL __global__ __launch_bounds__(512, 1)
// The block's shared memory, of the size it was launched with.
#define NORMD_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else  // after what plays the GPU: see tests/unit/kernels/emulated_gpu.h
#include "kernels/half.h"
#define NORMD_DEVICE inline
#define NORMD_KERNEL
#define NORMD_RESIDENT_KERNEL
#endif

#include <cstdint>

#include "kernels/cuda/plan.h"
#include "kernels/dtype.h"

namespace normd::cuda {

struct Float32 {
  using Storage = float;
  using Compute = float;
  static constexpr DType kDType = DType::kFloat32;
  static NORMD_DEVICE float Load(float value) { return value; }
  static NORMD_DEVICE float Store(float value) { return value; }
};

struct Float64 {
  using Storage = double;
  using Compute = double;
  static constexpr DType kDType = DType::kFloat64;
  static NORMD_DEVICE double Load(double value) { return value; }
  static NORMD_DEVICE double Store(double value) { return value; }
};

#if defined(__CUDACC__)
struct Half {
  using Storage = __half;
  using Compute = float;
  static constexpr DType kDType = DType::kFloat16;
  static NORMD_DEVICE float Load(__half value) { return __half2float(value); }
  static NORMD_DEVICE __half Store(float value) { return __float2half_rn(value); }
};
struct BHalf {
  using Storage = __nv_bfloat16;
  using Compute = float;
  static constexpr DType kDType = DType::kBFloat16;
  static NORMD_DEVICE float Load(__nv_bfloat16 value) { return __bfloat162float(value); }
  static NORMD_DEVICE __nv_bfloat16 Store(float value) { return __float2bfloat16_rn(value); }
};
#else
struct Half {
  using Storage = Float16;
  using Compute = float;
  static constexpr DType kDType = DType::kFloat16;
  static float Load(Float16 value) { return ToFloat(value); }
  static Float16 Store(float value) { return ToFloat16(value); }
};
struct BHalf {
  using Storage = BFloat16;
  using Compute = float;
  static constexpr DType kDType = DType::kBFloat16;
  static float Load(BFloat16 value) { return ToFloat(value); }
  static BFloat16 Store(float value) { return ToBFloat16(value); }
};
#endif

// a * b + c, rounded once on a GPU. Nothing else is contracted (CMakeLists.txt): left to
// the compiler, one kernel might round otherwise than another that does the same.
#if defined(__CUDACC__)
NORMD_DEVICE float MultiplyAdd(float a, float b, float c) { return __fmaf_rn(a, b, c); }
NORMD_DEVICE double MultiplyAdd(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
template <class T>
T MultiplyAdd(T a, T b, T c) {
  return a * b + c;
}
#endif

// Eight neighbours, the first of which has an index that is a multiple of 8.
template <class E>
struct alignas(16) Octet {
  typename E::Storage value[kOctet];

  NORMD_DEVICE typename E::Compute operator[](int k) const { return E::Load(value[k]); }
  NORMD_DEVICE void Set(int k, typename E::Compute v) { value[k] = E::Store(v); }
};

struct alignas(16) Quad {
  uint32_t word[4];
};

NORMD_DEVICE bool IsAligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Elements i + low .. i + high - 1 of `data`, which has `size`; the others hold
// anything. Reads nothing past the end of `data`.
template <class E>
NORMD_DEVICE Octet<E> LoadOctet(const void* data, int64_t size, int64_t i, int low, int high) {
  constexpr int kQuads = sizeof(Octet<E>) / sizeof(Quad);
  Octet<E> octet;
  const auto* from = static_cast<const typename E::Storage*>(data) + i;
  if (IsAligned(data) && i + kOctet <= size) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      reinterpret_cast<Quad*>(&octet)[q] = reinterpret_cast<const Quad*>(from)[q];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      octet.value[k] = k >= low && k < high ? from[k] : typename E::Storage{};
    }
  }
  return octet;
}

template <class E>
NORMD_DEVICE void StoreOctet(void* data, int64_t i, int low, int high, const Octet<E>& octet) {
  constexpr int kQuads = sizeof(Octet<E>) / sizeof(Quad);
  auto* to = static_cast<typename E::Storage*>(data) + i;
  if (IsAligned(data) && low == 0 && high == kOctet) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      reinterpret_cast<Quad*>(to)[q] = reinterpret_cast<const Quad*>(&octet)[q];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      if (k >= low && k < high) to[k] = octet.value[k];
    }
  }
}

// Begins to copy an octet to shared memory; otherwise as LoadOctet(). The thread that
// called may read it after AwaitFetches().
template <class E>
NORMD_DEVICE void FetchOctet(Octet<E>* to, const void* data, int64_t size, int64_t i, int low,
                             int high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if (IsAligned(data) && i + kOctet <= size) {
    const auto* from =
        reinterpret_cast<const char*>(static_cast<const typename E::Storage*>(data) + i);
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
#pragma unroll
    for (unsigned q = 0; q < sizeof(Octet<E>); q += sizeof(Quad)) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(at + q), "l"(from + q)
                   : "memory");
    }
    return;
  }
#endif
  *to = LoadOctet<E>(data, size, i, low, high);
}

// Ends a group of fetches.
NORMD_DEVICE void EndFetches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// For all of this thread's groups but the last `kBut`.
template <int kBut>
NORMD_DEVICE void AwaitFetches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kBut) : "memory");
#endif
}

// a / b and a % b; in 32 bits where both fit, several times as fast.
NORMD_DEVICE int64_t Divide(int64_t a, int64_t b, int64_t& rest) {
  if ((a | b) >> 32 == 0) {
    const auto quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    rest = static_cast<uint32_t>(a) - quotient * static_cast<uint32_t>(b);
    return quotient;
  }
  rest = a % b;
  return a / b;
}

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_ELEMENTS_INL_H_
