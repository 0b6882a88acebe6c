#include "server/service/backward.h"

#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/convert.h"
#include "server/service/validate.h"

namespace normd {
namespace {

// The forward that is differentiated, from a context or from the request.
struct ForwardPass {
  NormProblem problem;
  const char* input = nullptr;
  std::vector<double> mean;
  std::vector<double> var;
  bool statistics_of_batch = true;
  Values weight;
};

// Shared by the tries of one call: the first that is not stale answers.
struct Call {
  BackwardDone done;
  std::optional<SavedContexts::Lease> context = std::nullopt;
  bool retain_context = false;
  TensorAnswer<v1::BackwardResponse> answer = {};

  void Refuse(absl::Status status) {
    context.reset();  // good for another try
    done(std::move(status));
  }
  void Answer() {
    if (context.has_value()) context->Commit(retain_context);
    done(std::move(answer));
  }
};

absl::Status CheckSameTensor(const TensorSpec& grad_output, const std::vector<int64_t>& shape,
                             const NormProblem& problem) {
  if (grad_output.shape != shape) {
    return InvalidField("grad_output.shape", ShapeText(grad_output.shape),
                        absl::StrCat(ShapeText(shape), ", the output's shape"));
  }
  if (grad_output.dtype != problem.dtype) {
    return InvalidField("grad_output.dtype", NameOf(grad_output.dtype),
                        absl::StrCat(NameOf(problem.dtype), ", the output's dtype"));
  }
  if (grad_output.format != problem.format) {
    return InvalidField(
        "grad_output.memory_format",
        grad_output.format == MemoryFormat::kChannelsLast ? "CHANNELS_LAST" : "CONTIGUOUS",
        "the output's memory format");
  }
  return absl::OkStatus();
}

// The pass whose statistics come with the request, from the running ones, or from
// the input itself, for which `scratch` (as large as the input) takes its output.
absl::StatusOr<ForwardPass> PassFromRequest(Core& core, const v1::BackwardRequest& request,
                                            const InstanceState& state, Mode mode,
                                            const TensorSpec& spec, const char* input,
                                            char* scratch, const std::stop_token& stop) {
  const auto problem = ToProblem(state.layer(), spec, "input");
  if (!problem.ok()) return problem.status();
  ForwardPass pass{.problem = *problem, .input = input, .weight = state.weight};
  pass.statistics_of_batch = mode == Mode::kTrain || !state.layer().track_running_stats;
  if (!pass.statistics_of_batch) {
    if (request.has_batch_statistics()) {
      return InvalidField("batch_statistics", "present in eval mode",
                          "absent in eval mode, where the running statistics serve");
    }
    pass.mean = ToDoubles(state.running_mean);
    pass.var = ToDoubles(state.running_var);
    return pass;
  }
  if (absl::Status s = CheckMoreThanOneValue(*problem, spec); !s.ok()) return s;
  BatchMoments moments;
  if (request.has_batch_statistics()) {
    auto given = ToBatchMoments(request.batch_statistics(), *problem);
    if (!given.ok()) return given.status();
    moments = *std::move(given);
  } else {
    const auto sets = static_cast<size_t>(problem->num_sets());
    moments = {.count = problem->set_size(),
               .mean = std::vector<double>(sets),
               .m2 = std::vector<double>(sets)};
    const Outcome outcome =
        core.backend->ForwardByBatch(*problem,
                                     {.x = input,
                                      .y = scratch,
                                      .affine = {},
                                      .moments = {moments.mean.data(), moments.m2.data()}},
                                     Place::kHost, stop);
    if (absl::Status s = ToStatus(outcome); !s.ok()) return s;
  }
  pass.var = BiasedVariance(moments);
  pass.mean = std::move(moments.mean);
  return pass;
}

// old + gradient; the gradient itself where there is none yet.
Values Accumulated(const Values& old, const Values& gradient) {
  if (!old.present()) return gradient;
  return Values::Map(gradient.dtype(), gradient.size(),
                     [&](int64_t i) { return old[i] + gradient[i]; });
}

}  // namespace

void Backward(Core& core, const v1::BackwardRequest& request, Payload input, Payload grad_output,
              std::stop_token stop, BackwardDone done) {
  const absl::StatusOr<ChangeOptions> options = ToChangeOptions(request, Method::kBackward);
  if (!options.ok()) return done(options.status());
  const auto wanted_mode = ToMode(request.mode());
  if (!wanted_mode.ok()) return done(wanted_mode.status());
  const auto spec = ToTensorSpec(request.grad_output(), "grad_output");
  if (!spec.ok()) return done(spec.status());
  if (absl::Status s = CheckBytes(*spec, grad_output.size, "grad_output"); !s.ok()) return done(s);
  const bool saved = !request.context_id().empty();
  TensorSpec input_spec;
  if (saved) {
    if (request.has_input() || request.has_batch_statistics() || wanted_mode->has_value()) {
      return done(InvalidField("context_id", "given beside input, batch_statistics or mode",
                               "either a context_id or those, not both"));
    }
  } else {
    if (!request.has_input()) {
      return done(InvalidField("input", "", "the forward's input, or a context_id"));
    }
    auto parsed = ToTensorSpec(request.input(), "input");
    if (!parsed.ok()) return done(parsed.status());
    input_spec = *std::move(parsed);
    if (absl::Status s = CheckBytes(input_spec, input.size, "input"); !s.ok()) return done(s);
  }
  const auto instance = core.registry->Find(request.name());
  if (!instance.ok()) return done(instance.status());

  auto call = std::make_shared<Call>(
      Call{.done = std::move(done), .retain_context = request.retain_context()});
  for (;;) {
    // What accumulates builds on what is about to be, the rest on what was
    // acknowledged.
    const Snapshot tip = (*instance)->tip();
    const Snapshot state = request.accumulate() ? tip : (*instance)->published();
    if (tip == nullptr || state == nullptr) {
      return call->Refuse(absl::NotFoundError("the instance was deleted"));
    }
    const Mode mode = wanted_mode->value_or(state->mode);

    if (saved && !call->context.has_value()) {
      auto lease =
          core.contexts->Use(request.context_id(), state->identity->uid, options->request_id);
      if (!lease.ok()) return call->Refuse(lease.status());
      call->context.emplace(*std::move(lease));
    }
    const std::vector<int64_t>& shape = saved ? call->context->forward().shape : input_spec.shape;
    // Before memory is claimed: is this a pass of the instance at all?
    NormProblem problem;
    if (saved) {
      problem = call->context->forward().problem;
    } else {
      const auto checked = ToProblem(state->layer(), input_spec, "input");
      if (!checked.ok()) return call->Refuse(checked.status());
      problem = *checked;
    }
    if (absl::Status s = CheckSameTensor(*spec, shape, problem); !s.ok()) return call->Refuse(s);

    const bool needs_scratch = !saved && !request.has_batch_statistics();
    if (call->answer.data.data() == nullptr && (!request.skip_grad_input() || needs_scratch)) {
      auto buffer = GetBuffer(core, spec->bytes());
      if (!buffer.ok()) return call->Refuse(buffer.status());
      call->answer.data = std::move(buffer->buffer);
      call->answer.memory = std::move(buffer->claim);
    }
    ForwardPass pass;
    if (saved) {
      const SavedForward& forward = call->context->forward();
      pass = {.problem = problem,
              .input = forward.input.data(),
              .mean = forward.mean,
              .var = forward.var,
              .statistics_of_batch = forward.statistics_of_batch,
              .weight = forward.weight};
    } else {
      auto made = PassFromRequest(core, request, *state, mode, input_spec, input.data,
                                  call->answer.data.data(), stop);
      if (!made.ok()) return call->Refuse(made.status());
      pass = *std::move(made);
    }

    const bool affine = state->layer().affine;
    Outcome outcome = Outcome::kOk;
    Values grad_bias;
    const auto compute = [&](void* grad_weight_data, void* grad_bias_data) {
      outcome = core.backend->Backward(
          pass.problem,
          {.x = pass.input,
           .grad_y = grad_output.data,
           .grad_x = request.skip_grad_input() ? nullptr : call->answer.data.data(),
           .weight = pass.weight.data(),
           .statistics = {pass.mean.data(), pass.var.data()},
           .statistics_of_batch = pass.statistics_of_batch,
           .grad_weight = grad_weight_data,
           .grad_bias = grad_bias_data},
          Place::kHost, stop);
    };
    Values grad_weight;
    if (affine) {
      const DType dtype = pass.problem.parameter_dtype();
      grad_weight = Values::Make(dtype, pass.problem.channels, [&](void* weight_data) {
        grad_bias = Values::Make(dtype, pass.problem.channels,
                                 [&](void* bias_data) { compute(weight_data, bias_data); });
      });
    } else {
      compute(nullptr, nullptr);
    }
    if (absl::Status s = ToStatus(outcome); !s.ok()) return call->Refuse(s);

    v1::BackwardResponse& header = call->answer.header;
    if (affine) {
      *header.mutable_grad_weight() = ToProto(grad_weight);
      *header.mutable_grad_bias() = ToProto(grad_bias);
    }
    call->answer.has_tensor = !request.skip_grad_input();
    if (call->answer.has_tensor) call->answer.tensor = ToProto(*spec);

    if (!request.accumulate() &&
        (!options->expected_version.has_value() || *options->expected_version == state->version)) {
      header.set_version(state->version);
      return call->Answer();
    }
    const bool fresh = (*instance)->Change(
        *options,
        [&](InstanceState& next) -> absl::StatusOr<Edited> {
          if (!request.accumulate() || !affine) return Edited::kUnchanged;
          // Without a context the gradients are those of the state as it is.
          if (!saved && (next.weight.data() != state->weight.data() ||
                         (!wanted_mode->has_value() && next.mode != mode) ||
                         (!pass.statistics_of_batch &&
                          (next.running_mean.data() != state->running_mean.data() ||
                           next.running_var.data() != state->running_var.data())))) {
            return Edited::kStale;
          }
          next.grad_weight = Accumulated(next.grad_weight, grad_weight);
          next.grad_bias = Accumulated(next.grad_bias, grad_bias);
          return Edited::kChanged;
        },
        [call](absl::StatusOr<Changed> changed) {
          if (!changed.ok()) return call->Refuse(changed.status());
          call->answer.header.set_version(changed->version);
          call->answer.header.set_replayed(changed->replayed);
          call->Answer();
        });
    if (fresh) return;
  }
}

}  // namespace normd
