#include "server/state_directory.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"

namespace normd {

absl::StatusOr<std::unique_ptr<StateDirectory>> StateDirectory::Open(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot make the state directory ", path, ": ", error.message(),
                     "; give one that can be made with --state_dir"));
  }
  const std::string lock_path = absl::StrCat(path, "/LOCK");
  const int lock = open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock < 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot write to the state directory ", path, ": ", std::strerror(errno),
                     "; make it writable, or give another with --state_dir"));
  }
  if (flock(lock, LOCK_EX | LOCK_NB) != 0) {
    std::string owner(32, '\0');
    const ssize_t size = pread(lock, owner.data(), owner.size(), 0);
    owner.resize(size > 0 ? static_cast<size_t>(size) : 0);
    close(lock);
    return absl::FailedPreconditionError(
        absl::StrCat("the state directory ", path, " is in use by another normd (process ", owner,
                     "); stop that one, or give this one another directory with --state_dir"));
  }
  const std::string owner = absl::StrCat(getpid());
  // For people to read: nothing depends on it.
  if (ftruncate(lock, 0) != 0 || pwrite(lock, owner.data(), owner.size(), 0) < 0) {
    // The lock is what counts, and a full disk must not keep the server down.
  }
  return absl::WrapUnique(new StateDirectory(path, lock));
}

StateDirectory::~StateDirectory() { close(lock_); }

bool StateDirectory::has_store() const {
  std::error_code error;
  return std::filesystem::exists(path_ + "/state.sqlite", error);
}

}  // namespace normd
