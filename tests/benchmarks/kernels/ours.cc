#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/kernels.h"
#include "kernels/thread_pool.h"
#include "tests/benchmarks/kernels/contender.h"

namespace normd {
namespace {

NormProblem ProblemOf(const BenchCase& bench) {
  NormProblem problem{.batch = bench.batch,
                      .channels = bench.channels,
                      .positions = bench.height * bench.width,
                      .dtype = static_cast<DType>(bench.dtype)};
  if (bench.channels_last != 0) problem.format = MemoryFormat::kChannelsLast;
  if (bench.layer != kBatchNorm) {
    problem.reduction = Reduction::kPerSampleGroup;
    problem.groups = bench.groups;
    problem.center = bench.layer != kRmsNorm;
  }
  return problem;
}

class Ours final : public Contender {
 public:
  explicit Ours(const BenchCase& bench)
      : bench_(bench),
        problem_(ProblemOf(bench)),
        executor_(bench.threads),
        backend_(MakeCpuBackend(executor_, {})),
        weight_(static_cast<size_t>(problem_.channels), 1.25),
        bias_(weight_.size(), 0.5),
        grad_weight_(weight_.size()),
        grad_bias_(weight_.size()),
        weight_float_(weight_.begin(), weight_.end()),
        bias_float_(bias_.begin(), bias_.end()),
        mean_(static_cast<size_t>(problem_.num_sets())),
        var_(mean_.size(), 1),
        mask_(bench.fused ? static_cast<size_t>(ReluMaskBytes(problem_.size())) : 0, 0x5a) {}

  void Run() override {
    const bool is_double = problem_.dtype == DType::kFloat64;
    const void* weight =
        is_double ? static_cast<const void*>(weight_.data()) : weight_float_.data();
    const void* bias = is_double ? static_cast<const void*>(bias_.data()) : bias_float_.data();
    const bool biased = bench_.layer != kRmsNorm;
    if (!biased) bias = nullptr;
    const Epilogue epilogue = bench_.fused
                                  ? Epilogue{bench_.residual, Activation::kRelu,
                                             bench_.operation == kEval ? nullptr : mask_.data()}
                                  : Epilogue{};
    switch (bench_.operation) {
      case kEval:
        backend_->ForwardByStatistics(problem_,
                                      {.x = bench_.x,
                                       .y = bench_.y,
                                       .affine = {weight, bias},
                                       .statistics = {mean_.data(), var_.data()},
                                       .epilogue = epilogue},
                                      Place::kHost, {});
        break;
      case kTrainForward:
        backend_->ForwardByBatch(problem_,
                                 {.x = bench_.x,
                                  .y = bench_.y,
                                  .affine = {weight, bias},
                                  .moments = {mean_.data(), var_.data()},
                                  .epilogue = epilogue},
                                 Place::kHost, {});
        break;
      case kBackward:
        backend_->Backward(problem_,
                           {.x = bench_.x,
                            .grad_y = bench_.grad_y,
                            .grad_x = bench_.y,
                            .weight = weight,
                            .statistics = {mean_.data(), var_.data()},
                            .grad_weight = grad_weight_.data(),
                            .grad_bias = biased ? grad_bias_.data() : nullptr,
                            .relu_mask = bench_.fused ? mask_.data() : nullptr,
                            .grad_residual = bench_.fused ? bench_.residual : nullptr},
                           Place::kHost, {});
        break;
    }
  }

 private:
  const BenchCase bench_;
  const NormProblem problem_;
  ThreadPool executor_;
  std::unique_ptr<Backend> backend_;
  std::vector<double> weight_, bias_, grad_weight_, grad_bias_;
  std::vector<float> weight_float_, bias_float_;
  std::vector<double> mean_, var_;
  std::vector<uint8_t> mask_;
};

}  // namespace
}  // namespace normd

extern "C" {
Contender* bench_ours(const BenchCase* bench) { return new normd::Ours(*bench); }
const char* bench_instruction_set() { return normd::cpu::InstructionSet(); }
}
