// A server of the contract in memory, for tests of clients: it remembers what it
// was sent, fails when told to, and keeps the promise of request ids.
#ifndef NORMD_TESTS_UNIT_CLIENT_FAKE_SERVER_H_
#define NORMD_TESTS_UNIT_CLIENT_FAKE_SERVER_H_

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <google/protobuf/message.h>
#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "normd/v1/error.pb.h"
#include "normd/v1/norm_service.grpc.pb.h"

namespace normd {

// Answers with what a test can recognize: Forward doubles each float32, Backward
// negates each, and changes count versions.
class FakeServer final : public v1::NormService::Service {
 public:
  FakeServer() {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.SetMaxReceiveMessageSize(-1);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    address_ = absl::StrCat("127.0.0.1:", port);
  }
  ~FakeServer() override { server_->Shutdown(std::chrono::system_clock::now()); }

  const std::string& address() const { return address_; }

  // What becomes of a call: before it is applied, or after it, when the answer is
  // lost though the change was made.
  struct Failure {
    grpc::StatusCode code = grpc::StatusCode::UNAVAILABLE;
    std::string message = "told to fail";
    bool after_applying = false;
    v1::ErrorDetail detail = {};
  };
  // The next calls fail, one after another, each as told.
  void FailNext(Failure failure) {
    absl::MutexLock lock(&mutex_);
    failures_.push_back(std::move(failure));
  }

  // Method names and requests so far, streams by their headers.
  template <class Request>
  std::vector<Request> Requests() const {
    absl::MutexLock lock(&mutex_);
    std::vector<Request> found;
    for (const auto& request : requests_) {
      if (const auto* typed = dynamic_cast<const Request*>(request.get())) found.push_back(*typed);
    }
    return found;
  }
  size_t num_calls() const {
    absl::MutexLock lock(&mutex_);
    return requests_.size();
  }
  // Changes that were applied.
  uint64_t version() const {
    absl::MutexLock lock(&mutex_);
    return version_;
  }
  std::vector<size_t> chunk_sizes() const {
    absl::MutexLock lock(&mutex_);
    return chunk_sizes_;
  }

  int64_t max_message_bytes = 64 << 20;  // what GetServerInfo says
  // Past this Forward and Backward answer as a server with a smaller limit does.
  int64_t enforced_message_bytes = 1 << 30;

  // What GetInstance and ListInstances know.
  v1::Instance instance = MakeInstance("bn1");
  v1::State state;

  static v1::Instance MakeInstance(const std::string& name) {
    v1::Instance made;
    made.set_name(name);
    made.set_uid("11111111-2222-4333-8444-555555555555");
    auto* layer = made.mutable_config()->mutable_batch_norm_2d();
    layer->set_num_features(3);
    layer->set_eps(1e-5);
    layer->set_momentum(0.1);
    layer->set_affine(true);
    layer->set_track_running_stats(true);
    made.mutable_config()->set_state_dtype(v1::DATA_TYPE_FLOAT32);
    made.set_mode(v1::MODE_TRAIN);
    made.set_version(7);
    made.set_num_batches_tracked(5);
    made.set_has_gradients(true);
    made.set_optimizer("sgd");
    made.set_state_bytes(1234);
    made.mutable_create_time()->set_seconds(1700000000);
    made.mutable_update_time()->set_seconds(1700000060);
    return made;
  }

 private:
  using Context = grpc::ServerContext;
  using Status = grpc::Status;
  template <class T>
  using In = const T*;

  // The whole life of a call that `apply` carries out; a repeated request id is
  // answered and not applied.
  template <class Request, class Response>
  Status Serve(Context* context, const Request& request, Response* response,
               const std::function<Status()>& apply) {
    absl::MutexLock lock(&mutex_);
    auto copy = std::make_unique<Request>();
    copy->CopyFrom(request);
    requests_.push_back(std::move(copy));
    Failure failure;
    bool fails = false;
    if (!failures_.empty()) {
      fails = true;
      failure = std::move(failures_.front());
      failures_.pop_front();
    }
    if (!fails || failure.after_applying) {
      const Status status = Apply(request, response, apply);
      if (!status.ok() || !fails) return status;
    }
    if (failure.detail.ByteSizeLong() > 0) {
      context->AddTrailingMetadata("normd-error-detail-bin", failure.detail.SerializeAsString());
    }
    return {failure.code, failure.message};
  }

  template <class Request, class Response>
  Status Apply(const Request& request, Response* response, const std::function<Status()>& apply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if constexpr (requires { request.request_id(); }) {
      const auto known = answers_.find(request.request_id());
      if (known != answers_.end()) {
        response->ParseFromString(known->second);
        response->set_replayed(true);
        return Status::OK;
      }
      const Status status = apply();
      if (!status.ok()) return status;
      ++version_;
      if constexpr (requires { response->set_version(1); }) response->set_version(version_);
      answers_[request.request_id()] = response->SerializeAsString();
      return status;
    } else {
      return apply();
    }
  }

  static Status Ok() { return Status::OK; }

  static std::string MapFloats(const std::string& bytes, float factor) {
    std::string mapped = bytes;
    for (size_t i = 0; i + 4 <= mapped.size(); i += 4) {
      float value;
      memcpy(&value, &mapped[i], 4);
      value *= factor;
      memcpy(&mapped[i], &value, 4);
    }
    return mapped;
  }

  Status TooLong(Context* context) {
    v1::ErrorDetail detail;
    detail.set_flag("--max_message_bytes");
    detail.set_limit(enforced_message_bytes);
    context->AddTrailingMetadata("normd-error-detail-bin", detail.SerializeAsString());
    return {grpc::StatusCode::RESOURCE_EXHAUSTED, "message past --max_message_bytes"};
  }

  Status CreateInstance(Context* c, In<v1::CreateInstanceRequest> q,
                        v1::CreateInstanceResponse* a) override {
    return Serve(c, *q, a, [&] {
      *a->mutable_instance() = instance;
      a->mutable_instance()->set_name(q->name());
      *a->mutable_instance()->mutable_config() = q->config();
      a->mutable_instance()->set_mode(q->mode());
      return Ok();
    });
  }
  Status GetInstance(Context* c, In<v1::GetInstanceRequest> q,
                     v1::GetInstanceResponse* a) override {
    return Serve(c, *q, a, [&] {
      if (q->name() != instance.name()) {
        return Status(grpc::StatusCode::NOT_FOUND, absl::StrCat("no instance named ", q->name()));
      }
      *a->mutable_instance() = instance;
      return Ok();
    });
  }
  // Two pages of one instance each.
  Status ListInstances(Context* c, In<v1::ListInstancesRequest> q,
                       v1::ListInstancesResponse* a) override {
    return Serve(c, *q, a, [&] {
      const bool first = q->page_token().empty();
      *a->add_instances() = first ? instance : MakeInstance("bn2");
      if (first) a->set_next_page_token("second");
      a->set_total_count(2);
      return Ok();
    });
  }
  Status DeleteInstance(Context* c, In<v1::DeleteInstanceRequest> q,
                        v1::DeleteInstanceResponse* a) override {
    return Serve(c, *q, a, Ok);
  }
  Status Train(Context* c, In<v1::TrainRequest> q, v1::TrainResponse* a) override {
    return Serve(c, *q, a, Ok);
  }
  Status Eval(Context* c, In<v1::EvalRequest> q, v1::EvalResponse* a) override {
    return Serve(c, *q, a, Ok);
  }
  Status ZeroGrad(Context* c, In<v1::ZeroGradRequest> q, v1::ZeroGradResponse* a) override {
    return Serve(c, *q, a, Ok);
  }
  Status Step(Context* c, In<v1::StepRequest> q, v1::StepResponse* a) override {
    return Serve(c, *q, a, [&] {
      a->set_stepped(true);
      return Ok();
    });
  }
  Status GetState(Context* c, In<v1::GetStateRequest> q, v1::GetStateResponse* a) override {
    return Serve(c, *q, a, [&] {
      a->set_version(7);
      *a->mutable_instance() = instance;
      *a->mutable_state() = state;
      return Ok();
    });
  }
  Status SetState(Context* c, In<v1::SetStateRequest> q, v1::SetStateResponse* a) override {
    return Serve(c, *q, a, Ok);
  }
  Status ResetRunningStats(Context* c, In<v1::ResetRunningStatsRequest> q,
                           v1::ResetRunningStatsResponse* a) override {
    return Serve(c, *q, a, Ok);
  }
  Status ResetParameters(Context* c, In<v1::ResetParametersRequest> q,
                         v1::ResetParametersResponse* a) override {
    return Serve(c, *q, a, Ok);
  }

  static v1::Checkpoint MakeCheckpoint(const std::string& id, bool sound) {
    v1::Checkpoint made;
    made.set_id(id);
    made.set_reason("manual");
    made.mutable_create_time()->set_seconds(1700000000);
    made.set_instance_count(2);
    made.set_total_bytes(4096);
    made.set_sound(sound);
    if (!sound) made.set_problem("bn1.safetensors: wrong checksum");
    return made;
  }
  Status SaveCheckpoint(Context* c, In<v1::SaveCheckpointRequest> q,
                        v1::SaveCheckpointResponse* a) override {
    return Serve(c, *q, a, [&] {
      *a->mutable_checkpoint() = MakeCheckpoint("00000003-manual", true);
      return Ok();
    });
  }
  Status LoadCheckpoint(Context* c, In<v1::LoadCheckpointRequest> q,
                        v1::LoadCheckpointResponse* a) override {
    return Serve(c, *q, a, [&] {
      *a->mutable_checkpoint() = MakeCheckpoint("00000002-manual", true);
      auto* loaded = a->add_instances();
      loaded->set_name("bn1");
      loaded->set_version(8);
      a->set_instance_count(1);
      *a->add_damaged() = MakeCheckpoint("00000003-manual", false);
      return Ok();
    });
  }
  Status ListCheckpoints(Context* c, In<v1::ListCheckpointsRequest> q,
                         v1::ListCheckpointsResponse* a) override {
    return Serve(c, *q, a, [&] {
      *a->add_checkpoints() = MakeCheckpoint("00000003-manual", false);
      *a->add_checkpoints() = MakeCheckpoint("00000002-manual", true);
      return Ok();
    });
  }
  Status GetServerInfo(Context* c, In<v1::GetServerInfoRequest> q,
                       v1::GetServerInfoResponse* a) override {
    return Serve(c, *q, a, [&] {
      a->set_version("0.1.0");
      a->set_backend("cpu");
      auto* device = a->add_devices();
      device->set_name("a processor");
      device->set_parallelism(2);
      device->set_memory_bytes(int64_t{8} << 30);
      device->set_healthy(true);
      a->mutable_limits()->set_max_message_bytes(max_message_bytes);
      a->mutable_limits()->set_max_instances(1000);
      a->mutable_limits()->set_max_features(65536);
      a->mutable_limits()->set_memory_budget(int64_t{4} << 30);
      a->mutable_limits()->set_context_budget(int64_t{1} << 30);
      a->mutable_limits()->set_context_ttl_ms(600000);
      a->mutable_start_time()->set_seconds(1700000000);
      a->set_instance_count(2);
      a->set_memory_in_use(4096);
      a->set_durability("interval");
      return Ok();
    });
  }

  void Fill(const v1::ForwardRequest& request, const std::string& data, v1::ForwardResponse* a) {
    a->set_mode(request.mode() == v1::MODE_UNSPECIFIED ? v1::MODE_TRAIN : request.mode());
    a->set_num_batches_tracked(6);
    if (request.save_for_backward()) a->set_context_id("context-1");
    if (request.return_batch_statistics()) {
      a->mutable_batch_statistics()->set_count(4);
      a->mutable_batch_statistics()->add_mean(0.5);
      a->mutable_batch_statistics()->add_var(0.25);
    }
    *a->mutable_output() = request.input();
    a->mutable_output()->set_data(MapFloats(data, 2));
  }
  void Fill(const v1::BackwardRequest& request, const std::string& data, v1::BackwardResponse* a) {
    auto* weight = a->mutable_grad_weight();
    weight->set_dtype(v1::DATA_TYPE_FLOAT32);
    weight->add_shape(1);
    weight->set_data(std::string("\0\0\x80\x3f", 4));
    *a->mutable_grad_bias() = *weight;
    if (request.skip_grad_input()) return;
    *a->mutable_grad_input() = request.grad_output();
    a->mutable_grad_input()->set_data(MapFloats(data, -1));
  }

  Status Forward(Context* c, In<v1::ForwardRequest> q, v1::ForwardResponse* a) override {
    return Serve(c, *q, a, [&] {
      if (static_cast<int64_t>(q->ByteSizeLong()) > enforced_message_bytes) return TooLong(c);
      Fill(*q, q->input().data(), a);
      return Ok();
    });
  }
  Status Backward(Context* c, In<v1::BackwardRequest> q, v1::BackwardResponse* a) override {
    return Serve(c, *q, a, [&] {
      if (static_cast<int64_t>(q->ByteSizeLong()) > enforced_message_bytes) return TooLong(c);
      Fill(*q, q->grad_output().data(), a);
      return Ok();
    });
  }

  Status ForwardStream(Context* c,
                       grpc::ServerReaderWriter<v1::ForwardStreamResponse,
                                                v1::ForwardStreamRequest>* stream) override {
    v1::ForwardStreamRequest part;
    if (!stream->Read(&part)) return {grpc::StatusCode::INVALID_ARGUMENT, "no header"};
    const v1::ForwardRequest header = part.header();
    std::string data;
    while (stream->Read(&part)) AddChunk(part.chunk(), &data);
    v1::ForwardStreamResponse first;
    const Status status = Serve(c, header, first.mutable_header(), [&] {
      Fill(header, data, first.mutable_header());
      return Ok();
    });
    if (!status.ok()) return status;
    const std::string output = std::move(*first.mutable_header()->mutable_output()->mutable_data());
    first.mutable_header()->mutable_output()->clear_data();
    stream->Write(first);
    WriteChunks<v1::ForwardStreamResponse>(output, stream);
    return status;
  }
  Status BackwardStream(Context* c,
                        grpc::ServerReaderWriter<v1::BackwardStreamResponse,
                                                 v1::BackwardStreamRequest>* stream) override {
    v1::BackwardStreamRequest part;
    if (!stream->Read(&part)) return {grpc::StatusCode::INVALID_ARGUMENT, "no header"};
    v1::BackwardRequest header = part.header();
    std::string data;
    std::string input;
    while (stream->Read(&part)) {
      if (part.has_grad_output_chunk()) {
        AddChunk(part.grad_output_chunk(), &data);
      } else {
        AddChunk(part.input_chunk(), &input);
      }
    }
    v1::BackwardStreamResponse first;
    header.mutable_input()->set_data(input);  // for the test to see
    const Status status = Serve(c, header, first.mutable_header(), [&] {
      Fill(header, data, first.mutable_header());
      return Ok();
    });
    if (!status.ok()) return status;
    std::string output;
    if (first.header().has_grad_input()) {
      output = std::move(*first.mutable_header()->mutable_grad_input()->mutable_data());
      first.mutable_header()->mutable_grad_input()->clear_data();
    }
    stream->Write(first);
    WriteChunks<v1::BackwardStreamResponse>(output, stream);
    return status;
  }

  void AddChunk(const std::string& chunk, std::string* data) {
    absl::MutexLock lock(&mutex_);
    chunk_sizes_.push_back(chunk.size());
    *data += chunk;
  }
  // In odd sizes, which are the server's to choose.
  template <class Part, class Stream>
  static void WriteChunks(const std::string& bytes, Stream* stream) {
    for (size_t at = 0; at < bytes.size(); at += 100003) {
      Part part;
      part.set_chunk(bytes.substr(at, 100003));
      stream->Write(part);
    }
  }

  mutable absl::Mutex mutex_;
  std::vector<std::unique_ptr<google::protobuf::Message>> requests_ ABSL_GUARDED_BY(mutex_);
  std::deque<Failure> failures_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::string> answers_ ABSL_GUARDED_BY(mutex_);
  std::vector<size_t> chunk_sizes_ ABSL_GUARDED_BY(mutex_);
  uint64_t version_ ABSL_GUARDED_BY(mutex_) = 0;

  std::string address_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace normd

#endif  // NORMD_TESTS_UNIT_CLIENT_FAKE_SERVER_H_
