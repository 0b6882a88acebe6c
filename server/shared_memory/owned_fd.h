// OwnedFd: a file descriptor that is closed with its owner.
#ifndef NORMD_SERVER_SHARED_MEMORY_OWNED_FD_H_
#define NORMD_SERVER_SHARED_MEMORY_OWNED_FD_H_

#include <utility>

#include <unistd.h>

namespace normd {

class OwnedFd {
 public:
  explicit OwnedFd(int fd = -1) : fd_(fd) {}
  OwnedFd(OwnedFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  OwnedFd& operator=(OwnedFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~OwnedFd() {
    if (fd_ >= 0) close(fd_);
  }

  int get() const { return fd_; }  // negative: none

 private:
  int fd_;
};

}  // namespace normd

#endif  // NORMD_SERVER_SHARED_MEMORY_OWNED_FD_H_
