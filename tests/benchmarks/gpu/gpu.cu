// The kernels on this machine's first GPU, beside copies of the same bytes.
//
//   normd_bench_gpu [--quick] [--json FILE] [--filter PART,...]
//
// Rows on the device: medians over rounds in which ours and the floor take turns. The
// floor is a device-to-device copy of one tensor, times the tensors that the kernels
// are to read and write over the two that the copy does:
//   eval            2   x -> y
//   train_forward   3   x, x -> y; rows 2: x -> y
//   backward        5   x, dy, x, dy -> dx; rows 3: x, dy -> dx
//   fused           one more for the residual
// so that a ratio above 1 is a pass saved. Rows host/...: from host memory to host
// memory through the backend, beside pinned copies of the same bytes there and back.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/half.h"

namespace normd {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
void Check(Outcome outcome, const char* what) {
  if (outcome == Outcome::kOk) return;
  std::fprintf(stderr, "%s: outcome %d\n", what, static_cast<int>(outcome));
  std::exit(1);
}

enum class Operation { kEval, kTrainForward, kBackward };
constexpr const char* kOperations[] = {"eval", "train_forward", "backward"};

struct Case {
  std::string name;  // as in the kernels' suite
  Operation operation;
  NormProblem problem;
  bool fused = false;

  bool rows() const { return problem.reduction == Reduction::kPerSampleGroup; }
  double tensors() const {
    const double plain = operation == Operation::kEval           ? 2
                         : operation == Operation::kTrainForward ? (rows() ? 2 : 3)
                                                                 : (rows() ? 3 : 5);
    return plain + (fused ? 1 : 0);
  }
};

const char* ShortName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "f32";
    case DType::kFloat64: return "f64";
    case DType::kFloat16: return "f16";
    case DType::kBFloat16: return "bf16";
  }
  return "?";
}

std::vector<Case> Cases(bool quick) {
  struct Shape {
    int64_t n, c, h, w;
  };
  const std::vector<Shape> batch_norm =
      quick ? std::vector<Shape>{{32, 512, 28, 28}, {32, 2048, 7, 7}, {8, 16, 32, 32}}
            : std::vector<Shape>{{32, 64, 112, 112}, {32, 256, 56, 56}, {32, 512, 28, 28},
                                 {32, 1024, 14, 14}, {32, 2048, 7, 7},  {256, 64, 112, 112},
                                 {1, 64, 56, 56},    {8, 16, 32, 32},   {64, 3, 224, 224}};
  const std::vector<Shape> rows = {{8192, 768, 1, 1}, {4096, 4096, 1, 1}, {64, 16384, 1, 1}};
  std::vector<Case> cases;
  const auto add = [&](const char* layer, Operation operation, MemoryFormat format, DType dtype,
                       const Shape& s, bool fused) {
    Case c{.operation = operation,
           .problem = {.batch = s.n,
                       .channels = s.c,
                       .positions = s.h * s.w,
                       .format = format,
                       .dtype = dtype},
           .fused = fused};
    const bool is_row = std::string(layer).find("_norm/") != std::string::npos;
    std::string shape = std::to_string(s.n) + "x" + std::to_string(s.c);
    if (is_row) {
      c.problem.reduction = Reduction::kPerSampleGroup;
      c.problem.center = std::string(layer) != "rms_norm/";
    } else {
      shape += "x" + std::to_string(s.h) + "x" + std::to_string(s.w);
    }
    c.name = std::string(layer) + (fused ? "add_relu/" : "") +
             kOperations[static_cast<int>(operation)] +
             (format == MemoryFormat::kContiguous ? "/nchw/" : "/nhwc/") + ShortName(dtype) + "/" +
             shape;
    cases.push_back(c);
  };
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const Operation operation :
         {Operation::kEval, Operation::kTrainForward, Operation::kBackward}) {
      for (const auto format : {MemoryFormat::kContiguous, MemoryFormat::kChannelsLast}) {
        for (const Shape& s : batch_norm) add("", operation, format, dtype, s, false);
        if (!quick && operation != Operation::kEval && dtype != DType::kFloat16) {
          add("", operation, format, dtype, {32, 256, 56, 56}, true);
        }
      }
      if (operation == Operation::kEval || dtype == DType::kFloat16) continue;
      for (const char* layer : {"layer_norm/", "rms_norm/"}) {
        for (size_t i = 0; i < (quick ? 1 : rows.size()); ++i) {
          add(layer, operation, MemoryFormat::kContiguous, dtype, rows[i], false);
        }
      }
    }
  }
  return cases;
}

// Normal-like values of any type, the same few over and over.
std::vector<std::byte> Values(DType dtype, int64_t count) {
  const auto width = static_cast<int64_t>(SizeOf(dtype));
  constexpr int64_t kPeriod = (1 << 16) + 1;
  std::vector<std::byte> bytes(static_cast<size_t>(count * width));
  uint64_t state = 1;
  for (int64_t i = 0; i < std::min(count, kPeriod); ++i) {
    double sum = 0.25;
    for (int k = 0; k < 4; ++k) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<double>(state >> 40) / (1 << 24) - 0.5;
    }
    const auto single = static_cast<float>(sum);
    std::byte* const at = bytes.data() + i * width;
    if (dtype == DType::kFloat64) std::memcpy(at, &sum, 8);
    if (dtype == DType::kFloat32) std::memcpy(at, &single, 4);
    if (dtype == DType::kFloat16) {
      const Float16 half = ToFloat16(single);
      std::memcpy(at, &half, 2);
    }
    if (dtype == DType::kBFloat16) {
      const BFloat16 half = ToBFloat16(single);
      std::memcpy(at, &half, 2);
    }
  }
  for (int64_t done = kPeriod; done < count; done += kPeriod) {
    std::memcpy(bytes.data() + done * width, bytes.data(),
                static_cast<size_t>(std::min(kPeriod, count - done) * width));
  }
  return bytes;
}

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) { Check(cudaMalloc(&memory_, bytes + 256), "cudaMalloc"); }
  ~DeviceMemory() { (void)cudaFree(memory_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  template <class T = void>
  T* get() const {
    return static_cast<T*>(memory_);
  }
  void Fill(const void* from, size_t bytes) const {
    Check(cudaMemcpy(memory_, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }

 private:
  void* memory_ = nullptr;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double Seconds(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

struct Row {
  std::string name;
  double ours_ms, floor_ms, ratio;
  double bytes;
};

// Ours and the floor by turns: `run(n)` runs n times and waits.
Row Measure(const std::string& name, double bytes, double floor_times, int rounds,
            const std::function<void(int)>& ours, const std::function<void(int)>& floor) {
  const auto count_for = [](const std::function<void(int)>& run) {
    run(3);
    const double once = Seconds([&] { run(3); }) / 3;
    return std::clamp(static_cast<int>(0.02 / once), 3, 2000);
  };
  const int ours_count = count_for(ours), floor_count = count_for(floor);
  std::vector<double> ours_ms, floor_ms, ratios;
  for (int round = 0; round < rounds; ++round) {
    ours_ms.push_back(Seconds([&] { ours(ours_count); }) * 1e3 / ours_count);
    floor_ms.push_back(Seconds([&] { floor(floor_count); }) * 1e3 / floor_count * floor_times);
    ratios.push_back(floor_ms.back() / ours_ms.back());
  }
  return {name, Median(ours_ms), Median(floor_ms), Median(ratios), bytes};
}

Row MeasureOnDevice(const Case& c, cuda::Device& device, int rounds) {
  const NormProblem& problem = c.problem;
  const size_t bytes = static_cast<size_t>(problem.size()) * SizeOf(problem.dtype);
  const auto channels = static_cast<size_t>(problem.channels);
  const auto sets = static_cast<size_t>(problem.num_sets());
  const DeviceMemory x(bytes), y(bytes), second(bytes), third(c.fused ? bytes : 0);
  const DeviceMemory mask(static_cast<size_t>(ReluMaskBytes(problem.size())));
  const DeviceMemory weight(channels * 8), bias(channels * 8), grad_weight(channels * 8),
      grad_bias(channels * 8), mean(sets * 8), var(sets * 8);
  const auto values = Values(problem.dtype, problem.size());
  x.Fill(values.data(), bytes);
  second.Fill(values.data(), bytes);
  const std::vector<double> zeros(sets), ones(std::max(sets, channels), 1);
  const auto parameters = Values(problem.parameter_dtype(), problem.channels);
  weight.Fill(parameters.data(), parameters.size());
  bias.Fill(parameters.data(), parameters.size());
  mean.Fill(zeros.data(), sets * 8);
  var.Fill(ones.data(), sets * 8);

  const std::unique_ptr<cuda::Stream> stream = device.NewStream();
  if (stream == nullptr) Check(Outcome::kDeviceFailed, "NewStream");
  cuda::ForwardWork forward{.problem = problem,
                            .count = problem.size(),
                            .x = x.get(),
                            .y = y.get(),
                            .weight = weight.get(),
                            .bias = bias.get()};
  if (c.operation == Operation::kEval) {
    forward.statistics = {mean.get<double>(), var.get<double>()};
  } else {
    forward.moments = {mean.get<double>(), var.get<double>()};
  }
  if (c.fused) forward.epilogue = {second.get(), Activation::kRelu, mask.get<uint8_t>()};
  cuda::BackwardWork backward{.problem = problem,
                              .args = {.x = x.get(),
                                       .grad_y = second.get(),
                                       .grad_x = y.get(),
                                       .weight = weight.get(),
                                       .statistics = {mean.get<double>(), var.get<double>()},
                                       .grad_weight = grad_weight.get(),
                                       .grad_bias = grad_bias.get()}};
  if (c.fused) {
    Check(cudaMemset(mask.get(), 0x5a, static_cast<size_t>(ReluMaskBytes(problem.size()))),
          "cudaMemset");
    backward.args.relu_mask = mask.get<uint8_t>();
    backward.args.grad_residual = third.get();
  }
  const bool is_backward = c.operation == Operation::kBackward;
  const DeviceMemory scratch(is_backward ? device.ScratchBytes(backward)
                                         : device.ScratchBytes(forward));
  forward.scratch = backward.scratch = scratch.get();
  const auto ours = [&](int count) {
    for (int i = 0; i < count; ++i) {
      Check(is_backward ? stream->Backward(backward) : stream->Forward(forward), "launch");
    }
    Check(stream->Wait(), "wait");
  };
  const auto floor = [&](int count) {
    for (int i = 0; i < count; ++i) {
      Check(cudaMemcpyAsync(y.get(), x.get(), bytes, cudaMemcpyDeviceToDevice), "copy");
    }
    Check(cudaDeviceSynchronize(), "copy");
  };
  return Measure(c.name, c.tensors() * static_cast<double>(bytes), c.tensors() / 2, rounds, ours,
                 floor);
}

Row MeasureFromHost(Backend& backend, int64_t batch, int rounds) {
  const NormProblem problem{.batch = batch, .channels = 256, .positions = 56 * 56};
  const size_t bytes = static_cast<size_t>(problem.size()) * 4;
  const auto x = Values(problem.dtype, problem.size());
  std::vector<std::byte> y(bytes);
  const std::vector<double> mean(256, 0), var(256, 1);
  const auto ours = [&](int count) {
    for (int i = 0; i < count; ++i) {
      Check(backend.ForwardByStatistics(
                problem, {.x = x.data(), .y = y.data(), .statistics = {mean.data(), var.data()}},
                Place::kHost, {}),
            "ForwardByStatistics");
    }
  };
  const DeviceMemory device(bytes);
  void* pinned = nullptr;
  Check(cudaMallocHost(&pinned, bytes), "cudaMallocHost");
  const auto floor = [&](int count) {
    for (int i = 0; i < count; ++i) {
      Check(cudaMemcpyAsync(device.get(), pinned, bytes, cudaMemcpyHostToDevice), "copy");
      Check(cudaMemcpyAsync(pinned, device.get(), bytes, cudaMemcpyDeviceToHost), "copy");
      Check(cudaDeviceSynchronize(), "copy");
    }
  };
  const Row row = Measure("host/eval/nchw/f32/" + std::to_string(batch) + "x256x56x56",
                          2.0 * static_cast<double>(bytes), 1, rounds, ours, floor);
  Check(cudaFreeHost(pinned), "cudaFreeHost");
  return row;
}

// Whether a name contains one of the parts, or there are none.
bool IsWanted(const std::string& name, const std::vector<std::string>& parts) {
  return parts.empty() || std::any_of(parts.begin(), parts.end(), [&](const std::string& part) {
           return name.find(part) != std::string::npos;
         });
}

std::vector<std::string> Parts(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream stream(list);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

int Main(int argc, char** argv) {
  bool quick = false;
  const char* json = nullptr;
  std::vector<std::string> filter;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0) {
      quick = true;
    } else if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
      json = argv[++i];
    } else if (std::strcmp(argv[i], "--filter") == 0 && i + 1 < argc) {
      filter = Parts(argv[++i]);
    } else {
      std::fprintf(stderr, "usage: normd_bench_gpu [--quick] [--json FILE] [--filter PART,...]\n");
      return 2;
    }
  }
  std::string why;
  const auto devices = cuda::OpenDevices({0}, &why);
  if (devices.empty()) {
    std::fprintf(stderr, "nothing is measured: %s\n", why.c_str());
    return 1;
  }
  Check(cudaSetDevice(0), "cudaSetDevice");
  std::printf("%s\n%-52s %9s %9s %7s %9s\n", devices[0]->info().name.c_str(), "case", "ours ms",
              "floor ms", "ratio", "GB/s");
  std::vector<Row> rows;
  const int rounds = quick ? 5 : 9;
  const auto report = [&](const Row& row) {
    std::printf("%-52s %9.4f %9.4f %7.2f %9.0f\n", row.name.c_str(), row.ours_ms, row.floor_ms,
                row.ratio, row.bytes / row.ours_ms * 1e-6);
    std::fflush(stdout);
    rows.push_back(row);
  };
  for (const Case& c : Cases(quick)) {
    if (IsWanted(c.name, filter)) report(MeasureOnDevice(c, *devices[0], rounds));
  }
  const auto backend = MakeCudaBackend({.devices = {0}}, &why);
  for (const int64_t batch : quick ? std::vector<int64_t>{8} : std::vector<int64_t>{1, 8, 32}) {
    if (IsWanted("host", filter)) report(MeasureFromHost(*backend, batch, rounds));
  }
  if (json == nullptr) return 0;
  std::FILE* const file = std::fopen(json, "w");
  if (file == nullptr) {
    std::fprintf(stderr, "cannot write %s\n", json);
    return 1;
  }
  std::fprintf(file, "[\n");
  for (size_t i = 0; i < rows.size(); ++i) {
    std::fprintf(file,
                 " {\"suite\": \"gpu\", \"case\": \"%s\", \"ours_ms\": %.5f, \"floor_ms\": %.5f, "
                 "\"peers\": {}, \"floor_ratio\": %.4f, \"peer_ratio\": null, \"bytes\": %.0f, "
                 "\"device\": \"%s\"}%s\n",
                 rows[i].name.c_str(), rows[i].ours_ms, rows[i].floor_ms, rows[i].ratio,
                 rows[i].bytes, devices[0]->info().name.c_str(), i + 1 < rows.size() ? "," : "");
  }
  std::fprintf(file, "]\n");
  return std::fclose(file) == 0 ? 0 : 1;
}

}  // namespace
}  // namespace normd

int main(int argc, char** argv) { return normd::Main(argc, argv); }
