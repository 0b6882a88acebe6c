#include "client/internal/stream.h"

#include <cstdint>
#include <utility>

namespace normd::inline client::internal {
namespace {

enum Tag : intptr_t { kStarted, kRead, kWritten, kFinished };

void* AsPointer(Tag tag) { return reinterpret_cast<void*>(tag); }

}  // namespace

grpc::Status RunStream(
    grpc::GenericStub& stub, grpc::ClientContext* context, const std::string& method,
    absl::FunctionRef<grpc::Status(std::optional<grpc::ByteBuffer>*)> next_request,
    absl::FunctionRef<grpc::Status(grpc::ByteBuffer*)> on_response) {
  grpc::CompletionQueue queue;
  const auto stream = stub.PrepareCall(context, method, &queue);
  grpc::ByteBuffer response;
  grpc::Status our_error;  // the first of next_request or on_response
  grpc::Status status;
  bool writing = false;  // a write is under way
  bool all_written = false;
  bool all_read = false;

  const auto note = [&](grpc::Status error) {
    if (error.ok() || !our_error.ok()) return;
    our_error = std::move(error);
    context->TryCancel();
  };
  const auto write_next = [&] {
    std::optional<grpc::ByteBuffer> request;
    note(next_request(&request));
    writing = true;
    if (request) {
      stream->Write(*request, AsPointer(kWritten));
    } else {
      all_written = true;
      stream->WritesDone(AsPointer(kWritten));
    }
  };

  stream->StartCall(AsPointer(kStarted));
  void* tag = nullptr;
  bool ok = false;
  while (queue.Next(&tag, &ok)) {
    switch (static_cast<Tag>(reinterpret_cast<intptr_t>(tag))) {
      case kStarted:
        // A call that could not start fails its reads and writes as well.
        stream->Read(&response, AsPointer(kRead));
        write_next();
        break;
      case kRead:
        if (!ok) {
          all_read = true;
          break;
        }
        if (our_error.ok()) note(on_response(&response));
        response.Clear();
        stream->Read(&response, AsPointer(kRead));
        break;
      case kWritten:
        writing = false;
        if (!ok) all_written = true;  // the server has ended the call
        if (!all_written) write_next();
        break;
      case kFinished: queue.Shutdown(); continue;
    }
    // Reads end when the call does; the last write then fails at once.
    if (all_read && !writing) {
      all_read = false;
      all_written = true;
      stream->Finish(&status, AsPointer(kFinished));
    }
  }
  return our_error.ok() ? status : our_error;
}

}  // namespace normd::inline client::internal
