#include "server/service/background.h"

#include <utility>

#include "absl/time/clock.h"

namespace normd {

Background::Background(absl::Duration period, absl::AnyInvocable<void()> tick)
    : period_(period), tick_(std::move(tick)), thread_([this] { Loop(); }) {}

Background::~Background() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void Background::Run(absl::AnyInvocable<void()> task) {
  absl::MutexLock lock(&mutex_);
  tasks_.push_back(std::move(task));
}

void Background::Loop() {
  absl::Time next_tick = absl::Now() + period_;
  for (;;) {
    absl::AnyInvocable<void()> task;
    {
      absl::MutexLock lock(&mutex_);
      const auto woken = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
        return stopping_ || !tasks_.empty();
      };
      mutex_.AwaitWithDeadline(absl::Condition(&woken), next_tick);
      if (!tasks_.empty()) {
        task = std::move(tasks_.front());
        tasks_.pop_front();
      } else if (stopping_) {
        return;
      }
    }
    if (task) task();
    if (absl::Now() >= next_tick) {
      tick_();
      next_tick = absl::Now() + period_;
    }
  }
}

}  // namespace normd
