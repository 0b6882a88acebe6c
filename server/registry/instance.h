// Instance: one living named instance, and the order of its changes.
#ifndef NORMD_SERVER_REGISTRY_INSTANCE_H_
#define NORMD_SERVER_REGISTRY_INSTANCE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/numeric/int128.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/instance/instance_state.h"
#include "server/instance/request_log.h"
#include "server/state/persister.h"
#include "server/state/state_store.h"

namespace normd {

using Snapshot = std::shared_ptr<const InstanceState>;

// NOT_FOUND: of an instance that was found, and has been deleted since.
absl::Status InstanceDeleted();

// FAILED_PRECONDITION: of a repeated call whose tensors cannot be computed again, since
// they are not kept and what they were computed from has changed. Tells what was applied.
absl::Status NoLongerKnown(const std::string& request_id, const AppliedRequest& applied);

// A random UUID (RFC 4122, version 4), for an instance.
std::string NewUid();

// What every changing call brings along.
struct ChangeOptions {
  Method method = Method::kForward;
  std::optional<uint64_t> expected_version;
  std::optional<absl::uint128> request_id;
};

// The outcome of a change.
struct Changed {
  uint64_t version = 0;
  // The request_id was applied before; `version` and `num_batches_tracked` are
  // those of then.
  bool replayed = false;
  // What the change was.
  Method method = Method::kForward;
  int64_t num_batches_tracked = 0;
  // The state that the change made; with `replayed`, that of now.
  Snapshot state;
};

using ChangeDone = absl::AnyInvocable<void(absl::StatusOr<Changed>)>;

// What an edit made of the state.
enum class Edited {
  kChanged,    // publish it as the next version
  kReset,      // likewise; remembered as Method::kResetOptimizer
  kUnchanged,  // nothing to change: answer the version that is
  kStale,      // computed from what is no longer so: nothing happened, try again
};

// An instance whose every change goes through one lock, and becomes visible when
// it is as durable as --durability asks. Thread-safe.
//
// Between its lock and the store a change is pending: later changes build on it
// (`tip`), readers do not see it yet (`published`). When a commit fails, it and
// all that built on it are taken back and answered with the error, so that memory
// never runs ahead of what was acknowledged.
class Instance : public std::enable_shared_from_this<Instance> {
 public:
  // A new instance, unpublished until its creation is durable.
  Instance(Persister* persister, StoredInstance initial)
      : persister_(persister), tip_(std::move(initial.state)) {
    for (const AppliedRequest& request : initial.requests) requests_.Add(request);
  }

  // One that the store holds already.
  static std::shared_ptr<Instance> Restored(Persister* persister, StoredInstance stored);

  // The last acknowledged state; null before the creation is durable and after
  // the removal.
  Snapshot published() const;
  // The newest state, perhaps not acknowledged yet: what a change that is about
  // to be computed must build on. Null as above.
  Snapshot tip() const;

  // The change that `request_id` made, while it is remembered.
  std::optional<AppliedRequest> Applied(std::optional<absl::uint128> request_id) const;

  // Submits the state the instance was made with. `replace` is true for one that
  // the store may hold under the same name.
  void Create(absl::AnyInvocable<void(absl::Status)> done);

  // Makes one change, exactly once a request_id:
  //   a request_id that was applied before is answered from memory
  //   an expected_version that is not the tip's: ABORTED
  //   else `edit` edits a copy of the tip, under the lock, in microseconds;
  //   its error is answered and nothing changes
  // `done` is called once, after the lock is released: here, or on the store's
  // writer thread once the change is durable. Returns false, without calling it,
  // where the edit was stale.
  bool Change(const ChangeOptions& options,
              absl::FunctionRef<absl::StatusOr<Edited>(InstanceState& next)> edit, ChangeDone done);

  // Ends the instance: likewise, and from then on it is NOT_FOUND.
  void Remove(const ChangeOptions& options, ChangeDone done);

  // Replaces the state by one from a checkpoint: the tip's version + 1, its own
  // uid (a new one where the checkpoint's layer is another: contexts saved so far are of
  // no use to that) and create time. `done` as above.
  void Replace(const StoredInstance& loaded, ChangeDone done);

  // State and remembered requests of one version, for a checkpoint; null state
  // as for published().
  StoredInstance ForCheckpoint() const;

 private:
  struct Waiter {
    uint64_t version;
    Changed answer;
    ChangeDone done;
  };

  // Hands the tip's change to the persister and arranges for `done`.
  void Submit(normd::Change change, Changed answer, ChangeDone done, bool removal)
      ABSL_UNLOCK_FUNCTION(mutex_);
  // Takes back what is pending: it could not be kept.
  void TakeBack() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnDurable(const absl::Status& status, uint64_t epoch, const Changed& answer, ChangeDone done,
                 bool removal);

  Persister* const persister_;
  mutable absl::Mutex mutex_;
  Snapshot published_ ABSL_GUARDED_BY(mutex_);
  Snapshot tip_ ABSL_GUARDED_BY(mutex_);
  RequestLog requests_ ABSL_GUARDED_BY(mutex_);
  bool removing_ ABSL_GUARDED_BY(mutex_) = false;
  bool removed_ ABSL_GUARDED_BY(mutex_) = false;
  // How often pending changes were taken back: a pending change of an earlier
  // epoch is dead already.
  uint64_t epoch_ ABSL_GUARDED_BY(mutex_) = 0;
  // Answers that wait for a pending version, which they did not make.
  std::vector<Waiter> waiters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace normd

#endif  // NORMD_SERVER_REGISTRY_INSTANCE_H_
