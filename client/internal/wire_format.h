// Messages that end in a tensor, as byte buffers that lend the tensor's memory.
#ifndef NORMD_CLIENT_INTERNAL_WIRE_FORMAT_H_
#define NORMD_CLIENT_INTERNAL_WIRE_FORMAT_H_

#include <string_view>
#include <utility>
#include <vector>

#include <google/protobuf/message_lite.h>
#include <grpcpp/support/byte_buffer.h>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "client/normd_client.h"

namespace normd::inline client::internal {

// A tensor's bytes to lend to gRPC; borrowed ones are copied, since gRPC may hold
// on to them after a call has ended.
grpc::Slice LendBytes(const Tensor& tensor);

// `message` followed by tensor fields, each given by its field number and set in
// `message` nowhere.
struct TensorField {
  int number;
  const Tensor* tensor;
};
grpc::ByteBuffer MessageWithTensors(const google::protobuf::MessageLite& message,
                                    absl::Span<const TensorField> fields);

// A message of one field, which holds `bytes`.
grpc::ByteBuffer MessageOfBytes(int field_number, grpc::Slice bytes);

grpc::ByteBuffer MessageOf(const google::protobuf::MessageLite& message);

// Calls `take` with the value of a message's only field, `field_number` of type bytes, piece
// by piece as it lies in the message. False, and nothing taken, for any other message.
bool TakeBytesOf(const grpc::ByteBuffer& message, int field_number,
                 absl::FunctionRef<void(std::string_view)> take);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_WIRE_FORMAT_H_
