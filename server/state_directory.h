// StateDirectory: --state_dir, owned by one process at a time.
#ifndef NORMD_SERVER_STATE_DIRECTORY_H_
#define NORMD_SERVER_STATE_DIRECTORY_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace normd {

// Holds a lock on the directory for as long as it lives.
//
//   DIRECTORY/LOCK           the lock, with the owner's process id in it
//   DIRECTORY/state.sqlite   the store (sqlite_store)
//   DIRECTORY/checkpoints/   generations (checkpoints)
class StateDirectory {
 public:
  // Makes the directory where it is missing. FAILED_PRECONDITION when it cannot be
  // made or written, or when another process has it; the message says what to do.
  static absl::StatusOr<std::unique_ptr<StateDirectory>> Open(const std::string& path);
  ~StateDirectory();
  StateDirectory(const StateDirectory&) = delete;
  StateDirectory& operator=(const StateDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string checkpoints() const { return path_ + "/checkpoints"; }
  // Whether a store was ever made here: without one, state comes from the newest
  // sound checkpoint.
  bool has_store() const;

 private:
  StateDirectory(std::string path, int lock) : path_(std::move(path)), lock_(lock) {}

  const std::string path_;
  const int lock_;
};

}  // namespace normd

#endif  // NORMD_SERVER_STATE_DIRECTORY_H_
