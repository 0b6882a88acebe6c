// What we know of this machine's caches.
#ifndef NORMD_KERNELS_CPU_CACHE_H_
#define NORMD_KERNELS_CPU_CACHE_H_

#include <cstdint>

namespace normd::cpu {

// Of a cache line. Vectors that lie on two of them cost twice.
inline constexpr int64_t kLineBytes = 64;

// Bytes of all tensors of a call up to which its output is best written into the cache:
// half of the last-level cache, since the rest belongs to others. On Intel's servers no
// more than the threads' L2s: their L3 is a mesh that takes a store that bypasses it in two thirds
// of the time.
int64_t LargestCachedBytes(int threads = 1);

// Bytes of all tensors up to which what is read comes so fast that fetching it ahead by hand
// costs more than it brings. On Intel's servers, where many share a large L3, an eighth of it.
int64_t LargestNearBytes();

// Bytes that are still in the L2 when they are read again, beside what is fetched and
// written meanwhile.
int64_t LargestReadTwice();

// Bytes of all tensors of a call that are in the L2 when the next one comes.
int64_t LargestInL2();

// Whether what is written should bypass the cache: not if it is best written into it, nor
// in place (the line is there already).
inline bool ShouldStream(int64_t bytes_of_all_tensors, bool in_place) {
  return !in_place && bytes_of_all_tensors > LargestCachedBytes();
}

// Makes stores that bypassed the cache visible before whatever this thread signals
// next.
void FlushStreams();

}  // namespace normd::cpu

#endif  // NORMD_KERNELS_CPU_CACHE_H_
