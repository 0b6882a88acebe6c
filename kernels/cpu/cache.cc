#include "kernels/cpu/cache.h"

#include <unistd.h>

#include "hwy/cache_control.h"

namespace normd::cpu {

int64_t LastLevelCacheBytes() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL3_CACHE_SIZE
    for (int name : {_SC_LEVEL3_CACHE_SIZE, _SC_LEVEL2_CACHE_SIZE}) {
      if (const long size = sysconf(name); size > 0) return static_cast<int64_t>(size);
    }
#endif
    return int64_t{8} << 20;
  }();
  return bytes;
}

void FlushStreams() { hwy::FlushStream(); }

}  // namespace normd::cpu
