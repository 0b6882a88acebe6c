// SavedContexts: what Backward needs of a Forward, kept on the server.
#ifndef NORMD_SERVER_REGISTRY_SAVED_CONTEXTS_H_
#define NORMD_SERVER_REGISTRY_SAVED_CONTEXTS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/numeric/int128.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "kernels/problem.h"
#include "server/admission/memory_budget.h"
#include "server/instance/values.h"
#include "server/wire/buffer.h"

namespace normd {

// A Forward's input and what it was normalized by.
struct SavedForward {
  std::string uid;  // of the instance
  NormProblem problem;
  std::vector<int64_t> shape;
  std::shared_ptr<const Buffer> input;
  std::vector<double> mean;
  std::vector<double> var;  // biased
  bool statistics_of_batch = true;
  Values weight;     // as it was then
  Buffer relu_mask;  // a bit a value; empty: no activation
  bool has_residual = false;
};

// Thread-safe.
class SavedContexts {
 public:
  // A context under use by one Backward. Unless Commit was called, the context is
  // as before when this goes.
  class Lease {
   public:
    Lease(Lease&& other) noexcept
        : contexts_(std::exchange(other.contexts_, nullptr)),
          id_(std::move(other.id_)),
          forward_(std::move(other.forward_)) {}
    Lease& operator=(Lease&&) = delete;
    ~Lease();

    const SavedForward& forward() const { return *forward_; }
    // The Backward is done: the context is spent, but for retries of the same
    // request_id; with `retain` it stays good for another Backward.
    void Commit(bool retain);

   private:
    friend class SavedContexts;
    Lease(SavedContexts* contexts, std::string id, std::shared_ptr<const SavedForward> forward)
        : contexts_(contexts), id_(std::move(id)), forward_(std::move(forward)) {}

    SavedContexts* contexts_;
    std::string id_;
    std::shared_ptr<const SavedForward> forward_;
  };

  // `budget` bounds the bytes kept and must outlive the contexts; `ttl` how long.
  SavedContexts(MemoryBudget* budget, absl::Duration ttl) : budget_(budget), ttl_(ttl) {}

  // Claims the bytes of a context that is to be. Expired contexts, then spent ones make
  // room; RESOURCE_EXHAUSTED when that is not enough.
  absl::StatusOr<MemoryClaim> Claim(int64_t bytes);

  // Keeps `forward`, whose bytes are claimed, and returns its context_id.
  std::string Put(SavedForward forward, MemoryClaim claim);

  // Forgets a context whose Forward was refused after all.
  void Drop(const std::string& id);

  // Forgets those of an instance that is gone.
  void DropOf(const std::string& uid);

  // NOT_FOUND: no such context of this instance, or expired. FAILED_PRECONDITION:
  // spent, or under use. A spent one is lent again to the request that spent it.
  absl::StatusOr<Lease> Use(const std::string& id, const std::string& uid,
                            std::optional<absl::uint128> request_id);

  // Forgets what has expired; called from time to time.
  void Sweep();

 private:
  struct Entry {
    std::string uid;
    absl::Time expires;
    std::shared_ptr<const SavedForward> forward;  // null: spent, and its memory given back
    MemoryClaim claim;
    bool in_use = false;
    bool spent = false;
    std::optional<absl::uint128> user;  // the request_id that uses or spent it
  };

  void Release(const std::string& id, bool committed, bool retain);
  void DropExpired(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Gives back the memory of the spent context that expires first.
  bool DropOneSpent() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  MemoryBudget* const budget_;
  const absl::Duration ttl_;
  absl::Mutex mutex_;
  absl::flat_hash_map<std::string, Entry> entries_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace normd

#endif  // NORMD_SERVER_REGISTRY_SAVED_CONTEXTS_H_
