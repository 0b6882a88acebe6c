// Files and directories by descriptor: nothing here follows a symbolic link below
// the directory it was given.
#ifndef NORMD_SERVER_STATE_FILES_H_
#define NORMD_SERVER_STATE_FILES_H_

#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace normd {

// Owns a file descriptor, or none (-1).
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor();

  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

// What a failed system call means: RESOURCE_EXHAUSTED where space, a quota or a
// size limit ended, NOT_FOUND for what is not there, FAILED_PRECONDITION where
// permissions or the kind of file are in the way, else UNAVAILABLE. The message is
// "`doing` `path`: " and the system's reason.
absl::Status ErrnoStatus(int error, std::string_view doing, std::string_view path);

// `path` is for messages in all of these.

// Makes the directory and its parents where missing, durably.
absl::Status MakeDirectories(const std::string& path);

// FAILED_PRECONDITION when `name` is no directory.
absl::StatusOr<Descriptor> OpenDirectory(int parent, const std::string& name,
                                         std::string_view path);

// Makes `name`, which must not be there. `sync`: on stable storage at return.
absl::Status WriteNewFile(int directory, const std::string& name, std::string_view bytes, bool sync,
                          std::string_view path);

// The whole of a regular file; DATA_LOSS when it is larger than `max_bytes` or no
// regular file.
absl::StatusOr<std::string> ReadWholeFile(int directory, const std::string& name, size_t max_bytes,
                                          std::string_view path);

absl::Status SyncDirectory(int directory, std::string_view path);

// Everything written to the file system that holds `directory`.
absl::Status SyncFileSystem(int directory, std::string_view path);

// Removes `name` with all that is in it; fine when it is not there.
absl::Status RemoveTree(int directory, const std::string& name, std::string_view path);

}  // namespace normd

#endif  // NORMD_SERVER_STATE_FILES_H_
