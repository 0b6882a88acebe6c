#include "server/state/checkpoints.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/convert.h"
#include "server/service/handlers.h"
#include "server/service/saved_checkpoints.h"
#include "server/service/validate.h"
#include "server/state/manifest.h"

namespace normd {
namespace {

constexpr int kMostListed = 1000;

absl::Status NoCheckpoints() {
  return absl::FailedPreconditionError(
      "the server keeps no checkpoints: it was started without --state_dir");
}

absl::Status Save(Core& core, absl::uint128 request_id, v1::SaveCheckpointResponse& response) {
  if (const auto id = core.saved_checkpoints->Find(request_id)) {
    const auto all = core.checkpoints->List();
    if (!all.ok()) return all.status();
    for (const CheckpointInfo& info : *all) {
      if (info.id != *id) continue;
      *response.mutable_checkpoint() = ToProto(info);
      response.set_replayed(true);
      return absl::OkStatus();
    }
  }
  const auto info = core.checkpoints->Save("manual", core.registry->ForCheckpoint());
  if (!info.ok()) return info.status();
  core.saved_checkpoints->Add(request_id, info->id);
  *response.mutable_checkpoint() = ToProto(*info);
  // Nothing that the checkpoint holds is lost by a crash that spares it.
  return core.persister->Flush();
}

// A checkpoint holds everyone's instances: who may not act on all of them is not told the
// names of its files.
constexpr char kDamagedSomewhere[] = "it is damaged; the server's log says where";

absl::Status Load(Core& core, bool of_all, const v1::LoadCheckpointRequest& request,
                  v1::LoadCheckpointResponse& response) {
  uint64_t number = 0;
  if (!request.checkpoint_id().empty() && !ParseGenerationId(request.checkpoint_id(), &number)) {
    return InvalidField("checkpoint_id", request.checkpoint_id(),
                        "an id as ListCheckpoints tells it, like 00000042-manual, or nothing");
  }
  const std::vector<std::string> names(request.names().begin(), request.names().end());
  const auto loaded = core.checkpoints->Load(request.checkpoint_id(), names);
  if (absl::IsDataLoss(loaded.status()) && !of_all) {
    spdlog::error("LoadCheckpoint: {}", std::string(loaded.status().message()));
    return ForField(
        absl::DataLossError(absl::StrCat("the checkpoint cannot be loaded: ", kDamagedSomewhere)),
        "checkpoint_id");
  }
  if (!loaded.ok()) return ForField(loaded.status(), "checkpoint_id");
  const auto versions = core.registry->Load(loaded->instances);
  if (!versions.ok()) return versions.status();
  *response.mutable_checkpoint() = ToProto(loaded->info);
  for (const CheckpointInfo& damaged : loaded->damaged) {
    v1::Checkpoint& told = *response.add_damaged();
    told = ToProto(damaged);
    if (of_all) continue;
    spdlog::error("LoadCheckpoint passed over {}: {}", damaged.id, damaged.problem);
    told.set_problem(kDamagedSomewhere);
  }
  response.set_instance_count(static_cast<int64_t>(versions->size()));
  for (size_t i = 0; i < std::min<size_t>(versions->size(), kMostListed); ++i) {
    v1::LoadedInstance& instance = *response.add_instances();
    instance.set_name(loaded->instances[i].state->identity->name);
    instance.set_version((*versions)[i]);
  }
  return core.persister->Flush();
}

}  // namespace

void SaveCheckpoint(Core& core, const v1::SaveCheckpointRequest& request,
                    v1::SaveCheckpointResponse& response, Done done) {
  const auto request_id = ToRequestId(request.request_id());
  if (!request_id.ok()) return done(request_id.status());
  if (core.checkpoints == nullptr) return done(NoCheckpoints());
  core.background->Run([&core, id = request_id->value_or(0), &response,
                        done = std::move(done)]() mutable { done(Save(core, id, response)); });
}

void LoadCheckpoint(Core& core, const Caller& caller, const v1::LoadCheckpointRequest& request,
                    v1::LoadCheckpointResponse& response, Done done) {
  for (const std::string& name : request.names()) {
    if (absl::Status s = CheckName(name); !s.ok()) return done(ForField(s, "names"));
  }
  if (core.checkpoints == nullptr) return done(NoCheckpoints());
  core.background->Run(
      [&core, of_all = caller.MayOnAll(Role::kAdmin), &request, &response,
       done = std::move(done)]() mutable { done(Load(core, of_all, request, response)); });
}

void ListCheckpoints(Core& core, const v1::ListCheckpointsRequest& request,
                     v1::ListCheckpointsResponse& response, Done done) {
  const auto page_size = ToPageSize(request.page_size());
  if (!page_size.ok()) return done(page_size.status());
  if (core.checkpoints == nullptr) return done(NoCheckpoints());
  core.background->Run(
      [&core, &request, &response, page_size = *page_size, done = std::move(done)]() mutable {
        const auto all = core.checkpoints->List();
        if (!all.ok()) return done(all.status());
        // A token is the id of the last one listed; ids sort by age.
        auto first = all->begin();
        if (!request.page_token().empty()) {
          uint64_t number = 0;
          if (!ParseGenerationId(request.page_token(), &number)) {
            return done(InvalidField("page_token", request.page_token(),
                                     "next_page_token of the page before, or nothing"));
          }
          first = std::find_if(all->begin(), all->end(), [&](const CheckpointInfo& info) {
            return info.id < request.page_token();
          });
        }
        for (auto it = first; it != all->end(); ++it) {
          if (response.checkpoints_size() == page_size) {
            response.set_next_page_token(std::prev(it)->id);
            break;
          }
          *response.add_checkpoints() = ToProto(*it);
        }
        done(absl::OkStatus());
      });
}

}  // namespace normd
