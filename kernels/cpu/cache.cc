#include "kernels/cpu/cache.h"

#include <fstream>
#include <string>

#include <unistd.h>

#include "hwy/cache_control.h"

namespace normd::cpu {
namespace {

// Linux's own account, "32768K". glibc's sysconf() multiplies by the number of
// virtual processors on some virtual machines, so it comes second.
int64_t SizeFromSysfs() {
  int64_t largest = 0;
  for (const char* index : {"index2", "index3"}) {
    std::ifstream file(std::string("/sys/devices/system/cpu/cpu0/cache/") + index + "/size");
    int64_t kilobytes = 0;
    if (file >> kilobytes && kilobytes << 10 > largest) largest = kilobytes << 10;
  }
  return largest;
}

}  // namespace

int64_t LastLevelCacheBytes() {
  static const int64_t bytes = [] {
    if (const int64_t size = SizeFromSysfs(); size > 0) return size;
#ifdef _SC_LEVEL3_CACHE_SIZE
    for (const int name : {_SC_LEVEL3_CACHE_SIZE, _SC_LEVEL2_CACHE_SIZE}) {
      if (const long size = sysconf(name); size > 0) return static_cast<int64_t>(size);
    }
#endif
    return int64_t{8} << 20;
  }();
  return bytes;
}

void FlushStreams() { hwy::FlushStream(); }

}  // namespace normd::cpu
