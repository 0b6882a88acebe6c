#include "server/state/parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"

namespace normd {
namespace {

constexpr size_t kMaxThreads = 16;
// Below this a thread costs more than it brings.
constexpr size_t kMinPerThread = 16;

}  // namespace

absl::Status ParallelFor(size_t count, absl::FunctionRef<absl::Status(size_t i)> work) {
  const size_t processors = std::max(1u, std::thread::hardware_concurrency());
  const size_t threads = std::min({processors, kMaxThreads, count / kMinPerThread + 1});

  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  absl::Mutex mutex;
  absl::Status error;
  size_t error_at = count;
  const auto run = [&] {
    while (!failed.load(std::memory_order_relaxed)) {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      absl::Status status = work(i);
      if (status.ok()) continue;
      failed = true;
      absl::MutexLock lock(&mutex);
      if (i < error_at) {
        error_at = i;
        error = std::move(status);
      }
    }
  };
  {
    std::vector<std::jthread> helpers;
    for (size_t i = 1; i < threads; ++i) helpers.emplace_back(run);
    run();
  }
  return error;
}

}  // namespace normd
