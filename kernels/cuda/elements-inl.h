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
// Blocks of up to `threads`, so many of them a multiprocessor.
#define NORMD_KERNEL_OF(threads, blocks) __global__ __launch_bounds__(threads, blocks)
// The block's shared memory, of the size it was launched with.
#define NORMD_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else  // after what plays the GPU: see tests/unit/kernels/emulated_gpu.h
#include "kernels/half.h"
#define NORMD_DEVICE inline
#define NORMD_KERNEL
#define NORMD_KERNEL_OF(threads, blocks)
#endif

#include <bit>
#include <cstdint>

#include "kernels/cuda/plan.h"

namespace normd::cuda {

// Of each type: its bits, what it is computed in, and how one becomes the other.
struct Float32 {
  using Bits = uint32_t;
  using Compute = float;
  static NORMD_DEVICE float FromBits(uint32_t bits) { return std::bit_cast<float>(bits); }
  static NORMD_DEVICE uint32_t ToBits(float value) { return std::bit_cast<uint32_t>(value); }
};

struct Float64 {
  using Bits = uint64_t;
  using Compute = double;
  static NORMD_DEVICE double FromBits(uint64_t bits) { return std::bit_cast<double>(bits); }
  static NORMD_DEVICE uint64_t ToBits(double value) { return std::bit_cast<uint64_t>(value); }
};

// PairToBits: of two neighbours, the first in the low half.
struct Half {
  using Bits = uint16_t;
  using Compute = float;
#if defined(__CUDACC__)
  static NORMD_DEVICE float FromBits(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static NORMD_DEVICE uint32_t PairToBits(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
#else
  static float FromBits(uint16_t bits) { return ToFloat(Float16{bits}); }
  static uint32_t PairToBits(float first, float second) {
    return ToFloat16(first).bits | static_cast<uint32_t>(ToFloat16(second).bits) << 16;
  }
#endif
};
struct BHalf {
  using Bits = uint16_t;
  using Compute = float;
  static NORMD_DEVICE float FromBits(uint16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
#if defined(__CUDACC__)
  static NORMD_DEVICE uint32_t PairToBits(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
#else
  static uint32_t PairToBits(float first, float second) {
    return ToBFloat16(first).bits | static_cast<uint32_t>(ToBFloat16(second).bits) << 16;
  }
#endif
};

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

// The first thing that a kernel does: waits until the kernel before it on the stream is done,
// and lets the next one be launched meanwhile, which will wait here as well. Where the device
// can; else kernels are launched one after another anyway.
NORMD_DEVICE void AwaitKernelBefore() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The value of the thread whose number differs in the bits of `mask`, below 32. All threads of
// a block come here together.
#if defined(__CUDACC__)
template <class V>
NORMD_DEVICE V FromOtherLane(const V& value, int mask) {
  static_assert(sizeof(V) % 4 == 0);
  V other;
#pragma unroll
  for (unsigned w = 0; w < sizeof(V) / 4; ++w) {
    reinterpret_cast<unsigned*>(&other)[w] =
        __shfl_xor_sync(0xffffffffU, reinterpret_cast<const unsigned*>(&value)[w], mask);
  }
  return other;
}
#endif

// Eight neighbours, the first of which has an index that is a multiple of 8. As words, which
// are registers: two halves share one.
template <class E>
struct alignas(16) Octet {
  using Bits = typename E::Bits;
  using T = typename E::Compute;
  static constexpr int kWords = static_cast<int>(sizeof(Bits)) * kOctet / 4;
  uint32_t word[kWords];

  NORMD_DEVICE Bits BitsOf(int k) const {
    if constexpr (sizeof(Bits) == 2) return static_cast<Bits>(word[k / 2] >> k % 2 * 16);
    if constexpr (sizeof(Bits) == 4) return word[k];
    if constexpr (sizeof(Bits) == 8) {
      return word[2 * k] | static_cast<uint64_t>(word[2 * k + 1]) << 32;
    }
  }
  NORMD_DEVICE T operator[](int k) const { return E::FromBits(BitsOf(k)); }

  NORMD_DEVICE void SetBits(int k, Bits bits) {
    if constexpr (sizeof(Bits) == 2) {
      const int at = k % 2 * 16;
      word[k / 2] = (word[k / 2] & ~(0xffffU << at)) | static_cast<uint32_t>(bits) << at;
    } else if constexpr (sizeof(Bits) == 4) {
      word[k] = bits;
    } else {
      word[2 * k] = static_cast<uint32_t>(bits);
      word[2 * k + 1] = static_cast<uint32_t>(bits >> 32);
    }
  }
  NORMD_DEVICE static Octet Of(const T (&values)[kOctet]) {
    Octet octet;
    if constexpr (sizeof(Bits) == 2) {
#pragma unroll
      for (int k = 0; k < kOctet; k += 2) {
        octet.word[k / 2] = E::PairToBits(values[k], values[k + 1]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kOctet; ++k) octet.SetBits(k, E::ToBits(values[k]));
    }
    return octet;
  }
};

struct alignas(16) Quad {
  uint32_t word[4];
};

NORMD_DEVICE bool IsAligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <class E>
NORMD_DEVICE typename E::Compute LoadOne(const void* data, int64_t i) {
  return E::FromBits(static_cast<const typename E::Bits*>(data)[i]);
}

// Elements i to i + 7, all of which may be read: tensors here begin at 16 bytes and end with a
// whole octet, of which what is past their end is anything (cuda_backend.cc).
template <class E>
NORMD_DEVICE Octet<E> LoadOctet(const void* data, int64_t i) {
  Octet<E> octet;
  const auto* const from =
      reinterpret_cast<const Quad*>(static_cast<const typename E::Bits*>(data) + i);
#pragma unroll
  for (int q = 0; q < static_cast<int>(sizeof(octet) / sizeof(Quad)); ++q) {
    reinterpret_cast<Quad*>(&octet)[q] = from[q];
  }
  return octet;
}

// Elements i + low to i + high - 1, of which the caches drop first: nothing here reads these
// again, as it does what they were made of.
template <class E>
NORMD_DEVICE void StoreOctet(void* data, int64_t i, int low, int high, const Octet<E>& octet) {
  constexpr int kQuads = sizeof(Octet<E>) / sizeof(Quad);
  auto* to = static_cast<typename E::Bits*>(data) + i;
  if (low == 0 && high == kOctet) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#if defined(__CUDACC__)
      __stcs(reinterpret_cast<uint4*>(to) + q, reinterpret_cast<const uint4*>(&octet)[q]);
#else
      reinterpret_cast<Quad*>(to)[q] = reinterpret_cast<const Quad*>(&octet)[q];
#endif
    }
  } else {
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      if (k >= low && k < high) to[k] = octet.BitsOf(k);
    }
  }
}

// Divides by the same number again and again, by a product with its reciprocal where all
// fits in 31 bits (Granlund and Montgomery 1994).
struct Divisor {
  explicit Divisor(int64_t by) : value(by) {
    if (by >> 31 != 0) return;
    while (int64_t{1} << shift < by) ++shift;
    magic = static_cast<uint32_t>((uint64_t{1} << 32) *
                                      ((uint64_t{1} << shift) - static_cast<uint64_t>(by)) /
                                      static_cast<uint64_t>(by) +
                                  1);
  }
  NORMD_DEVICE int64_t Divide(int64_t a, int64_t& rest) const {
    if ((a | value) >> 31 == 0) {
      const auto from = static_cast<uint32_t>(a);
      const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(from) * magic >> 32);
      const uint32_t quotient = (high + from) >> shift;
      rest = from - quotient * static_cast<uint32_t>(value);
      return quotient;
    }
    rest = a % value;
    return a / value;
  }

  int64_t value;
  uint32_t magic = 0;
  int shift = 0;
};

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
