// The audit log (--audit_log): who changed what, and who was refused.
//
// A line of JSON each, written before the call is answered:
//
//   {"time":"2026-01-31T12:00:00.123456Z","who":"trainer","peer":"ipv4:10.0.0.7:41234",
//    "method":"Step","instance":"net/bn1","request_id":"...","outcome":"OK","version":12,
//    "replayed":false}
//
// `outcome` is the gRPC code. `who` is empty where nobody was made out. A refused call of
// any method is in it, at most 100 of UNAUTHENTICATED a second, so that strangers cannot
// fill the disk.
#ifndef NORMD_SERVER_AUTH_AUDIT_LOG_H_
#define NORMD_SERVER_AUTH_AUDIT_LOG_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace spdlog {
class logger;
}

namespace normd {

struct AuditRecord {
  std::string who;
  std::string peer;
  std::string method;
  std::string instance;    // empty: the call names none
  std::string request_id;  // empty: the call has none
  absl::StatusCode outcome = absl::StatusCode::kOk;
  uint64_t version = 0;  // of the instance after the change; 0: none
  bool replayed = false;
};

// Thread-safe.
class AuditLog {
 public:
  // Appends to the file, which is made for its owner alone where it is missing.
  // FAILED_PRECONDITION when it cannot be written. An empty path: nothing is kept.
  static absl::StatusOr<std::unique_ptr<AuditLog>> Open(const std::string& path);

  void Write(const AuditRecord& record);

 private:
  explicit AuditLog(std::shared_ptr<spdlog::logger> logger) : logger_(std::move(logger)) {}

  bool StrangersTooLoud();

  const std::shared_ptr<spdlog::logger> logger_;  // null: nothing is kept
  std::atomic<int64_t> second_ = 0;
  std::atomic<int> strangers_ = 0;  // refused in that second
};

}  // namespace normd

#endif  // NORMD_SERVER_AUTH_AUDIT_LOG_H_
