// What is the same for every RPC: whether the caller may make it, its outcome as gRPC
// tells it, and its lines in the log and the audit log.
#ifndef NORMD_SERVER_SERVICE_RPC_H_
#define NORMD_SERVER_SERVICE_RPC_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"
#include "server/auth/caller.h"
#include "server/auth/permissions.h"
#include "server/clock.h"
#include "server/service/core.h"

namespace normd {

// What there is to tell of a call that is over.
struct Finished {
  std::string instance = {};
  std::string request_id = {};
  uint64_t version = 0;  // of the instance after it; 0: it changed none
  bool replayed = false;
  bool changed = false;  // though the method's row does not say so
  int64_t bytes_in = 0;
  int64_t bytes_out = 0;
};

// One call under way. Each way of serving a method makes one, asks admitted() before it
// reads the request, and Authorize() before it acts on it.
class Rpc {
 public:
  // Makes out who calls. `method` is its name in normd.v1.NormService.
  Rpc(Core& core, const char* method, grpc::CallbackServerContext* context);
  ~Rpc();
  Rpc(const Rpc&) = delete;
  Rpc& operator=(const Rpc&) = delete;

  // UNAUTHENTICATED, PERMISSION_DENIED for a caller who may make no such call on
  // anything, or UNAVAILABLE while the server shuts down.
  const absl::Status& admitted() const { return admitted_; }

  // Whether the caller may make this call on what the request names; PERMISSION_DENIED
  // if not. Precondition: admitted().
  template <class Request>
  absl::Status Authorize(const Request& request) const {
    if constexpr (requires { request.names(); }) {
      const std::vector<std::string> names(request.names().begin(), request.names().end());
      return CheckNames(*caller_, *permission_, names);
    } else if constexpr (requires { request.name(); }) {
      return CheckNames(*caller_, *permission_, {request.name()});
    } else {
      return CheckNames(*caller_, *permission_, {});
    }
  }

  // Precondition: admitted(). Lives as long as the Rpc.
  const Caller& caller() const { return *caller_; }

  // The status as gRPC sends it, with the ErrorDetail put into the trailing
  // metadata; logs the call at debug level (errors of the server's own at error), and
  // a change or a refusal in the audit log.
  grpc::Status Finish(const absl::Status& status, const Finished& finished);

 private:
  void Audit(const absl::Status& status, const Finished& finished) const;

  Core& core_;
  const char* const method_;
  grpc::CallbackServerContext* const context_;
  const absl::Time start_ = SteadyNow();
  const Permission* const permission_;    // null: the method has no row
  std::shared_ptr<const Caller> caller_;  // null: nobody was made out
  absl::Status admitted_;
  bool inside_ = false;  // of the gate
};

// What the request tells of the call, and what its answer does.
template <class Request>
Finished Tell(const Request& request) {
  Finished finished;
  if constexpr (requires { request.name(); }) finished.instance = request.name();
  if constexpr (requires { request.request_id(); }) finished.request_id = request.request_id();
  return finished;
}
template <class Request, class Response>
Finished Tell(const Request& request, const Response& response) {
  Finished finished = Tell(request);
  if constexpr (requires { response.version() + uint64_t{0}; }) {
    finished.version = response.version();
  }
  if constexpr (requires { response.replayed(); }) finished.replayed = response.replayed();
  return finished;
}

// Requests above this many bytes are served on the compute threads, so that the
// threads which poll the network never work for long; smaller ones where they
// arrive, so that they pay for no hop.
inline constexpr int64_t kLargestInline = 64 * 1024;

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_RPC_H_
