// How gRPC serves a method of one message each way whose message is read when the server says
// so (see tensor_call.h).
//
// gRPC's own handler for that is the one of streams. It ends each call on another thread than
// the one that polls the network, and to wake that costs a sixth of the requests of 1 KiB that
// are served in a second. Here a call ends where its last operation does, as gRPC itself has it
// for reactors of its own. What a call frees at its end must not block.
#ifndef NORMD_SERVER_SERVICE_ONE_MESSAGE_H_
#define NORMD_SERVER_SERVICE_ONE_MESSAGE_H_

#include <cstdlib>
#include <functional>
#include <utility>

#include "grpcpp/grpcpp.h"
#include "grpcpp/impl/codegen/server_callback_handlers.h"

namespace normd {
struct OneMessage {};
}  // namespace normd

// A specialization, since gRPC opens a call's context to its handlers alone.
template <>
class grpc::internal::CallbackBidiHandler<normd::OneMessage, normd::OneMessage> final
    : public grpc::internal::MethodHandler {
 public:
  using Reactor = grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>;

  // `serve` never returns null.
  explicit CallbackBidiHandler(std::function<Reactor*(grpc::CallbackServerContext*)> serve)
      : serve_(std::move(serve)) {}

  void RunHandler(const HandlerParameter& param) override {
    grpc_call* const call = param.call->call();
    grpc::g_core_codegen_interface->grpc_call_ref(call);
    auto* context = static_cast<grpc::CallbackServerContext*>(param.server_context);
    auto* stream = new (grpc::g_core_codegen_interface->grpc_call_arena_alloc(call, sizeof(Stream)))
        Stream(context, *param.call, param.call_requester);
    param.server_context->BeginCompletionOp(
        param.call, [stream](bool) { stream->MaybeDone(kInline); }, stream);
    stream->Bind(serve_(context));
  }

 private:
  static constexpr bool kInline = true;

  // The operations of one call; lies in its arena until the reactor is done.
  class Stream final : public grpc::ServerCallbackReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer> {
   public:
    Stream(grpc::CallbackServerContext* context, const Call& call,
           std::function<void()> call_requester)
        : context_(context), call_(call), call_requester_(std::move(call_requester)) {}

    void Bind(Reactor* reactor) {
      reactor_ = reactor;
      read_tag_.Set(
          call_.call(),
          [this](bool ok) {
            if (!ok) context_->MaybeMarkCancelledOnRead();
            reactor_->OnReadDone(ok);
            MaybeDone(kInline);
          },
          &read_ops_, /*can_inline=*/false);
      read_ops_.set_core_cq_tag(&read_tag_);
      BindReactor(reactor);
      MaybeCallOnCancel(reactor);
      MaybeDone(kInline);
    }

    void Read(grpc::ByteBuffer* message) override {
      Ref();
      read_ops_.RecvMessage(message);
      call_.PerformOps(&read_ops_);
    }
    void WriteAndFinish(const grpc::ByteBuffer* message, grpc::WriteOptions options,
                        grpc::Status status) override {
      // A ByteBuffer is serialized already.
      if (!finish_ops_.SendMessagePtr(message, options).ok()) std::abort();
      Finish(std::move(status));
    }
    void Finish(grpc::Status status) override {
      finish_tag_.Set(
          call_.call(), [this](bool) { MaybeDone(kInline); }, &finish_ops_, /*can_inline=*/true);
      finish_ops_.set_core_cq_tag(&finish_tag_);
      finish_ops_.SendInitialMetadata(&context_->initial_metadata_,
                                      context_->initial_metadata_flags());
      context_->sent_initial_metadata_ = true;
      finish_ops_.ServerSendStatus(&context_->trailing_metadata_, std::move(status));
      call_.PerformOps(&finish_ops_);
    }

    // A call of one message each way has nothing to send before its answer.
    void SendInitialMetadata() override { std::abort(); }
    void Write(const grpc::ByteBuffer*, grpc::WriteOptions) override { std::abort(); }

   private:
    void CallOnDone() override {
      reactor_->OnDone();
      grpc_call* const call = call_.call();
      const std::function<void()> call_requester = std::move(call_requester_);
      if (context_->context_allocator() != nullptr) {
        context_->context_allocator()->Release(context_);
      }
      this->~Stream();
      grpc::g_core_codegen_interface->grpc_call_unref(call);
      call_requester();
    }
    ServerReactor* reactor() override { return reactor_; }

    CallOpSet<CallOpRecvMessage<grpc::ByteBuffer>> read_ops_;
    CallbackWithSuccessTag read_tag_;
    CallOpSet<CallOpSendInitialMetadata, CallOpSendMessage, CallOpServerSendStatus> finish_ops_;
    CallbackWithSuccessTag finish_tag_;
    grpc::CallbackServerContext* const context_;
    Call call_;
    std::function<void()> call_requester_;
    Reactor* reactor_ = nullptr;
  };

  const std::function<Reactor*(grpc::CallbackServerContext*)> serve_;
};

#endif  // NORMD_SERVER_SERVICE_ONE_MESSAGE_H_
