#include "server/service/tensor_stream.h"

#include <algorithm>
#include <cstring>
#include <stop_token>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/error/error.h"
#include "server/service/backward.h"
#include "server/service/forward.h"
#include "server/service/rpc.h"
#include "server/service/validate.h"

namespace normd {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;

// A tensor that arrives in chunks. Its memory is claimed when the header has said
// its size, and touched only as chunks arrive.
class Arriving {
 public:
  absl::Status Begin(Core& core, const v1::Tensor& header, absl::string_view field) {
    field_ = std::string(field);
    if (!header.data().empty()) {
      return InvalidField(absl::StrCat("header.", field, ".data"),
                          absl::StrCat(header.data().size(), " bytes"),
                          "nothing: the bytes follow in chunks");
    }
    const auto spec = ToTensorSpec(header, field);
    if (!spec.ok()) return spec.status();
    auto memory = GetBuffer(core, spec->bytes());
    if (!memory.ok()) return ForField(memory.status(), absl::StrCat(field, ".shape"));
    memory_ = *std::move(memory);
    expected_ = static_cast<size_t>(spec->bytes());
    return absl::OkStatus();
  }

  absl::Status Add(const std::string& chunk) {
    if (chunk.size() > expected_ - received_) {
      return InvalidField(absl::StrCat(field_, ".data"),
                          absl::StrCat("more than ", expected_, " bytes"), Allowed());
    }
    if (!chunk.empty()) std::memcpy(memory_.buffer.data() + received_, chunk.data(), chunk.size());
    received_ += chunk.size();
    return absl::OkStatus();
  }

  absl::Status End() const {
    if (received_ == expected_) return absl::OkStatus();
    return InvalidField(absl::StrCat(field_, ".data"), absl::StrCat(received_, " bytes"),
                        Allowed());
  }

  // What has arrived; the buffer's memory stays with this.
  Payload payload() const { return {.data = memory_.buffer.data(), .size = expected_}; }
  int64_t received() const { return static_cast<int64_t>(received_); }

 private:
  std::string Allowed() const {
    return absl::StrCat("chunks of ", expected_, " bytes in all, as the header's shape says");
  }

  std::string field_;
  ClaimedBuffer memory_;
  size_t expected_ = 0;
  size_t received_ = 0;
};

absl::Status HeaderFirst() {
  return InvalidField("part", "a chunk before the header", "one header first, then chunks");
}
absl::Status HeaderOnce() {
  return InvalidField("part", "a second header", "one header first, then chunks");
}
absl::Status NoHeader() {
  return InvalidField("part", "no message with a part", "one header first, then chunks");
}

struct ForwardMethod {
  using Request = v1::ForwardStreamRequest;
  using Response = v1::ForwardStreamResponse;
  using Answer = v1::ForwardResponse;
  static constexpr char kName[] = "ForwardStream";

  v1::ForwardRequest header;
  Arriving input;
  Arriving residual;

  absl::Status Begin(Core& core) {
    absl::Status begun = input.Begin(core, header.input(), "input");
    if (begun.ok() && header.has_residual()) {
      begun = residual.Begin(core, header.residual(), "residual");
    }
    return begun;
  }
  absl::Status Add(const Request& request) {
    return request.has_residual_chunk() ? residual.Add(request.residual_chunk())
                                        : input.Add(request.chunk());
  }
  absl::Status End() const {
    absl::Status ended = input.End();
    return ended.ok() ? residual.End() : ended;
  }
  int64_t received() const { return input.received() + residual.received(); }
  void Call(Core& core, const Caller& caller, std::stop_token stop, ForwardDone done) {
    Forward(core, caller, header, input.payload(), residual.payload(), std::move(stop),
            std::move(done));
  }
  static void SetTensor(Answer& answer, AnswerTensor& tensor) {
    *answer.mutable_output() = std::move(tensor.header);
  }
  static void SetChunk(Response& response, const AnswerTensor&, const char* data, size_t size) {
    response.set_chunk(data, size);
  }
};

struct BackwardMethod {
  using Request = v1::BackwardStreamRequest;
  using Response = v1::BackwardStreamResponse;
  using Answer = v1::BackwardResponse;
  static constexpr char kName[] = "BackwardStream";

  v1::BackwardRequest header;
  Arriving grad_output;
  Arriving input;

  absl::Status Begin(Core& core) {
    absl::Status begun = grad_output.Begin(core, header.grad_output(), "grad_output");
    if (begun.ok() && header.has_input()) begun = input.Begin(core, header.input(), "input");
    return begun;
  }
  absl::Status Add(const Request& request) {
    return request.has_input_chunk() ? input.Add(request.input_chunk())
                                     : grad_output.Add(request.grad_output_chunk());
  }
  absl::Status End() const {
    absl::Status ended = grad_output.End();
    return ended.ok() ? input.End() : ended;
  }
  int64_t received() const { return grad_output.received() + input.received(); }
  void Call(Core& core, const Caller&, std::stop_token stop, BackwardDone done) {
    Backward(core, header, input.payload(), grad_output.payload(), std::move(stop),
             std::move(done));
  }
  static void SetTensor(Answer& answer, AnswerTensor& tensor) {
    v1::Tensor& field = tensor.number == Answer::kGradResidualFieldNumber
                            ? *answer.mutable_grad_residual()
                            : *answer.mutable_grad_input();
    field = std::move(tensor.header);
  }
  static void SetChunk(Response& response, const AnswerTensor& tensor, const char* data,
                       size_t size) {
    if (tensor.number == Answer::kGradResidualFieldNumber) {
      response.set_grad_residual_chunk(data, size);
    } else {
      response.set_chunk(data, size);
    }
  }
};

// One stream. gRPC calls the reactions one after another, and the answer is begun
// only when the last message was read: nothing here runs at once with anything else
// but OnCancel. Deletes itself when gRPC is done.
template <class Method>
class TensorStream final
    : public grpc::ServerBidiReactor<typename Method::Request, typename Method::Response> {
 public:
  TensorStream(Core& core, grpc::CallbackServerContext* context)
      : core_(core), rpc_(core, Method::kName, context) {
    if (rpc_.admitted().ok()) {
      this->StartRead(&request_);
    } else {
      End(rpc_.admitted());
    }
  }

  void OnReadDone(bool ok) override {
    if (!ok) return OnAllRead();
    if (absl::Status taken = Take(); !taken.ok()) return End(taken);
    this->StartRead(&request_);
  }

  void OnWriteDone(bool ok) override {
    if (!ok) return End(ToStatus(Outcome::kStopped));
    WriteNext();
  }

  void OnCancel() override { stop_.request_stop(); }
  void OnDone() override { delete this; }

 private:
  absl::Status Take() {
    if (static_cast<int64_t>(request_.ByteSizeLong()) > core_.limits.max_message_bytes) {
      return LimitExceeded("chunk",
                           absl::StrCat("a message of ", request_.ByteSizeLong(), " bytes"),
                           core_.limits.max_message_bytes, "--max_message_bytes");
    }
    if (request_.has_header()) {
      if (begun_) return HeaderOnce();
      begun_ = true;
      method_.header = std::move(*request_.mutable_header());
      finished_ = Tell(method_.header, typename Method::Answer());
      if (absl::Status allowed = rpc_.Authorize(method_.header); !allowed.ok()) return allowed;
      return method_.Begin(core_);
    }
    if (!begun_) return request_.part_case() == 0 ? NoHeader() : HeaderFirst();
    return request_.part_case() == 0 ? NoHeader() : method_.Add(request_);
  }

  void OnAllRead() {
    if (stop_.stop_requested()) return End(ToStatus(Outcome::kStopped));
    if (!begun_) return End(NoHeader());
    if (absl::Status whole = method_.End(); !whole.ok()) return End(whole);
    core_.executor->Enqueue([this] {
      method_.Call(core_, rpc_.caller(), stop_.get_token(),
                   [this](absl::StatusOr<TensorAnswer<typename Method::Answer>> answer) {
                     if (!answer.ok()) return End(answer.status());
                     finished_ = Tell(method_.header, answer->header);
                     finished_.changed = answer->changed;
                     tensors_ = std::move(answer->tensors);
                     // The answer's own order has the residual's gradient first; a
                     // stream's reader wants grad_input first.
                     std::reverse(tensors_.begin(), tensors_.end());
                     for (AnswerTensor& tensor : tensors_) {
                       Method::SetTensor(answer->header, tensor);
                     }
                     *response_.mutable_header() = std::move(answer->header);
                     this->StartWrite(&response_);
                   });
    });
  }

  void WriteNext() {
    while (next_ < tensors_.size() && offset_ == tensors_[next_].data.size()) {
      ++next_;
      offset_ = 0;
    }
    if (next_ == tensors_.size()) return End(absl::OkStatus());
    const AnswerTensor& tensor = tensors_[next_];
    const size_t size = std::min(tensor.data.size() - offset_, kChunkBytes);
    Method::SetChunk(response_, tensor, tensor.data.data() + offset_, size);
    offset_ += size;
    sent_ += static_cast<int64_t>(size);
    this->StartWrite(&response_);
  }

  void End(const absl::Status& status) {
    if (ended_) return;
    ended_ = true;
    finished_.bytes_in = method_.received();
    finished_.bytes_out = sent_;
    this->Finish(rpc_.Finish(status, finished_));
  }

  Core& core_;
  Rpc rpc_;
  Method method_;
  typename Method::Request request_;
  typename Method::Response response_;
  std::vector<AnswerTensor> tensors_;
  size_t next_ = 0;    // the tensor that is being sent,
  size_t offset_ = 0;  // and its bytes that were
  std::stop_source stop_;
  int64_t sent_ = 0;
  Finished finished_;
  bool begun_ = false;
  bool ended_ = false;
};

}  // namespace

grpc::ServerBidiReactor<v1::ForwardStreamRequest, v1::ForwardStreamResponse>* ServeForwardStream(
    Core& core, grpc::CallbackServerContext* context) {
  return new TensorStream<ForwardMethod>(core, context);
}

grpc::ServerBidiReactor<v1::BackwardStreamRequest, v1::BackwardStreamResponse>* ServeBackwardStream(
    Core& core, grpc::CallbackServerContext* context) {
  return new TensorStream<BackwardMethod>(core, context);
}

}  // namespace normd
