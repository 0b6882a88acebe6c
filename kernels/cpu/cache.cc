#include "kernels/cpu/cache.h"

#include <algorithm>
#include <fstream>
#include <string>

#include "hwy/cache_control.h"

namespace normd::cpu {
namespace {

// Linux's own account, "32768K"; 0 where there is none. glibc's sysconf() multiplies by
// the number of virtual processors on some virtual machines.
int64_t CacheBytes(const char* index) {
  std::ifstream file(std::string("/sys/devices/system/cpu/cpu0/cache/") + index + "/size");
  int64_t kilobytes = 0;
  return file >> kilobytes ? kilobytes << 10 : 0;
}

bool IsIntelServer() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0 && __builtin_cpu_supports("avx512f") != 0;
#else
  return false;
#endif
}

}  // namespace

int64_t LargestCachedBytes() {
  static const int64_t bytes = [] {
    const int64_t l2 = CacheBytes("index2");
    if (l2 > 0 && IsIntelServer()) return l2;
    const int64_t last = std::max(l2, CacheBytes("index3"));
    return last > 0 ? last / 2 : int64_t{4} << 20;
  }();
  return bytes;
}

void FlushStreams() { hwy::FlushStream(); }

}  // namespace normd::cpu
