// bench.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/internal/request_id.h"
#include "client/normctl/command.h"
#include "client/normctl/flags.h"
#include "client/normctl/float_types.h"
#include "client/normctl/output.h"
#include "client/normctl/usage_error.h"

namespace normd::normctl {
namespace {

struct Workload {
  std::string name;
  bool backward = false;
  std::vector<int64_t> shape = {8, 64, 56, 56};
  DataType dtype = DataType::kFloat32;
  MemoryFormat format = MemoryFormat::kContiguous;
  std::optional<Mode> mode;
  int concurrency = 1;
  absl::Duration duration = absl::Seconds(10);
};

// Values as activations have them; which ones does not matter.
absl::StatusOr<Tensor> RandomTensor(const Workload& work, uint64_t seed) {
  // Past this a benchmark's own memory is the thing measured.
  constexpr int64_t kMaxCount = (int64_t{4} << 30) / sizeof(float);
  int64_t count = 1;
  for (const int64_t size : work.shape) {
    if (size < 0 || (size > 0 && count > kMaxCount / size)) {
      return UsageError("--shape: sizes are 0 or more, and their product at most 2^30");
    }
    count *= size;
  }
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  // A period of odd length costs less than fresh values and looks as random.
  std::vector<float> period(4099);
  for (float& value : period) value = normal(random);
  std::string bytes(count * sizeof(float), '\0');
  auto* values = reinterpret_cast<float*>(bytes.data());
  for (int64_t i = 0; i < count; ++i) values[i] = period[i % period.size()];
  return ConvertTo(work.dtype,
                   Tensor::Own(DataType::kFloat32, work.shape, std::move(bytes), work.format));
}

// One of `concurrency` callers, each with its own tensor and, for backward, its
// own context.
class Caller {
 public:
  Caller(const Client& client, const Workload& work, Tensor tensor)
      : client_(client), work_(work), tensor_(std::move(tensor)) {}

  // A call outside the measurement: connections are made and memory is touched.
  absl::Status WarmUp() {
    if (!work_.backward) return CallOnce();
    const auto forward =
        client_.Forward(work_.name, tensor_, {.mode = work_.mode, .save_for_backward = true});
    if (!forward.ok()) return forward.status();
    context_id_ = forward->context_id;
    return CallOnce();
  }

  absl::Status CallOnce() {
    if (!work_.backward) {
      return client_.Forward(work_.name, tensor_, {.mode = work_.mode}).status();
    }
    return client_
        .Backward(work_.name, tensor_, {.context_id = context_id_, .retain_context = true})
        .status();
  }

  // Calls until `end` or `stop`; the times are milliseconds.
  absl::Status Run(absl::Time end, const std::atomic<bool>& stop,
                   std::atomic<int64_t>* total_calls) {
    for (absl::Time now = absl::Now(); now < end && !stop;) {
      absl::Status status = CallOnce();
      if (!status.ok()) return status;
      const absl::Time done = absl::Now();
      latencies_ms_.push_back(absl::ToDoubleMilliseconds(done - now));
      now = done;
      total_calls->fetch_add(1, std::memory_order_relaxed);
    }
    return absl::OkStatus();
  }

  // Uses the context up, so that the server may drop it when it needs the room.
  void Release() {
    if (context_id_.empty()) return;
    client_.Backward(work_.name, tensor_, {.context_id = context_id_}).status().IgnoreError();
  }

  const std::vector<double>& latencies_ms() const { return latencies_ms_; }

 private:
  const Client& client_;
  const Workload& work_;
  const Tensor tensor_;
  std::string context_id_;
  std::vector<double> latencies_ms_;
};

struct Measurement {
  std::vector<double> latencies_ms;  // sorted
  absl::Duration elapsed;
  int64_t payload_bytes = 0;  // of the tensor that goes one way

  // The smallest latency that at least `share` of the calls did not exceed.
  double Percentile(double share) const {
    const auto rank = static_cast<size_t>(std::ceil(share * latencies_ms.size()));
    return latencies_ms[std::clamp<size_t>(rank, 1, latencies_ms.size()) - 1];
  }
};

absl::StatusOr<Measurement> Measure(const Client& client, const Workload& work,
                                    Progress& progress) {
  std::vector<Caller> callers;
  Measurement result;
  for (int i = 0; i < work.concurrency; ++i) {
    auto tensor = RandomTensor(work, i);
    if (!tensor.ok()) return tensor.status();
    result.payload_bytes = static_cast<int64_t>(tensor->bytes().size());
    callers.emplace_back(client, work, *std::move(tensor));
  }
  const auto release = absl::MakeCleanup([&] {
    for (Caller& caller : callers) caller.Release();
  });
  for (Caller& caller : callers) {
    absl::Status status = caller.WarmUp();
    if (!status.ok()) return status;
  }

  std::atomic<bool> stop = false;
  std::atomic<int64_t> calls = 0;
  std::atomic<int> running = work.concurrency;
  absl::Mutex mutex;
  absl::Status failure;
  const absl::Time begin = absl::Now();
  const absl::Time end = begin + work.duration;
  std::vector<std::thread> threads;
  for (Caller& caller : callers) {
    threads.emplace_back([&] {
      absl::Status status = caller.Run(end, stop, &calls);
      if (!status.ok()) {
        absl::MutexLock lock(&mutex);
        failure.Update(status);
        stop = true;
      }
      --running;
    });
  }
  while (running > 0) {
    const absl::Duration left = std::max(absl::ZeroDuration(), end - absl::Now());
    progress.Show(absl::StrCat(absl::FormatDuration(absl::Ceil(left, absl::Seconds(1))), " left, ",
                               calls.load(), " calls"));
    absl::SleepFor(absl::Milliseconds(20));
  }
  for (std::thread& thread : threads) thread.join();
  result.elapsed = absl::Now() - begin;
  progress.Clear();
  if (!failure.ok()) return failure;

  for (const Caller& caller : callers) {
    result.latencies_ms.insert(result.latencies_ms.end(), caller.latencies_ms().begin(),
                               caller.latencies_ms().end());
  }
  std::sort(result.latencies_ms.begin(), result.latencies_ms.end());
  return result;
}

Report ReportOf(const Workload& work, const Measurement& measured) {
  const double seconds = absl::ToDoubleSeconds(measured.elapsed);
  const auto count = static_cast<double>(measured.latencies_ms.size());
  double sum = 0;
  for (const double latency : measured.latencies_ms) sum += latency;
  const double rate = count / seconds;
  const double bytes_per_s = rate * static_cast<double>(measured.payload_bytes);
  const char* op = work.backward ? "backward" : "forward";
  const bool channels_last = work.format == MemoryFormat::kChannelsLast;
  const auto ms = [](double value) { return absl::StrFormat("%.3f ms", value); };
  return {.json = {{"op", op},
                   {"shape", work.shape},
                   {"dtype", NameOf(work.dtype)},
                   {"memory_format", channels_last ? "channels_last" : "contiguous"},
                   {"concurrency", work.concurrency},
                   {"seconds", seconds},
                   {"requests", measured.latencies_ms.size()},
                   {"requests_per_s", rate},
                   {"payload_bytes", measured.payload_bytes},
                   {"payload_bytes_per_s", bytes_per_s},
                   {"latency_ms",
                    {{"mean", sum / count},
                     {"p50", measured.Percentile(0.5)},
                     {"p90", measured.Percentile(0.9)},
                     {"p99", measured.Percentile(0.99)},
                     {"max", measured.latencies_ms.back()}}}},
          .text = absl::StrCat(
              op, " of ", std::string(NameOf(work.dtype)), " ", HumanShape(work.shape),
              channels_last ? " channels_last, " : ", ", work.concurrency, " in flight, ",
              absl::StrFormat("%.1f", seconds), " s\n",
              Table({{"REQUESTS", "REQUESTS/S", "PAYLOAD", "PAYLOAD/S", "P50", "P90", "P99", "MAX"},
                     {absl::StrCat(measured.latencies_ms.size()), absl::StrFormat("%.1f", rate),
                      HumanBytes(static_cast<double>(measured.payload_bytes)),
                      absl::StrCat(HumanBytes(bytes_per_s), "/s"), ms(measured.Percentile(0.5)),
                      ms(measured.Percentile(0.9)), ms(measured.Percentile(0.99)),
                      ms(measured.latencies_ms.back())}}),
              "Payload is the tensor that goes one way; as much comes back.\n")};
}

Action Bench(CLI::App& app) {
  auto work = Shared<Workload>();
  auto* name_option =
      app.add_option("name", work->name, "Instance; default: one of its own, removed afterwards")
          ->type_name("NAME");
  auto num_features = Shared<std::optional<int64_t>>();
  app.add_option("--num_features", *num_features,
                 "Channels of the instance of its own; default: the shape's")
      ->excludes(name_option)
      ->type_name("C");
  auto* shape_option = app.add_option("--shape", work->shape, "N,C,H,W of the tensors")
                           ->delimiter(',')
                           ->expected(1, 8)
                           ->allow_extra_args(false)
                           ->default_str("8,64,56,56")
                           ->type_name("N,C,H,W");
  auto dtype = AddDataType(app, "--dtype", InputTypes(), "Of the tensors [float32]");
  auto format = AddMemoryFormat(app);
  app.add_option("--concurrency", work->concurrency, "Calls in flight")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str()
      ->type_name("N");
  AddDuration(app, "--duration", &work->duration, "How long to measure");
  AddChoice<bool>(app, "--op", {{"forward", false}, {"backward", true}}, "What to call",
                  [work](const bool& backward) { work->backward = backward; })
      ->default_str("forward");
  auto mode = AddMode(app, "Of the calls; default: the instance's");

  return [=](Session& session) -> absl::StatusOr<Report> {
    const Client& client = session.client;
    work->dtype = dtype->value_or(DataType::kFloat32);
    work->format = *format;
    work->mode = *mode;

    const bool own = work->name.empty();
    if (*num_features && shape_option->count() == 0) work->shape[1] = **num_features;
    if (own) {
      if (work->shape.size() < 2 && !*num_features) {
        return UsageError("--shape is N,C,H,W, such as 8,64,56,56");
      }
      work->name = absl::StrCat("normctl-bench/", client::internal::NewRequestId());
      InstanceConfig config;
      config.layer = BatchNorm2d{.num_features = num_features->value_or(work->shape[1])};
      if (work->dtype == DataType::kFloat64) config.state_dtype = DataType::kFloat64;
      const auto created = client.CreateInstance(work->name, config);
      if (!created.ok()) return created.status();
    }
    const auto remove = absl::MakeCleanup([&] {
      if (own) client.DeleteInstance(work->name).status().IgnoreError();
    });

    const auto measured = Measure(client, *work, session.progress);
    if (!measured.ok()) return measured.status();
    return ReportOf(*work, *measured);
  };
}

constexpr Command kCommands[] = {
    {"bench", "Measure latency and throughput of forward or backward",
     "bench --shape=8,64,56,56 --concurrency=4 --duration=5s", Bench},
};

}  // namespace

absl::Span<const Command> BenchCommands() { return kCommands; }

}  // namespace normd::normctl
