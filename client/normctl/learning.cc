// zero-grad, step.
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/normctl/command.h"
#include "client/normctl/flags.h"
#include "client/normctl/output.h"
#include "client/normctl/usage_error.h"

namespace normd::normctl {
namespace {

Action ZeroGrad(CLI::App& app) {
  auto name = AddName(app);
  auto keep_zeros = Shared(false);
  app.add_flag("--keep_zeros", *keep_zeros,
               "Leave gradients of zero instead of none (set_to_none=False)");
  auto call = AddChangeFlags(app);
  return [=](Session& session) -> absl::StatusOr<Report> {
    const auto changed = session.client.ZeroGrad(*name, !*keep_zeros, *call);
    if (!changed.ok()) return changed.status();
    return ChangeReport(
        absl::StrCat(*name, *keep_zeros ? " has zero gradients" : " has no gradients"), *changed);
  };
}

// The settings of all rules, of which each has some.
struct Settings {
  std::optional<double> lr, momentum, dampening, weight_decay, beta1, beta2, eps;
  bool nesterov = false, amsgrad = false, maximize = false;
};

// Takes a setting where it was given; else the rule's default stays.
void Take(const std::optional<double>& setting, double* to) { *to = setting.value_or(*to); }

absl::StatusOr<Optimizer> SgdOf(const Settings& settings) {
  if (!settings.lr) return UsageError("--optimizer=sgd needs --lr");
  if (settings.beta1 || settings.beta2 || settings.eps || settings.amsgrad) {
    return UsageError("--beta1, --beta2, --eps and --amsgrad are of adam and adamw, not of sgd");
  }
  Sgd sgd;
  Take(settings.lr, &sgd.lr);
  Take(settings.momentum, &sgd.momentum);
  Take(settings.dampening, &sgd.dampening);
  Take(settings.weight_decay, &sgd.weight_decay);
  sgd.nesterov = settings.nesterov;
  sgd.maximize = settings.maximize;
  return sgd;
}

template <class AdamOrAdamW>
absl::StatusOr<Optimizer> AdamOf(const Settings& settings) {
  if (settings.momentum || settings.dampening || settings.nesterov) {
    return UsageError("--momentum, --dampening and --nesterov are of sgd, not of adam and adamw");
  }
  AdamOrAdamW adam;
  Take(settings.lr, &adam.lr);
  Take(settings.beta1, &adam.beta1);
  Take(settings.beta2, &adam.beta2);
  Take(settings.eps, &adam.eps);
  Take(settings.weight_decay, &adam.weight_decay);
  adam.amsgrad = settings.amsgrad;
  adam.maximize = settings.maximize;
  return adam;
}

using Rule = absl::StatusOr<Optimizer> (*)(const Settings&);

Action Step(CLI::App& app) {
  auto name = AddName(app);
  auto rule = Shared<Rule>(nullptr);
  AddChoice<Rule>(
      app, "--optimizer", {{"sgd", SgdOf}, {"adam", AdamOf<Adam>}, {"adamw", AdamOf<AdamW>}},
      "Update rule, as torch.optim has it", [rule](const Rule& value) { *rule = value; })
      ->required();
  auto settings = Shared<Settings>();
  const auto number = [&](const char* flag, std::optional<double>* value, const char* help) {
    app.add_option(flag, *value, help)->type_name("FLOAT");
  };
  number("--lr", &settings->lr, "Learning rate; adam and adamw have 0.001 by default");
  number("--momentum", &settings->momentum, "Of sgd [0]");
  number("--dampening", &settings->dampening, "Of sgd [0]");
  number("--weight_decay", &settings->weight_decay, "[0; adamw: 0.01]");
  number("--beta1", &settings->beta1, "Of adam and adamw [0.9]");
  number("--beta2", &settings->beta2, "Of adam and adamw [0.999]");
  number("--eps", &settings->eps, "Of adam and adamw [1e-8]");
  app.add_flag("--nesterov", settings->nesterov, "Of sgd");
  app.add_flag("--amsgrad", settings->amsgrad, "Of adam and adamw");
  app.add_flag("--maximize", settings->maximize, "Climb instead of descend");
  auto options = Shared<StepOptions>();
  app.add_flag("--reset_optimizer", options->reset_optimizer, "Forget the optimizer's state first");
  app.add_flag("--zero_grad", options->zero_grad, "Drop the gradients afterwards");
  auto call = AddChangeFlags(app);

  return [=](Session& session) -> absl::StatusOr<Report> {
    const absl::StatusOr<Optimizer> optimizer = (*rule)(*settings);
    if (!optimizer.ok()) return optimizer.status();
    const auto result = session.client.Step(*name, *optimizer, *options, *call);
    if (!result.ok()) return result.status();
    Report report = ChangeReport(
        absl::StrCat(*name, result->stepped ? " stepped" : " has no gradients to step with"),
        *result);
    report.json["stepped"] = result->stepped;
    return report;
  };
}

constexpr Command kCommands[] = {
    {"zero-grad", "Drop the accumulated gradients", "zero-grad net/bn1", ZeroGrad},
    {"step", "One optimizer step on weight and bias",
     "step net/bn1 --optimizer=sgd --lr=0.1 --momentum=0.9 --zero_grad", Step},
};

}  // namespace

absl::Span<const Command> LearningCommands() { return kCommands; }

}  // namespace normd::normctl
