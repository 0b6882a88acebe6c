// A common disk's sync on a machine with a fast one: fsync and fdatasync of this program, its
// engines' included, are these.
#include <atomic>

#include <sys/syscall.h>
#include <unistd.h>

#include "absl/time/clock.h"
#include "tests/benchmarks/durability/contender.h"

namespace normd {
namespace {

std::atomic<int64_t> delay_ms = 0;

int Sync(long number, int fd) {
  if (const int64_t ms = delay_ms; ms > 0) absl::SleepFor(absl::Milliseconds(ms));
  return static_cast<int>(syscall(number, fd));
}

}  // namespace

void SlowSyncs(absl::Duration delay) { delay_ms = absl::ToInt64Milliseconds(delay); }

}  // namespace normd

extern "C" {
int fsync(int fd) { return normd::Sync(SYS_fsync, fd); }
int fdatasync(int fd) { return normd::Sync(SYS_fdatasync, fd); }
}
