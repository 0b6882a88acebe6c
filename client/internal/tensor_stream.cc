#include "client/internal/tensor_stream.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "client/internal/calls.h"
#include "client/internal/convert.h"
#include "client/internal/stream.h"
#include "client/internal/wire_format.h"

namespace normd::inline client::internal {
namespace {

int64_t ByteCount(const Tensor& tensor) { return static_cast<int64_t>(tensor.bytes().size()); }

// The bytes of a tensor as messages of chunks, from the first to the last.
class Chunks {
 public:
  Chunks(const Tensor& tensor, int field_number, int64_t chunk_bytes)
      : Chunks(tensor.bytes().size(), field_number, chunk_bytes,
               [bytes = LendBytes(tensor)](size_t begin, size_t end) {
                 return bytes.sub(begin, end);
               }) {}
  Chunks(const TensorSource& source, int64_t size, int field_number, int64_t chunk_bytes)
      : Chunks(static_cast<size_t>(size), field_number, chunk_bytes,
               [&source](size_t begin, size_t end) -> absl::StatusOr<grpc::Slice> {
                 grpc::Slice slice(end - begin);
                 absl::Status read = source.read(
                     static_cast<int64_t>(begin),
                     {reinterpret_cast<char*>(const_cast<uint8_t*>(slice.begin())), slice.size()});
                 if (!read.ok()) return read;
                 return slice;
               }) {}

  void Rewind() { offset_ = 0; }

  bool done() const { return offset_ == size_; }
  // Precondition: not done().
  absl::StatusOr<grpc::ByteBuffer> Next() {
    const size_t begin = offset_;
    offset_ = std::min(size_, begin + chunk_bytes_);
    auto bytes = get_(begin, offset_);
    if (!bytes.ok()) return bytes.status();
    return MessageOfBytes(field_number_, *std::move(bytes));
  }

 private:
  using Get = std::function<absl::StatusOr<grpc::Slice>(size_t begin, size_t end)>;
  Chunks(size_t size, int field_number, int64_t chunk_bytes, Get get)
      : size_(size),
        field_number_(field_number),
        chunk_bytes_(static_cast<size_t>(chunk_bytes)),
        get_(std::move(get)) {}

  size_t size_;
  int field_number_;
  size_t chunk_bytes_;
  Get get_;
  size_t offset_ = 0;
};

absl::StatusOr<int64_t> ChunkBytes(Connection& connection, absl::Time deadline) {
  const auto limit = connection.MaxMessageBytes(deadline);
  if (!limit.ok()) return limit.status();
  // Half of the limit leaves room for the message around the chunk.
  return std::max<int64_t>(1, std::min(connection.options().stream_chunk_bytes, *limit / 2));
}

// Tensors of `expected` bytes that the answer's header says will follow it.
int64_t TensorsIn(const v1::ForwardResponse&) { return 1; }
int64_t TensorsIn(const v1::BackwardResponse& header) {
  return header.has_grad_input() + header.has_grad_residual();
}

template <class Header>
struct StreamAnswer {
  Header header;
  std::string bytes;           // all chunks, unless a sink took them
  int64_t received = 0;        // bytes of them
  std::string residual_bytes;  // all chunks of grad_residual
};

// Sends `header` and then the chunks, and gathers what comes back, the first tensor in `sink`
// where there is one; tensors of `expected` bytes each, if all goes well.
template <class Response, class Header>
absl::StatusOr<StreamAnswer<Header>> CallStream(Connection& connection, const char* method,
                                                const google::protobuf::MessageLite& header,
                                                std::vector<Chunks> chunks, int64_t expected,
                                                absl::Time deadline, const Progress& progress,
                                                const TensorSink* sink = nullptr) {
  StreamAnswer<Header> answer;
  absl::Status our_error;  // of a source or the sink: no other try would do better
  const auto give_up = [&](absl::Status error) -> grpc::Status {
    our_error = std::move(error);
    return {grpc::StatusCode::ABORTED, "given up"};
  };
  absl::Status status = connection.Run(deadline, [&](grpc::ClientContext* context) {
    // Each attempt begins anew.
    bool header_sent = false;
    bool header_received = false;
    for (Chunks& tensor : chunks) tensor.Rewind();
    answer.bytes.clear();
    answer.received = 0;
    answer.residual_bytes.clear();

    const auto next_request = [&](std::optional<grpc::ByteBuffer>* request) -> grpc::Status {
      if (!std::exchange(header_sent, true)) {
        *request = MessageOf(header);
        return grpc::Status::OK;
      }
      for (Chunks& tensor : chunks) {
        if (tensor.done()) continue;
        auto chunk = tensor.Next();
        if (!chunk.ok()) return give_up(chunk.status());
        *request = *std::move(chunk);
        break;
      }
      return grpc::Status::OK;
    };
    absl::Status sunk;
    const auto take = [&](std::string_view bytes) {
      if (sink == nullptr) {
        answer.bytes += bytes;
      } else if (sunk.ok()) {
        sunk = (*sink)(answer.received, bytes);
      }
      answer.received += static_cast<int64_t>(bytes.size());
    };
    const auto take_residual = [&](std::string_view bytes) { answer.residual_bytes += bytes; };
    const auto taken = [&]() -> grpc::Status {
      if (!sunk.ok()) return give_up(sunk);
      if (progress) {
        progress(answer.received + static_cast<int64_t>(answer.residual_bytes.size()),
                 expected * TensorsIn(answer.header));
      }
      return grpc::Status::OK;
    };
    const auto on_response = [&](grpc::ByteBuffer* buffer) -> grpc::Status {
      bool is_chunk = header_received && TakeBytesOf(*buffer, Response::kChunkFieldNumber, take);
      if constexpr (requires { Response::kGradResidualChunkFieldNumber; }) {
        is_chunk = is_chunk ||
                   (header_received &&
                    TakeBytesOf(*buffer, Response::kGradResidualChunkFieldNumber, take_residual));
      }
      if (is_chunk) return taken();
      Response response;
      auto parsed = grpc::GenericDeserialize<grpc::ProtoBufferReader, Response>(buffer, &response);
      if (!parsed.ok()) return parsed;
      if (response.has_header() == header_received) {
        return {grpc::StatusCode::INTERNAL, "the server's stream is not one header, then chunks"};
      }
      if (response.has_header()) {
        header_received = true;
        answer.header = std::move(*response.mutable_header());
        if (TensorsIn(answer.header) > 0 && sink == nullptr) answer.bytes.reserve(expected);
        return grpc::Status::OK;
      }
      take(response.chunk());
      if constexpr (requires { response.grad_residual_chunk(); }) {
        take_residual(response.grad_residual_chunk());
      }
      return taken();
    };
    grpc::Status ended =
        RunStream(connection.generic_stub(), context, method, next_request, on_response);
    if (ended.ok() && !header_received) {
      return grpc::Status(grpc::StatusCode::INTERNAL, "the server's stream has no header");
    }
    return ended;
  });
  if (!our_error.ok()) return our_error;
  if (!status.ok()) return status;
  return answer;
}

// A streamed tensor, of which `received` bytes came, is as large as its header says, or the
// server is at fault.
absl::StatusOr<Tensor> StreamedTensor(const v1::Tensor& header, std::string bytes,
                                      int64_t received) {
  Tensor tensor = FromWire(header, std::move(bytes));
  if (tensor.num_elements() * static_cast<int64_t>(SizeOf(tensor.dtype())) != received) {
    return absl::InternalError("the server's stream ended before the tensor did");
  }
  return tensor;
}

}  // namespace

absl::StatusOr<ForwardResult> StreamForward(Connection& connection, v1::ForwardRequest request,
                                            const Tensor& input,
                                            const std::optional<Tensor>& residual,
                                            absl::Time deadline, const Progress& progress,
                                            const TensorSource* source, const TensorSink* sink) {
  const auto chunk_bytes = ChunkBytes(connection, deadline);
  if (!chunk_bytes.ok()) return chunk_bytes.status();
  const int64_t size = source == nullptr
                           ? ByteCount(input)
                           : input.num_elements() * static_cast<int64_t>(SizeOf(input.dtype()));
  *request.mutable_input() = HeaderOf(input);
  std::vector<Chunks> chunks;
  constexpr int kInput = v1::ForwardStreamRequest::kChunkFieldNumber;
  chunks.push_back(source == nullptr ? Chunks(input, kInput, *chunk_bytes)
                                     : Chunks(*source, size, kInput, *chunk_bytes));
  if (residual) {
    *request.mutable_residual() = HeaderOf(*residual);
    chunks.emplace_back(*residual, v1::ForwardStreamRequest::kResidualChunkFieldNumber,
                        *chunk_bytes);
  }
  v1::ForwardStreamRequest first;
  *first.mutable_header() = std::move(request);
  auto answer = CallStream<v1::ForwardStreamResponse, v1::ForwardResponse>(
      connection, kForwardStream, first, std::move(chunks), size, deadline, progress, sink);
  if (!answer.ok()) return answer.status();
  auto output = StreamedTensor(answer->header.output(), std::move(answer->bytes), answer->received);
  if (!output.ok()) return output.status();
  return ResultOf(std::move(answer->header), *std::move(output));
}

absl::StatusOr<BackwardResult> StreamBackward(Connection& connection, v1::BackwardRequest request,
                                              const Tensor& grad_output,
                                              const std::optional<Tensor>& input,
                                              absl::Time deadline, const Progress& progress) {
  const auto chunk_bytes = ChunkBytes(connection, deadline);
  if (!chunk_bytes.ok()) return chunk_bytes.status();
  *request.mutable_grad_output() = HeaderOf(grad_output);
  std::vector<Chunks> chunks;
  if (input) {
    *request.mutable_input() = HeaderOf(*input);
    chunks.emplace_back(*input, v1::BackwardStreamRequest::kInputChunkFieldNumber, *chunk_bytes);
  }
  chunks.emplace_back(grad_output, v1::BackwardStreamRequest::kGradOutputChunkFieldNumber,
                      *chunk_bytes);
  v1::BackwardStreamRequest first;
  *first.mutable_header() = std::move(request);
  auto answer = CallStream<v1::BackwardStreamResponse, v1::BackwardResponse>(
      connection, kBackwardStream, first, std::move(chunks), ByteCount(grad_output), deadline,
      progress);
  if (!answer.ok()) return answer.status();
  std::optional<Tensor> grad_input;
  if (answer->header.has_grad_input()) {
    auto tensor =
        StreamedTensor(answer->header.grad_input(), std::move(answer->bytes), answer->received);
    if (!tensor.ok()) return tensor.status();
    grad_input = *std::move(tensor);
  }
  std::optional<Tensor> grad_residual;
  if (answer->header.has_grad_residual()) {
    const auto received = static_cast<int64_t>(answer->residual_bytes.size());
    auto tensor =
        StreamedTensor(answer->header.grad_residual(), std::move(answer->residual_bytes), received);
    if (!tensor.ok()) return tensor.status();
    grad_residual = *std::move(tensor);
  }
  return ResultOf(std::move(answer->header), std::move(grad_input), std::move(grad_residual));
}

}  // namespace normd::inline client::internal
