#include "server/admission/memory_budget.h"

#include <algorithm>
#include <fstream>

#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/error/error.h"

namespace normd {

MemoryClaim::~MemoryClaim() {
  if (budget_ == nullptr || bytes_ == 0) return;
  budget_->in_use_.fetch_sub(bytes_);
  if (budget_->listener_ != nullptr) budget_->listener_->Released();
}

bool MemoryBudget::HasRoom(int64_t bytes) {
  if (bytes > limit_ - in_use_.load() && bytes <= limit_ && reclaim_ != nullptr) reclaim_();
  return bytes <= limit_ - in_use_.load();
}

absl::StatusOr<MemoryClaim> MemoryBudget::Claim(int64_t bytes) {
  HasRoom(bytes);  // or is made to have, if it can be
  int64_t used = in_use_.load(std::memory_order_relaxed);
  do {
    if (bytes > limit_ - used) {
      return bytes > limit_
                 ? LimitExceeded("",
                                 absl::StrCat("a request that needs ", bytes, " bytes of memory"),
                                 limit_, flag_)
                 : LimitExceeded("",
                                 absl::StrCat("a request that needs ", bytes, " bytes beside the ",
                                              used, " in use"),
                                 limit_, flag_, absl::Milliseconds(100));
    }
  } while (!in_use_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed));
  return MemoryClaim(this, bytes);
}

int64_t MachineMemoryBytes() {
  int64_t bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  // cgroup v2, then v1; "max" and absent files leave the machine's.
  for (const char* path :
       {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t limit = 0;
    if (std::ifstream(path) >> limit && limit > 0) bytes = std::min(bytes, limit);
  }
  return bytes;
}

}  // namespace normd
