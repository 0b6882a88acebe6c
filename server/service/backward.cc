#include "server/service/backward.h"

#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/convert.h"
#include "server/service/layers.h"
#include "server/service/shared_tensors.h"
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
  const uint8_t* relu_mask = nullptr;
  Lasting lasting = {};
};

// Shared by the tries of one call: the first that is not stale answers.
struct Call {
  BackwardDone done;
  std::optional<SavedContexts::Lease> context = std::nullopt;
  bool retain_context = false;
  OutputMemory grad_input = {};
  OutputMemory grad_residual = {};
  TensorAnswer<v1::BackwardResponse> answer = {};

  void Refuse(absl::Status status) {
    context.reset();  // good for another try
    done(std::move(status));
  }
  void Answer(const TensorSpec& spec, bool skip_grad_input, bool with_residual) {
    if (context.has_value()) context->Commit(retain_context);
    using Response = v1::BackwardResponse;
    if (with_residual) {
      answer.tensors.push_back(
          ToAnswer(Response::kGradResidualFieldNumber, spec, std::move(grad_residual)));
    }
    if (!skip_grad_input) {
      answer.tensors.push_back(
          ToAnswer(Response::kGradInputFieldNumber, spec, std::move(grad_input)));
    }
    done(std::move(answer));
  }
};

// `pass` with statistics that come with the request, from the running ones, or from
// the input itself.
absl::StatusOr<ForwardPass> PassFromRequest(Core& core, const v1::BackwardRequest& request,
                                            const InstanceState& state, const Pass& of_layer,
                                            const char* input, Place place,
                                            const std::stop_token& stop) {
  const NormProblem& problem = of_layer.problem;
  ForwardPass pass{.problem = problem, .input = input, .weight = state.weight};
  pass.statistics_of_batch = of_layer.by_batch;
  if (!pass.statistics_of_batch) {
    if (request.has_batch_statistics()) {
      return InvalidField("batch_statistics", "present in eval mode",
                          "absent in eval mode, where the running statistics serve");
    }
    pass.mean = ToDoubles(state.running_mean);
    pass.var = ToDoubles(state.running_var);
    pass.lasting.mean = state.running_mean.token();
    pass.lasting.var = state.running_var.token();
    return pass;
  }
  BatchMoments moments;
  if (request.has_batch_statistics()) {
    auto given = ToBatchMoments(request.batch_statistics(), problem);
    if (!given.ok()) return given.status();
    moments = *std::move(given);
  } else {
    auto own = MomentsOf(core, problem, input, place, stop);
    if (!own.ok()) return own.status();
    moments = *std::move(own);
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

// INVALID_ARGUMENT where what is written lies amid what is read, or both amid each other.
absl::Status CheckOutputs(const BackwardOutputs& outputs, int64_t bytes, const Payload& input,
                          const Payload& grad_output) {
  for (const auto& [output, field] : {std::pair(&outputs.grad_input, "grad_input_memory"),
                                      std::pair(&outputs.grad_residual, "grad_residual_memory")}) {
    for (const Payload* tensor : {&input, &grad_output}) {
      absl::Status fits = CheckOutput(*output, field, bytes, *tensor);
      if (!fits.ok()) return fits;
    }
  }
  const SharedBytes& grad_input = outputs.grad_input;
  const SharedBytes& grad_residual = outputs.grad_residual;
  if (grad_input.region == nullptr || grad_input.region != grad_residual.region) {
    return absl::OkStatus();
  }
  const uint64_t a = grad_input.name.offset(), b = grad_residual.name.offset();
  if (bytes == 0 || (a > b ? a - b : b - a) >= static_cast<uint64_t>(bytes)) {
    return absl::OkStatus();
  }
  return InvalidField("grad_residual_memory", absl::StrCat("offset ", b, ", amid grad_input's"),
                      "memory apart from grad_input's");
}

}  // namespace

void Backward(Core& core, const v1::BackwardRequest& request, Payload input, Payload grad_output,
              BackwardOutputs outputs, MemoryClaim spare, std::stop_token stop, BackwardDone done) {
  if (request.has_grad_input_memory() || request.has_grad_residual_memory()) {
    return done(
        InvalidField(request.has_grad_input_memory() ? "grad_input_memory" : "grad_residual_memory",
                     "given", "nothing in a stream, which sends its gradients"));
  }
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
  if (request.skip_grad_input()) outputs.grad_input = {};
  if (!saved) outputs.grad_residual = {};
  if (absl::Status s = CheckOutputs(outputs, spec->bytes(), input, grad_output); !s.ok()) {
    return done(s);
  }
  if (saved && grad_output.on_device) {
    return done(InvalidField("context_id", "given beside a grad_output on the GPU",
                             "the input, on the GPU too"));
  }
  const auto place = CommonPlace(
      {{"grad_output", grad_output.on_device},
       {"input", saved ? grad_output.on_device : input.on_device},
       {"grad_input_memory",
        request.skip_grad_input() ? grad_output.on_device : outputs.grad_input.on_device()},
       {"grad_residual_memory", outputs.grad_residual.region == nullptr
                                    ? grad_output.on_device
                                    : outputs.grad_residual.on_device()}});
  if (!place.ok()) return done(place.status());
  const auto instance = core.registry->Find(request.name());
  if (!instance.ok()) return done(instance.status());

  auto call =
      std::make_shared<Call>(Call{.done = std::move(done),
                                  .retain_context = request.retain_context(),
                                  .grad_input = {.shared = std::move(outputs.grad_input)},
                                  .grad_residual = {.shared = std::move(outputs.grad_residual)}});
  for (;;) {
    // What accumulates builds on what is about to be, the rest on what was
    // acknowledged.
    const Snapshot tip = (*instance)->tip();
    const Snapshot state = request.accumulate() ? tip : (*instance)->published();
    if (tip == nullptr || state == nullptr) {
      return call->Refuse(InstanceDeleted());
    }
    const Mode mode = wanted_mode->value_or(state->mode);

    if (call->context.has_value() && call->context->forward().uid != state->identity->uid) {
      call->context.reset();  // of a layer that a checkpoint has replaced meanwhile
    }
    if (saved && !call->context.has_value()) {
      auto lease =
          core.contexts->Use(request.context_id(), state->identity->uid, options->request_id);
      if (!lease.ok()) return call->Refuse(lease.status());
      call->context.emplace(*std::move(lease));
    }
    // Before memory is claimed: is this a pass of the instance at all?
    TensorSpec forward_spec = input_spec;
    Pass of_layer;
    if (saved) {
      const SavedForward& forward = call->context->forward();
      forward_spec = {
          .dtype = forward.problem.dtype, .format = forward.problem.format, .shape = forward.shape};
    } else {
      auto checked = ToPass(state->layer(), mode, input_spec, "input");
      if (!checked.ok()) return call->Refuse(checked.status());
      of_layer = *std::move(checked);
      const auto applied = (*instance)->Applied(options->request_id);
      const bool same = !applied.has_value() || applied->version == tip->version ||
                        (wanted_mode->has_value() && of_layer.by_batch &&
                         tip->parameters_version <= applied->version);
      if (request.accumulate() && !same && applied->method == Method::kBackward) {
        return call->Refuse(NoLongerKnown(request.request_id(), *applied));
      }
    }
    absl::Status same = CheckSameTensor(*spec, "grad_output", forward_spec, "the output");
    if (!same.ok()) return call->Refuse(std::move(same));

    // In place of grad_output, the first that asks, where no other try will want it.
    const bool only_try = saved || !request.accumulate();
    const auto get = [&](OutputMemory& output) {
      if (output.present()) return absl::OkStatus();
      if (only_try && grad_output.gathered.buffer.data() != nullptr) {
        output.own = std::move(grad_output.gathered);
        return absl::OkStatus();
      }
      auto memory = GetBuffer(core, spec->bytes(), spare);
      if (memory.ok()) output.own = *std::move(memory);
      return memory.status();
    };
    const auto move_out = [&](Payload& tensor) {
      return MoveOutOf(core, call->grad_input.shared, "grad_input_memory", tensor);
    };
    const bool wants_residual = saved && call->context->forward().has_residual;
    absl::Status memory;
    if (wants_residual) memory = get(call->grad_residual);
    if (memory.ok() && !request.skip_grad_input()) memory = get(call->grad_input);
    if (memory.ok() && !only_try) memory = move_out(input);
    if (memory.ok() && !only_try) memory = move_out(grad_output);
    if (!memory.ok()) return call->Refuse(std::move(memory));
    char* const grad_input = call->grad_input.data();
    ForwardPass pass;
    if (saved) {
      const SavedForward& forward = call->context->forward();
      pass = {.problem = forward.problem,
              .input = forward.input->data(),
              .mean = forward.mean,
              .var = forward.var,
              .statistics_of_batch = forward.statistics_of_batch,
              .weight = forward.weight,
              .relu_mask = reinterpret_cast<const uint8_t*>(forward.relu_mask.data())};
    } else {
      auto made = PassFromRequest(core, request, *state, of_layer, input.data, *place, stop);
      if (!made.ok()) return call->Refuse(made.status());
      pass = *std::move(made);
    }
    pass.lasting.weight = pass.weight.token();

    const Layer& layer = state->layer();
    Outcome outcome = Outcome::kOk;
    Values grad_weight;
    Values grad_bias;
    const auto compute = [&](void* grad_weight_data, void* grad_bias_data) {
      outcome = core.backend->Backward(pass.problem,
                                       {.x = pass.input,
                                        .grad_y = grad_output.data,
                                        .grad_x = request.skip_grad_input() ? nullptr : grad_input,
                                        .weight = pass.weight.data(),
                                        .statistics = {pass.mean.data(), pass.var.data()},
                                        .statistics_of_batch = pass.statistics_of_batch,
                                        .grad_weight = grad_weight_data,
                                        .grad_bias = grad_bias_data,
                                        .relu_mask = pass.relu_mask,
                                        .grad_residual = call->grad_residual.data(),
                                        .lasting = pass.lasting},
                                       *place, stop);
    };
    // Into values of the parameters' type, where the layer has them.
    const auto with_values = [&](bool wanted, Values& values, auto fill) {
      if (!wanted) return fill(nullptr);
      values = Values::Make(pass.problem.parameter_dtype(), pass.problem.channels, fill);
    };
    with_values(layer.has_weight(), grad_weight, [&](void* weight_data) {
      with_values(layer.has_bias(), grad_bias,
                  [&](void* bias_data) { compute(weight_data, bias_data); });
    });
    if (absl::Status s = ToStatus(outcome); !s.ok()) return call->Refuse(s);

    v1::BackwardResponse& header = call->answer.header;
    const std::vector<int64_t> parameter_shape = layer.parameter_shape();
    if (grad_weight.present()) {
      *header.mutable_grad_weight() = ToProto(grad_weight, parameter_shape);
    }
    if (grad_bias.present()) *header.mutable_grad_bias() = ToProto(grad_bias, parameter_shape);

    if (!request.accumulate() &&
        (!options->expected_version.has_value() || *options->expected_version == state->version)) {
      header.set_version(state->version);
      return call->Answer(*spec, request.skip_grad_input(), wants_residual);
    }
    const bool fresh = (*instance)->Change(
        *options,
        [&](InstanceState& next) -> absl::StatusOr<Edited> {
          if (!request.accumulate() || !layer.has_weight()) return Edited::kUnchanged;
          if (next.identity->uid != state->identity->uid) return Edited::kStale;
          // Without a context the gradients are those of the state as it is.
          if (!saved && (next.weight.data() != state->weight.data() ||
                         (!wanted_mode->has_value() && next.mode != mode) ||
                         (!pass.statistics_of_batch &&
                          (next.running_mean.data() != state->running_mean.data() ||
                           next.running_var.data() != state->running_var.data())))) {
            return Edited::kStale;
          }
          next.grad_weight = Accumulated(next.grad_weight, grad_weight);
          if (layer.has_bias()) next.grad_bias = Accumulated(next.grad_bias, grad_bias);
          return Edited::kChanged;
        },
        [call, spec = *spec, skip = request.skip_grad_input(), wants_residual,
         accumulated =
             request.accumulate() && layer.has_weight()](absl::StatusOr<Changed> changed) {
          if (!changed.ok()) return call->Refuse(changed.status());
          call->answer.header.set_version(changed->version);
          call->answer.header.set_replayed(changed->replayed);
          call->answer.changed = accumulated;
          call->Answer(spec, skip, wants_residual);
        });
    if (fresh) return;
  }
}

}  // namespace normd
