// StateStore: where acknowledged state is kept. Knows versions and records, not
// files: an embedded engine today (sqlite_store), a distributed one next.
#ifndef NORMD_SERVER_STATE_STATE_STORE_H_
#define NORMD_SERVER_STATE_STATE_STORE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "server/instance/instance_state.h"
#include "server/instance/request_log.h"

namespace normd {

// An instance as it is kept: its state and the requests that it remembers.
struct StoredInstance {
  std::shared_ptr<const InstanceState> state;
  std::vector<AppliedRequest> requests;  // oldest first
};

// A removed instance, remembered so that a repeated delete is answered alike.
struct Tombstone {
  std::string name;
  AppliedRequest request;
};

// One step of one instance's life.
struct Change {
  std::string name;
  // The version that the store must hold for the change to apply; 0: none. A removal
  // of none leaves its tombstone (the instance was made and removed in between).
  uint64_t previous_version = 0;
  // The new state; null: the instance is removed.
  std::shared_ptr<const InstanceState> state;
  // Requests that were applied since previous_version, oldest first. With a
  // removal: at most one, which makes the tombstone.
  std::vector<AppliedRequest> requests;
  // Whether the store is to forget the requests it held before (the instance
  // was created anew or loaded from a checkpoint).
  bool replace_requests = false;
};

// Thread-safe.
class StateStore {
 public:
  virtual ~StateStore() = default;

  // Applies the changes in order, each if the store holds its previous_version
  // then (compare-and-swap), all in one transaction. When it returns, what was
  // applied is on stable storage. Returns a status a change: Aborted where the
  // version did not match. When the transaction itself fails, none is applied
  // and all carry its error (RESOURCE_EXHAUSTED when the disk is full, DATA_LOSS
  // when the store is damaged, UNAVAILABLE otherwise); the next Commit starts afresh.
  virtual std::vector<absl::Status> Commit(absl::Span<const Change> changes) = 0;

  // Calls `instance` for each one held, in any order. DataLoss when the store is
  // damaged; stops at the first error of the callback.
  virtual absl::Status Load(absl::FunctionRef<absl::Status(StoredInstance)> instance,
                            absl::FunctionRef<absl::Status(Tombstone)> tombstone) = 0;
};

}  // namespace normd

#endif  // NORMD_SERVER_STATE_STATE_STORE_H_
