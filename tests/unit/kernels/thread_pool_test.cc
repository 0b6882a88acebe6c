#include "kernels/thread_pool.h"

#include <atomic>
#include <chrono>
#include <latch>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace normd {
namespace {

TEST(ThreadPool, RunsEachTaskOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool executor(threads);
    EXPECT_EQ(executor.concurrency(), threads);
    std::vector<std::atomic<int>> runs(1000);
    executor.ParallelFor(1000, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
    for (const auto& count : runs) ASSERT_EQ(count.load(), 1);
  }
}

TEST(ThreadPool, WalksEachShareBackwardWhereAsked) {
  ThreadPool executor(2);
  std::mutex mutex;
  std::map<std::thread::id, std::vector<int64_t>> taken;
  // Two tasks that wait for each other begin a share each.
  std::latch both(2);
  executor.ParallelFor(
      100,
      [&](int64_t i) {
        bool first;
        {
          std::lock_guard lock(mutex);
          std::vector<int64_t>& own = taken[std::this_thread::get_id()];
          own.push_back(i);
          first = own.size() == 1;
        }
        if (first) both.arrive_and_wait();
      },
      Walk::kBackward);
  ASSERT_EQ(taken.size(), 2u);
  std::set<int64_t> begun;
  for (const auto& [thread, tasks] : taken) begun.insert(tasks.front());
  EXPECT_EQ(begun, (std::set<int64_t>{49, 99}));

  std::vector<int64_t> serial;
  SerialExecutor().ParallelFor(
      3, [&](int64_t i) { serial.push_back(i); }, Walk::kBackward);
  EXPECT_EQ(serial, (std::vector<int64_t>{2, 1, 0}));
}

TEST(ThreadPool, WakesThreadsThatSleep) {
  ThreadPool executor(3);
  for (int i = 0; i < 3; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    // Tasks that wait for each other: a thread must come for each.
    std::latch all(3);
    executor.ParallelFor(3, [&](int64_t) { all.arrive_and_wait(); });
  }
}

// Loops that would not wait for a thread to wake: one alone has none, many in a row soon do.
TEST(ThreadPool, WakesThreadsForLoopsThatFollowEachOther) {
  ThreadPool executor(2);
  std::atomic<bool> helped = false;
  const auto caller = std::this_thread::get_id();
  const auto loop = [&] {
    executor.ParallelFor(
        64, [&](int64_t) { helped = helped || std::this_thread::get_id() != caller; },
        Walk::kForward, Help::kAwake);
  };
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // all are asleep
  loop();
  EXPECT_FALSE(helped.load());
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!helped && std::chrono::steady_clock::now() < end) loop();
  EXPECT_TRUE(helped.load());
}

TEST(ThreadPool, HelpsALoopWithinATask) {
  ThreadPool executor(2);
  std::atomic<int> runs = 0;
  executor.ParallelFor(8, [&](int64_t) {
    executor.ParallelFor(
        8, [&](int64_t) { ++runs; }, Walk::kForward, Help::kAwake);
  });
  EXPECT_EQ(runs.load(), 64);
}

TEST(ThreadPool, UsesAllUsableCoresByDefault) {
  ThreadPool executor;
  EXPECT_EQ(executor.concurrency(), UsableCores());
  EXPECT_GE(UsableCores(), 1);
}

TEST(ThreadPool, RunsWhatIsEnqueuedOnOtherThreads) {
  for (const int threads : {1, 2}) {
    ThreadPool executor(threads);
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

TEST(ThreadPool, LetsEnqueuedTasksUseAllThreads) {
  ThreadPool executor(2);
  // Two tasks that wait for each other: both must run at once.
  std::latch both(2);
  std::latch done(1);
  executor.Enqueue([&] {
    executor.ParallelFor(2, [&](int64_t) { both.arrive_and_wait(); });
    done.count_down();
  });
  done.wait();
}

TEST(ThreadPool, FinishesWhatIsEnqueuedBeforeItIsDestroyed) {
  std::atomic<int> runs = 0;
  {
    ThreadPool executor(2);
    for (int i = 0; i < 100; ++i) executor.Enqueue([&] { ++runs; });
  }
  EXPECT_EQ(runs.load(), 100);
}

TEST(ThreadPool, ServesManyCallersAtOnce) {
  ThreadPool executor(2);
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
