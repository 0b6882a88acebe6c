#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <new>

#include <unistd.h>

#include "kernels/cpu/call.h"
#include "kernels/cpu/kernels.h"

namespace normd {
namespace {

enum class Geometry { kPlanes, kColumns, kRows };

// How the problem's memory is best walked: the only choice that is made.
Geometry GeometryOf(const NormProblem& problem) {
  const bool channels_last = problem.format == MemoryFormat::kChannelsLast && problem.positions > 1;
  if (!channels_last && problem.positions >= cpu::kSmallestPlane) return Geometry::kPlanes;
  if (!channels_last && problem.reduction == Reduction::kPerSampleGroup) return Geometry::kRows;
  return Geometry::kColumns;
}

template <class T>
void Zero(void* data, int64_t count) {
  if (data != nullptr) std::fill_n(static_cast<T*>(data), count, T{0});
}

void ZeroParameter(const NormProblem& problem, void* data) {
  if (problem.parameter_dtype() == DType::kFloat64) {
    Zero<double>(data, problem.channels);
  } else {
    Zero<float>(data, problem.channels);
  }
}

Outcome Forward(const cpu::ForwardCall& call, const cpu::Context& context) {
  if (call.problem.size() == 0) {
    Zero<double>(call.moments.mean, call.problem.num_sets());
    Zero<double>(call.moments.m2, call.problem.num_sets());
    return Outcome::kOk;
  }
  try {
    switch (GeometryOf(call.problem)) {
      case Geometry::kPlanes: return cpu::ForwardByPlanes(call, context);
      case Geometry::kColumns: return cpu::ForwardByColumns(call, context);
      case Geometry::kRows: return cpu::ForwardByRows(call, context);
    }
  } catch (const std::bad_alloc&) {
  }
  return Outcome::kOutOfMemory;
}

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(Executor& executor) : executor_(executor) {}

  std::string_view name() const override { return "cpu"; }

  std::vector<DeviceInfo> devices() const override {
    const int64_t memory = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
    return {{.name = std::string("cpu ") + cpu::InstructionSet(),
             .parallelism = executor_.concurrency(),
             .memory_bytes = memory}};
  }

  bool Supports(Place place) const override { return place == Place::kHost; }

  Outcome ForwardByBatch(const NormProblem& problem, const ForwardByBatchArgs& args, Place,
                         std::stop_token stop) override {
    return Forward({problem, args.x, args.y, args.affine, args.epilogue, args.moments, {}},
                   {executor_, std::move(stop)});
  }

  Outcome ForwardByStatistics(const NormProblem& problem, const ForwardByStatisticsArgs& args,
                              Place, std::stop_token stop) override {
    return Forward({problem, args.x, args.y, args.affine, args.epilogue, {}, args.statistics},
                   {executor_, std::move(stop)});
  }

  Outcome ForwardRange(const NormProblem& problem, const ForwardRangeArgs& args, Place,
                       std::stop_token stop) override {
    if (args.count == 0) return Outcome::kOk;
    const cpu::RangeCall call{problem, args};
    const cpu::Context context{executor_, std::move(stop)};
    try {
      switch (GeometryOf(problem)) {
        case Geometry::kPlanes: return cpu::RangeByPlanes(call, context);
        case Geometry::kColumns: return cpu::RangeByColumns(call, context);
        case Geometry::kRows: return cpu::RangeByRows(call, context);
      }
    } catch (const std::bad_alloc&) {
    }
    return Outcome::kOutOfMemory;
  }

  Outcome Backward(const NormProblem& problem, const BackwardArgs& args, Place,
                   std::stop_token stop) override {
    if (problem.size() == 0) {
      ZeroParameter(problem, args.grad_weight);
      ZeroParameter(problem, args.grad_bias);
      return Outcome::kOk;
    }
    const cpu::BackwardCall call{problem, args};
    const cpu::Context context{executor_, std::move(stop)};
    try {
      switch (GeometryOf(problem)) {
        case Geometry::kPlanes: return cpu::BackwardByPlanes(call, context);
        case Geometry::kColumns: return cpu::BackwardByColumns(call, context);
        case Geometry::kRows: return cpu::BackwardByRows(call, context);
      }
    } catch (const std::bad_alloc&) {
    }
    return Outcome::kOutOfMemory;
  }

 private:
  Executor& executor_;
};

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(Executor& executor, const CpuOptions&) {
  return std::make_unique<CpuBackend>(executor);
}

}  // namespace normd
