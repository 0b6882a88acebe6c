// AdmissionQueue: lets a request in when there is memory and a place for it, and has it
// wait a while for them where --admission_queue_timeout says so.
#ifndef NORMD_SERVER_ADMISSION_ADMISSION_QUEUE_H_
#define NORMD_SERVER_ADMISSION_ADMISSION_QUEUE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <stop_token>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/admission/concurrency_limit.h"
#include "server/admission/memory_budget.h"
#include "server/admission/release_listener.h"

namespace normd {

// What a request holds while it is under way.
struct Admission {
  ConcurrencySlot slot;
  MemoryClaim claim;
};

// Thread-safe. Requests that wait leave in the order in which they came, so that a large
// one is not passed over for ever; none of them holds anything meanwhile. No thread waits.
class AdmissionQueue final : private ReleaseListener {
 public:
  using Done = absl::AnyInvocable<void(absl::StatusOr<Admission>)>;
  using Executor = std::function<void(std::function<void()>)>;

  // At most so many wait; the next one is refused at once. A waiting call costs a few KiB.
  static constexpr size_t kMostWaiting = 1000;

  // Hears of what is given back to `concurrency` and `memory`, and lets in on `executor`,
  // which may run what it was given until this is destroyed. `timeout` 0: nobody waits.
  AdmissionQueue(ConcurrencyLimit& concurrency, MemoryBudget& memory, Executor executor,
                 absl::Duration timeout);
  AdmissionQueue(const AdmissionQueue&) = delete;
  AdmissionQueue& operator=(const AdmissionQueue&) = delete;

  // Calls `done` once: here and now, where `bytes` fit or waiting would not help; or else
  // from another thread: when they fit, with RESOURCE_EXHAUSTED and a retry delay when they
  // have not for the timeout, or with CANCELLED when `stop` is requested first.
  void Admit(int64_t bytes, const std::stop_token& stop, Done done);

 private:
  struct Waiting;

  void Released() override;
  absl::StatusOr<Admission> TryAdmit(int64_t bytes);
  bool Fits(int64_t bytes) const;
  // Lets in whoever is next, as long as they fit.
  void LetIn();
  // Ends one's waiting: null where it has ended already.
  std::shared_ptr<Waiting> Remove(const Waiting* waiting);

  ConcurrencyLimit& concurrency_;
  MemoryBudget& memory_;
  const Executor executor_;
  const absl::Duration timeout_;

  // As many as the queue has, readable without its lock. Sequentially consistent, as what
  // is given back is: either who comes sees what was given back, or who gives back sees
  // who waits.
  std::atomic<int64_t> num_waiting_ = 0;
  std::atomic<bool> due_ = false;  // LetIn() on the executor
  absl::Mutex mutex_;
  std::list<std::shared_ptr<Waiting>> queue_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace normd

#endif  // NORMD_SERVER_ADMISSION_ADMISSION_QUEUE_H_
