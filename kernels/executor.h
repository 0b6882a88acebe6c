// Executor: the threads that a kernel may use. The caller owns them.
#ifndef NORMD_KERNELS_EXECUTOR_H_
#define NORMD_KERNELS_EXECUTOR_H_

#include <cstdint>
#include <functional>

namespace normd {

// The order in which each thread takes its tasks, as far as it can be had.
enum class Walk { kForward, kBackward };

// Whose help a loop is worth: that of threads that are awake and have nothing to do, or also
// the time that it takes to wake others. (Loops in a row may wake some for those to come.)
enum class Help { kAwake, kAll };

// Thread-safe: several calls may be under way and share the threads.
class Executor {
 public:
  virtual ~Executor() = default;

  // Threads that one ParallelFor may use, the caller's included; 1 or more.
  virtual int concurrency() const = 0;

  // Runs task(0) .. task(count - 1), each once, in any order and on any thread,
  // the caller's included; returns when all are done. Tasks do not throw.
  virtual void ParallelFor(int64_t count, const std::function<void(int64_t)>& task,
                           Walk walk = Walk::kForward, Help help = Help::kAll) = 0;
};

// Runs everything on the caller's thread.
class SerialExecutor final : public Executor {
 public:
  int concurrency() const override { return 1; }
  void ParallelFor(int64_t count, const std::function<void(int64_t)>& task,
                   Walk walk = Walk::kForward, Help = Help::kAll) override {
    for (int64_t i = 0; i < count; ++i) task(walk == Walk::kForward ? i : count - 1 - i);
  }
};

}  // namespace normd

#endif  // NORMD_KERNELS_EXECUTOR_H_
