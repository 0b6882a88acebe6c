#include "server/service/background.h"

#include <utility>

namespace normd {

Background::Background(absl::Duration period, absl::AnyInvocable<void()> tick)
    : period_(period), tick_(std::move(tick)), thread_([this] { Loop(); }) {}

Background::~Background() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    woken_.SignalAll();
  }
  thread_.join();
}

void Background::Run(absl::AnyInvocable<void()> task) {
  absl::MutexLock lock(&mutex_);
  tasks_.push_back(std::move(task));
  woken_.SignalAll();
}

void Background::Loop() {
  absl::Time next_tick = SteadyNow() + period_;
  for (;;) {
    absl::AnyInvocable<void()> task;
    {
      absl::MutexLock lock(&mutex_);
      while (!stopping_ && tasks_.empty() && SteadyNow() < next_tick) {
        woken_.WaitUntil(&mutex_, next_tick);
      }
      if (!tasks_.empty()) {
        task = std::move(tasks_.front());
        tasks_.pop_front();
      } else if (stopping_) {
        return;
      }
    }
    if (task) task();
    if (SteadyNow() >= next_tick) {
      tick_();
      next_tick = SteadyNow() + period_;
    }
  }
}

}  // namespace normd
