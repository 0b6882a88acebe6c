// Highway, with the instruction sets we compile for: AVX-512, AVX2, SSE4 and plain
// C++ on x86; NEON on Arm. SSSE3 would cost a fifth of the compile time for
// machines older than 2008; SVE's vectors have no size, and so cannot be members.
#ifndef NORMD_KERNELS_CPU_SIMD_H_
#define NORMD_KERNELS_CPU_SIMD_H_

#define NORMD_NEVER (HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// The same source takes a compiler ten times as long: AVX-512 and plain C++ are enough.
#define HWY_DISABLED_TARGETS (NORMD_NEVER | HWY_SSE4 | HWY_AVX2)
#else
#define HWY_DISABLED_TARGETS NORMD_NEVER
#endif

#endif  // NORMD_KERNELS_CPU_SIMD_H_
