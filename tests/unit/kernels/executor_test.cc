#include <atomic>
#include <latch>
#include <numeric>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/tbb_executor.h"

namespace normd {
namespace {

TEST(TbbExecutor, RunsEachTaskOnce) {
  for (const int threads : {1, 2, 5}) {
    TbbExecutor executor(threads);
    EXPECT_EQ(executor.concurrency(), threads);
    std::vector<std::atomic<int>> runs(1000);
    executor.ParallelFor(1000, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
    for (const auto& count : runs) ASSERT_EQ(count.load(), 1);
  }
}

TEST(TbbExecutor, UsesAllUsableCoresByDefault) {
  TbbExecutor executor;
  EXPECT_EQ(executor.concurrency(), UsableCores());
  EXPECT_GE(UsableCores(), 1);
}

TEST(TbbExecutor, RunsWhatIsEnqueuedOnOtherThreads) {
  for (const int threads : {1, 2}) {
    TbbExecutor executor(threads);
    std::latch done(1);
    std::thread::id worker;
    executor.Enqueue([&] {
      worker = std::this_thread::get_id();
      done.count_down();
    });
    done.wait();
    EXPECT_NE(worker, std::this_thread::get_id());
  }
}

TEST(TbbExecutor, LetsEnqueuedTasksUseAllThreads) {
  TbbExecutor executor(2);
  // Two tasks that wait for each other: both must run at once.
  std::latch both(2);
  std::latch done(1);
  executor.Enqueue([&] {
    executor.ParallelFor(2, [&](int64_t) { both.arrive_and_wait(); });
    done.count_down();
  });
  done.wait();
}

TEST(TbbExecutor, FinishesWhatIsEnqueuedBeforeItIsDestroyed) {
  std::atomic<int> runs = 0;
  {
    TbbExecutor executor(2);
    for (int i = 0; i < 100; ++i) executor.Enqueue([&] { ++runs; });
  }
  EXPECT_EQ(runs.load(), 100);
}

TEST(TbbExecutor, ServesManyCallersAtOnce) {
  TbbExecutor executor(2);
  std::atomic<int64_t> sum = 0;
  {
    std::vector<std::jthread> callers;
    for (int caller = 0; caller < 8; ++caller) {
      callers.emplace_back([&] {
        for (int call = 0; call < 50; ++call) {
          executor.ParallelFor(20, [&](int64_t i) { sum += i; });
        }
      });
    }
  }
  EXPECT_EQ(sum.load(), 8 * 50 * 190);
}

}  // namespace
}  // namespace normd
