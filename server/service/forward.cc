#include "server/service/forward.h"

#include <cstring>
#include <utility>

#include "server/service/convert.h"
#include "server/service/validate.h"

namespace normd {
namespace {

// What one pass over the tensor made.
struct Normalized {
  bool by_batch = false;
  BatchMoments moments;      // by_batch
  std::vector<double> mean;  // what served
  std::vector<double> var;
};

// Normalizes `input` into `output` with the parameters and statistics of `state`.
absl::StatusOr<Normalized> Normalize(Core& core, const InstanceState& state, bool by_batch,
                                     const NormProblem& problem, const char* input, char* output,
                                     const std::stop_token& stop) {
  Normalized result{.by_batch = by_batch};
  const Affine affine{state.weight.data(), state.bias.data()};
  Outcome outcome;
  if (by_batch) {
    const auto sets = static_cast<size_t>(problem.num_sets());
    result.moments = {.count = problem.set_size(),
                      .mean = std::vector<double>(sets),
                      .m2 = std::vector<double>(sets)};
    outcome = core.backend->ForwardByBatch(
        problem,
        {.x = input,
         .y = output,
         .affine = affine,
         .moments = {result.moments.mean.data(), result.moments.m2.data()}},
        Place::kHost, stop);
    result.mean = result.moments.mean;
    result.var = BiasedVariance(result.moments);
  } else {
    result.mean = ToDoubles(state.running_mean);
    result.var = ToDoubles(state.running_var);
    outcome =
        core.backend->ForwardByStatistics(problem,
                                          {.x = input,
                                           .y = output,
                                           .affine = affine,
                                           .statistics = {result.mean.data(), result.var.data()}},
                                          Place::kHost, stop);
  }
  if (absl::Status status = ToStatus(outcome); !status.ok()) return status;
  return result;
}

absl::StatusOr<std::string> Save(Core& core, const InstanceState& state, const NormProblem& problem,
                                 const TensorSpec& spec, const Payload& input,
                                 const Normalized& normalized) {
  SavedForward saved{.uid = state.identity->uid,
                     .problem = problem,
                     .shape = spec.shape,
                     .input = core.pool->Get(input.size),
                     .mean = normalized.mean,
                     .var = normalized.var,
                     .statistics_of_batch = normalized.by_batch,
                     .weight = state.weight};
  if (input.size > 0) {
    if (saved.input.data() == nullptr) return ToStatus(Outcome::kOutOfMemory);
    std::memcpy(saved.input.data(), input.data, input.size);
  }
  return core.contexts->Put(std::move(saved));
}

// Shared by the tries of one call: the first that is not stale answers.
struct Call {
  Core& core;
  ForwardDone done;
  TensorAnswer<v1::ForwardResponse> answer = {};

  void DropContext() {
    if (!answer.header.context_id().empty()) core.contexts->Drop(answer.header.context_id());
  }
  void Refuse(absl::Status status) {
    DropContext();
    done(std::move(status));
  }
  void Answer() { done(std::move(answer)); }
};

}  // namespace

void Forward(Core& core, const v1::ForwardRequest& request, Payload input, std::stop_token stop,
             ForwardDone done) {
  const absl::StatusOr<ChangeOptions> options = ToChangeOptions(request, Method::kForward);
  if (!options.ok()) return done(options.status());
  const auto wanted_mode = ToMode(request.mode());
  if (!wanted_mode.ok()) return done(wanted_mode.status());
  const auto spec = ToTensorSpec(request.input(), "input");
  if (!spec.ok()) return done(spec.status());
  if (absl::Status s = CheckBytes(*spec, input.size, "input"); !s.ok()) return done(s);
  const auto instance = core.registry->Find(request.name());
  if (!instance.ok()) return done(instance.status());

  auto output = GetBuffer(core, spec->bytes());
  if (!output.ok()) return done(output.status());
  auto call = std::make_shared<Call>(Call{.core = core, .done = std::move(done)});
  call->answer.data = std::move(output->buffer);
  call->answer.memory = std::move(output->claim);
  call->answer.tensor = ToProto(*spec);

  for (;;) {
    const Snapshot tip = (*instance)->tip();
    if (tip == nullptr) return call->Refuse(absl::NotFoundError("the instance was deleted"));
    const Layer& layer = tip->layer();
    const auto problem = ToProblem(layer, *spec, "input");
    if (!problem.ok()) return call->Refuse(problem.status());
    const Mode mode = wanted_mode->value_or(tip->mode);
    const bool by_batch = mode == Mode::kTrain || !layer.track_running_stats;
    const bool folds = mode == Mode::kTrain && layer.track_running_stats;
    if (by_batch) {
      absl::Status enough = CheckMoreThanOneValue(*problem, *spec);
      if (!enough.ok()) return call->Refuse(std::move(enough));
    }
    // A call that changes nothing sees what was acknowledged, one that folds
    // builds on what is about to be.
    const Snapshot state = folds ? tip : (*instance)->published();
    if (state == nullptr) return call->Refuse(absl::NotFoundError("the instance was deleted"));

    const auto normalized =
        Normalize(core, *state, by_batch, *problem, input.data, call->answer.data.data(), stop);
    if (!normalized.ok()) return call->Refuse(normalized.status());

    v1::ForwardResponse& header = call->answer.header;
    header.set_mode(ToProto(mode));
    header.set_num_batches_tracked(state->num_batches_tracked);
    if (request.return_batch_statistics() && by_batch) {
      *header.mutable_batch_statistics() = ToProto(normalized->moments);
    }
    if (request.save_for_backward()) {
      call->DropContext();  // of a try before
      auto context_id = Save(core, *state, *problem, *spec, input, *normalized);
      if (!context_id.ok()) return call->Refuse(context_id.status());
      header.set_context_id(*std::move(context_id));
    }

    if (!folds &&
        (!options->expected_version.has_value() || *options->expected_version == state->version)) {
      header.set_version(state->version);
      return call->Answer();
    }
    const bool fresh = (*instance)->Change(
        *options,
        [&](InstanceState& next) -> absl::StatusOr<Edited> {
          if (!folds) return Edited::kUnchanged;  // and the version was checked
          // Whoever came between changed what this output should have been.
          if (next.weight.data() != state->weight.data() ||
              next.bias.data() != state->bias.data() ||
              (!wanted_mode->has_value() && next.mode != mode)) {
            return Edited::kStale;
          }
          FoldBatch(normalized->moments, next);
          return Edited::kChanged;
        },
        [call](absl::StatusOr<Changed> changed) {
          if (!changed.ok()) return call->Refuse(changed.status());
          call->answer.header.set_version(changed->version);
          call->answer.header.set_replayed(changed->replayed);
          call->answer.header.set_num_batches_tracked(changed->num_batches_tracked);
          call->Answer();
        });
    if (fresh) return;
  }
}

}  // namespace normd
