// All calls but Forward and Backward, which are in compute.cc.
#include <utility>

#include <google/protobuf/wrappers.pb.h>

#include "absl/strings/str_cat.h"
#include "client/internal/change.h"
#include "client/internal/connection.h"
#include "client/internal/convert.h"
#include "client/internal/wire_format.h"
#include "client/normd_client.h"

namespace normd::inline client {
namespace {

using internal::FromWire;
using internal::ToWire;
using Stub = v1::NormService::StubInterface;

template <class Request>
Request Named(std::string_view name) {
  Request request;
  request.set_name(std::string(name));
  return request;
}

template <class Request>
Request Change(std::string_view name, const CallOptions& call) {
  Request request = Named<Request>(name);
  internal::MarkChange(call, &request);
  return request;
}

// Version and replayed of any answer to a change.
template <class Response>
absl::StatusOr<Changed> ChangedBy(const absl::StatusOr<Response>& response) {
  if (!response.ok()) return response.status();
  return Changed{.version = response->version(), .replayed = response->replayed()};
}

}  // namespace

absl::StatusOr<Client> Client::Connect(std::string target, const ClientOptions& options) {
  if (target.empty()) return absl::InvalidArgumentError("the server's address is empty");
  if (options.max_message_bytes < 0 || options.stream_chunk_bytes <= 0) {
    return absl::InvalidArgumentError(
        "max_message_bytes must be 0 or more and stream_chunk_bytes 1 or more");
  }
  if (options.retry.initial_backoff <= absl::ZeroDuration() ||
      options.retry.max_backoff < options.retry.initial_backoff) {
    return absl::InvalidArgumentError(
        "initial_backoff must be positive and max_backoff not less than it");
  }
  const auto credentials = internal::ReadCredentials(target, options);
  if (!credentials.ok()) return credentials.status();
  return Client(std::make_shared<internal::Connection>(target, options, *credentials));
}

absl::StatusOr<CreateResult> Client::CreateInstance(std::string_view name,
                                                    const InstanceConfig& config, Mode mode,
                                                    const CallOptions& call) const {
  auto request = Change<v1::CreateInstanceRequest>(name, call);
  *request.mutable_config() = ToWire(config);
  request.set_mode(ToWire(mode));
  const auto response = connection_->Call(&Stub::CreateInstance, request, call);
  if (!response.ok()) return response.status();
  CreateResult result;
  result.version = response->version();
  result.replayed = response->replayed();
  result.instance = FromWire(response->instance());
  return result;
}

absl::StatusOr<Instance> Client::GetInstance(std::string_view name, const CallOptions& call) const {
  const auto response =
      connection_->Call(&Stub::GetInstance, Named<v1::GetInstanceRequest>(name), call);
  if (!response.ok()) return response.status();
  return FromWire(response->instance());
}

absl::StatusOr<InstancePage> Client::ListInstances(const ListOptions& options,
                                                   const CallOptions& call) const {
  v1::ListInstancesRequest request;
  request.set_name_prefix(options.name_prefix);
  request.set_page_size(options.page_size);
  request.set_page_token(options.page_token);
  const auto response = connection_->Call(&Stub::ListInstances, request, call);
  if (!response.ok()) return response.status();
  InstancePage page;
  for (const v1::Instance& instance : response->instances()) {
    page.instances.push_back(FromWire(instance));
  }
  page.next_page_token = response->next_page_token();
  page.total_count = response->total_count();
  return page;
}

absl::StatusOr<Changed> Client::DeleteInstance(std::string_view name,
                                               const CallOptions& call) const {
  return ChangedBy(connection_->Call(&Stub::DeleteInstance,
                                     Change<v1::DeleteInstanceRequest>(name, call), call));
}

absl::StatusOr<Changed> Client::Train(std::string_view name, const CallOptions& call) const {
  return ChangedBy(connection_->Call(&Stub::Train, Change<v1::TrainRequest>(name, call), call));
}

absl::StatusOr<Changed> Client::Eval(std::string_view name, const CallOptions& call) const {
  return ChangedBy(connection_->Call(&Stub::Eval, Change<v1::EvalRequest>(name, call), call));
}

absl::StatusOr<Changed> Client::ZeroGrad(std::string_view name, bool set_to_none,
                                         const CallOptions& call) const {
  auto request = Change<v1::ZeroGradRequest>(name, call);
  request.set_set_to_none(set_to_none);
  return ChangedBy(connection_->Call(&Stub::ZeroGrad, request, call));
}

absl::StatusOr<StepResult> Client::Step(std::string_view name, const Optimizer& optimizer,
                                        const StepOptions& options, const CallOptions& call) const {
  auto request = Change<v1::StepRequest>(name, call);
  *request.mutable_optimizer() = ToWire(optimizer);
  request.set_reset_optimizer(options.reset_optimizer);
  request.set_zero_grad(options.zero_grad);
  const auto response = connection_->Call(&Stub::Step, request, call);
  if (!response.ok()) return response.status();
  StepResult result;
  result.version = response->version();
  result.replayed = response->replayed();
  result.stepped = response->stepped();
  return result;
}

absl::StatusOr<State> Client::GetState(std::string_view name, const GetStateOptions& options,
                                       const CallOptions& call) const {
  auto request = Named<v1::GetStateRequest>(name);
  request.set_include_gradients(options.include_gradients);
  request.set_include_optimizer(options.include_optimizer);
  auto response = connection_->Call(&Stub::GetState, request, call);
  if (!response.ok()) return response.status();
  return FromWire(*std::move(response));
}

absl::StatusOr<Changed> Client::SetState(std::string_view name,
                                         absl::Span<const NamedTensor> state_dict,
                                         const CallOptions& call) const {
  auto request = Change<v1::SetStateRequest>(name, call);
  for (const NamedTensor& named : state_dict) {
    v1::NamedTensor* wire = request.mutable_state()->add_state_dict();
    wire->set_name(named.name);
    *wire->mutable_tensor() = ToWire(named.tensor);
  }
  return ChangedBy(connection_->Call(&Stub::SetState, request, call));
}

absl::StatusOr<Changed> Client::ResetRunningStats(std::string_view name,
                                                  const CallOptions& call) const {
  return ChangedBy(connection_->Call(&Stub::ResetRunningStats,
                                     Change<v1::ResetRunningStatsRequest>(name, call), call));
}

absl::StatusOr<Changed> Client::ResetParameters(std::string_view name,
                                                const CallOptions& call) const {
  return ChangedBy(connection_->Call(&Stub::ResetParameters,
                                     Change<v1::ResetParametersRequest>(name, call), call));
}

absl::StatusOr<SaveCheckpointResult> Client::SaveCheckpoint(const CallOptions& call) const {
  v1::SaveCheckpointRequest request;
  internal::MarkChange(call, &request);
  const auto response = connection_->Call(&Stub::SaveCheckpoint, request, call);
  if (!response.ok()) return response.status();
  return SaveCheckpointResult{.checkpoint = FromWire(response->checkpoint()),
                              .replayed = response->replayed()};
}

absl::StatusOr<LoadCheckpointResult> Client::LoadCheckpoint(std::string_view checkpoint_id,
                                                            absl::Span<const std::string> names,
                                                            const CallOptions& call) const {
  v1::LoadCheckpointRequest request;
  request.set_checkpoint_id(std::string(checkpoint_id));
  for (const std::string& name : names) request.add_names(name);
  const auto response = connection_->Call(&Stub::LoadCheckpoint, request, call);
  if (!response.ok()) return response.status();
  LoadCheckpointResult result;
  result.checkpoint = FromWire(response->checkpoint());
  for (const v1::LoadedInstance& loaded : response->instances()) {
    result.instances.push_back({loaded.name(), loaded.version()});
  }
  result.instance_count = response->instance_count();
  for (const v1::Checkpoint& damaged : response->damaged()) {
    result.damaged.push_back(FromWire(damaged));
  }
  return result;
}

absl::StatusOr<CheckpointPage> Client::ListCheckpoints(int32_t page_size,
                                                       std::string_view page_token,
                                                       const CallOptions& call) const {
  v1::ListCheckpointsRequest request;
  request.set_page_size(page_size);
  request.set_page_token(std::string(page_token));
  const auto response = connection_->Call(&Stub::ListCheckpoints, request, call);
  if (!response.ok()) return response.status();
  CheckpointPage page;
  for (const v1::Checkpoint& checkpoint : response->checkpoints()) {
    page.checkpoints.push_back(FromWire(checkpoint));
  }
  page.next_page_token = response->next_page_token();
  return page;
}

absl::StatusOr<ServerInfo> Client::GetServerInfo(const CallOptions& call) const {
  const auto response = connection_->Call(&Stub::GetServerInfo, v1::GetServerInfoRequest(), call);
  if (!response.ok()) return response.status();
  return FromWire(*response);
}

absl::StatusOr<SharedMemoryStatus> Client::GetSharedMemoryStatus(const CallOptions& call) const {
  const auto wire =
      connection_->Call(&Stub::GetSharedMemoryStatus, v1::GetSharedMemoryStatusRequest(), call);
  if (!wire.ok()) return wire.status();
  return SharedMemoryStatus{.enabled = wire->enabled(),
                            .socket = wire->socket(),
                            .connections = wire->connections(),
                            .regions = wire->regions(),
                            .bytes_in_use = wire->bytes_in_use(),
                            .shared_memory_budget = wire->shared_memory_budget(),
                            .max_region_bytes = wire->max_region_bytes(),
                            .max_regions = wire->max_regions(),
                            .cuda_ipc = wire->cuda_ipc()};
}

absl::StatusOr<Health> Client::CheckHealth(std::string_view service,
                                           const CallOptions& call) const {
  // HealthCheckRequest and HealthCheckResponse have one field each, and on the
  // wire they are these two well-known types.
  google::protobuf::StringValue request;
  request.set_value(std::string(service));
  google::protobuf::Int32Value response;
  absl::Status status =
      connection_->CallRaw("/grpc.health.v1.Health/Check", internal::MessageOf(request), &response,
                           connection_->DeadlineOf(call));
  if (!status.ok()) return status;
  switch (response.value()) {
    case 1: return Health::kServing;
    case 2: return Health::kNotServing;
    case 3: return Health::kServiceUnknown;
    default: return Health::kUnknown;
  }
}

}  // namespace normd::inline client
