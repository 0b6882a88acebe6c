// The unary RPCs that carry tensors, as raw messages: the payload is used where it
// arrived or gathered once, and the answer lends its memory to gRPC.
#ifndef NORMD_SERVER_SERVICE_TENSOR_CALL_H_
#define NORMD_SERVER_SERVICE_TENSOR_CALL_H_

#include "grpcpp/grpcpp.h"
#include "server/service/core.h"

namespace normd {

grpc::ServerUnaryReactor* ServeForward(Core& core, grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request, grpc::ByteBuffer* response);
grpc::ServerUnaryReactor* ServeBackward(Core& core, grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_TENSOR_CALL_H_
