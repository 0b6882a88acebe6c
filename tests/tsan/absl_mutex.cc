// Linked into the programs of the tsan build: Debian's Abseil is built without
// ThreadSanitizer, which therefore does not see what absl::Mutex orders. These stand before
// Abseil's own functions, for its other libraries and gRPC too, and tell it.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace {

// Abseil's function of that name; called with the object as its first argument.
template <typename Function>
Function* Real(const char* mangled) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, mangled));
}

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

#define NORMD_PREFIX "_ZN4absl7debian3"

// `CALL` lets go of the mutex where it waits, and has it again when it returns.
#define NORMD_AROUND(MUTEX, RESULT, CALL) \
  __tsan_release(MUTEX);                  \
  RESULT CALL;                            \
  __tsan_acquire(MUTEX)

void Mutex::Lock() {
  static auto* const real = Real<void(Mutex*)>(NORMD_PREFIX "5Mutex4LockEv");
  real(this);
  __tsan_acquire(this);
}

void Mutex::Unlock() {
  static auto* const real = Real<void(Mutex*)>(NORMD_PREFIX "5Mutex6UnlockEv");
  __tsan_release(this);
  real(this);
}

bool Mutex::TryLock() {
  static auto* const real = Real<bool(Mutex*)>(NORMD_PREFIX "5Mutex7TryLockEv");
  const bool locked = real(this);
  if (locked) __tsan_acquire(this);
  return locked;
}

void Mutex::ReaderLock() {
  static auto* const real = Real<void(Mutex*)>(NORMD_PREFIX "5Mutex10ReaderLockEv");
  real(this);
  __tsan_acquire(this);
}

void Mutex::ReaderUnlock() {
  static auto* const real = Real<void(Mutex*)>(NORMD_PREFIX "5Mutex12ReaderUnlockEv");
  __tsan_release(this);
  real(this);
}

void Mutex::Await(const Condition& condition) {
  static auto* const real =
      Real<void(Mutex*, const Condition&)>(NORMD_PREFIX "5Mutex5AwaitERKNS0_9ConditionE");
  NORMD_AROUND(this, , real(this, condition));
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static auto* const real = Real<bool(Mutex*, const Condition&, Duration)>(
      NORMD_PREFIX "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  NORMD_AROUND(this, const bool result =, real(this, condition, timeout));
  return result;
}

void CondVar::Wait(Mutex* mutex) {
  static auto* const real = Real<void(CondVar*, Mutex*)>(NORMD_PREFIX "7CondVar4WaitEPNS0_5MutexE");
  NORMD_AROUND(mutex, , real(this, mutex));
}

bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static auto* const real = Real<bool(CondVar*, Mutex*, Duration)>(
      NORMD_PREFIX "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  NORMD_AROUND(mutex, const bool result =, real(this, mutex, timeout));
  return result;
}

bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static auto* const real = Real<bool(CondVar*, Mutex*, Time)>(
      NORMD_PREFIX "7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE");
  NORMD_AROUND(mutex, const bool result =, real(this, mutex, deadline));
  return result;
}

ABSL_NAMESPACE_END
}  // namespace absl
