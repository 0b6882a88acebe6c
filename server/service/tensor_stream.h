// ForwardStream and BackwardStream: tensors past one message, in chunks.
#ifndef NORMD_SERVER_SERVICE_TENSOR_STREAM_H_
#define NORMD_SERVER_SERVICE_TENSOR_STREAM_H_

#include "grpcpp/grpcpp.h"
#include "normd/v1/norm_service.pb.h"
#include "server/service/core.h"

namespace normd {

grpc::ServerBidiReactor<v1::ForwardStreamRequest, v1::ForwardStreamResponse>* ServeForwardStream(
    Core& core, grpc::CallbackServerContext* context);
grpc::ServerBidiReactor<v1::BackwardStreamRequest, v1::BackwardStreamResponse>* ServeBackwardStream(
    Core& core, grpc::CallbackServerContext* context);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_TENSOR_STREAM_H_
