#include "kernels/tbb_executor.h"

#include <algorithm>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/partitioner.h>
#include <oneapi/tbb/task_arena.h>
#include <sched.h>

namespace normd {
namespace {

// cgroup v2's cpu.max is "<quota> <period>" in microseconds, or "max <period>".
int CgroupCores(int cores) {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return cores;
  const double share = std::strtod(quota.c_str(), nullptr) / period;
  return std::clamp(static_cast<int>(share + 0.5), 1, cores);
}

}  // namespace

int UsableCores() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
  return CgroupCores(std::max(cores, 1));
}

struct TbbExecutor::Impl {
  // No slot is kept for callers: what is enqueued may use all threads. Who calls
  // from outside joins if there is room, else waits while others do the work.
  explicit Impl(int threads)
      : workers(oneapi::tbb::global_control::max_allowed_parallelism, threads + 1),
        arena(threads, /*reserved_for_masters=*/0) {}

  // oneTBB starts one thread less than this, counting on the main thread to work;
  // a server's main thread sleeps.
  oneapi::tbb::global_control workers;
  oneapi::tbb::task_arena arena;
  std::mutex mutex;
  std::condition_variable idle;
  int64_t enqueued = 0;  // guarded by mutex
};

TbbExecutor::TbbExecutor(int threads)
    : impl_(std::make_unique<Impl>(threads > 0 ? threads : UsableCores())) {}

TbbExecutor::~TbbExecutor() {
  std::unique_lock lock(impl_->mutex);
  impl_->idle.wait(lock, [this] { return impl_->enqueued == 0; });
}

int TbbExecutor::concurrency() const { return impl_->arena.max_concurrency(); }

void TbbExecutor::ParallelFor(int64_t count, const std::function<void(int64_t)>& task) {
  if (count <= 1 || concurrency() == 1) {  // no hand-over
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  impl_->arena.execute([&] {
    oneapi::tbb::parallel_for(
        oneapi::tbb::blocked_range<int64_t>(0, count, 1),
        [&](const oneapi::tbb::blocked_range<int64_t>& range) {
          for (int64_t i = range.begin(); i != range.end(); ++i) task(i);
        },
        oneapi::tbb::auto_partitioner());
  });
}

void TbbExecutor::Enqueue(std::function<void()> task) {
  {
    std::lock_guard lock(impl_->mutex);
    ++impl_->enqueued;
  }
  impl_->arena.enqueue([impl = impl_.get(), task = std::move(task)] {
    task();
    // Notified under the lock: the destructor may free the rest right after.
    std::lock_guard lock(impl->mutex);
    if (--impl->enqueued == 0) impl->idle.notify_all();
  });
}

}  // namespace normd
