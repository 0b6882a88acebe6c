#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <new>

#include "kernels/reference.h"

namespace normd {
namespace {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(Executor& executor) : executor_(executor) {}

  std::string_view name() const override { return "cpu"; }
  std::vector<DeviceInfo> devices() const override {
    return {{.name = "cpu", .parallelism = executor_.concurrency()}};
  }
  bool Supports(Place place) const override { return place == Place::kHost; }

  Outcome ForwardByBatch(const NormProblem& problem, const ForwardByBatchArgs& args, Place,
                         std::stop_token) override {
    const auto x = reference::Load(problem.dtype, args.x, problem.size());
    const auto moments = reference::MomentsOf(problem, x);
    std::ranges::copy(moments.mean, args.moments.mean);
    std::ranges::copy(moments.m2, args.moments.m2);
    Forward(problem, x, args.affine, moments.mean, reference::VarianceOf(problem, moments.m2),
            args.epilogue, args.y);
    return Outcome::kOk;
  }

  Outcome ForwardByStatistics(const NormProblem& problem, const ForwardByStatisticsArgs& args,
                              Place, std::stop_token) override {
    const int64_t sets = problem.num_sets();
    Forward(problem, reference::Load(problem.dtype, args.x, problem.size()), args.affine,
            reference::Values(args.statistics.mean, args.statistics.mean + sets),
            reference::Values(args.statistics.var, args.statistics.var + sets), args.epilogue,
            args.y);
    return Outcome::kOk;
  }

  Outcome Backward(const NormProblem& problem, const BackwardArgs& args, Place,
                   std::stop_token) override {
    const int64_t sets = problem.num_sets();
    std::vector<bool> mask;
    for (int64_t i = 0; args.relu_mask != nullptr && i < problem.size(); ++i) {
      mask.push_back((args.relu_mask[i / 8] >> (i % 8) & 1) != 0);
    }
    const auto result = reference::Backward(
        problem, reference::Load(problem.dtype, args.x, problem.size()),
        reference::Load(problem.dtype, args.grad_y, problem.size()), Channels(problem, args.weight),
        reference::Values(args.statistics.mean, args.statistics.mean + sets),
        reference::Values(args.statistics.var, args.statistics.var + sets),
        args.statistics_of_batch, mask);
    const DType parameter = problem.parameter_dtype();
    if (args.grad_x) reference::Store(problem.dtype, result.grad_x, args.grad_x);
    if (args.grad_residual) {
      reference::Store(problem.dtype, result.grad_residual, args.grad_residual);
    }
    if (args.grad_weight) reference::Store(parameter, result.grad_weight, args.grad_weight);
    if (args.grad_bias) reference::Store(parameter, result.grad_bias, args.grad_bias);
    return Outcome::kOk;
  }

 private:
  static reference::Values Channels(const NormProblem& problem, const void* data) {
    if (data == nullptr) return {};
    return reference::Load(problem.parameter_dtype(), data, problem.channels);
  }

  static void Forward(const NormProblem& problem, const reference::Values& x, const Affine& affine,
                      const reference::Values& mean, const reference::Values& var,
                      const Epilogue& epilogue, void* y) {
    reference::Values residual;
    if (epilogue.residual) {
      residual = reference::Load(problem.dtype, epilogue.residual, problem.size());
    }
    const auto result = reference::Forward(
        problem, x, {Channels(problem, affine.weight), Channels(problem, affine.bias)}, mean, var,
        residual, epilogue.activation);
    for (size_t i = 0; epilogue.relu_mask != nullptr && i < result.relu_mask.size(); ++i) {
      if (i % 8 == 0) epilogue.relu_mask[i / 8] = 0;
      epilogue.relu_mask[i / 8] |= static_cast<uint8_t>(result.relu_mask[i] << (i % 8));
    }
    reference::Store(problem.dtype, result.y, y);
  }

  Executor& executor_;
};

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(Executor& executor, const CpuOptions&) {
  return std::make_unique<CpuBackend>(executor);
}

}  // namespace normd
