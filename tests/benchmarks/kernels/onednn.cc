// oneDNN (2.x) on the same problem, with memory of its own.
#include <unordered_map>
#include <vector>

#include <dnnl.hpp>
#include <omp.h>

#include "kernels/dtype.h"
#include "tests/benchmarks/kernels/contender.h"

namespace {

using dnnl::memory;

const dnnl::engine& Engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

class OneDnn final : public Contender {
 public:
  OneDnn(const BenchCase& bench, bool blocked) : threads_(bench.threads), stream_(Engine()) {
    omp_set_num_threads(threads_);
    const auto type = static_cast<normd::DType>(bench.dtype) == normd::DType::kBFloat16
                          ? memory::data_type::bf16
                          : memory::data_type::f32;
    if (bench.layer == kLayerNorm) {
      LayerNorm(bench, type);
    } else {
      BatchNorm(bench, type, blocked);
    }
  }

  void Run() override {
    omp_set_num_threads(threads_);
    primitive_.execute(stream_, arguments_);
    stream_.wait();
  }

 private:
  void BatchNorm(const BenchCase& bench, memory::data_type type, bool blocked) {
    const auto tag = blocked                    ? memory::format_tag::nChw16c
                     : bench.channels_last != 0 ? memory::format_tag::nhwc
                                                : memory::format_tag::nchw;
    const memory::desc data({bench.batch, bench.channels, bench.height, bench.width}, type, tag);
    const memory::desc scale_shift({2, bench.channels}, memory::data_type::f32,
                                   memory::format_tag::nc);
    using dnnl::normalization_flags;
    auto flags = normalization_flags::use_scale_shift;
    if (bench.operation == kEval) flags |= normalization_flags::use_global_stats;
    const auto kind = bench.operation == kEval ? dnnl::prop_kind::forward_inference
                                               : dnnl::prop_kind::forward_training;
    const dnnl::batch_normalization_forward::primitive_desc forward({kind, data, 1e-5f, flags},
                                                                    Engine());
    Add(DNNL_ARG_SRC, data);
    Add(DNNL_ARG_MEAN, forward.mean_desc());
    Add(DNNL_ARG_VARIANCE, forward.variance_desc(), 1);
    Add(DNNL_ARG_SCALE_SHIFT, scale_shift, 1);
    if (bench.operation == kBackward) {
      const dnnl::batch_normalization_backward::primitive_desc backward(
          {dnnl::prop_kind::backward, data, data, 1e-5f, flags}, Engine(), forward);
      Add(DNNL_ARG_DIFF_DST, data);
      Add(DNNL_ARG_DIFF_SRC, data);
      Add(DNNL_ARG_DIFF_SCALE_SHIFT, scale_shift);
      primitive_ = dnnl::batch_normalization_backward(backward);
    } else {
      Add(DNNL_ARG_DST, data);
      primitive_ = dnnl::batch_normalization_forward(forward);
    }
  }

  void LayerNorm(const BenchCase& bench, memory::data_type type) {
    const memory::desc data({bench.batch, bench.channels}, type, memory::format_tag::ab);
    const memory::desc statistics({bench.batch}, memory::data_type::f32, memory::format_tag::a);
    const memory::desc scale_shift({2, bench.channels}, memory::data_type::f32,
                                   memory::format_tag::nc);
    const auto flags = dnnl::normalization_flags::use_scale_shift;
    const dnnl::layer_normalization_forward::primitive_desc forward(
        {dnnl::prop_kind::forward_training, data, statistics, 1e-5f, flags}, Engine());
    Add(DNNL_ARG_SRC, data);
    Add(DNNL_ARG_MEAN, statistics);
    Add(DNNL_ARG_VARIANCE, statistics, 1);
    Add(DNNL_ARG_SCALE_SHIFT, scale_shift, 1);
    if (bench.operation == kBackward) {
      const dnnl::layer_normalization_backward::primitive_desc backward(
          {dnnl::prop_kind::backward, data, data, statistics, 1e-5f, flags}, Engine(), forward);
      Add(DNNL_ARG_DIFF_DST, data);
      Add(DNNL_ARG_DIFF_SRC, data);
      Add(DNNL_ARG_DIFF_SCALE_SHIFT, scale_shift);
      primitive_ = dnnl::layer_normalization_backward(backward);
    } else {
      Add(DNNL_ARG_DST, data);
      primitive_ = dnnl::layer_normalization_forward(forward);
    }
  }

  void Add(int argument, const memory::desc& description, double mean = 0) {
    const memory value(description, Engine());
    const bool half = description.data_type() == memory::data_type::bf16;
    const int64_t width = half ? 2 : 4;
    bench_fill(value.get_data_handle(),
               static_cast<int32_t>(half ? normd::DType::kBFloat16 : normd::DType::kFloat32),
               static_cast<int64_t>(description.get_size()) / width, mean, 7);
    if (mean != 0) {  // variance and scale: constant, not random
      for (size_t i = 0; i < description.get_size() / 4; ++i) {
        static_cast<float*>(value.get_data_handle())[i] = 1;
      }
    }
    arguments_.insert({argument, value});
  }

  int threads_;
  dnnl::stream stream_;
  dnnl::primitive primitive_;
  std::unordered_map<int, memory> arguments_;
};

}  // namespace

extern "C" Contender* bench_onednn(const BenchCase* bench, int32_t blocked) {
  const auto dtype = static_cast<normd::DType>(bench->dtype);
  const bool batch_norm = bench->layer == kBatchNorm;
  if (bench->fused || (!batch_norm && bench->layer != kLayerNorm)) return nullptr;
  if (blocked && (!batch_norm || bench->channels % 16 != 0)) return nullptr;
  if (dtype != normd::DType::kFloat32 && dtype != normd::DType::kBFloat16) return nullptr;
  try {
    return new OneDnn(*bench, blocked != 0);
  } catch (const dnnl::error&) {
    return nullptr;  // not implemented
  }
}
