// CallGate: lets calls in until the server shuts down, and knows when all are out.
#ifndef NORMD_SERVER_ADMISSION_CALL_GATE_H_
#define NORMD_SERVER_ADMISSION_CALL_GATE_H_

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"

namespace normd {

// gRPC's own shutdown would wait for the watchers of its health service too, which never
// leave, and cancels calls that arrive where UNAVAILABLE is due. Thread-safe.
class CallGate {
 public:
  // UNAVAILABLE once closed, with the delay after which another server may be there. Each
  // OK is followed by one Leave().
  absl::Status Enter();
  void Leave();

  // Lets nobody in from now on. Returns whether all were out before `deadline`, and waits
  // until they are or it passes, by SteadyNow().
  bool Close(absl::Time deadline);

 private:
  absl::Mutex mutex_;
  SteadyCondVar empty_;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t inside_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace normd

#endif  // NORMD_SERVER_ADMISSION_CALL_GATE_H_
