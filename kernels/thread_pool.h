// ThreadPool: the threads of a process that compute.
#ifndef NORMD_KERNELS_THREAD_POOL_H_
#define NORMD_KERNELS_THREAD_POOL_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "kernels/executor.h"

namespace normd {

// An Executor that also runs tasks of their own. Thread-safe. After a loop its threads stay
// awake for a moment (kAwake), so that the next finds them at hand, and give way meanwhile to
// whoever wants their core; then they sleep.
//
// Each thread of a loop has a share of neighbouring tasks, the same share in a later loop as
// long, and helps with the others' when it is done. What is enqueued begins before threads
// join a loop: several calls at once are spread over the threads before any is cut.
class ThreadPool final : public Executor {
 public:
  // `threads`: the most that work at once, 1 or more; 0: the cores this process may use.
  explicit ThreadPool(int threads = 0);
  // Returns when everything enqueued has run.
  ~ThreadPool() override;

  int concurrency() const override;
  void ParallelFor(int64_t count, const std::function<void(int64_t)>& task,
                   Walk walk = Walk::kForward, Help help = Help::kAll) override;

  // Runs `task` on one of the threads, soon; returns at once. It may call ParallelFor(), and
  // does not throw.
  void Enqueue(std::function<void()> task);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// Cores this process may run on: its CPU affinity, cut to the cgroup's quota.
int UsableCores();

}  // namespace normd

#endif  // NORMD_KERNELS_THREAD_POOL_H_
