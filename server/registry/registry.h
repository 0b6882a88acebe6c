// Registry: the living instances by name.
#ifndef NORMD_SERVER_REGISTRY_REGISTRY_H_
#define NORMD_SERVER_REGISTRY_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "server/registry/instance.h"
#include "server/state/persister.h"
#include "server/state/state_store.h"

namespace normd {

// Thread-safe.
class Registry {
 public:
  // `persister` must outlive the registry. `max_instances` is named in errors as
  // --max_instances.
  Registry(Persister* persister, int64_t max_instances)
      : persister_(persister), max_instances_(max_instances) {}

  // Takes in what the store holds; before the first call from outside.
  void Restore(StoredInstance stored);
  void Restore(Tombstone tombstone);

  // Makes an instance of version 1. ALREADY_EXISTS when the name is taken, but a
  // repeated request_id is answered as replayed.
  void Create(const std::string& name, const Layer& layer, Mode mode,
              std::optional<absl::uint128> request_id, ChangeDone done);

  // NOT_FOUND naming it.
  absl::StatusOr<std::shared_ptr<Instance>> Find(absl::string_view name) const;

  // The acknowledged state of an instance; NOT_FOUND likewise.
  absl::StatusOr<Snapshot> Published(absl::string_view name) const;

  // As Instance::Remove; a repeated request_id answers OK again.
  void Delete(const std::string& name, const ChangeOptions& options, ChangeDone done);

  // Up to `limit` published instances in the order of their names, those after
  // `after` that begin with `prefix`. `more` tells whether others follow.
  std::vector<Snapshot> List(absl::string_view prefix, absl::string_view after, size_t limit,
                             bool* more) const;

  // Every published instance, each from one version.
  std::vector<StoredInstance> ForCheckpoint() const;

  // Replaces or makes the instances of a checkpoint, and waits until that is as
  // durable as asked. Answers their versions, in order.
  absl::StatusOr<std::vector<uint64_t>> Load(absl::Span<const StoredInstance> instances);

  int64_t size() const;

 private:
  void Erase(const std::string& name, const Instance* instance);
  void Remember(Tombstone tombstone);
  // The removal of `name` that `request_id` made, if it is still remembered.
  std::optional<AppliedRequest> FindRemoval(const std::string& name,
                                            std::optional<absl::uint128> request_id) const;

  Persister* const persister_;
  const int64_t max_instances_;
  mutable absl::Mutex mutex_;
  // In the order of names, for ListInstances.
  absl::btree_map<std::string, std::shared_ptr<Instance>> instances_ ABSL_GUARDED_BY(mutex_);
  // The last removal of a name, for RequestLog::kKeep.
  absl::flat_hash_map<std::string, AppliedRequest> tombstones_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace normd

#endif  // NORMD_SERVER_REGISTRY_REGISTRY_H_
