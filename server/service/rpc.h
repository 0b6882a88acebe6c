// What is the same for every RPC: its outcome as gRPC tells it, and its line in
// the log.
#ifndef NORMD_SERVER_SERVICE_RPC_H_
#define NORMD_SERVER_SERVICE_RPC_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"

namespace normd {

// One call under way.
class Rpc {
 public:
  Rpc(const char* method, grpc::CallbackServerContext* context)
      : method_(method), context_(context) {}

  // The status as gRPC sends it, with the ErrorDetail put into the trailing
  // metadata; logs the call at debug level (errors of the server's own at error).
  grpc::Status Finish(const absl::Status& status, absl::string_view instance, int64_t bytes_in = 0,
                      int64_t bytes_out = 0);

 private:
  const char* const method_;
  grpc::CallbackServerContext* const context_;
  const absl::Time start_ = absl::Now();
};

// Requests above this many bytes are served on the compute threads, so that the
// threads which poll the network never work for long; smaller ones where they
// arrive, so that they pay for no hop.
inline constexpr int64_t kLargestInline = 64 * 1024;

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_RPC_H_
