#include "server/admission/admission_queue.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/time/clock.h"
#include "grpcpp/alarm.h"

namespace normd {

struct AdmissionQueue::Waiting {
  Waiting(int64_t bytes, Done done) : bytes(bytes), done(std::move(done)) {}

  const int64_t bytes;
  Done done;
  // Each looks for this in the queue, and does nothing where it is not there any more. As
  // the queue's lock is not held where this ends, they may do so while it does.
  grpc::Alarm alarm;
  std::optional<std::stop_callback<std::function<void()>>> on_stop;
};

AdmissionQueue::AdmissionQueue(ConcurrencyLimit& concurrency, MemoryBudget& memory,
                               Executor executor, absl::Duration timeout)
    : concurrency_(concurrency),
      memory_(memory),
      executor_(std::move(executor)),
      timeout_(timeout) {
  if (timeout_ == absl::ZeroDuration()) return;
  concurrency_.NotifyOnRelease(this);
  memory_.NotifyOnRelease(this);
}

void AdmissionQueue::Admit(int64_t bytes, const std::stop_token& stop, Done done) {
  if (num_waiting_.load() == 0 || bytes > memory_.limit()) {
    auto admission = TryAdmit(bytes);
    if (admission.ok() || timeout_ == absl::ZeroDuration() || bytes > memory_.limit()) {
      return done(std::move(admission));
    }
  }
  const auto waiting = std::make_shared<Waiting>(bytes, std::move(done));
  bool full = false;
  {
    absl::MutexLock lock(&mutex_);
    full = queue_.size() >= kMostWaiting;
    if (!full) {
      queue_.push_back(waiting);
      num_waiting_.store(static_cast<int64_t>(queue_.size()));
    }
  }
  if (full) return waiting->done(TryAdmit(bytes));
  waiting->alarm.Set(
      absl::ToChronoTime(absl::Now() + timeout_),
      [this, weak = std::weak_ptr<Waiting>(waiting)](bool) {
        const auto late = weak.lock();
        if (late == nullptr || Remove(late.get()) == nullptr) return;
        late->done(TryAdmit(late->bytes));  // with the reason, where that is still there
      });
  waiting->on_stop.emplace(stop, [this, raw = waiting.get()] {
    if (const auto stopped = Remove(raw); stopped != nullptr) {
      stopped->done(absl::CancelledError("the call was cancelled or its deadline passed"));
    }
  });
  LetIn();
}

void AdmissionQueue::Released() {
  if (num_waiting_.load() == 0 || due_.exchange(true)) return;
  executor_([this] {
    due_.store(false);
    LetIn();
  });
}

bool AdmissionQueue::Fits(int64_t bytes) const {
  return concurrency_.has_room() && memory_.HasRoom(bytes);
}

absl::StatusOr<Admission> AdmissionQueue::TryAdmit(int64_t bytes) {
  auto slot = concurrency_.Enter();
  if (!slot.ok()) return slot.status();
  auto claim = memory_.Claim(bytes);
  if (!claim.ok()) return claim.status();
  return Admission{*std::move(slot), *std::move(claim)};
}

void AdmissionQueue::LetIn() {
  for (;;) {
    std::shared_ptr<Waiting> next;
    absl::StatusOr<Admission> admission;
    {
      absl::MutexLock lock(&mutex_);
      // Looked at before it is taken: what is given back again would have this called again.
      if (queue_.empty() || !Fits(queue_.front()->bytes)) return;
      admission = TryAdmit(queue_.front()->bytes);
      if (!admission.ok()) continue;  // somebody was faster: look again
      next = std::move(queue_.front());
      queue_.pop_front();
      num_waiting_.store(static_cast<int64_t>(queue_.size()));
    }
    next->done(std::move(admission));
  }
}

std::shared_ptr<AdmissionQueue::Waiting> AdmissionQueue::Remove(const Waiting* waiting) {
  std::shared_ptr<Waiting> removed;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = std::find_if(queue_.begin(), queue_.end(), [waiting](const auto& entry) {
      return entry.get() == waiting;
    });
    if (found == queue_.end()) return nullptr;
    removed = std::move(*found);
    queue_.erase(found);
    num_waiting_.store(static_cast<int64_t>(queue_.size()));
  }
  return removed;
}

}  // namespace normd
