#include "server/service/forward_pieces.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "server/service/convert.h"
#include "server/service/layers.h"
#include "server/service/tensor_answer.h"

namespace normd {
namespace {

std::shared_ptr<const std::vector<double>> Shared(std::vector<double> values) {
  return std::make_shared<const std::vector<double>>(std::move(values));
}

bool IsPerSample(const Pass& pass) {
  return pass.by_batch && pass.problem.reduction == Reduction::kPerSampleGroup;
}

}  // namespace

absl::StatusOr<ForwardPieces::Plan> ForwardPieces::Begin(Core& core, const Caller& caller,
                                                         const v1::ForwardRequest& request,
                                                         const ForwardSpec& spec) {
  const auto instance = core.registry->Find(request.name());
  if (!instance.ok()) return instance.status();
  const Snapshot state = (*instance)->published();
  if (state == nullptr) return InstanceDeleted();
  const Mode mode = spec.mode.value_or(state->mode);
  const auto pass = ToPass(state->layer(), mode, spec.input, "input");
  if (!pass.ok()) return pass.status();
  absl::Status allowed = CheckMayForward(caller, request, pass->folds);
  if (!allowed.ok()) return allowed;
  Plan plan{.problem = pass->problem};
  // What a request_id did before is answered by the unary call's way.
  const bool again = (*instance)->Applied(spec.options.request_id).has_value();
  if (request.save_for_backward() || again) return plan;
  if (pass->folds) {
    if (!IsPerSample(*pass)) plan.way = Way::kAfterStatistics;
    return plan;
  }
  const bool another_version =
      spec.options.expected_version.has_value() && *spec.options.expected_version != state->version;
  const bool as_it_arrives =
      !pass->by_batch || (IsPerSample(*pass) && !request.return_batch_statistics());
  if (!as_it_arrives || another_version || request.has_residual()) return plan;

  plan.way = Way::kAsItArrives;
  ForwardPieces& made = plan.pieces.emplace();
  made.backend_ = core.backend;
  made.state_ = state;
  made.problem_ = pass->problem;
  made.activation_ = spec.activation;
  made.by_batch_ = pass->by_batch;
  if (pass->by_batch) {
    made.grain_ = std::max<int64_t>(1, pass->problem.channels * pass->problem.positions);
  } else {
    made.mean_ = Shared(ToDoubles(state->running_mean));
    made.var_ = Shared(ToDoubles(state->running_var));
    made.lasting_ = {.mean = state->running_mean.token(), .var = state->running_var.token()};
  }
  made.header_.set_mode(ToProto(mode));
  made.header_.set_version(state->version);
  made.header_.set_num_batches_tracked(state->num_batches_tracked);
  *made.header_.mutable_output() = ToProto(spec.input);
  return plan;
}

void ForwardPieces::Fold(Core& core, const Caller& caller, const v1::ForwardRequest& request,
                         const ForwardSpec& spec, const char* input, const ArrivingMoments* arrived,
                         const std::stop_token& stop, Done done) {
  const auto instance = core.registry->Find(request.name());
  if (!instance.ok()) return done(instance.status());
  const Snapshot tip = (*instance)->tip();
  if (tip == nullptr) return done(InstanceDeleted());
  const Mode mode = spec.mode.value_or(tip->mode);
  const auto pass = ToPass(tip->layer(), mode, spec.input, "input");
  if (!pass.ok()) return done(pass.status());
  if (!pass->folds) return done(std::nullopt);
  absl::Status allowed = CheckMayForward(caller, request, /*folds=*/true);
  if (!allowed.ok()) return done(std::move(allowed));

  // Another instance of this name may have come meanwhile.
  const bool are_there = arrived != nullptr && arrived->problem() == pass->problem;
  const absl::StatusOr<BatchMoments> moments =
      are_there ? arrived->Get() : MomentsOf(core, pass->problem, input, Place::kHost, stop);
  if (!moments.ok()) return done(moments.status());

  ForwardPieces pieces;
  pieces.backend_ = core.backend;
  pieces.problem_ = pass->problem;
  pieces.activation_ = spec.activation;
  pieces.by_batch_ = true;
  pieces.header_.set_mode(ToProto(mode));
  *pieces.header_.mutable_output() = ToProto(spec.input);
  if (request.return_batch_statistics()) {
    *pieces.header_.mutable_batch_statistics() = ToProto(*moments);
  }
  pieces.var_ = Shared(BiasedVariance(*moments));
  pieces.mean_ = Shared(moments->mean);
  pieces.lasting_ = {.mean = pieces.mean_, .var = pieces.var_};

  // Shared: `done` is wanted here too if the edit is stale.
  const auto shared = std::make_shared<Done>(std::move(done));
  const bool fresh = (*instance)->Change(
      spec.options,
      [&](InstanceState& next) -> absl::StatusOr<Edited> {
        if (next.identity->uid != tip->identity->uid) return Edited::kStale;
        if (!spec.mode.has_value() && next.mode != mode) return Edited::kStale;
        FoldBatch(*moments, next);
        return Edited::kChanged;
      },
      [shared, pieces = std::move(pieces)](absl::StatusOr<Changed> changed) mutable {
        if (!changed.ok()) return (*shared)(changed.status());
        if (changed->state == nullptr) return (*shared)(InstanceDeleted());
        if (changed->replayed) return (*shared)(std::nullopt);
        // Normalized with the parameters of the very state that the fold made.
        pieces.state_ = std::move(changed->state);
        pieces.header_.set_version(changed->version);
        pieces.header_.set_num_batches_tracked(changed->num_batches_tracked);
        (*shared)(std::optional<ForwardPieces>(std::move(pieces)));
      });
  if (!fresh) (*shared)(std::nullopt);
}

absl::Status ForwardPieces::Normalize(char* data, const char* residual, int64_t first,
                                      int64_t count, const std::stop_token& stop) const {
  const Affine affine{state_->weight.data(), state_->bias.data()};
  const Epilogue epilogue{.residual = residual, .activation = activation_};
  Lasting lasting = lasting_;
  lasting.weight = state_->weight.token();
  lasting.bias = state_->bias.token();
  if (mean_ != nullptr) {
    return ToStatus(backend_->ForwardRange(problem_,
                                           {.first = first,
                                            .count = count,
                                            .x = data,
                                            .y = data,
                                            .affine = affine,
                                            .statistics = {mean_->data(), var_->data()},
                                            .statistics_of_batch = by_batch_,
                                            .epilogue = epilogue,
                                            .lasting = std::move(lasting)},
                                           Place::kHost, stop));
  }
  NormProblem samples = problem_;
  samples.batch = count / grain_;
  BatchMoments moments = MomentsFor(samples);
  return ToStatus(backend_->ForwardByBatch(samples,
                                           {.x = data,
                                            .y = data,
                                            .affine = affine,
                                            .moments = {moments.mean.data(), moments.m2.data()},
                                            .epilogue = epilogue,
                                            .lasting = std::move(lasting)},
                                           Place::kHost, stop));
}

}  // namespace normd
