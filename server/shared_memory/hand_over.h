// HandOver: the Unix socket through which clients get their regions.
#ifndef NORMD_SERVER_SHARED_MEMORY_HAND_OVER_H_
#define NORMD_SERVER_SHARED_MEMORY_HAND_OVER_H_

#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/shared_memory/owned_fd.h"
#include "server/shared_memory/regions.h"

namespace normd {

// One thread that accepts connections and sees them end. It reads nothing: a client that
// sends anything at all is cut off.
class HandOver {
 public:
  // Listens at `path`, a file for this process's user alone, and takes connections of that
  // user and of root. Connections without a region for `idle` are closed. FAILED_PRECONDITION
  // where `path` cannot be listened at, or another process does. `regions` must outlive this.
  static absl::StatusOr<std::unique_ptr<HandOver>> Listen(const std::string& path, Regions* regions,
                                                          absl::Duration idle);
  // Closes all connections, and leaves their memory to clients that have it mapped.
  ~HandOver();
  HandOver(const HandOver&) = delete;
  HandOver& operator=(const HandOver&) = delete;

  const std::string& path() const { return path_; }

 private:
  struct Peer {
    std::string connection;
    int socket = -1;  // owned by the connection
    absl::Time useful_at;
  };

  HandOver(std::string path, Regions* regions, absl::Duration idle, OwnedFd listener, OwnedFd stop);
  void Run();
  void Accept();
  void CloseIdle();

  const std::string path_;
  Regions* const regions_;
  const absl::Duration idle_;
  const OwnedFd listener_;
  const OwnedFd stop_;
  std::vector<Peer> peers_;  // of the thread
  std::thread thread_;
};

}  // namespace normd

#endif  // NORMD_SERVER_SHARED_MEMORY_HAND_OVER_H_
