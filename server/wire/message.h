// Requests and answers with tensors, without a needless copy: the header fields
// go through protobuf, the payload does not.
//
// On the wire these are the ordinary messages of norm_service.proto, so that any
// generated client may send and receive them.
#ifndef NORMD_SERVER_WIRE_MESSAGE_H_
#define NORMD_SERVER_WIRE_MESSAGE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "google/protobuf/message.h"
#include "grpcpp/support/byte_buffer.h"
#include "kernels/executor.h"
#include "normd/v1/tensor.pb.h"
#include "server/wire/buffer.h"

namespace normd {

// The bytes of a tensor: they lie in a slice of the message, or were gathered from its
// slices, or lie elsewhere. Aligned for any element type.
struct Payload {
  const char* data = nullptr;
  size_t size = 0;
  // Holds the bytes where they were gathered.
  ClaimedBuffer gathered;
  // Keeps them where they lie in a slice or elsewhere.
  std::shared_ptr<const void> keep = nullptr;
  // They are in a device's memory: not to be touched here.
  bool on_device = false;
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
// Empties `message`: its slices go as they are read, but those that a payload lies in. What is
// gathered, by the threads of `executor`, is claimed by the caller: never more than the
// message's bytes.
absl::Status ParseMessage(grpc::ByteBuffer& message, absl::Span<const TensorField> fields,
                          BufferPool& pool, Executor& executor,
                          google::protobuf::MessageLite& header);

// One top-level field of type Tensor of an answer.
struct AnswerTensor {
  int number = 0;
  v1::Tensor header;   // without data
  ClaimedBuffer data;  // lent to the message until gRPC lets go of it
};

// `header` followed by its tensors, in their order.
// Precondition: the header's own fields of these numbers are not set.
grpc::ByteBuffer WriteMessage(const google::protobuf::MessageLite& header,
                              std::vector<AnswerTensor> tensors);

// A message of one field of type bytes, as streams of chunks have them: where the bytes
// lie in the slices that brought it.
class Chunk {
 public:
  // The chunk that `message` is; nothing unless its only field is one of `numbers`.
  static std::optional<Chunk> Of(const grpc::ByteBuffer& message, absl::Span<const int> numbers);
  // One of bytes that have been parsed already.
  static Chunk Of(int number, const std::string& bytes);

  int number() const { return number_; }
  size_t size() const { return size_; }
  // Writes `count` bytes from the `from`-th on to `to`. Precondition: they are there.
  void Copy(size_t from, size_t count, char* to) const;

 private:
  int number_ = 0;
  size_t size_ = 0;
  size_t offset_ = 0;  // of the first byte, in the slices
  grpc::ByteBuffer message_;
  std::vector<grpc::Slice> slices_;  // its own, destroyed before it: see SliceStream
};

// A message whose only field, `number`, is these bytes, lent to gRPC together with `keep`.
grpc::ByteBuffer WriteChunk(int number, const char* data, size_t size, std::shared_ptr<void> keep);

}  // namespace normd

#endif  // NORMD_SERVER_WIRE_MESSAGE_H_
