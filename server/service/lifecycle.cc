#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/convert.h"
#include "server/service/handlers.h"
#include "server/service/layers.h"
#include "server/service/validate.h"

namespace normd {

void CreateInstance(Core& core, const v1::CreateInstanceRequest& request,
                    v1::CreateInstanceResponse& response, Done done) {
  if (absl::Status s = CheckName(request.name()); !s.ok()) return done(s);
  const auto layer = ToLayer(request.config(), core.limits.max_features);
  if (!layer.ok()) return done(layer.status());
  const auto mode = ToMode(request.mode());
  if (!mode.ok()) return done(mode.status());
  const auto request_id = ToRequestId(request.request_id());
  if (!request_id.ok()) return done(request_id.status());
  core.registry->Create(
      request.name(), *layer, mode->value_or(Mode::kTrain), *request_id,
      [&response, done = std::move(done)](absl::StatusOr<Changed> created) mutable {
        if (created.ok()) {
          response.set_version(created->version);
          response.set_replayed(created->replayed);
          *response.mutable_instance() = ToProto(*created->state);
        }
        done(created.status());
      });
}

void GetInstance(Core& core, const v1::GetInstanceRequest& request,
                 v1::GetInstanceResponse& response, Done done) {
  if (absl::Status s = CheckName(request.name()); !s.ok()) return done(s);
  const auto state = core.registry->Published(request.name());
  if (!state.ok()) return done(state.status());
  response.set_version((*state)->version);
  *response.mutable_instance() = ToProto(**state);
  done(absl::OkStatus());
}

void ListInstances(Core& core, const Caller& caller, const v1::ListInstancesRequest& request,
                   v1::ListInstancesResponse& response, Done done) {
  const auto page_size = ToPageSize(request.page_size());
  if (!page_size.ok()) return done(page_size.status());
  // A token is the last name of the page before, in base64 so that nobody takes
  // it for something to make up.
  std::string after;
  if (!request.page_token().empty() &&
      (!absl::WebSafeBase64Unescape(request.page_token(), &after) || !CheckName(after).ok())) {
    return done(InvalidField("page_token", request.page_token(),
                             "next_page_token of the page before, or nothing"));
  }
  bool more = false;
  std::string last;
  for (const std::string& prefix : caller.Visible(Role::kReader, request.name_prefix())) {
    const auto room = static_cast<size_t>(*page_size - response.instances_size());
    // Without room it still tells whether there are more.
    for (const Snapshot& state : core.registry->List(prefix, after, room, &more)) {
      *response.add_instances() = ToProto(*state);
      last = state->identity->name;
    }
    if (more) break;
  }
  if (more) response.set_next_page_token(absl::WebSafeBase64Escape(last));
  // Who does not see all is not told how many there are.
  if (caller.MayOnAll(Role::kReader)) response.set_total_count(core.registry->size());
  done(absl::OkStatus());
}

void DeleteInstance(Core& core, const v1::DeleteInstanceRequest& request,
                    v1::DeleteInstanceResponse& response, Done done) {
  const auto options = ToChangeOptions(request, Method::kDelete);
  if (!options.ok()) return done(options.status());
  core.registry->Delete(
      request.name(), *options,
      [&core, &response, done = std::move(done)](absl::StatusOr<Changed> deleted) mutable {
        if (deleted.ok()) {
          if (deleted->state != nullptr) core.contexts->DropOf(deleted->state->identity->uid);
          response.set_version(deleted->version);
          response.set_replayed(deleted->replayed);
        }
        done(deleted.status());
      });
}

}  // namespace normd
