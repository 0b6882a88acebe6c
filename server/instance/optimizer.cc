#include "server/instance/optimizer.h"

#include <cmath>

namespace normd {
namespace {

// max() that keeps NaN, as torch.maximum does.
double Maximum(double a, double b) { return std::isnan(a) || a > b ? a : b; }

// torch.optim.SGD (Sutskever et al. 2013, with PyTorch's order of operations: the
// first momentum buffer is the gradient itself, undampened).
void SgdStep(const OptimizerSettings& s, Values& parameter, const Values& gradient,
             OptimizerSlot& slot) {
  const auto direction = [&](int64_t i) {
    return (s.maximize ? -gradient[i] : gradient[i]) + s.weight_decay * parameter[i];
  };
  const DType dtype = parameter.dtype();
  const int64_t size = parameter.size();
  Values buffer = slot.momentum_buffer;
  if (s.momentum != 0) {
    buffer = Values::Map(dtype, size, [&](int64_t i) {
      return slot.momentum_buffer.present()
                 ? s.momentum * slot.momentum_buffer[i] + (1 - s.dampening) * direction(i)
                 : direction(i);
    });
  }
  parameter = Values::Map(dtype, size, [&](int64_t i) {
    const double step = s.momentum == 0 ? direction(i)
                        : s.nesterov    ? direction(i) + s.momentum * buffer[i]
                                        : buffer[i];
    return parameter[i] - s.lr * step;
  });
  slot.momentum_buffer = buffer;
}

// torch.optim.Adam (Kingma and Ba 2015; amsgrad: Reddi et al. 2018) and AdamW
// (Loshchilov and Hutter 2019), which decays the parameter instead of adding to
// the gradient.
void AdamStep(const OptimizerSettings& s, Values& parameter, const Values& gradient,
              OptimizerSlot& slot) {
  const bool decoupled = s.rule == OptimizerRule::kAdamW;
  const DType dtype = parameter.dtype();
  const int64_t size = parameter.size();
  const double decayed = decoupled ? 1 - s.lr * s.weight_decay : 1;
  const auto g = [&](int64_t i) {
    const double value = s.maximize ? -gradient[i] : gradient[i];
    return decoupled ? value : value + s.weight_decay * parameter[i];
  };
  const auto before = [](const Values& values, int64_t i) {
    return values.present() ? values[i] : 0.0;
  };

  slot.step += 1;
  slot.exp_avg = Values::Map(dtype, size, [&, old = slot.exp_avg](int64_t i) {
    return s.beta1 * before(old, i) + (1 - s.beta1) * g(i);
  });
  slot.exp_avg_sq = Values::Map(dtype, size, [&, old = slot.exp_avg_sq](int64_t i) {
    return s.beta2 * before(old, i) + (1 - s.beta2) * g(i) * g(i);
  });
  if (s.amsgrad) {
    slot.max_exp_avg_sq = Values::Map(dtype, size, [&, old = slot.max_exp_avg_sq](int64_t i) {
      return Maximum(before(old, i), slot.exp_avg_sq[i]);
    });
  }

  const double step = static_cast<double>(slot.step);
  const double bias_correction1 = 1 - std::pow(s.beta1, step);
  const double bias_correction2 = 1 - std::pow(s.beta2, step);
  const Values& second_moment = s.amsgrad ? slot.max_exp_avg_sq : slot.exp_avg_sq;
  parameter = Values::Map(dtype, size, [&](int64_t i) {
    const double denominator = std::sqrt(second_moment[i]) / std::sqrt(bias_correction2) + s.eps;
    return parameter[i] * decayed - s.lr / bias_correction1 * slot.exp_avg[i] / denominator;
  });
}

}  // namespace

void Step(const OptimizerSettings& settings, InstanceState& state) {
  auto optimizer = std::make_shared<OptimizerState>();
  if (state.optimizer != nullptr && state.optimizer->rule == settings.rule) {
    *optimizer = *state.optimizer;
  }
  optimizer->rule = settings.rule;
  const auto step = [&](Values& parameter, const Values& gradient, OptimizerSlot& slot) {
    if (!parameter.present() || !gradient.present()) return;
    if (settings.rule == OptimizerRule::kSgd) {
      SgdStep(settings, parameter, gradient, slot);
    } else {
      AdamStep(settings, parameter, gradient, slot);
    }
  };
  step(state.weight, state.grad_weight, optimizer->weight);
  step(state.bias, state.grad_bias, optimizer->bias);
  state.optimizer = std::move(optimizer);
}

}  // namespace normd
