#include "server/state/files.h"

#include <cerrno>
#include <filesystem>
#include <memory>
#include <system_error>
#include <vector>

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

namespace normd {

Descriptor::~Descriptor() {
  if (fd_ >= 0) close(fd_);
}

absl::Status ErrnoStatus(int error, std::string_view doing, std::string_view path) {
  const std::string message =
      fmt::format("{} {}: {}", doing, path, std::generic_category().message(error));
  switch (error) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case EMFILE:
    case ENFILE: return absl::ResourceExhaustedError(message);
    case ENOENT: return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
    case EROFS:
    case ENOTDIR:
    case EISDIR:
    case ELOOP:
    case EEXIST: return absl::FailedPreconditionError(message);
    default: return absl::UnavailableError(message);
  }
}

absl::Status MakeDirectories(const std::string& path) {
  namespace fs = std::filesystem;
  // The outermost directory that is made: its entry lies in one that was there.
  fs::path existing = fs::path(path).lexically_normal();
  std::error_code error;
  std::vector<fs::path> made;
  while (!existing.empty() && !fs::exists(existing, error)) {
    made.push_back(existing);
    existing = existing.parent_path();
  }
  fs::create_directories(path, error);
  if (error) return ErrnoStatus(error.value(), "cannot make the directory", path);
  for (const fs::path& directory : made) {
    const std::string parent =
        directory.has_parent_path() ? directory.parent_path().string() : std::string(".");
    absl::StatusOr<Descriptor> opened = OpenDirectory(AT_FDCWD, parent, parent);
    if (!opened.ok()) return opened.status();
    if (absl::Status status = SyncDirectory(opened->get(), parent); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<Descriptor> OpenDirectory(int parent, const std::string& name,
                                         std::string_view path) {
  // What the operator names may be a link; what lies inside may not.
  const int no_follow = parent == AT_FDCWD ? 0 : O_NOFOLLOW;
  Descriptor directory(
      openat(parent, name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | no_follow));
  if (directory.get() < 0) return ErrnoStatus(errno, "cannot open the directory", path);
  return directory;
}

absl::Status WriteNewFile(int directory, const std::string& name, std::string_view bytes, bool sync,
                          std::string_view path) {
  Descriptor file(
      openat(directory, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644));
  if (file.get() < 0) return ErrnoStatus(errno, "cannot make", path);
  while (!bytes.empty()) {
    const ssize_t written = write(file.get(), bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return ErrnoStatus(errno, "cannot write", path);
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  if (sync && fsync(file.get()) != 0) return ErrnoStatus(errno, "cannot sync", path);
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadWholeFile(int directory, const std::string& name, size_t max_bytes,
                                          std::string_view path) {
  // Without O_NONBLOCK a pipe in a file's place would hang here.
  Descriptor file(openat(directory, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (file.get() < 0) return ErrnoStatus(errno, "cannot open", path);
  struct stat info;
  if (fstat(file.get(), &info) != 0) return ErrnoStatus(errno, "cannot read", path);
  if (!S_ISREG(info.st_mode)) {
    return absl::DataLossError(fmt::format("{} is no regular file", path));
  }
  if (static_cast<uint64_t>(info.st_size) > max_bytes) {
    return absl::DataLossError(
        fmt::format("{} has {} bytes, more than {}", path, info.st_size, max_bytes));
  }
  std::string bytes(static_cast<size_t>(info.st_size), '\0');
  size_t filled = 0;
  while (filled < bytes.size()) {
    const ssize_t count = read(file.get(), bytes.data() + filled, bytes.size() - filled);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return ErrnoStatus(errno, "cannot read", path);
    if (count == 0) break;
    filled += static_cast<size_t>(count);
  }
  bytes.resize(filled);
  return bytes;
}

absl::Status SyncDirectory(int directory, std::string_view path) {
  if (fsync(directory) != 0) return ErrnoStatus(errno, "cannot sync the directory", path);
  return absl::OkStatus();
}

absl::Status SyncFileSystem(int directory, std::string_view path) {
  if (syncfs(directory) != 0) return ErrnoStatus(errno, "cannot sync the file system of", path);
  return absl::OkStatus();
}

absl::Status RemoveTree(int directory, const std::string& name, std::string_view path) {
  if (unlinkat(directory, name.c_str(), 0) == 0 || errno == ENOENT) return absl::OkStatus();
  if (errno != EISDIR && errno != EPERM) return ErrnoStatus(errno, "cannot remove", path);

  absl::StatusOr<Descriptor> opened = OpenDirectory(directory, name, path);
  if (!opened.ok()) return opened.status();
  std::unique_ptr<DIR, int (*)(DIR*)> entries(fdopendir(fcntl(opened->get(), F_DUPFD_CLOEXEC, 0)),
                                              closedir);
  if (entries == nullptr) return ErrnoStatus(errno, "cannot read the directory", path);
  // Named first, removed then: an open listing need not survive removals.
  std::vector<std::string> names;
  while (const dirent* entry = readdir(entries.get())) {
    const std::string_view child = entry->d_name;
    if (child != "." && child != "..") names.emplace_back(child);
  }
  for (const std::string& child : names) {
    if (absl::Status status = RemoveTree(opened->get(), child, path); !status.ok()) return status;
  }
  if (unlinkat(directory, name.c_str(), AT_REMOVEDIR) != 0) {
    return ErrnoStatus(errno, "cannot remove", path);
  }
  return absl::OkStatus();
}

}  // namespace normd
