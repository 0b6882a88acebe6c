// Connection: deadlines and retries between Client and gRPC's stubs.
#ifndef NORMD_CLIENT_INTERNAL_CONNECTION_H_
#define NORMD_CLIENT_INTERNAL_CONNECTION_H_

#include <memory>
#include <string>

#include <google/protobuf/message.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/internal/credentials.h"
#include "client/internal/shared_memory.h"
#include "client/normd_client.h"
#include "normd/v1/norm_service.grpc.pb.h"

namespace normd::inline client::internal {

// Thread-safe.
class Connection {
 public:
  Connection(const std::string& target, const ClientOptions& options,
             const Credentials& credentials);

  const ClientOptions& options() const { return options_; }
  // For calls whose messages are put together by hand.
  grpc::GenericStub& generic_stub() { return generic_stub_; }

  // When a call that begins now must be over, with all its retries.
  absl::Time DeadlineOf(const CallOptions& call) const;

  // A method of the generated stub, as often as the retry policy says.
  template <class Request, class Response>
  using Method = grpc::Status (v1::NormService::StubInterface::*)(grpc::ClientContext*,
                                                                  const Request&, Response*);
  template <class Request, class Response>
  absl::StatusOr<Response> Call(Method<Request, Response> method, const Request& request,
                                const CallOptions& call) {
    Response response;
    absl::Status status = Run(DeadlineOf(call), [&](grpc::ClientContext* context) {
      return (stub_.get()->*method)(context, request, &response);
    });
    if (!status.ok()) return status;
    return response;
  }

  // Likewise, but once.
  template <class Request, class Response>
  absl::StatusOr<Response> CallOnce(Method<Request, Response> method, const Request& request,
                                    absl::Time deadline) {
    Response response;
    absl::Status status = RunOnce(deadline, [&](grpc::ClientContext* context) {
      return (stub_.get()->*method)(context, request, &response);
    });
    if (!status.ok()) return status;
    return response;
  }

  // A unary method by its name ("/normd.v1.NormService/Forward"), likewise.
  absl::Status CallRaw(const std::string& method, const grpc::ByteBuffer& request,
                       google::protobuf::Message* response, absl::Time deadline);
  // One attempt of it.
  grpc::Status CallRawOnce(grpc::ClientContext* context, const std::string& method,
                           const grpc::ByteBuffer& request, google::protobuf::Message* response);

  // `attempt` with a fresh context each time, likewise.
  absl::Status Run(absl::Time deadline,
                   absl::FunctionRef<grpc::Status(grpc::ClientContext*)> attempt);

  // A single attempt.
  absl::Status RunOnce(absl::Time deadline,
                       absl::FunctionRef<grpc::Status(grpc::ClientContext*)> attempt);

  // Memory that the server sees too.
  SharedMemoryPool& shared_memory() { return shared_memory_; }

  // The option, or the server's own limit, asked for once.
  absl::StatusOr<int64_t> MaxMessageBytes(absl::Time deadline);

 private:
  const ClientOptions options_;
  const std::string authorization_;  // of each call; empty: none
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::NormService::StubInterface> stub_;
  grpc::GenericStub generic_stub_;

  SharedMemoryPool shared_memory_;

  absl::Mutex mutex_;
  int64_t max_message_bytes_ ABSL_GUARDED_BY(mutex_);  // 0: not known yet
};

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_CONNECTION_H_
