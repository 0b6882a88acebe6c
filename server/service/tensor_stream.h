// ForwardStream and BackwardStream: tensors past one message, in chunks.
//
// An eval-mode Forward, and one whose samples are normalized each by itself, passes
// through: pieces of the output leave while the input still comes, and no more than a few
// chunks are ever here (or a sample, where that is larger). A train-mode Forward keeps the
// input once, takes its statistics while it comes, and normalizes it in place while it
// leaves. What else there is, is gathered, served as the unary call serves it, and sent.
#ifndef NORMD_SERVER_SERVICE_TENSOR_STREAM_H_
#define NORMD_SERVER_SERVICE_TENSOR_STREAM_H_

#include "grpcpp/grpcpp.h"
#include "server/service/core.h"

namespace normd {

using RawStream = grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>;

RawStream* ServeForwardStream(Core& core, grpc::CallbackServerContext* context);
RawStream* ServeBackwardStream(Core& core, grpc::CallbackServerContext* context);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_TENSOR_STREAM_H_
