// Background: one thread for work that blocks on files, so that the threads which
// compute and those which serve never do.
#ifndef NORMD_SERVER_SERVICE_BACKGROUND_H_
#define NORMD_SERVER_SERVICE_BACKGROUND_H_

#include <deque>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"

namespace normd {

// Thread-safe.
class Background {
 public:
  // `tick` runs on the thread every `period`, between the tasks.
  Background(absl::Duration period, absl::AnyInvocable<void()> tick);
  // Runs what was queued, then stops.
  ~Background();
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  // Runs `task` after those queued before it.
  void Run(absl::AnyInvocable<void()> task);

 private:
  void Loop();

  const absl::Duration period_;
  absl::AnyInvocable<void()> tick_;
  absl::Mutex mutex_;
  SteadyCondVar woken_;
  std::deque<absl::AnyInvocable<void()>> tasks_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_BACKGROUND_H_
