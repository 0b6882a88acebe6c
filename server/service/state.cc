#include "server/instance/running_stats.h"
#include "server/service/change.h"
#include "server/service/convert.h"
#include "server/service/handlers.h"

namespace normd {

void GetState(Core& core, const v1::GetStateRequest& request, v1::GetStateResponse& response,
              Done done) {
  if (absl::Status s = CheckName(request.name()); !s.ok()) return done(s);
  const auto state = core.registry->Published(request.name());
  if (!state.ok()) return done(state.status());
  response.set_version((*state)->version);
  *response.mutable_instance() = ToProto(**state);
  *response.mutable_state() =
      ToStateProto(**state, request.include_gradients(), request.include_optimizer());
  done(absl::OkStatus());
}

void SetState(Core& core, const v1::SetStateRequest& request, v1::SetStateResponse& response,
              Done done) {
  ChangeInstance(core, request, response, Method::kSetState, std::move(done),
                 [&](InstanceState& next) -> absl::StatusOr<Edited> {
                   if (absl::Status s = LoadStateDict(request.state(), next); !s.ok()) return s;
                   return Edited::kChanged;
                 });
}

void ResetRunningStats(Core& core, const v1::ResetRunningStatsRequest& request,
                       v1::ResetRunningStatsResponse& response, Done done) {
  ChangeInstance(core, request, response, Method::kResetRunningStats, std::move(done),
                 [](InstanceState& next) {
                   ResetRunningStats(next);
                   return Edited::kChanged;
                 });
}

void ResetParameters(Core& core, const v1::ResetParametersRequest& request,
                     v1::ResetParametersResponse& response, Done done) {
  ChangeInstance(core, request, response, Method::kResetParameters, std::move(done),
                 [](InstanceState& next) {
                   ResetParameters(next);
                   return Edited::kChanged;
                 });
}

}  // namespace normd
