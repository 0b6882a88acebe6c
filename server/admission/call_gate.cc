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
  --inside_;
}

bool CallGate::Close(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  closed_ = true;
  const auto empty = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return inside_ == 0; };
  return mutex_.AwaitWithDeadline(absl::Condition(&empty), deadline);
}

}  // namespace normd
