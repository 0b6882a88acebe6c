#include "server/service/forward.h"

#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/auth/permissions.h"
#include "server/error/error.h"
#include "server/service/convert.h"
#include "server/service/forward_pieces.h"
#include "server/service/layers.h"
#include "server/service/shared_tensors.h"
#include "server/service/validate.h"

namespace normd {
namespace {

// Shared by the tries of one call: the first that is not stale answers.
struct Call {
  Core& core;
  ForwardDone done;
  OutputMemory output = {};
  std::shared_ptr<const Buffer> kept_input = nullptr;  // with save_for_backward
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

// What one try normalized by, and the mask where one was wanted.
struct Normalized {
  BatchMoments moments;           // by_batch
  std::vector<double> mean, var;  // else
  Buffer relu_mask;
};

// Normalizes `input` into the call's output with the parameters and statistics of
// `state`.
absl::StatusOr<Normalized> Normalize(Call& call, const InstanceState& state, const Pass& pass,
                                     const char* input, Epilogue epilogue, bool saving, Place place,
                                     const std::stop_token& stop) {
  Normalized made;
  if (saving && epilogue.activation == Activation::kRelu) {
    made.relu_mask = call.core.pool->Get(static_cast<size_t>(ReluMaskBytes(pass.problem.size())));
    if (made.relu_mask.data() == nullptr) return ToStatus(Outcome::kOutOfMemory);
    epilogue.relu_mask = reinterpret_cast<uint8_t*>(made.relu_mask.data());
  }
  const Affine affine{state.weight.data(), state.bias.data()};
  Lasting lasting{.weight = state.weight.token(), .bias = state.bias.token()};
  Outcome outcome;
  if (pass.by_batch) {
    made.moments = MomentsFor(pass.problem);
    outcome = call.core.backend->ForwardByBatch(
        pass.problem,
        {.x = input,
         .y = call.output.data(),
         .affine = affine,
         .moments = {made.moments.mean.data(), made.moments.m2.data()},
         .epilogue = epilogue,
         .lasting = std::move(lasting)},
        place, stop);
  } else {
    made.mean = ToDoubles(state.running_mean);
    made.var = ToDoubles(state.running_var);
    lasting.mean = state.running_mean.token();
    lasting.var = state.running_var.token();
    outcome =
        call.core.backend->ForwardByStatistics(pass.problem,
                                               {.x = input,
                                                .y = call.output.data(),
                                                .affine = affine,
                                                .statistics = {made.mean.data(), made.var.data()},
                                                .epilogue = epilogue,
                                                .lasting = std::move(lasting)},
                                               place, stop);
  }
  if (absl::Status status = ToStatus(outcome); !status.ok()) return status;
  return made;
}

// Bytes that a saved context takes.
int64_t ContextBytes(const ForwardSpec& spec, const NormProblem& problem) {
  return spec.input.bytes() + 2 * int64_t{sizeof(double)} * problem.num_sets() +
         (spec.activation == Activation::kRelu ? ReluMaskBytes(problem.size()) : 0);
}

// The input for a context: the memory that it was gathered into, or a copy of what
// lies in the message.
absl::Status KeepInput(Call& call, Payload& input) {
  if (call.kept_input != nullptr) return absl::OkStatus();
  Buffer& gathered = input.gathered.buffer;
  if (gathered.data() == nullptr && input.size > 0) {
    gathered = call.core.pool->Get(input.size);
    if (gathered.data() == nullptr) return ToStatus(Outcome::kOutOfMemory);
    std::memcpy(gathered.data(), input.data, input.size);
    input.data = gathered.data();
  }
  call.kept_input = std::make_shared<const Buffer>(std::move(gathered));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ForwardSpec> ToForwardSpec(const v1::ForwardRequest& request) {
  ForwardSpec spec;
  if (request.has_output_memory()) {
    return InvalidField("output_memory", "given", "nothing in a stream, which sends its output");
  }
  auto options = ToChangeOptions(request, Method::kForward);
  if (!options.ok()) return options.status();
  spec.options = *options;
  const auto mode = ToMode(request.mode());
  if (!mode.ok()) return mode.status();
  spec.mode = *mode;
  const auto activation = ToActivation(request.activation());
  if (!activation.ok()) return activation.status();
  spec.activation = *activation;
  auto input = ToTensorSpec(request.input(), "input");
  if (!input.ok()) return input.status();
  spec.input = *std::move(input);
  if (request.has_residual()) {
    const auto residual = ToTensorSpec(request.residual(), "residual");
    if (!residual.ok()) return residual.status();
    absl::Status same = CheckSameTensor(*residual, "residual", spec.input, "the input");
    if (!same.ok()) return same;
  }
  return spec;
}

absl::Status CheckMayForward(const Caller& caller, const v1::ForwardRequest& request, bool folds) {
  if (!folds && !request.save_for_backward()) return absl::OkStatus();
  return CheckStronger(caller, Role::kUser, request.name(),
                       folds ? "a Forward in train mode" : "a Forward with save_for_backward");
}

namespace {

// One forward call's tensors, checked.
struct Tensors {
  Payload input;
  Payload residual;
  SharedBytes output;
  Place place = Place::kHost;
};

// Normalizes first and folds then, again where the instance has changed meanwhile.
void ForwardInTries(Core& core, const Caller& caller, const v1::ForwardRequest& request,
                    const ForwardSpec& spec, Tensors tensors, MemoryClaim spare,
                    const std::stop_token& stop, ForwardDone done) {
  auto& [input, residual, output, place] = tensors;
  const auto instance = core.registry->Find(request.name());
  if (!instance.ok()) return done(instance.status());
  const bool saving = request.save_for_backward();

  auto call = std::make_shared<Call>(
      Call{.core = core, .done = std::move(done), .output = {.shared = std::move(output)}});
  for (;;) {
    const Snapshot tip = (*instance)->tip();
    if (tip == nullptr) return call->Refuse(InstanceDeleted());
    // What is remembered has folded, and so was in train mode whichever is set today.
    const auto applied = (*instance)->Applied(spec.options.request_id);
    const bool again = applied.has_value() && applied->method == Method::kForward;
    if (again && tip->parameters_version > applied->version) {
      return call->Refuse(NoLongerKnown(request.request_id(), *applied));
    }
    const Mode mode = again ? Mode::kTrain : spec.mode.value_or(tip->mode);
    const auto pass = ToPass(tip->layer(), mode, spec.input, "input");
    if (!pass.ok()) return call->Refuse(pass.status());
    if (absl::Status allowed = CheckMayForward(caller, request, pass->folds); !allowed.ok()) {
      return call->Refuse(std::move(allowed));
    }
    // A call that changes nothing sees what was acknowledged, one that folds
    // builds on what is about to be.
    const Snapshot state = pass->folds ? tip : (*instance)->published();
    if (state == nullptr) return call->Refuse(InstanceDeleted());

    if (!call->output.present()) {
      // In place, where neither a context nor another try will want the input.
      if (!saving && !pass->folds && input.gathered.buffer.data() != nullptr) {
        call->output.own = std::move(input.gathered);
      } else {
        auto memory = GetBuffer(core, spec.input.bytes(), spare);
        if (!memory.ok()) return call->Refuse(memory.status());
        call->output.own = *std::move(memory);
      }
    }
    if (pass->folds) {
      // Another try will want them.
      for (Payload* tensor : {&input, &residual}) {
        absl::Status moved = MoveOutOf(core, call->output.shared, "output_memory", *tensor);
        if (!moved.ok()) return call->Refuse(std::move(moved));
      }
    }
    MemoryClaim context_claim;
    if (saving) {
      call->DropContext();  // of a try before
      call->answer.header.clear_context_id();
      auto claim = core.contexts->Claim(ContextBytes(spec, pass->problem));
      if (!claim.ok()) return call->Refuse(claim.status());
      context_claim = *std::move(claim);
      if (absl::Status kept = KeepInput(*call, input); !kept.ok()) return call->Refuse(kept);
    }

    const Epilogue epilogue{.residual = residual.data, .activation = spec.activation};
    auto made = Normalize(*call, *state, *pass, input.data, epilogue, saving, place, stop);
    if (!made.ok()) return call->Refuse(made.status());

    v1::ForwardResponse& header = call->answer.header;
    header.set_mode(ToProto(mode));
    header.set_num_batches_tracked(state->num_batches_tracked);
    if (request.return_batch_statistics() && pass->by_batch) {
      *header.mutable_batch_statistics() = ToProto(made->moments);
    }
    if (saving) {
      SavedForward saved{
          .uid = state->identity->uid,
          .problem = pass->problem,
          .shape = spec.input.shape,
          .input = call->kept_input,
          .mean = pass->by_batch ? made->moments.mean : std::move(made->mean),
          .var = pass->by_batch ? BiasedVariance(made->moments) : std::move(made->var),
          .statistics_of_batch = pass->by_batch,
          .weight = state->weight,
          .relu_mask = std::move(made->relu_mask),
          .has_residual = request.has_residual()};
      header.set_context_id(core.contexts->Put(std::move(saved), std::move(context_claim)));
    }

    if (!pass->folds && (!spec.options.expected_version.has_value() ||
                         *spec.options.expected_version == state->version)) {
      header.set_version(state->version);
      return call->Answer(spec.input);
    }
    const bool fresh = (*instance)->Change(
        spec.options,
        [&](InstanceState& next) -> absl::StatusOr<Edited> {
          if (!pass->folds) return Edited::kUnchanged;  // and the version was checked
          // Whoever came between changed what this output should have been.
          if (next.weight.data() != state->weight.data() ||
              next.bias.data() != state->bias.data() || next.identity->uid != tip->identity->uid ||
              (!spec.mode.has_value() && next.mode != mode)) {
            return Edited::kStale;
          }
          FoldBatch(made->moments, next);
          return Edited::kChanged;
        },
        [call, input_spec = spec.input, folds = pass->folds](absl::StatusOr<Changed> changed) {
          if (!changed.ok()) return call->Refuse(changed.status());
          call->answer.header.set_version(changed->version);
          call->answer.header.set_replayed(changed->replayed);
          call->answer.header.set_num_batches_tracked(changed->num_batches_tracked);
          call->answer.changed = folds;
          call->Answer(input_spec);
        });
    if (fresh) return;
  }
}

// Less than this is still in a near cache when it is read again.
constexpr size_t kFoldsFirst = size_t{32} << 20;

// Whether statistics are taken and folded in first, and the input is normalized where it lies
// then: that reads it once more from memory, but a large call needs half the memory.
absl::StatusOr<bool> FoldsFirst(Core& core, const Caller& caller, const v1::ForwardRequest& request,
                                const ForwardSpec& spec, const Tensors& tensors) {
  if (tensors.input.gathered.buffer.size() < kFoldsFirst || tensors.output.region != nullptr ||
      core.backend->name() != "cpu") {
    return false;
  }
  const auto plan = ForwardPieces::Begin(core, caller, request, spec);
  if (!plan.ok()) return plan.status();
  return plan->way == ForwardPieces::Way::kAfterStatistics;
}

void FoldThenNormalize(Core& core, const Caller& caller, const v1::ForwardRequest& request,
                       const ForwardSpec& spec, Tensors tensors, MemoryClaim spare,
                       const std::stop_token& stop, ForwardDone done) {
  struct Call {
    ForwardSpec spec;
    Tensors tensors;
    MemoryClaim spare;
    ForwardDone done;
  };
  const auto call =
      std::make_shared<Call>(Call{spec, std::move(tensors), std::move(spare), std::move(done)});
  ForwardPieces::Fold(
      core, caller, request, call->spec, call->tensors.input.data, /*arrived=*/nullptr, stop,
      [&core, &caller, &request, call, stop](absl::StatusOr<std::optional<ForwardPieces>> pieces) {
        if (!pieces.ok()) return call->done(pieces.status());
        if (!pieces->has_value()) {
          return ForwardInTries(core, caller, request, call->spec, std::move(call->tensors),
                                std::move(call->spare), stop, std::move(call->done));
        }
        // Not here: others wait for the thread that tells what is durable.
        core.executor->Enqueue([call, pieces = **std::move(pieces), stop] {
          const TensorSpec& input = call->spec.input;
          ClaimedBuffer memory = std::move(call->tensors.input.gathered);
          absl::Status status =
              pieces.Normalize(memory.buffer.data(), call->tensors.residual.data, 0,
                               input.bytes() / static_cast<int64_t>(SizeOf(input.dtype)), stop);
          if (!status.ok()) return call->done(std::move(status));
          TensorAnswer<v1::ForwardResponse> answer{.header = pieces.header(), .changed = true};
          answer.header.clear_output();
          answer.tensors.push_back(
              ToAnswer(v1::ForwardResponse::kOutputFieldNumber, input, {.own = std::move(memory)}));
          call->done(std::move(answer));
        });
      });
}

}  // namespace

void Forward(Core& core, const Caller& caller, const v1::ForwardRequest& request, Payload input,
             Payload residual, SharedBytes output, MemoryClaim spare, std::stop_token stop,
             ForwardDone done) {
  const auto spec = ToForwardSpec(request);
  if (!spec.ok()) return done(spec.status());
  if (absl::Status s = CheckBytes(spec->input, input.size, "input"); !s.ok()) return done(s);
  if (request.has_residual()) {
    if (absl::Status s = CheckBytes(spec->input, residual.size, "residual"); !s.ok()) {
      return done(s);
    }
  }
  for (const Payload* tensor : {&input, &residual}) {
    absl::Status fits = CheckOutput(output, "output_memory", spec->input.bytes(), *tensor);
    if (!fits.ok()) return done(std::move(fits));
  }
  const auto place =
      CommonPlace({{"input", input.on_device},
                   {"residual", request.has_residual() ? residual.on_device : input.on_device},
                   {"output_memory", output.on_device()}});
  if (!place.ok()) return done(place.status());
  if (*place == Place::kDevice && request.save_for_backward()) {
    return done(InvalidField("save_for_backward", "true",
                             "false with tensors on the GPU; Backward takes the input again"));
  }
  Tensors tensors{std::move(input), std::move(residual), std::move(output), *place};
  const auto folds_first = FoldsFirst(core, caller, request, *spec, tensors);
  if (!folds_first.ok()) return done(folds_first.status());
  (*folds_first ? FoldThenNormalize : ForwardInTries)(
      core, caller, request, *spec, std::move(tensors), std::move(spare), stop, std::move(done));
}

}  // namespace normd
