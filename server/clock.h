// Time that goes on though somebody sets the system's clock: whatever lasts for some time
// is measured by it, or the clock's way back (or forth) would make it late (or early).
#ifndef NORMD_SERVER_CLOCK_H_
#define NORMD_SERVER_CLOCK_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace normd {

// The system's time of the first call, and as much later as has passed since then.
inline absl::Time SteadyNow() {
  using Clock = std::chrono::steady_clock;
  struct Begin {
    absl::Time time = absl::Now();
    Clock::time_point steady = Clock::now();
  };
  static const Begin begin;
  return begin.time + absl::FromChrono(Clock::now() - begin.steady);
}

// A condition variable whose deadlines are SteadyNow()'s. absl::CondVar waits by the
// system's time.
class SteadyCondVar {
 public:
  void SignalAll() { changed_.notify_all(); }

  // Returns when signalled, at `deadline`, or for no reason. Precondition: the caller
  // holds `mutex`.
  void WaitUntil(absl::Mutex* mutex, absl::Time deadline) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    Lockable lockable{mutex};
    const absl::Duration left = std::clamp(deadline - SteadyNow(), absl::ZeroDuration(), kLongest);
    changed_.wait_for(lockable, absl::ToChronoNanoseconds(left));
  }

 private:
  static constexpr absl::Duration kLongest = absl::Hours(1);

  struct Lockable {
    void lock() ABSL_NO_THREAD_SAFETY_ANALYSIS { mutex->Lock(); }
    void unlock() ABSL_NO_THREAD_SAFETY_ANALYSIS { mutex->Unlock(); }
    absl::Mutex* mutex;
  };

  std::condition_variable_any changed_;
};

}  // namespace normd

#endif  // NORMD_SERVER_CLOCK_H_
