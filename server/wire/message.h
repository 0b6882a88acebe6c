// Requests and answers with tensors, without a needless copy: the header fields
// go through protobuf, the payload does not.
//
// On the wire these are the ordinary messages of norm_service.proto, so that any
// generated client may send and receive them.
#ifndef NORMD_SERVER_WIRE_MESSAGE_H_
#define NORMD_SERVER_WIRE_MESSAGE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "google/protobuf/message.h"
#include "grpcpp/support/byte_buffer.h"
#include "normd/v1/tensor.pb.h"
#include "server/wire/buffer.h"

namespace normd {

// The `data` of a tensor: bytes that lie in the message itself or were gathered
// from its slices. Aligned for any element type.
struct Payload {
  const char* data = nullptr;
  size_t size = 0;
  // Holds the bytes where they were gathered; else they lie in the message.
  Buffer gathered;
};

// One top-level field of type Tensor, and where its payload goes.
struct TensorField {
  int number = 0;
  Payload* payload = nullptr;
};

// Parses `message` into `header`, but for the `data` of the named tensor fields,
// which become payloads; the header's tensors have empty data. Takes fields in
// any order and repeated ones as protobuf does (the last one counts).
// INVALID_ARGUMENT for bytes that are no such message. RESOURCE_EXHAUSTED when
// there is no memory to gather in.
// The payloads are good while `message` and `pool` are.
absl::Status ParseMessage(const grpc::ByteBuffer& message, absl::Span<const TensorField> fields,
                          BufferPool& pool, google::protobuf::MessageLite& header);

// One top-level field of type Tensor of an answer.
struct AnswerTensor {
  int number = 0;
  v1::Tensor header;           // without data
  Buffer data;                 // lent to the message until gRPC lets go of it,
  std::shared_ptr<void> keep;  // and this with it
};

// `header` followed by its tensors, in their order.
// Precondition: the header's own fields of these numbers are not set.
grpc::ByteBuffer WriteMessage(const google::protobuf::MessageLite& header,
                              std::vector<AnswerTensor> tensors);
}  // namespace normd

#endif  // NORMD_SERVER_WIRE_MESSAGE_H_
