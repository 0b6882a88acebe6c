#include "kernels/thread_pool.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <latch>
#include <limits>
#include <mutex>
#include <semaphore>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sched.h>

namespace normd {
namespace {

// How long a thread stays awake after a loop. Waking one that sleeps costs its caller 5 us and
// comes 30 to 60 us late, which is as long as a MiB takes; the loop that normalizes comes
// sooner after the one that sums, or the same caller's next call. Longer, it would be in the
// way of the threads that receive and send.
constexpr std::chrono::microseconds kAwake{30};

// After so many loops, each of which began while threads would have been awake after the one
// before, more are to be expected: then threads are woken also for those that would not wait for
// them.
constexpr int64_t kLoopsOfBurst = 4;

constexpr int64_t kWakes = 2;  // by one thread
constexpr int64_t kCacheLine = 64;

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until ready() or `most` is over; other threads that want the core go first.
template <class Ready>
bool AwaitAwake(std::chrono::microseconds most, const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + most;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      Pause();
    }
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

// Tasks [begin, end) that nobody has begun. Its owner takes them from one end, others from
// the other.
class alignas(kCacheLine) Share {
 public:
  void Assign(uint32_t begin, uint32_t end) { range_.store(Pack(begin, end)); }

  bool TakeFirst(uint32_t& task) {
    return Take([&](uint32_t& begin, uint32_t&) { task = begin++; });
  }
  bool TakeLast(uint32_t& task) {
    return Take([&](uint32_t&, uint32_t& end) { task = --end; });
  }

 private:
  static uint64_t Pack(uint32_t begin, uint32_t end) { return uint64_t{end} << 32 | begin; }

  template <class Change>
  bool Take(const Change& change) {
    uint64_t range = range_.load(std::memory_order_relaxed);
    for (;;) {
      auto begin = static_cast<uint32_t>(range);
      auto end = static_cast<uint32_t>(range >> 32);
      if (begin == end) return false;
      change(begin, end);
      if (range_.compare_exchange_weak(range, Pack(begin, end), std::memory_order_relaxed)) {
        return true;
      }
    }
  }

  std::atomic<uint64_t> range_ = 0;
};

// A ParallelFor() under way.
class Loop {
 public:
  Loop(uint32_t count, int threads, const std::function<void(int64_t)>& task, Walk walk, Help help)
      : task_(task),
        walk_(walk),
        help_(help),
        shares_(std::min<size_t>(count, threads)),
        left_(count) {
    for (size_t k = 0; k < shares_.size(); ++k) {
      const auto cut = [&](size_t i) { return static_cast<uint32_t>(count * i / shares_.size()); };
      shares_[k].Assign(cut(k), cut(k + 1));
    }
  }

  // Whether one more thread finds a share of its own; if so, it must call Work().
  bool Join(size_t& share) {
    if (joined_ == shares_.size()) return false;
    share = joined_++;
    return true;
  }
  // Threads to wake for it, if more such loops are expected, or not.
  int64_t wanted(bool in_burst) const {
    return in_burst || help_ == Help::kAll ? static_cast<int64_t>(shares_.size() - joined_) : 0;
  }

  // Runs tasks until all have begun.
  void Work(size_t own) {
    ptrdiff_t done = 0;
    uint32_t task;
    const bool forward = walk_ == Walk::kForward;
    const auto take = [&](Share& share, bool first) {
      return first ? share.TakeFirst(task) : share.TakeLast(task);
    };
    for (size_t k = 0; k < shares_.size(); ++k) {
      Share& share = shares_[(own + k) % shares_.size()];
      while (take(share, (k == 0) == forward)) {
        task_(task);
        ++done;
      }
    }
    left_.count_down(done);
  }

  void AwaitAll() {
    if (!AwaitAwake(kAwake, [this] { return left_.try_wait(); })) left_.wait();
  }

 private:
  const std::function<void(int64_t)>& task_;  // not after AwaitAll()
  const Walk walk_;
  const Help help_;
  std::vector<Share> shares_;
  size_t joined_ = 0;  // guarded by the pool's mutex
  std::latch left_;
};

// cgroup v2's cpu.max is "<quota> <period>" in microseconds, or "max <period>".
int CgroupCores(int cores) {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return cores;
  const double share = std::strtod(quota.c_str(), nullptr) / period;
  return std::clamp(static_cast<int>(std::lround(share)), 1, cores);
}

}  // namespace

int UsableCores() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
  return CgroupCores(std::max(cores, 1));
}

class ThreadPool::Impl {
 public:
  explicit Impl(int threads) : threads_(threads) {
    for (int i = 0; i < threads; ++i) {
      Bed& bed = beds_.emplace_back(0);
      workers_.emplace_back([this, &bed] { Work(bed); });
    }
  }

  ~Impl() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      for (Bed* bed : asleep_) bed->release();
      asleep_.clear();
    }
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

  void Enqueue(std::function<void()> task) {
    std::unique_lock lock(mutex_);
    tasks_.push_back(std::move(task));
    Announce(lock, tasks());
  }

  void Run(const std::shared_ptr<Loop>& loop) {
    size_t own = 0;
    {
      std::unique_lock lock(mutex_);
      loop->Join(own);
      loops_.push_back(loop);
      const bool follows = std::chrono::steady_clock::now() - last_loop_ended_ < kAwake;
      burst_ = follows ? burst_ + 1 : 0;
      Announce(lock, loop->wanted(/*in_burst=*/burst_ >= kLoopsOfBurst));
    }
    loop->Work(own);
    {
      std::lock_guard lock(mutex_);
      std::erase(loops_, loop);
      last_loop_ended_ = std::chrono::steady_clock::now();
    }
    loop->AwaitAll();
  }

 private:
  using Bed = std::binary_semaphore;  // where a thread sleeps

  int64_t tasks() const { return static_cast<int64_t>(tasks_.size()); }

  // There is work for `wanted` threads. Those that are awake and without any see it; for the
  // rest some are woken, which wake more.
  void Announce(std::unique_lock<std::mutex>& lock, int64_t wanted) {
    announced_.fetch_add(1, std::memory_order_relaxed);
    std::array<Bed*, kWakes> woken{};
    for (int64_t i = 0; i < std::min(wanted - awake_, kWakes) && !asleep_.empty(); ++i) {
      woken[static_cast<size_t>(i)] = asleep_.back();
      asleep_.pop_back();
    }
    lock.unlock();
    for (Bed* bed : woken) {
      if (bed != nullptr) bed->release();
    }
  }

  void Work(Bed& bed) {
    std::unique_lock lock(mutex_);
    bool looped = false;  // then another loop may follow soon
    for (;;) {
      if (RunTask(lock)) {
        looped = false;
      } else if (HelpLoop(lock)) {
        looped = true;
      } else if (stopping_) {
        return;
      } else if (looped) {
        StayAwake(lock);
        looped = false;
      } else {
        asleep_.push_back(&bed);
        lock.unlock();
        bed.acquire();
        lock.lock();
      }
    }
  }

  void StayAwake(std::unique_lock<std::mutex>& lock) {
    const uint64_t seen = announced_.load(std::memory_order_relaxed);
    ++awake_;
    lock.unlock();
    AwaitAwake(kAwake, [&] { return announced_.load(std::memory_order_relaxed) != seen; });
    lock.lock();
    --awake_;
  }

  // Whether there was one, which is then done.
  bool RunTask(std::unique_lock<std::mutex>& lock) {
    if (tasks_.empty()) return false;
    const std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    tasks_.empty() ? lock.unlock() : Announce(lock, tasks());
    task();
    lock.lock();
    return true;
  }

  // Whether there was one, all of whose tasks have then begun.
  bool HelpLoop(std::unique_lock<std::mutex>& lock) {
    size_t own = 0;
    const auto found =
        std::ranges::find_if(loops_, [&](const auto& loop) { return loop->Join(own); });
    if (found == loops_.end()) return false;
    const std::shared_ptr<Loop> loop = *found;
    const int64_t wanted = loop->wanted(/*in_burst=*/burst_ >= kLoopsOfBurst);
    wanted == 0 ? lock.unlock() : Announce(lock, wanted);
    loop->Work(own);
    lock.lock();
    std::erase(loops_, loop);
    return true;
  }

  const int threads_;
  std::mutex mutex_;  // guards what has no own
  std::deque<std::function<void()>> tasks_;
  std::vector<std::shared_ptr<Loop>> loops_;  // with tasks that nobody has begun
  std::atomic<uint64_t> announced_ = 0;       // changed under the mutex
  // Threads that wait for work.
  int64_t awake_ = 0;
  std::vector<Bed*> asleep_;  // who fell asleep last is woken first: its cache is warm
  bool stopping_ = false;
  int64_t burst_ = 0;  // loops, each soon after the one before
  std::chrono::steady_clock::time_point last_loop_ended_;
  std::deque<Bed> beds_;  // of each worker
  std::vector<std::thread> workers_;
};

ThreadPool::ThreadPool(int threads)
    : impl_(std::make_unique<Impl>(threads > 0 ? threads : UsableCores())) {}

ThreadPool::~ThreadPool() = default;

int ThreadPool::concurrency() const { return impl_->threads(); }

void ThreadPool::ParallelFor(int64_t count, const std::function<void(int64_t)>& task, Walk walk,
                             Help help) {
  if (count <= 1 || concurrency() == 1) {  // no hand-over
    SerialExecutor().ParallelFor(count, task, walk);
    return;
  }
  // A share's ends have 32 bits: more tasks than that go in groups.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t group = (count - 1) / kMost + 1;
  const std::function<void(int64_t)> tasks_of_group = [&](int64_t k) {
    for (int64_t i = k * group; i < std::min(count, (k + 1) * group); ++i) task(i);
  };
  const auto groups = static_cast<uint32_t>((count - 1) / group + 1);
  impl_->Run(std::make_shared<Loop>(groups, concurrency(), group == 1 ? task : tasks_of_group, walk,
                                    help));
}

void ThreadPool::Enqueue(std::function<void()> task) { impl_->Enqueue(std::move(task)); }

}  // namespace normd
