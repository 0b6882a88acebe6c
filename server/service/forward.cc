#include "server/service/forward.h"

#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/auth/permissions.h"
#include "server/error/error.h"
#include "server/service/convert.h"
#include "server/service/layers.h"
#include "server/service/validate.h"

namespace normd {
namespace {

// Shared by the tries of one call: the first that is not stale answers.
struct Call {
  Core& core;
  ForwardDone done;
  ClaimedBuffer output = {};
  TensorAnswer<v1::ForwardResponse> answer = {};

  void DropContext() {
    if (!answer.header.context_id().empty()) core.contexts->Drop(answer.header.context_id());
  }
  void Refuse(absl::Status status) {
    DropContext();
    done(std::move(status));
  }
  void Answer(const TensorSpec& spec) {
    answer.tensors.push_back(
        ToAnswer(v1::ForwardResponse::kOutputFieldNumber, spec, std::move(output)));
    done(std::move(answer));
  }
};

absl::StatusOr<Activation> ToActivation(v1::Activation activation) {
  switch (activation) {
    case v1::ACTIVATION_UNSPECIFIED:
    case v1::ACTIVATION_NONE: return Activation::kNone;
    case v1::ACTIVATION_RELU: return Activation::kRelu;
    default: break;
  }
  return InvalidField("activation", absl::StrCat(static_cast<int>(activation)),
                      "ACTIVATION_NONE or ACTIVATION_RELU");
}

// Normalizes `input` into the call's output with the parameters and statistics of
// `state`; answers what Backward will need.
absl::StatusOr<SavedForward> Normalize(Call& call, const InstanceState& state, const Pass& pass,
                                       const TensorSpec& spec, const char* input,
                                       const Epilogue& epilogue, BatchMoments& moments,
                                       const std::stop_token& stop) {
  SavedForward saved{.uid = state.identity->uid,
                     .problem = pass.problem,
                     .shape = spec.shape,
                     .statistics_of_batch = pass.by_batch,
                     .weight = state.weight};
  Epilogue after = epilogue;
  if (epilogue.activation == Activation::kRelu) {
    saved.relu_mask = call.core.pool->Get(static_cast<size_t>(ReluMaskBytes(spec.elements)));
    if (saved.relu_mask.data() == nullptr) return ToStatus(Outcome::kOutOfMemory);
    after.relu_mask = reinterpret_cast<uint8_t*>(saved.relu_mask.data());
  }
  const Affine affine{state.weight.data(), state.bias.data()};
  Outcome outcome;
  if (pass.by_batch) {
    const auto sets = static_cast<size_t>(pass.problem.num_sets());
    moments = {.count = pass.problem.set_size(),
               .mean = std::vector<double>(sets),
               .m2 = std::vector<double>(sets)};
    outcome =
        call.core.backend->ForwardByBatch(pass.problem,
                                          {.x = input,
                                           .y = call.output.buffer.data(),
                                           .affine = affine,
                                           .moments = {moments.mean.data(), moments.m2.data()},
                                           .epilogue = after},
                                          Place::kHost, stop);
    saved.mean = moments.mean;
    saved.var = BiasedVariance(moments);
  } else {
    saved.mean = ToDoubles(state.running_mean);
    saved.var = ToDoubles(state.running_var);
    outcome =
        call.core.backend->ForwardByStatistics(pass.problem,
                                               {.x = input,
                                                .y = call.output.buffer.data(),
                                                .affine = affine,
                                                .statistics = {saved.mean.data(), saved.var.data()},
                                                .epilogue = after},
                                               Place::kHost, stop);
  }
  if (absl::Status status = ToStatus(outcome); !status.ok()) return status;
  return saved;
}

absl::StatusOr<std::string> Save(Core& core, SavedForward saved, const Payload& input) {
  saved.input = core.pool->Get(input.size);
  if (input.size > 0) {
    if (saved.input.data() == nullptr) return ToStatus(Outcome::kOutOfMemory);
    std::memcpy(saved.input.data(), input.data, input.size);
  }
  return core.contexts->Put(std::move(saved));
}

}  // namespace

void Forward(Core& core, const Caller& caller, const v1::ForwardRequest& request, Payload input,
             Payload residual, std::stop_token stop, ForwardDone done) {
  const absl::StatusOr<ChangeOptions> options = ToChangeOptions(request, Method::kForward);
  if (!options.ok()) return done(options.status());
  const auto wanted_mode = ToMode(request.mode());
  if (!wanted_mode.ok()) return done(wanted_mode.status());
  const auto activation = ToActivation(request.activation());
  if (!activation.ok()) return done(activation.status());
  const auto spec = ToTensorSpec(request.input(), "input");
  if (!spec.ok()) return done(spec.status());
  if (absl::Status s = CheckBytes(*spec, input.size, "input"); !s.ok()) return done(s);
  Epilogue epilogue{.activation = *activation};
  if (request.has_residual()) {
    const auto residual_spec = ToTensorSpec(request.residual(), "residual");
    if (!residual_spec.ok()) return done(residual_spec.status());
    if (absl::Status s = CheckSameTensor(*residual_spec, "residual", *spec, "the input"); !s.ok()) {
      return done(s);
    }
    if (absl::Status s = CheckBytes(*residual_spec, residual.size, "residual"); !s.ok()) {
      return done(s);
    }
    epilogue.residual = residual.data;
  }
  const auto instance = core.registry->Find(request.name());
  if (!instance.ok()) return done(instance.status());

  auto output = GetBuffer(core, spec->bytes());
  if (!output.ok()) return done(output.status());
  auto call = std::make_shared<Call>(
      Call{.core = core, .done = std::move(done), .output = *std::move(output)});

  for (;;) {
    const Snapshot tip = (*instance)->tip();
    if (tip == nullptr) return call->Refuse(absl::NotFoundError("the instance was deleted"));
    const Mode mode = wanted_mode->value_or(tip->mode);
    const auto pass = ToPass(tip->layer(), mode, *spec, "input");
    if (!pass.ok()) return call->Refuse(pass.status());
    if (pass->folds || request.save_for_backward()) {
      absl::Status allowed = CheckStronger(
          caller, Role::kUser, request.name(),
          pass->folds ? "a Forward in train mode" : "a Forward with save_for_backward");
      if (!allowed.ok()) return call->Refuse(std::move(allowed));
    }
    // A call that changes nothing sees what was acknowledged, one that folds
    // builds on what is about to be.
    const Snapshot state = pass->folds ? tip : (*instance)->published();
    if (state == nullptr) return call->Refuse(absl::NotFoundError("the instance was deleted"));

    BatchMoments moments;
    auto saved = Normalize(*call, *state, *pass, *spec, input.data, epilogue, moments, stop);
    if (!saved.ok()) return call->Refuse(saved.status());
    saved->has_residual = request.has_residual();

    v1::ForwardResponse& header = call->answer.header;
    header.set_mode(ToProto(mode));
    header.set_num_batches_tracked(state->num_batches_tracked);
    if (request.return_batch_statistics() && pass->by_batch) {
      *header.mutable_batch_statistics() = ToProto(moments);
    }
    if (request.save_for_backward()) {
      call->DropContext();  // of a try before
      auto context_id = Save(core, *std::move(saved), input);
      if (!context_id.ok()) return call->Refuse(context_id.status());
      header.set_context_id(*std::move(context_id));
    }

    if (!pass->folds &&
        (!options->expected_version.has_value() || *options->expected_version == state->version)) {
      header.set_version(state->version);
      return call->Answer(*spec);
    }
    const bool fresh = (*instance)->Change(
        *options,
        [&](InstanceState& next) -> absl::StatusOr<Edited> {
          if (!pass->folds) return Edited::kUnchanged;  // and the version was checked
          // Whoever came between changed what this output should have been.
          if (next.weight.data() != state->weight.data() ||
              next.bias.data() != state->bias.data() ||
              (!wanted_mode->has_value() && next.mode != mode)) {
            return Edited::kStale;
          }
          FoldBatch(moments, next);
          return Edited::kChanged;
        },
        [call, spec = *spec, folds = pass->folds](absl::StatusOr<Changed> changed) {
          if (!changed.ok()) return call->Refuse(changed.status());
          call->answer.header.set_version(changed->version);
          call->answer.header.set_replayed(changed->replayed);
          call->answer.header.set_num_batches_tracked(changed->num_batches_tracked);
          call->answer.changed = folds;
          call->Answer(spec);
        });
    if (fresh) return;
  }
}

}  // namespace normd
