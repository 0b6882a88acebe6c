#include "client/internal/connection.h"

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "client/internal/retry.h"
#include "client/internal/status.h"

namespace normd::inline client::internal {
namespace {

// What is no longer comes with the headers.
constexpr size_t kAnnounceAbove = 64 * 1024;

std::shared_ptr<grpc::Channel> MakeChannel(
    const std::string& target, const ClientOptions& options,
    const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
  grpc::ChannelArguments arguments;
  // The server limits what it takes; an answer is as large as its question.
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  // gRPC would wait a second before it looks again for a server that restarts. (Its
  // MIN_RECONNECT_BACKOFF stays: that is how long one attempt may take, and a short one
  // fails on a busy machine.)
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 5000);
  // Retries are ours: gRPC's would not know which answers carry a retry delay.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  if (!options.user_agent.empty()) arguments.SetUserAgentPrefix(options.user_agent);
  return grpc::CreateCustomChannel(target, credentials, arguments);
}

}  // namespace

Connection::Connection(const std::string& target, const ClientOptions& options,
                       const Credentials& credentials)
    : options_(options),
      authorization_(credentials.authorization),
      channel_(MakeChannel(target, options, credentials.channel)),
      stub_(v1::NormService::NewStub(channel_)),
      generic_stub_(channel_),
      shared_memory_(this, target),
      max_message_bytes_(options.max_message_bytes) {}

absl::Time Connection::DeadlineOf(const CallOptions& call) const {
  return absl::Now() + call.timeout.value_or(options_.timeout);
}

absl::Status Connection::Run(absl::Time deadline,
                             absl::FunctionRef<grpc::Status(grpc::ClientContext*)> attempt) {
  return CallWithRetries(options_.retry, deadline, [&] { return RunOnce(deadline, attempt); });
}

absl::Status Connection::RunOnce(absl::Time deadline,
                                 absl::FunctionRef<grpc::Status(grpc::ClientContext*)> attempt) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(deadline));
  if (!authorization_.empty()) context.AddMetadata("authorization", authorization_);
  const grpc::Status status = attempt(&context);
  return ToAbsl(status, context);
}

absl::Status Connection::CallRaw(const std::string& method, const grpc::ByteBuffer& request,
                                 google::protobuf::Message* response, absl::Time deadline) {
  return Run(deadline, [&](grpc::ClientContext* context) {
    // Lets the server refuse it, or have it wait, before it is sent.
    if (request.Length() > kAnnounceAbove) {
      context->AddMetadata("normd-message-bytes", absl::StrCat(request.Length()));
    }
    return CallRawOnce(context, method, request, response);
  });
}

grpc::Status Connection::CallRawOnce(grpc::ClientContext* context, const std::string& method,
                                     const grpc::ByteBuffer& request,
                                     google::protobuf::Message* response) {
  grpc::ByteBuffer answer;
  grpc::Status status;
  absl::Notification done;
  generic_stub_.UnaryCall(context, method, grpc::StubOptions(), &request, &answer,
                          [&](grpc::Status result) {
                            status = std::move(result);
                            done.Notify();
                          });
  done.WaitForNotification();
  if (!status.ok()) return status;
  return grpc::GenericDeserialize<grpc::ProtoBufferReader, google::protobuf::Message>(&answer,
                                                                                      response);
}

absl::StatusOr<int64_t> Connection::MaxMessageBytes(absl::Time deadline) {
  {
    absl::MutexLock lock(&mutex_);
    if (max_message_bytes_ > 0) return max_message_bytes_;
  }
  v1::GetServerInfoResponse info;
  absl::Status status = Run(deadline, [&](grpc::ClientContext* context) {
    return stub_->GetServerInfo(context, v1::GetServerInfoRequest(), &info);
  });
  if (!status.ok()) return status;
  absl::MutexLock lock(&mutex_);
  max_message_bytes_ = info.limits().max_message_bytes();
  return max_message_bytes_;
}

}  // namespace normd::inline client::internal
