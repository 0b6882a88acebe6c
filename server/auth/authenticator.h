// From what a call presents to who calls.
#ifndef NORMD_SERVER_AUTH_AUTHENTICATOR_H_
#define NORMD_SERVER_AUTH_AUTHENTICATOR_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/grpcpp.h"
#include "server/auth/auth_file.h"
#include "server/auth/caller.h"

namespace normd {

// What a call brings along to say who it is from.
struct Presented {
  std::vector<std::string> authorization;  // values of the metadata key, "Bearer TOKEN"
  // Of a client certificate that TLS has verified.
  std::vector<std::string> common_names;
  std::vector<std::string> alt_names;
};

Presented PresentedBy(const grpc::ServerContextBase& context);

// Thread-safe.
class Authenticator {
 public:
  // Reads the file, and again within a second of a change of it; a new one that is
  // unsound is logged, and the one before stays in force. With an empty path nobody is
  // asked for anything, and everyone may do all.
  static absl::StatusOr<std::unique_ptr<Authenticator>> Open(const std::string& path);

  // UNAUTHENTICATED: nothing presented, or nothing that the file knows. A token goes
  // before a certificate; a wrong one is refused whatever the certificate says.
  absl::StatusOr<std::shared_ptr<const Caller>> Authenticate(const Presented& presented);

 private:
  // What tells one state of a file from another.
  struct Stamp {
    int64_t device = 0;
    int64_t inode = 0;
    int64_t size = 0;
    int64_t modified_ns = 0;
    int64_t changed_ns = 0;
    bool operator==(const Stamp&) const = default;
  };

  explicit Authenticator(std::string path) : path_(std::move(path)) {}

  absl::StatusOr<Stamp> StampOfFile() const;
  absl::Status Read();
  void ReadIfChanged();

  const std::string path_;
  std::atomic<int64_t> next_look_ns_ = 0;
  absl::Mutex mutex_;
  std::shared_ptr<const AuthFile> file_ ABSL_GUARDED_BY(mutex_);
  Stamp stamp_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace normd

#endif  // NORMD_SERVER_AUTH_AUTHENTICATOR_H_
