// Persister: brings changes to the StateStore, as --durability asks.
#ifndef NORMD_SERVER_STATE_PERSISTER_H_
#define NORMD_SERVER_STATE_PERSISTER_H_

#include <memory>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/state/state_store.h"

namespace normd {

enum class Durability : uint8_t {
  kNone,      // nothing is kept but checkpoints that are asked for
  kInterval,  // written behind, at most `interval` later
  kUpdate,    // on stable storage before the answer
};

// Owns one writer thread. Thread-safe.
class Persister {
 public:
  // How much longer than its interval kInterval acknowledges changes while none can be
  // stored. From then on it refuses them, so that no more than these can be lost.
  static constexpr absl::Duration kPatience = absl::Seconds(5);

  // `store` may be null with kNone; it must outlive the persister. `on_refusing` is called, never
  // from two threads at once, when kInterval begins to refuse changes (true) and when it takes
  // them again.
  static std::unique_ptr<Persister> Start(
      StateStore* store, Durability durability, absl::Duration interval,
      absl::AnyInvocable<void(bool)> on_refusing = [](bool) {},
      absl::Duration patience = kPatience);
  // Flushes, then stops the writer.
  virtual ~Persister() = default;

  // Whether Submit's `done` runs before Submit returns (kNone, kInterval).
  virtual bool acknowledges_at_once() const = 0;

  // Changes of one instance come in the order of their versions (the caller
  // holds the instance's lock). Never blocks on storage and never calls `done`
  // under a lock of its own.
  //   kUpdate    `done` is called on the writer thread, in the order of Submit,
  //              with the outcome of the commit; everything waiting goes into
  //              one commit (group commit)
  //   others     `done` is called before Submit returns; kInterval coalesces the
  //              changes of one instance and keeps those of a failed commit for
  //              the next try. Once commits fail and the oldest change kept is older than
  //              the interval and `patience`, changes are refused, with the code of the last
  //              failure, until a commit goes well
  virtual void Submit(Change change, absl::AnyInvocable<void(absl::Status)> done) = 0;

  // Returns when everything submitted before is durable, or why it is not.
  virtual absl::Status Flush() = 0;

  // Changes submitted since the start; always 0 with kNone.
  virtual uint64_t submitted() const = 0;

  // The last commit's error; OK when it went well.
  virtual absl::Status health() const = 0;
};

}  // namespace normd

#endif  // NORMD_SERVER_STATE_PERSISTER_H_
