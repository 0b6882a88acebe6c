// TbbExecutor: an Executor on a oneTBB task arena.
#ifndef NORMD_KERNELS_TBB_EXECUTOR_H_
#define NORMD_KERNELS_TBB_EXECUTOR_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "kernels/executor.h"

namespace normd {

// Threads come from oneTBB's one pool, so that several executors and several
// calls at once never run more threads than there are cores. Thread-safe. The
// destructor returns when everything enqueued has run.
class TbbExecutor final : public Executor {
 public:
  // `threads`: the most that work at once; 0: the cores this process may use.
  explicit TbbExecutor(int threads = 0);
  ~TbbExecutor() override;

  int concurrency() const override;
  void ParallelFor(int64_t count, const std::function<void(int64_t)>& task) override;

  // Runs `task` on one of the threads, soon; returns at once. What it does in
  // ParallelFor shares the same threads. The task does not throw.
  void Enqueue(std::function<void()> task);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Cores this process may run on: its CPU affinity, cut to the cgroup's quota.
int UsableCores();

}  // namespace normd

#endif  // NORMD_KERNELS_TBB_EXECUTOR_H_
