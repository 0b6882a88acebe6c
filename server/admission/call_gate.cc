#include "server/admission/call_gate.h"

#include "server/error/error.h"

namespace normd {
namespace {

constexpr absl::Duration kRetryDelay = absl::Milliseconds(500);

}  // namespace

absl::Status CallGate::Enter() {
  absl::MutexLock lock(&mutex_);
  if (closed_) {
    return Retryable(absl::StatusCode::kUnavailable, "the server is shutting down", kRetryDelay);
  }
  ++inside_;
  return absl::OkStatus();
}

void CallGate::Leave() {
  absl::MutexLock lock(&mutex_);
  if (--inside_ == 0 && closed_) empty_.SignalAll();
}

bool CallGate::Close(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  closed_ = true;
  while (inside_ > 0 && SteadyNow() < deadline) empty_.WaitUntil(&mutex_, deadline);
  return inside_ == 0;
}

}  // namespace normd
