#include "kernels/cpu/cache.h"

#include <algorithm>
#include <fstream>
#include <string>

#include <unistd.h>

#include "hwy/cache_control.h"

namespace normd::cpu {
namespace {

// Of the cache of this level, 2 or 3; 0 where nobody says. Linux's own account ("32768K")
// first: glibc's sysconf() multiplies by the number of virtual processors on some virtual
// machines.
int64_t CacheBytes(int level) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(level) + "/size");
  int64_t kilobytes = 0;
  if (file >> kilobytes && kilobytes > 0) return kilobytes << 10;
#ifdef _SC_LEVEL3_CACHE_SIZE
  return std::max(sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE), 0L);
#else
  return 0;
#endif
}

bool IsIntelServer() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0 && __builtin_cpu_supports("avx512f") != 0;
#else
  return false;
#endif
}

// Cautious guesses where nobody says.
int64_t L2Bytes() {
  static const int64_t bytes = CacheBytes(2) > 0 ? CacheBytes(2) : int64_t{1} << 20;
  return bytes;
}
int64_t LastLevelBytes() {
  const int64_t bytes = std::max(CacheBytes(2), CacheBytes(3));
  return bytes > 0 ? bytes : int64_t{8} << 20;
}

}  // namespace

int64_t LargestCachedBytes(int threads) {
  static const bool in_l2 = IsIntelServer();
  static const int64_t bytes = in_l2 ? L2Bytes() : LastLevelBytes() / 2;
  return in_l2 ? threads * bytes : bytes;
}

int64_t LargestNearBytes() {
  static const int64_t bytes = LastLevelBytes() / (IsIntelServer() ? 8 : 2);
  return bytes;
}

int64_t LargestInL2() { return L2Bytes(); }

int64_t LargestReadTwice() { return L2Bytes() / 4; }

void FlushStreams() { hwy::FlushStream(); }

}  // namespace normd::cpu
