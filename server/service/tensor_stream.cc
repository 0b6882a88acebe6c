#include "server/service/tensor_stream.h"

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "normd/v1/norm_service.pb.h"
#include "server/error/error.h"
#include "server/service/arriving.h"
#include "server/service/arriving_moments.h"
#include "server/service/backward.h"
#include "server/service/forward.h"
#include "server/service/forward_pieces.h"
#include "server/service/rpc.h"
#include "server/service/validate.h"

namespace normd {
namespace {

// Bytes of an answer's chunk: few messages, and still in the nearest caches when it is
// sent.
constexpr size_t kChunkBytes = size_t{1} << 20;

// The moments of what is no larger are taken when it is there, as the unary call takes them.
constexpr int64_t kLargestInOne = int64_t{4} << 20;

absl::Status WrongPart(absl::string_view found) {
  return InvalidField("part", found, "one header first, then chunks");
}

using Messages = std::deque<grpc::ByteBuffer>;
using EndDone = absl::AnyInvocable<void(absl::Status)>;

grpc::ByteBuffer Serialized(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return {&slice, 1};
}

// A tensor that arrives to be kept as a whole.
struct WholeTensor {
  ArrivingTensor tensor;
  ArrivingBytes bytes;

  absl::Status Begin(Core& core, const v1::Tensor& header, absl::string_view field) {
    absl::Status begun = tensor.Begin(header, field);
    bytes = ArrivingBytes(tensor.size());
    return begun.ok() ? tensor.CheckFits(core) : begun;
  }
  absl::Status Add(Core& core, const Chunk& chunk) {
    absl::Status taken = tensor.Take(chunk.size());
    return taken.ok() ? bytes.Add(core, chunk, 0, chunk.size()) : taken;
  }
  Payload TakePayload() {
    return {.data = bytes.memory().buffer.data(),
            .size = bytes.size(),
            .gathered = std::move(bytes.memory())};
  }
};

// Tensors that leave in chunks, one after another, without a copy.
class Leaving {
 public:
  void Add(AnswerTensor tensor) {
    tensors_.push_back(std::make_shared<AnswerTensor>(std::move(tensor)));
  }
  // The next chunk; `field_of` says which field of the stream's message a tensor is in.
  template <class FieldOf>
  std::optional<grpc::ByteBuffer> Next(FieldOf field_of) {
    while (!tensors_.empty() && offset_ == tensors_.front()->data.buffer.size()) {
      tensors_.pop_front();
      offset_ = 0;
    }
    if (tensors_.empty()) return std::nullopt;
    const std::shared_ptr<AnswerTensor>& tensor = tensors_.front();
    const size_t begin = offset_;
    const Buffer& data = tensor->data.buffer;
    offset_ = std::min(data.size(), begin + kChunkBytes);
    return WriteChunk(field_of(tensor->number), data.data() + begin, offset_ - begin, tensor);
  }

 private:
  std::deque<std::shared_ptr<AnswerTensor>> tensors_;
  size_t offset_ = 0;  // bytes of the first that have left
};

// What a stream does with its messages. One call at a time, in this order:
//   Begin                the header has come, in `header`
//   Add                  a chunk, of one of kChunks; Begin and Add may append answers
//   End                  all have come; `done` once the answer is decided, with its header
//   Next                 what remains of the answer, message by message; then none
class ForwardStream {
 public:
  using Request = v1::ForwardStreamRequest;
  using Response = v1::ForwardStreamResponse;
  static constexpr char kName[] = "ForwardStream";
  static constexpr std::array<int, 2> kChunks = {Request::kChunkFieldNumber,
                                                 Request::kResidualChunkFieldNumber};
  static const std::string& BytesOf(const Request& request) {
    return request.has_chunk() ? request.chunk() : request.residual_chunk();
  }

  ForwardStream(Core& core, std::stop_token stop) : core_(core), stop_(std::move(stop)) {}

  v1::ForwardRequest header;
  Finished finished;

  absl::Status Begin(const Caller& caller, Messages& answers) {
    caller_ = &caller;
    auto spec = ToForwardSpec(header);
    if (!spec.ok()) return spec.status();
    spec_ = *std::move(spec);
    auto plan = ForwardPieces::Begin(core_, caller, header, spec_);
    if (!plan.ok()) return plan.status();
    way_ = plan->way;
    pieces_ = std::move(plan->pieces);
    if (way_ == ForwardPieces::Way::kAfterStatistics && spec_.input.bytes() > kLargestInOne) {
      moments_.emplace(plan->problem);
    }
    if (way_ == ForwardPieces::Way::kAsItArrives) {
      if (absl::Status begun = input_.tensor.Begin(header.input(), "input"); !begun.ok()) {
        return begun;
      }
      answers.push_back(HeaderOf(pieces_->header()));
      return absl::OkStatus();
    }
    absl::Status begun = input_.Begin(core_, header.input(), "input");
    if (begun.ok() && header.has_residual()) {
      begun = residual_.Begin(core_, header.residual(), "residual");
    }
    return begun;
  }

  absl::Status Add(const Chunk& chunk, Messages& answers) {
    if (chunk.number() == Request::kResidualChunkFieldNumber) return residual_.Add(core_, chunk);
    if (way_ != ForwardPieces::Way::kAsItArrives) return Keep(chunk);
    if (absl::Status taken = input_.tensor.Take(chunk.size()); !taken.ok()) return taken;
    for (size_t from = 0; from < chunk.size();) {
      if (piece_.missing() == 0) piece_ = ArrivingBytes(PieceBytes(chunk.size() - from));
      const size_t count = std::min(chunk.size() - from, piece_.missing());
      if (absl::Status added = piece_.Add(core_, chunk, from, count); !added.ok()) return added;
      from += count;
      if (piece_.missing() > 0) continue;
      const auto memory = std::make_shared<ClaimedBuffer>(std::move(piece_.memory()));
      auto message = NormalizeNext(memory->buffer.data(), piece_.size(), memory);
      if (!message.ok()) return message.status();
      answers.push_back(*std::move(message));
    }
    return absl::OkStatus();
  }

  void End(Messages& answers, EndDone done) {
    absl::Status ended = input_.tensor.End();
    if (ended.ok()) ended = residual_.tensor.End();
    if (!ended.ok() || way_ == ForwardPieces::Way::kAsItArrives) return done(std::move(ended));
    if (way_ == ForwardPieces::Way::kWhole) return EndWhole(answers, std::move(done));
    ForwardPieces::Fold(core_, *caller_, header, spec_, input_.bytes.memory().buffer.data(),
                        moments_.has_value() ? &*moments_ : nullptr, stop_,
                        [this, &answers, done = std::move(done)](
                            absl::StatusOr<std::optional<ForwardPieces>> pieces) mutable {
                          if (!pieces.ok()) return done(pieces.status());
                          if (!pieces->has_value()) return EndWhole(answers, std::move(done));
                          pieces_ = **std::move(pieces);
                          kept_ = std::make_shared<ClaimedBuffer>(std::move(input_.bytes.memory()));
                          finished = Tell(header, pieces_->header());
                          finished.changed = true;
                          answers.push_back(HeaderOf(pieces_->header()));
                          done(absl::OkStatus());
                        });
  }

  absl::StatusOr<std::optional<grpc::ByteBuffer>> Next() {
    if (kept_ == nullptr) return leaving_.Next([](int) { return Response::kChunkFieldNumber; });
    const size_t begin = normalized_;
    const size_t count = std::min(kept_->buffer.size() - begin, kChunkBytes);
    if (count == 0) return std::optional<grpc::ByteBuffer>();
    auto message = NormalizeNext(kept_->buffer.data() + begin, count, kept_);
    if (!message.ok()) return message.status();
    return std::optional(*std::move(message));
  }

  int64_t received() const { return input_.tensor.received() + residual_.tensor.received(); }

 private:
  // Of a tensor that is kept as a whole.
  absl::Status Keep(const Chunk& chunk) {
    absl::Status added = input_.Add(core_, chunk);
    if (!added.ok() || !moments_.has_value()) return added;
    return moments_->Take(core_, input_.bytes.memory().buffer.data(),
                          static_cast<int64_t>(input_.bytes.received() / ElementBytes()), stop_);
  }

  static grpc::ByteBuffer HeaderOf(const v1::ForwardResponse& answer) {
    Response response;
    *response.mutable_header() = answer;
    return Serialized(response);
  }

  size_t ElementBytes() const { return SizeOf(spec_.input.dtype); }

  // Bytes of the next piece where `at_hand` have come: these, as far as they fill whole
  // grains and no more than a chunk, or else one grain.
  size_t PieceBytes(size_t at_hand) const {
    const size_t grain = static_cast<size_t>(pieces_->grain()) * ElementBytes();
    return std::max<size_t>(1, std::min(at_hand, kChunkBytes) / grain) * grain;
  }

  // `size` bytes at `data`, which belong to `keep`, normalized and lent to a message.
  absl::StatusOr<grpc::ByteBuffer> NormalizeNext(char* data, size_t size,
                                                 std::shared_ptr<void> keep) {
    const char* residual = residual_.bytes.memory().buffer.data();
    if (residual != nullptr) residual += normalized_;
    absl::Status status =
        pieces_->Normalize(data, residual, static_cast<int64_t>(normalized_ / ElementBytes()),
                           static_cast<int64_t>(size / ElementBytes()), stop_);
    if (!status.ok()) return status;
    normalized_ += size;
    return WriteChunk(Response::kChunkFieldNumber, data, size, std::move(keep));
  }

  void EndWhole(Messages& answers, EndDone done) {
    Forward(core_, *caller_, header, input_.TakePayload(), residual_.TakePayload(), {}, {}, stop_,
            [this, &answers, done = std::move(done)](
                absl::StatusOr<TensorAnswer<v1::ForwardResponse>> answer) mutable {
              if (!answer.ok()) return done(answer.status());
              for (AnswerTensor& tensor : answer->tensors) {
                *answer->header.mutable_output() = std::move(tensor.header);
                leaving_.Add(std::move(tensor));
              }
              finished = Tell(header, answer->header);
              finished.changed = answer->changed;
              answers.push_back(HeaderOf(answer->header));
              done(absl::OkStatus());
            });
  }

  Core& core_;
  const std::stop_token stop_;
  const Caller* caller_ = nullptr;
  ForwardSpec spec_;
  ForwardPieces::Way way_ = ForwardPieces::Way::kWhole;
  std::optional<ForwardPieces> pieces_;
  size_t normalized_ = 0;  // bytes
  ArrivingBytes piece_;    // kAsItArrives: what has come of the next
  WholeTensor input_;      // else its memory, too
  WholeTensor residual_;
  std::optional<ArrivingMoments> moments_;  // kAfterStatistics: of a large input
  std::shared_ptr<ClaimedBuffer> kept_;     // kAfterStatistics: the input, becoming the output
  Leaving leaving_;                         // kWhole
};

class BackwardStream {
 public:
  using Request = v1::BackwardStreamRequest;
  using Response = v1::BackwardStreamResponse;
  static constexpr char kName[] = "BackwardStream";
  static constexpr std::array<int, 2> kChunks = {Request::kGradOutputChunkFieldNumber,
                                                 Request::kInputChunkFieldNumber};
  static const std::string& BytesOf(const Request& request) {
    return request.has_input_chunk() ? request.input_chunk() : request.grad_output_chunk();
  }

  BackwardStream(Core& core, std::stop_token stop) : core_(core), stop_(std::move(stop)) {}

  v1::BackwardRequest header;
  Finished finished;

  absl::Status Begin(const Caller&, Messages&) {
    absl::Status begun = grad_output_.Begin(core_, header.grad_output(), "grad_output");
    if (begun.ok() && header.has_input()) begun = input_.Begin(core_, header.input(), "input");
    return begun;
  }

  absl::Status Add(const Chunk& chunk, Messages&) {
    return (chunk.number() == Request::kInputChunkFieldNumber ? input_ : grad_output_)
        .Add(core_, chunk);
  }

  void End(Messages& answers, EndDone done) {
    absl::Status ended = grad_output_.tensor.End();
    if (ended.ok()) ended = input_.tensor.End();
    if (!ended.ok()) return done(std::move(ended));
    Backward(core_, header, input_.TakePayload(), grad_output_.TakePayload(), {}, {}, stop_,
             [this, &answers, done = std::move(done)](
                 absl::StatusOr<TensorAnswer<v1::BackwardResponse>> answer) mutable {
               if (!answer.ok()) return done(answer.status());
               // The answer's own order has the residual's gradient first; a stream's
               // reader wants grad_input first.
               std::reverse(answer->tensors.begin(), answer->tensors.end());
               for (AnswerTensor& tensor : answer->tensors) {
                 v1::Tensor& field = IsResidual(tensor.number)
                                         ? *answer->header.mutable_grad_residual()
                                         : *answer->header.mutable_grad_input();
                 field = std::move(tensor.header);
                 leaving_.Add(std::move(tensor));
               }
               Response response;
               *response.mutable_header() = std::move(answer->header);
               answers.push_back(Serialized(response));
               done(absl::OkStatus());
             });
  }

  absl::StatusOr<std::optional<grpc::ByteBuffer>> Next() {
    return leaving_.Next([](int number) {
      return IsResidual(number) ? Response::kGradResidualChunkFieldNumber
                                : Response::kChunkFieldNumber;
    });
  }

  int64_t received() const { return grad_output_.tensor.received() + input_.tensor.received(); }

 private:
  static bool IsResidual(int number) {
    return number == v1::BackwardResponse::kGradResidualFieldNumber;
  }

  Core& core_;
  const std::stop_token stop_;
  WholeTensor grad_output_;
  WholeTensor input_;
  Leaving leaving_;
};

// One stream: a message is read while another is worked on and a third is written. None
// is worked on before the answers to the ones before it are on their way: so a reader
// who is slow stops the reading too, and never are there more than these three.
//
// gRPC's reactions, the work and its end may come from different threads. Each notes
// what it has to say under the lock; one thread at a time (`acting_`) decides what is
// to be begun and begins it, outside the lock, since gRPC may react right there. Deletes
// itself when gRPC is done.
template <class Method>
class TensorStream final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  TensorStream(Core& core, grpc::CallbackServerContext* context)
      : core_(core),
        context_(context),
        rpc_(core, Method::kName, context),
        method_(core, stop_.get_token()) {}

  void Start() {
    // Memory is claimed as it is needed, and without waiting: what a stream holds meanwhile
    // may be just what the others wait for.
    const auto begin = [this](absl::StatusOr<Admission> admission) {
      Act([this, &admission]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
        status_ = admission.status();
        if (admission.ok()) admission_ = *std::move(admission);
      });
    };
    if (!rpc_.admitted().ok()) return begin(rpc_.admitted());
    core_.admission->Admit(0, stop_.get_token(), begin);
  }

  void OnReadDone(bool ok) override {
    // The last read fails too when the call is cancelled: that is no end of the tensor.
    if (!ok && context_->IsCancelled()) stop_.request_stop();
    Act([this, ok]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      reading_ = false;
      if (ok) {
        arrived_ = true;
      } else {
        all_read_ = true;
      }
    });
  }

  void OnWriteDone(bool ok) override {
    Act([this, ok]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      writing_ = false;
      if (!ok && status_.ok()) status_ = ToStatus(Outcome::kStopped);
    });
  }

  void OnCancel() override { stop_.request_stop(); }
  void OnDone() override { delete this; }

 private:
  enum class Work : uint8_t { kNone, kMessage, kEnd, kNext };
  struct Actions {
    bool read = false;
    bool write = false;
    bool finish = false;
    Work work = Work::kNone;

    bool none() const { return !read && !write && !finish && work == Work::kNone; }
  };

  // Notes what has happened, and begins what is to follow. May end in this object's
  // deletion.
  template <class Note>
  void Act(Note note) {
    {
      absl::MutexLock lock(&mutex_);
      note();
      if (acting_) return;  // who acts looks again
      acting_ = true;
    }
    for (;;) {
      Actions actions;
      {
        absl::MutexLock lock(&mutex_);
        actions = Decide();
        if (actions.none()) acting_ = false;
      }
      if (actions.none()) return;
      if (actions.write) StartWrite(&written_);
      if (actions.work == Work::kMessage) message_ = std::exchange(read_, grpc::ByteBuffer());
      if (actions.read) StartRead(&read_);
      if (actions.work != Work::kNone) Begin(actions.work);
      if (actions.finish) {
        method_.finished.bytes_in = method_.received();
        method_.finished.bytes_out = sent_;
        Finish(rpc_.Finish(status_, method_.finished));
        return;  // nobody acts any more
      }
    }
  }

  Actions Decide() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    Actions actions;
    if (status_.ok() && stop_.stop_requested()) status_ = ToStatus(Outcome::kStopped);
    if (!status_.ok()) {
      actions.finish = !working_ && !writing_;
      return actions;
    }
    if (!writing_ && !answers_.empty()) {
      written_.Swap(&answers_.front());
      answers_.pop_front();
      sent_ += static_cast<int64_t>(written_.Length());
      writing_ = actions.write = true;
    }
    if (!working_ && answers_.empty()) {
      if (arrived_) {
        actions.work = Work::kMessage;
        arrived_ = false;
      } else if (answered_ && !all_sent_) {
        actions.work = Work::kNext;
      } else if (all_read_ && !answered_) {
        actions.work = Work::kEnd;
      }
      working_ = actions.work != Work::kNone;
    }
    if (!reading_ && !arrived_ && !all_read_) reading_ = actions.read = true;
    actions.finish = all_sent_ && !working_ && !writing_ && answers_.empty();
    return actions;
  }

  void Begin(Work work) {
    const bool is_small =
        work == Work::kMessage && static_cast<int64_t>(message_.Length()) <= kLargestInline;
    if (is_small) return Do(work);
    core_.executor->Enqueue([this, work] { Do(work); });
  }

  void Do(Work work) {
    switch (work) {
      case Work::kNone: return;
      case Work::kMessage: return Done(Take());
      case Work::kEnd:
        if (!begun_) return Done(WrongPart("no message with a part"));
        return method_.End(made_, [this](absl::Status status) {
          answered_now_ = status.ok();
          Done(std::move(status));
        });
      case Work::kNext: {
        auto next = method_.Next();
        if (!next.ok()) return Done(next.status());
        all_sent_now_ = !next->has_value();
        if (next->has_value()) made_.push_back(**std::move(next));
        return Done(absl::OkStatus());
      }
    }
  }

  void Done(absl::Status status) {
    Act([this, &status]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      working_ = false;
      if (status_.ok()) status_ = std::move(status);
      answered_ = answered_ || answered_now_;
      all_sent_ = all_sent_ || all_sent_now_;
      for (grpc::ByteBuffer& message : made_) answers_.push_back(std::move(message));
      made_.clear();
    });
  }

  // The message that has arrived.
  absl::Status Take() {
    const auto bytes = static_cast<int64_t>(message_.Length());
    if (bytes > core_.limits.max_message_bytes) {
      return LimitExceeded("chunk", absl::StrCat("a message of ", bytes, " bytes"),
                           core_.limits.max_message_bytes, "--max_message_bytes");
    }
    const auto claim = core_.memory->Claim(bytes);
    if (!claim.ok()) return claim.status();
    std::optional<Chunk> chunk = Chunk::Of(message_, Method::kChunks);
    if (!chunk.has_value()) {
      typename Method::Request request;
      if (!grpc::SerializationTraits<typename Method::Request>::Deserialize(&message_, &request)
               .ok()) {
        return InvalidField("request", absl::StrCat(bytes, " bytes that are none"),
                            absl::StrCat("a serialized ", request.GetTypeName()));
      }
      if (request.part_case() == 0) return WrongPart("no message with a part");
      if (request.has_header()) {
        if (begun_) return WrongPart("a second header");
        begun_ = true;
        method_.header = std::move(*request.mutable_header());
        method_.finished = Tell(method_.header);
        absl::Status allowed = rpc_.Authorize(method_.header);
        return allowed.ok() ? method_.Begin(rpc_.caller(), made_) : allowed;
      }
      chunk = Chunk::Of(static_cast<int>(request.part_case()), Method::BytesOf(request));
    }
    if (!begun_) return WrongPart("a chunk before the header");
    absl::Status added = method_.Add(*chunk, made_);
    message_.Clear();
    return added;
  }

  Core& core_;
  grpc::CallbackServerContext* const context_;
  Rpc rpc_;
  std::stop_source stop_;
  Admission admission_;

  // Of whoever works.
  Method method_;
  grpc::ByteBuffer message_;
  Messages made_;
  bool begun_ = false;
  bool answered_now_ = false;
  bool all_sent_now_ = false;

  // gRPC's, while it reads and writes.
  grpc::ByteBuffer read_;
  grpc::ByteBuffer written_;

  absl::Mutex mutex_;
  bool acting_ ABSL_GUARDED_BY(mutex_) = false;
  bool reading_ ABSL_GUARDED_BY(mutex_) = false;
  bool arrived_ ABSL_GUARDED_BY(mutex_) = false;  // read_ is a message to be worked on
  bool all_read_ ABSL_GUARDED_BY(mutex_) = false;
  bool working_ ABSL_GUARDED_BY(mutex_) = false;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool answered_ ABSL_GUARDED_BY(mutex_) = false;  // End is done
  bool all_sent_ ABSL_GUARDED_BY(mutex_) = false;  // Next has no more
  Messages answers_ ABSL_GUARDED_BY(mutex_);
  // Written under the lock, and not any more when the stream is finished.
  absl::Status status_;
  int64_t sent_ = 0;
};

template <class Method>
RawStream* Serve(Core& core, grpc::CallbackServerContext* context) {
  auto* stream = new TensorStream<Method>(core, context);
  stream->Start();
  return stream;
}

}  // namespace

RawStream* ServeForwardStream(Core& core, grpc::CallbackServerContext* context) {
  return Serve<ForwardStream>(core, context);
}

RawStream* ServeBackwardStream(Core& core, grpc::CallbackServerContext* context) {
  return Serve<BackwardStream>(core, context);
}

}  // namespace normd
