#include "server/state/persister.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <iterator>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "server/clock.h"

namespace normd {
namespace {

// kNone: keeps nothing.
class NullPersister : public Persister {
 public:
  bool acknowledges_at_once() const override { return true; }
  void Submit(Change, absl::AnyInvocable<void(absl::Status)> done) override {
    done(absl::OkStatus());
  }
  absl::Status Flush() override { return absl::OkStatus(); }
  uint64_t submitted() const override { return 0; }
  absl::Status health() const override { return absl::OkStatus(); }
};

// The writer thread. It commits what waits when that is due, when somebody
// flushes, and once more at the end.
class WritingPersister : public Persister {
 public:
  absl::Status Flush() final {
    absl::MutexLock lock(&mutex_);
    const uint64_t flush = ++flushes_asked_;
    work_.SignalAll();
    while (flushes_done_ < flush) flushed_.Wait(&mutex_);
    return health_;
  }

  uint64_t submitted() const final { return submitted_.load(std::memory_order_relaxed); }

  absl::Status health() const final {
    absl::MutexLock lock(&mutex_);
    return health_;
  }

 protected:
  explicit WritingPersister(StateStore* store) : store_(store) {}
  ~WritingPersister() override { assert(!writer_.joinable()); }

  // When what waits is to be committed; InfiniteFuture when nothing does.
  virtual absl::Time Due() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) = 0;
  // Takes what waits, for CommitTaken.
  virtual void Take() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) = 0;
  // Commits what was taken, and returns the commit's error.
  virtual absl::Status CommitTaken() ABSL_LOCKS_EXCLUDED(mutex_) = 0;

  // A derived class starts the writer at the end of its constructor and stops it at
  // the beginning of its destructor: the thread calls its methods.
  void StartWriter() {
    writer_ = std::thread([this] { Run(); });
  }
  void StopWriter() {
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
      work_.SignalAll();
    }
    writer_.join();
  }

  StateStore* const store_;
  std::atomic<uint64_t> submitted_ = 0;
  mutable absl::Mutex mutex_;
  SteadyCondVar work_;  // what Due answers has changed

 private:
  void Run() {
    absl::MutexLock lock(&mutex_);
    for (;;) {
      while (!stopping_ && flushes_done_ == flushes_asked_ && SteadyNow() < Due()) {
        work_.WaitUntil(&mutex_, Due());
      }
      const bool last = stopping_;
      const uint64_t flush = flushes_asked_;
      if (Due() < absl::InfiniteFuture()) {
        Take();
        mutex_.Unlock();
        absl::Status status = CommitTaken();
        mutex_.Lock();
        health_ = std::move(status);
      }
      flushes_done_ = flush;
      flushed_.SignalAll();
      if (last) return;
    }
  }

  absl::CondVar flushed_;
  uint64_t flushes_asked_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t flushes_done_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status health_ ABSL_GUARDED_BY(mutex_);
  std::thread writer_;
};

// kUpdate: every change by itself, all that wait in one commit. While one commit
// syncs, the next one gathers.
class UpdatePersister : public WritingPersister {
 public:
  explicit UpdatePersister(StateStore* store) : WritingPersister(store) { StartWriter(); }
  ~UpdatePersister() override { StopWriter(); }

  bool acknowledges_at_once() const override { return false; }

  void Submit(Change change, absl::AnyInvocable<void(absl::Status)> done) override {
    submitted_.fetch_add(1, std::memory_order_relaxed);
    absl::MutexLock lock(&mutex_);
    waiting_.changes.push_back(std::move(change));
    waiting_.done.push_back(std::move(done));
    work_.SignalAll();
  }

 private:
  struct Batch {
    std::vector<Change> changes;
    std::vector<absl::AnyInvocable<void(absl::Status)>> done;  // one a change
  };

  absl::Time Due() const override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return waiting_.changes.empty() ? absl::InfiniteFuture() : absl::InfinitePast();
  }
  void Take() override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { std::swap(waiting_, taken_); }

  absl::Status CommitTaken() override {
    const std::vector<absl::Status> statuses = store_->Commit(taken_.changes);
    absl::Status failure;
    for (size_t i = 0; i < statuses.size(); ++i) {
      // A version that did not match is the change's failure, not the commit's.
      if (failure.ok() && !absl::IsAborted(statuses[i])) failure = statuses[i];
      taken_.done[i](statuses[i]);
    }
    taken_.changes.clear();
    taken_.done.clear();
    return failure;
  }

  Batch waiting_ ABSL_GUARDED_BY(mutex_);
  Batch taken_;  // the writer's
};

// kInterval: what the changes of an instance come to, some time later.
class IntervalPersister : public WritingPersister {
 public:
  IntervalPersister(StateStore* store, absl::Duration interval,
                    absl::AnyInvocable<void(bool)> on_refusing, absl::Duration patience)
      : WritingPersister(store),
        interval_(interval),
        patience_(patience),
        on_refusing_(std::move(on_refusing)) {
    StartWriter();
  }
  ~IntervalPersister() override {
    StopWriter();
    if (!taken_.empty()) {
      spdlog::error("the last changes of {} instances could not be stored: {}", taken_.size(),
                    std::string(health().message()));
    }
  }

  bool acknowledges_at_once() const override { return true; }

  void Submit(Change change, absl::AnyInvocable<void(absl::Status)> done) override {
    absl::Status refusal;
    {
      absl::MutexLock lock(&mutex_);
      refusal = refusal_;
      if (refusal.ok()) {
        const absl::Time now = SteadyNow();
        if (waiting_.empty()) waiting_since_ = now;
        if (due_ == absl::InfiniteFuture()) {
          // The other half is the commit's: what is acknowledged is in the store at most an
          // interval later unless the disk takes longer than that.
          due_ = now + interval_ / 2;
          work_.SignalAll();
        }
        std::vector<Change>& steps = waiting_[change.name];
        AddStep(steps, std::move(change));
        submitted_.fetch_add(1, std::memory_order_relaxed);
      }
    }
    done(std::move(refusal));
  }

 private:
  // The steps of an instance that are not stored yet: one, or several where it was
  // removed in between, since each removal leaves its own tombstone.
  using Pending = absl::flat_hash_map<std::string, std::vector<Change>>;

  // Appends `next` to `steps`, as one step with the last where that can be.
  static void AddStep(std::vector<Change>& steps, Change next) {
    if (steps.empty() || steps.back().state == nullptr) {
      steps.push_back(std::move(next));
      return;
    }
    Change& last = steps.back();
    last.state = std::move(next.state);
    if (next.replace_requests || last.state == nullptr) {
      last.replace_requests = next.replace_requests;
      last.requests = std::move(next.requests);
      return;
    }
    last.requests.insert(last.requests.end(), next.requests.begin(), next.requests.end());
    // Forgotten by RequestLog too; trimmed when twice full, as there.
    if (last.requests.size() >= 2 * RequestLog::kCapacity) {
      last.requests.erase(last.requests.begin(), last.requests.end() - RequestLog::kCapacity);
    }
  }

  absl::Time Due() const override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return due_; }

  void Take() override ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    due_ = absl::InfiniteFuture();
    if (taken_.empty()) {
      std::swap(taken_, waiting_);
      taken_since_ = waiting_since_;
      return;
    }
    // What an earlier commit could not store comes before what came since.
    for (auto& [name, steps] : waiting_) {
      std::vector<Change>& earlier = taken_[name];
      for (Change& step : steps) AddStep(earlier, std::move(step));
    }
    waiting_.clear();
  }

  absl::Status CommitTaken() override {
    std::vector<Change> changes;
    for (auto& [name, steps] : taken_) {
      changes.insert(changes.end(), std::make_move_iterator(steps.begin()),
                     std::make_move_iterator(steps.end()));
    }
    taken_.clear();
    const std::vector<absl::Status> statuses = store_->Commit(changes);
    absl::Status failure;
    for (size_t i = 0; i < statuses.size(); ++i) {
      if (statuses[i].ok()) continue;
      if (absl::IsAborted(statuses[i])) {
        // The store holds another version than this process stored there: trying
        // again cannot help. Said loudly, and not kept.
        spdlog::error("a change of {} is lost: {}", changes[i].name,
                      std::string(statuses[i].message()));
      } else {
        taken_[changes[i].name].push_back(std::move(changes[i]));
      }
      if (failure.ok()) failure = statuses[i];
    }
    const bool kept = !taken_.empty();
    const bool was_refusing = refusing_;
    // Not when time alone has passed: a large commit may take long and go well.
    refusing_ = kept && SteadyNow() - taken_since_ >= interval_ + patience_;
    if (kept) {
      spdlog::error("changes of {} instances could not be stored and will be tried again: {}",
                    taken_.size(), std::string(failure.message()));
    }
    {
      absl::MutexLock lock(&mutex_);
      if (kept) due_ = std::min(due_, SteadyNow() + std::min(interval_, patience_));
      refusal_ = refusing_ ? Refusal(failure) : absl::OkStatus();
    }
    if (refusing_ != was_refusing) {
      if (refusing_) {
        spdlog::error("changes are refused until the store can be written again");
      } else {
        spdlog::info("the store can be written again: changes are taken");
      }
      on_refusing_(refusing_);
    }
    return failure;
  }

  absl::Status Refusal(const absl::Status& failure) const {
    return {failure.code(),
            fmt::format("changes acknowledged since {} could not be stored, so no others are taken "
                        "until the store can be written again (tried every {}): {}",
                        absl::FormatTime(absl::RFC3339_sec, taken_since_, absl::UTCTimeZone()),
                        absl::FormatDuration(std::min(interval_, patience_)),
                        std::string(failure.message()))};
  }

  const absl::Duration interval_;
  const absl::Duration patience_;
  absl::AnyInvocable<void(bool)> on_refusing_;  // the writer's
  Pending waiting_ ABSL_GUARDED_BY(mutex_);
  absl::Time waiting_since_ ABSL_GUARDED_BY(mutex_);  // of the oldest in `waiting_`
  // When the writer is to commit `waiting_`, and what it kept of a failed commit.
  absl::Time due_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  // What a change is answered; not OK: refused.
  absl::Status refusal_ ABSL_GUARDED_BY(mutex_);
  // The writer's.
  Pending taken_;
  absl::Time taken_since_;  // of the oldest in `taken_`
  bool refusing_ = false;
};

}  // namespace

std::unique_ptr<Persister> Persister::Start(StateStore* store, Durability durability,
                                            absl::Duration interval,
                                            absl::AnyInvocable<void(bool)> on_refusing,
                                            absl::Duration patience) {
  switch (durability) {
    case Durability::kNone: return std::make_unique<NullPersister>();
    case Durability::kInterval:
      return std::make_unique<IntervalPersister>(store, interval, std::move(on_refusing), patience);
    case Durability::kUpdate: return std::make_unique<UpdatePersister>(store);
  }
  return nullptr;
}

}  // namespace normd
