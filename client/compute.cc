// Forward and Backward, in one message or streamed; FoldConvolution.
#include <algorithm>
#include <limits>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/internal/change.h"
#include "client/internal/connection.h"
#include "client/internal/convert.h"
#include "client/internal/retry.h"
#include "client/internal/shared_memory.h"
#include "client/internal/stream.h"
#include "client/internal/wire_format.h"
#include "client/normd_client.h"

namespace normd::inline client {
namespace {

using internal::Connection;
using internal::FromWire;
using internal::HeaderOf;
using internal::ToWire;
using Progress = std::function<void(int64_t received, int64_t total)>;

constexpr char kForward[] = "/normd.v1.NormService/Forward";
constexpr char kForwardStream[] = "/normd.v1.NormService/ForwardStream";
constexpr char kBackward[] = "/normd.v1.NormService/Backward";
constexpr char kBackwardStream[] = "/normd.v1.NormService/BackwardStream";

// Room for all in a message that is no tensor, beside a few numbers a channel.
constexpr int64_t kOverhead = 4096;
// Payloads that any server takes in one message, so that none is asked.
constexpr int64_t kSmall = 1 << 20;
// Protobuf reads no message of 2 GiB or more.
constexpr int64_t kProtobufLimit = std::numeric_limits<int32_t>::max();

v1::ForwardRequest ForwardHeader(std::string_view name, const ForwardOptions& options,
                                 const CallOptions& call) {
  v1::ForwardRequest request;
  request.set_name(std::string(name));
  if (options.mode) request.set_mode(ToWire(*options.mode));
  request.set_save_for_backward(options.save_for_backward);
  request.set_return_batch_statistics(options.return_batch_statistics);
  if (options.activation == Activation::kRelu) request.set_activation(v1::ACTIVATION_RELU);
  internal::MarkChange(call, &request);
  return request;
}

v1::BackwardRequest BackwardHeader(std::string_view name, const BackwardOptions& options,
                                   const CallOptions& call) {
  v1::BackwardRequest request;
  request.set_name(std::string(name));
  request.set_context_id(options.context_id);
  if (options.mode) request.set_mode(ToWire(*options.mode));
  if (options.batch_statistics) {
    *request.mutable_batch_statistics() = ToWire(*options.batch_statistics);
  }
  request.set_accumulate(options.accumulate);
  request.set_retain_context(options.retain_context);
  request.set_skip_grad_input(options.skip_grad_input);
  internal::MarkChange(call, &request);
  return request;
}

ForwardResult ResultOf(v1::ForwardResponse&& response, Tensor output) {
  ForwardResult result;
  result.version = response.version();
  result.replayed = response.replayed();
  result.output = std::move(output);
  result.mode = FromWire(response.mode());
  result.num_batches_tracked = response.num_batches_tracked();
  result.context_id = response.context_id();
  if (response.has_batch_statistics()) {
    result.batch_statistics = FromWire(response.batch_statistics());
  }
  return result;
}

BackwardResult ResultOf(v1::BackwardResponse&& response, std::optional<Tensor> grad_input,
                        std::optional<Tensor> grad_residual) {
  BackwardResult result;
  result.version = response.version();
  result.replayed = response.replayed();
  result.grad_input = std::move(grad_input);
  result.grad_residual = std::move(grad_residual);
  if (response.has_grad_weight()) {
    result.grad_weight = FromWire(std::move(*response.mutable_grad_weight()));
  }
  if (response.has_grad_bias()) {
    result.grad_bias = FromWire(std::move(*response.mutable_grad_bias()));
  }
  return result;
}

// Whether a message with so much tensor must be streamed.
absl::StatusOr<bool> MustStream(Connection& connection, int64_t payload, int64_t channels,
                                absl::Time deadline) {
  if (payload <= kSmall && connection.options().max_message_bytes == 0) return false;
  const auto limit = connection.MaxMessageBytes(deadline);
  if (!limit.ok()) return limit.status();
  // Statistics have two doubles a channel.
  return payload + channels * 16 + kOverhead > std::min(*limit, kProtobufLimit);
}

int64_t ByteCount(const Tensor& tensor) { return static_cast<int64_t>(tensor.bytes().size()); }
int64_t ByteCount(const std::optional<Tensor>& tensor) { return tensor ? ByteCount(*tensor) : 0; }

int64_t Channels(const Tensor& tensor) {
  return tensor.shape().size() < 2 ? 0 : std::max<int64_t>(tensor.shape()[1], 0);
}

// The server found the message too long though the client thought otherwise: it
// has another limit than the one that the client was told.
bool IsTooLong(const absl::Status& status) {
  return absl::IsResourceExhausted(status) && DetailOf(status).flag == "--max_message_bytes";
}

// The bytes of a tensor as messages of chunks, from the first to the last.
class Chunks {
 public:
  Chunks(const Tensor& tensor, int field_number, int64_t chunk_bytes)
      : Chunks(tensor.bytes().size(), field_number, chunk_bytes,
               [bytes = internal::LendBytes(tensor)](size_t begin, size_t end) {
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
    return internal::MessageOfBytes(field_number_, *std::move(bytes));
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
        *request = internal::MessageOf(header);
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
      bool is_chunk =
          header_received && internal::TakeBytesOf(*buffer, Response::kChunkFieldNumber, take);
      if constexpr (requires { Response::kGradResidualChunkFieldNumber; }) {
        is_chunk =
            is_chunk || (header_received &&
                         internal::TakeBytesOf(*buffer, Response::kGradResidualChunkFieldNumber,
                                               take_residual));
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
        internal::RunStream(connection.generic_stub(), context, method, next_request, on_response);
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

// With `source` and `sink` the bytes come from and go there, and `input` has none.
absl::StatusOr<ForwardResult> StreamForward(Connection& connection, v1::ForwardRequest request,
                                            const Tensor& input,
                                            const std::optional<Tensor>& residual,
                                            absl::Time deadline, const Progress& progress,
                                            const TensorSource* source = nullptr,
                                            const TensorSink* sink = nullptr) {
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

// --- shared memory ---

// How a call through shared memory ended: nothing where it could not be made, and is to be
// made another way.
template <class Result>
using Tried = absl::StatusOr<std::optional<Result>>;

// The server answered for itself, so that it is done with the call's memory.
bool IsOver(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated: return true;
    default: return false;
  }
}

// The tensors of one call in shared memory.
class SharedTensors {
 public:
  SharedTensors(Connection& connection, absl::Time deadline)
      : connection_(connection), pool_(connection.shared_memory()), deadline_(deadline) {}

  // Names the memory where `tensor` is, or where it has been copied to.
  absl::Status Put(const Tensor& tensor, v1::Tensor* wire) {
    *wire = HeaderOf(tensor);
    if (tensor.bytes().empty()) return absl::OkStatus();
    if (auto there = pool_.Find(tensor.bytes())) {
      *wire->mutable_shared_memory() = *std::move(there);
      return absl::OkStatus();
    }
    auto lease = pool_.Get(tensor.bytes().size(), deadline_);
    if (!lease.ok()) return lease.status();
    tensor.bytes().copy((*lease)->data(), tensor.bytes().size());
    *wire->mutable_shared_memory() = (*lease)->Name(tensor.bytes().size());
    inputs_.push_back(*std::move(lease));
    return absl::OkStatus();
  }

  // Makes the call with memory of `bytes` for its output, which `name_output` names in the
  // request; 0: none is wanted. Each attempt has memory of its own: the server may still be
  // writing for the one before. False where there is no memory, or the server does not know
  // ours, and the call may be made another way.
  template <class Request, class Response>
  absl::StatusOr<bool> Call(const char* method, Request& request,
                            v1::SharedMemory* (Request::*name_output)(), size_t bytes,
                            Response* response) {
    absl::Status no_memory;
    absl::Status status =
        internal::CallWithRetries(connection_.options().retry, deadline_, [&]() -> absl::Status {
          if (bytes > 0) {
            auto lease = pool_.Get(bytes, deadline_);
            no_memory = lease.status();
            if (!lease.ok()) return absl::InternalError("no memory");
            output_ = *std::move(lease);
            *(request.*name_output)() = output_->Name(bytes);
          }
          const grpc::ByteBuffer message = internal::MessageOf(request);
          absl::Status ended = connection_.RunOnce(deadline_, [&](grpc::ClientContext* context) {
            return connection_.CallRawOnce(context, method, message, response);
          });
          if (!IsOver(ended)) Discard();
          return ended;
        });
    if (!no_memory.ok()) return Unavailable(std::move(no_memory));
    if (status.ok()) return true;
    lost_ = pool_.ForgetIfLost(status);
    if (lost_) return Unavailable(std::move(status));
    return status;
  }

  // Whether the server did not know the memory of the call.
  bool lost() const { return lost_; }

  // Where the call goes without, or why it must not.
  absl::StatusOr<bool> Unavailable(absl::Status why) const {
    if (pool_.must()) return why;
    return false;
  }

  // The answer's tensor where it lies.
  Tensor Output(const v1::Tensor& wire, size_t bytes) const {
    const Tensor header = FromWire(wire, "");
    return Tensor::Share(header.dtype(), header.shape(),
                         {bytes > 0 ? output_->data() : nullptr, bytes}, output_,
                         header.memory_format());
  }

 private:
  void Discard() {
    for (const auto& lease : inputs_) lease->Discard();
    if (output_ != nullptr) output_->Discard();
  }

  Connection& connection_;
  internal::SharedMemoryPool& pool_;
  const absl::Time deadline_;
  std::vector<std::shared_ptr<internal::Lease>> inputs_;
  std::shared_ptr<internal::Lease> output_;
  bool lost_ = false;
};

Tried<ForwardResult> SharedForward(Connection& connection, v1::ForwardRequest request,
                                   const Tensor& input, const std::optional<Tensor>& residual,
                                   absl::Time deadline, bool again = true) {
  SharedTensors tensors(connection, deadline);
  absl::Status put = tensors.Put(input, request.mutable_input());
  if (put.ok() && residual) put = tensors.Put(*residual, request.mutable_residual());
  v1::ForwardResponse response;
  const auto made =
      put.ok() ? tensors.Call(kForward, request, &v1::ForwardRequest::mutable_output_memory,
                              input.bytes().size(), &response)
               : tensors.Unavailable(std::move(put));
  // A restarted server has other memory to lend.
  if (tensors.lost() && again) {
    return SharedForward(connection, std::move(request), input, residual, deadline, false);
  }
  if (!made.ok()) return made.status();
  if (!*made) return std::nullopt;
  Tensor output = tensors.Output(response.output(), input.bytes().size());
  return ResultOf(std::move(response), std::move(output));
}

Tried<BackwardResult> SharedBackward(Connection& connection, v1::BackwardRequest request,
                                     const Tensor& grad_output, const std::optional<Tensor>& input,
                                     absl::Time deadline, bool again = true) {
  SharedTensors tensors(connection, deadline);
  absl::Status put = tensors.Put(grad_output, request.mutable_grad_output());
  if (put.ok() && input) put = tensors.Put(*input, request.mutable_input());
  v1::BackwardResponse response;
  const size_t bytes = request.skip_grad_input() ? 0 : grad_output.bytes().size();
  const auto made =
      put.ok() ? tensors.Call(kBackward, request, &v1::BackwardRequest::mutable_grad_input_memory,
                              bytes, &response)
               : tensors.Unavailable(std::move(put));
  if (tensors.lost() && again) {
    return SharedBackward(connection, std::move(request), grad_output, input, deadline, false);
  }
  if (!made.ok()) return made.status();
  if (!*made) return std::nullopt;
  std::optional<Tensor> grad_input;
  if (response.has_grad_input()) grad_input = tensors.Output(response.grad_input(), bytes);
  // In the message: whether there is one, only the server knows.
  std::optional<Tensor> grad_residual;
  if (response.has_grad_residual()) {
    grad_residual = FromWire(std::move(*response.mutable_grad_residual()));
  }
  return ResultOf(std::move(response), std::move(grad_input), std::move(grad_residual));
}

// --- memory on the server's GPU ---

// The tensor's type and shape, with nothing on the host.
Tensor Described(const CudaTensor& tensor) {
  return Tensor::Borrow(tensor.dtype, tensor.shape, "", tensor.format);
}

v1::SharedMemory NameOf(const CudaTensor& tensor, const std::string& region) {
  v1::SharedMemory name;
  name.set_region(region);
  name.set_offset(static_cast<uint64_t>(tensor.offset));
  name.set_length(static_cast<uint64_t>(Described(tensor).num_elements()) * SizeOf(tensor.dtype));
  return name;
}

v1::Tensor ToWire(const CudaTensor& tensor, const std::string& region) {
  v1::Tensor wire = HeaderOf(Described(tensor));
  *wire.mutable_shared_memory() = NameOf(tensor, region);
  return wire;
}

// Another attempt would read what the one before has written.
bool IsInPlace(const v1::SharedMemory& output, const v1::Tensor& input) {
  return output.region() == input.shared_memory().region() &&
         output.offset() == input.shared_memory().offset();
}

template <class Response>
absl::Status CallOnGpu(Connection& connection, const char* method,
                       const google::protobuf::MessageLite& request, bool in_place,
                       absl::Time deadline, Response* response) {
  const grpc::ByteBuffer message = internal::MessageOf(request);
  absl::Status status = in_place ? connection.RunOnce(deadline,
                                                      [&](grpc::ClientContext* context) {
                                                        return connection.CallRawOnce(
                                                            context, method, message, response);
                                                      })
                                 : connection.CallRaw(method, message, response, deadline);
  connection.shared_memory().ForgetIfLost(status);
  return status;
}

}  // namespace

std::string CudaMemory::region() const { return region_ == nullptr ? "" : region_->name(); }

absl::StatusOr<CudaMemory> Client::RegisterCudaMemory(std::string_view ipc_handle, int64_t bytes,
                                                      const CallOptions& call) const {
  auto region = connection_->shared_memory().RegisterCuda(connection_, ipc_handle, bytes,
                                                          connection_->DeadlineOf(call));
  if (!region.ok()) return region.status();
  CudaMemory memory;
  memory.size_ = bytes;
  memory.region_ = *std::move(region);
  return memory;
}

absl::StatusOr<ForwardResult> Client::Forward(std::string_view name, const CudaTensor& input,
                                              const CudaTensor& output,
                                              const ForwardOptions& options,
                                              const CallOptions& call) const {
  v1::ForwardRequest request = ForwardHeader(name, options, call);
  if (options.residual) *request.mutable_residual() = internal::ToWire(*options.residual);
  *request.mutable_input() = ToWire(input, input.memory.region());
  *request.mutable_output_memory() = NameOf(output, output.memory.region());
  v1::ForwardResponse response;
  absl::Status status = CallOnGpu(*connection_, kForward, request,
                                  IsInPlace(request.output_memory(), request.input()),
                                  connection_->DeadlineOf(call), &response);
  if (!status.ok()) return status;
  return ResultOf(std::move(response), Tensor());
}

absl::StatusOr<BackwardResult> Client::Backward(std::string_view name,
                                                const CudaTensor& grad_output,
                                                const CudaTensor& input,
                                                const std::optional<CudaTensor>& grad_input,
                                                const BackwardOptions& options,
                                                const CallOptions& call) const {
  v1::BackwardRequest request = BackwardHeader(name, options, call);
  *request.mutable_grad_output() = ToWire(grad_output, grad_output.memory.region());
  *request.mutable_input() = ToWire(input, input.memory.region());
  request.set_skip_grad_input(!grad_input.has_value());
  bool in_place = false;
  if (grad_input) {
    *request.mutable_grad_input_memory() = NameOf(*grad_input, grad_input->memory.region());
    in_place = IsInPlace(request.grad_input_memory(), request.grad_output()) ||
               IsInPlace(request.grad_input_memory(), request.input());
  }
  v1::BackwardResponse response;
  absl::Status status = CallOnGpu(*connection_, kBackward, request, in_place,
                                  connection_->DeadlineOf(call), &response);
  if (!status.ok()) return status;
  return ResultOf(std::move(response), std::nullopt, std::nullopt);
}

absl::StatusOr<TensorBuffer> Client::Allocate(size_t bytes, const CallOptions& call) const {
  TensorBuffer buffer;
  buffer.size_ = bytes;
  internal::SharedMemoryPool& pool = connection_->shared_memory();
  if (pool.Wants(bytes)) {
    auto lease = pool.Get(bytes, connection_->DeadlineOf(call));
    if (lease.ok()) {
      buffer.data_ = (*lease)->data();
      buffer.shared_ = true;
      buffer.owner_ = *std::move(lease);
      return buffer;
    }
    if (pool.must()) return lease.status();
  }
  constexpr std::align_val_t kCacheLine{64};
  buffer.data_ = static_cast<char*>(operator new(bytes, kCacheLine, std::nothrow));
  if (buffer.data_ == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
  }
  buffer.owner_ =
      std::shared_ptr<char>(buffer.data_, [](char* data) { operator delete(data, kCacheLine); });
  return buffer;
}

absl::StatusOr<ForwardResult> Client::Forward(std::string_view name, const Tensor& input,
                                              const ForwardOptions& options,
                                              const CallOptions& call) const {
  const absl::Time deadline = connection_->DeadlineOf(call);
  const int64_t payload = ByteCount(input) + ByteCount(options.residual);
  v1::ForwardRequest request = ForwardHeader(name, options, call);
  if (connection_->shared_memory().Wants(static_cast<size_t>(payload))) {
    auto tried = SharedForward(*connection_, request, input, options.residual, deadline);
    if (!tried.ok()) return tried.status();
    if (tried->has_value()) return **std::move(tried);
  }
  const auto must_stream = MustStream(*connection_, payload, Channels(input), deadline);
  if (!must_stream.ok()) return must_stream.status();

  if (!*must_stream) {
    std::vector<internal::TensorField> tensors;
    if (options.residual) {
      tensors.push_back({v1::ForwardRequest::kResidualFieldNumber, &*options.residual});
    }
    tensors.push_back({v1::ForwardRequest::kInputFieldNumber, &input});
    v1::ForwardResponse response;
    absl::Status status = connection_->CallRaw(
        kForward, internal::MessageWithTensors(request, tensors), &response, deadline);
    if (status.ok()) {
      Tensor output = FromWire(std::move(*response.mutable_output()));
      return ResultOf(std::move(response), std::move(output));
    }
    if (!IsTooLong(status)) return status;
  }
  return StreamForward(*connection_, std::move(request), input, options.residual, deadline,
                       call.progress);
}

absl::StatusOr<ForwardResult> Client::ForwardStream(std::string_view name, const Tensor& input,
                                                    const ForwardOptions& options,
                                                    const CallOptions& call) const {
  return StreamForward(*connection_, ForwardHeader(name, options, call), input, options.residual,
                       connection_->DeadlineOf(call), call.progress);
}

absl::StatusOr<BackwardResult> Client::Backward(std::string_view name, const Tensor& grad_output,
                                                const BackwardOptions& options,
                                                const CallOptions& call) const {
  const absl::Time deadline = connection_->DeadlineOf(call);
  const int64_t payload = ByteCount(grad_output) + ByteCount(options.input);
  v1::BackwardRequest request = BackwardHeader(name, options, call);
  if (connection_->shared_memory().Wants(static_cast<size_t>(payload))) {
    auto tried = SharedBackward(*connection_, request, grad_output, options.input, deadline);
    if (!tried.ok()) return tried.status();
    if (tried->has_value()) return **std::move(tried);
  }
  const auto must_stream = MustStream(*connection_, payload, Channels(grad_output), deadline);
  if (!must_stream.ok()) return must_stream.status();

  if (!*must_stream) {
    std::vector<internal::TensorField> tensors;
    if (options.input) {
      tensors.push_back({v1::BackwardRequest::kInputFieldNumber, &*options.input});
    }
    tensors.push_back({v1::BackwardRequest::kGradOutputFieldNumber, &grad_output});
    v1::BackwardResponse response;
    absl::Status status = connection_->CallRaw(
        kBackward, internal::MessageWithTensors(request, tensors), &response, deadline);
    if (status.ok()) {
      std::optional<Tensor> grad_input;
      if (response.has_grad_input()) {
        grad_input = FromWire(std::move(*response.mutable_grad_input()));
      }
      std::optional<Tensor> grad_residual;
      if (response.has_grad_residual()) {
        grad_residual = FromWire(std::move(*response.mutable_grad_residual()));
      }
      return ResultOf(std::move(response), std::move(grad_input), std::move(grad_residual));
    }
    if (!IsTooLong(status)) return status;
  }
  return StreamBackward(*connection_, std::move(request), grad_output, options.input, deadline,
                        call.progress);
}

absl::StatusOr<ForwardResult> Client::ForwardStream(std::string_view name,
                                                    const TensorSource& input,
                                                    const TensorSink& output,
                                                    const ForwardOptions& options,
                                                    const CallOptions& call) const {
  const Tensor shape = Tensor::Borrow(input.dtype, input.shape, "", input.memory_format);
  return StreamForward(*connection_, ForwardHeader(name, options, call), shape, options.residual,
                       connection_->DeadlineOf(call), call.progress, &input, &output);
}

absl::StatusOr<BackwardResult> Client::BackwardStream(std::string_view name,
                                                      const Tensor& grad_output,
                                                      const BackwardOptions& options,
                                                      const CallOptions& call) const {
  return StreamBackward(*connection_, BackwardHeader(name, options, call), grad_output,
                        options.input, connection_->DeadlineOf(call), call.progress);
}

absl::StatusOr<FoldedConvolution> Client::FoldConvolution(std::string_view name,
                                                          const Tensor& weight,
                                                          const FoldConvolutionOptions& options,
                                                          const CallOptions& call) const {
  v1::FoldConvolutionRequest request;
  request.set_name(std::string(name));
  request.set_transposed(options.transposed);
  request.set_groups(options.groups);
  if (options.bias) *request.mutable_bias() = ToWire(*options.bias);
  *request.mutable_weight() = ToWire(weight);
  auto response =
      connection_->Call(&v1::NormService::StubInterface::FoldConvolution, request, call);
  if (!response.ok()) return response.status();
  return FoldedConvolution{.version = response->version(),
                           .weight = FromWire(std::move(*response->mutable_weight())),
                           .bias = FromWire(std::move(*response->mutable_bias()))};
}

}  // namespace normd::inline client
