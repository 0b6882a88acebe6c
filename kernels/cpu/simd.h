// Highway, with the instruction sets we compile for: AVX-512, AVX2, SSE4 and plain
// C++ on x86; NEON on Arm. SSSE3 would cost a fifth of the compile time for
// machines older than 2008.
#ifndef NORMD_KERNELS_CPU_SIMD_H_
#define NORMD_KERNELS_CPU_SIMD_H_

#define HWY_DISABLED_TARGETS HWY_SSSE3

#endif  // NORMD_KERNELS_CPU_SIMD_H_
