// What we know of this machine's caches.
#ifndef NORMD_KERNELS_CPU_CACHE_H_
#define NORMD_KERNELS_CPU_CACHE_H_

#include <cstdint>

namespace normd::cpu {

// Bytes of the last-level cache; a cautious guess where the system does not say.
int64_t LastLevelCacheBytes();

// Whether what is written should bypass the cache: not if all tensors of the call fit
// in half of it (the rest belongs to others; the reader of the answer is better off),
// nor in place (the line is there already).
inline bool ShouldStream(int64_t bytes_of_all_tensors, bool in_place) {
  return !in_place && bytes_of_all_tensors > LastLevelCacheBytes() / 2;
}

// Makes stores that bypassed the cache visible before whatever this thread signals
// next.
void FlushStreams();

}  // namespace normd::cpu

#endif  // NORMD_KERNELS_CPU_CACHE_H_
