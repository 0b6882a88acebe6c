// Messages that end in a tensor, as byte buffers that lend the tensor's memory.
#ifndef NORMD_CLIENT_INTERNAL_WIRE_FORMAT_H_
#define NORMD_CLIENT_INTERNAL_WIRE_FORMAT_H_

#include <string>
#include <utility>
#include <vector>

#include <google/protobuf/message_lite.h>
#include <grpcpp/support/byte_buffer.h>

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

// Appends the value of a message's only field, `field_number` of type bytes, in the one copy
// that it takes. False, and nothing appended, for any other message.
bool AppendBytesOf(const grpc::ByteBuffer& message, int field_number, std::string& to);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_WIRE_FORMAT_H_
