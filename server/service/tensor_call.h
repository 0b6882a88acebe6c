// The unary RPCs that carry tensors, as raw messages: the payload is used where it
// arrived or gathered once, and the answer lends its memory to gRPC.
//
// For gRPC they are streams of one message each way, which look the same on the wire: so a
// call is seen before its message is read. A client that says in the metadata how long the
// message is ("normd-message-bytes", its bytes in decimal) is let in, or waits, or is refused
// before it has sent more than the first 64 KiB, and must then send it within 10 seconds and
// what 64 KiB a second take, or is cancelled; a message that nothing was said about is
// read first, and its memory is gRPC's until then.
#ifndef NORMD_SERVER_SERVICE_TENSOR_CALL_H_
#define NORMD_SERVER_SERVICE_TENSOR_CALL_H_

#include "grpcpp/grpcpp.h"
#include "server/service/core.h"

namespace normd {

using RawCall = grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>;

RawCall* ServeForward(Core& core, grpc::CallbackServerContext* context);
RawCall* ServeBackward(Core& core, grpc::CallbackServerContext* context);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_TENSOR_CALL_H_
