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

int64_t L2Bytes() {
  static const int64_t bytes = [] {
    const int64_t size = CacheBytes("index2");
    return size > 0 ? size : int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace

int64_t LargestCachedBytes() {
  static const int64_t bytes =
      IsIntelServer() ? L2Bytes() : std::max(L2Bytes(), CacheBytes("index3")) / 2;
  return bytes;
}

int64_t LargestReadTwice() { return L2Bytes() / 4; }

void FlushStreams() { hwy::FlushStream(); }

}  // namespace normd::cpu
