// One bidirectional stream, from one thread.
#ifndef NORMD_CLIENT_INTERNAL_STREAM_H_
#define NORMD_CLIENT_INTERNAL_STREAM_H_

#include <optional>
#include <string>

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include "absl/functional/function_ref.h"

namespace normd::inline client::internal {

// Opens `method`, sends what `next_request` makes until it makes nothing, and
// hands each answer to `on_response`; an error of either ends the stream. Sends and
// receives at once, so that neither side waits for the other's buffers.
grpc::Status RunStream(
    grpc::GenericStub& stub, grpc::ClientContext* context, const std::string& method,
    absl::FunctionRef<grpc::Status(std::optional<grpc::ByteBuffer>*)> next_request,
    absl::FunctionRef<grpc::Status(grpc::ByteBuffer*)> on_response);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_STREAM_H_
