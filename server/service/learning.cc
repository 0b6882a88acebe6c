#include "absl/status/status.h"
#include "server/error/error.h"
#include "server/instance/optimizer.h"
#include "server/service/change.h"
#include "server/service/handlers.h"

namespace normd {
namespace {

absl::Status NoParameters() {
  return ForField(absl::FailedPreconditionError(
                      "the instance has no parameters to step: it was created with affine=false"),
                  "name");
}

absl::Status OtherRule() {
  return ForField(absl::FailedPreconditionError(
                      "the instance's optimizer state is of another rule; set reset_optimizer to "
                      "forget it, or go on with the rule of the steps before"),
                  "optimizer.rule");
}

}  // namespace

void ZeroGrad(Core& core, const v1::ZeroGradRequest& request, v1::ZeroGradResponse& response,
              Done done) {
  const bool to_none = !request.has_set_to_none() || request.set_to_none();
  ChangeInstance(core, request, response, Method::kZeroGrad, std::move(done),
                 [to_none](InstanceState& next) {
                   for (Values* gradient : {&next.grad_weight, &next.grad_bias}) {
                     if (to_none) {
                       *gradient = Values();
                     } else if (gradient->present()) {
                       *gradient = Values::Filled(gradient->dtype(), gradient->size(), 0);
                     }
                   }
                   return Edited::kChanged;
                 });
}

void Step(Core& core, const v1::StepRequest& request, v1::StepResponse& response, Done done) {
  const auto settings = ToOptimizerSettings(request.optimizer());
  if (!settings.ok()) return done(settings.status());
  ChangeInstance(core, request, response, Method::kStep, std::move(done),
                 [&](InstanceState& next) -> absl::StatusOr<Edited> {
                   if (!next.weight.present()) return NoParameters();
                   if (request.reset_optimizer()) next.optimizer = nullptr;
                   if (next.optimizer != nullptr && next.optimizer->rule != settings->rule)
                     return OtherRule();
                   response.set_stepped(next.grad_weight.present() || next.grad_bias.present());
                   if (!response.stepped()) {
                     return request.reset_optimizer() ? Edited::kReset : Edited::kUnchanged;
                   }
                   normd::Step(*settings, next);
                   if (request.zero_grad()) {
                     next.grad_weight = Values();
                     next.grad_bias = Values();
                   }
                   return Edited::kChanged;
                 });
}

}  // namespace normd
