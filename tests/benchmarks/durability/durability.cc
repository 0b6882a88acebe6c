// Acknowledged updates a second with --durability=update: our persister and store,
// against what the engine alone (the floor), LMDB and a bare log make of the same
// records in the same batches. Interleaved rounds, medians.
// On the disk as it is, and with each sync slowed to that of a common one.
//   normd_bench_durability [--quick] [--json FILE] [--directory DIR]
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>

#include <fmt/format.h>
#include <stdlib.h>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/benchmarks/durability/contender.h"

namespace normd {

void Die(const std::string& what) {
  std::cerr << "normd_bench_durability: " << what << "\n";
  std::exit(1);
}

namespace {

using OpenEngine = std::unique_ptr<Engine> (*)(const std::string&, Records);

const std::pair<const char*, OpenEngine> kEngines[] = {
    {"sqlite", OpenBareSqlite},
#ifdef NORMD_HAVE_LMDB
    {"lmdb", OpenBareLmdb},
#endif
    {"log", OpenBareLog},
};

// A common disk's sync.
constexpr absl::Duration kSlower = absl::Milliseconds(5);

// A directory of its own for each measurement, removed after it.
class Scratch {
 public:
  explicit Scratch(const std::string& parent) : path_(parent + "/normd-durability-XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) Die("cannot make a directory in " + parent);
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Half the distance between the quartiles, relative to the median.
double Spread(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const double width = values[values.size() * 3 / 4] - values[values.size() / 4];
  return width / 2 / values[values.size() / 2];
}

struct Options {
  bool quick = false;
  std::string json;
  std::string directory = ".";
};

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const bool has_value = i + 1 < argc;
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--json" && has_value) {
      options.json = argv[++i];
    } else if (argument == "--directory" && has_value) {
      options.directory = argv[++i];
    } else {
      std::cerr << "usage: normd_bench_durability [--quick] [--json FILE] [--directory DIR]\n";
      std::exit(2);
    }
  }
  return options;
}

struct Measured {
  double per_s = 0;
  std::string json;  // the case's row
};

// `one_writer_per_s`: of the same case with one writer, or 0.
Measured Measure(const Workload& workload, double one_writer_per_s, const Options& options) {
  SlowSyncs(workload.slower);
  const int rounds = options.quick ? 3 : 5;
  const absl::Duration duration = absl::Milliseconds(options.quick ? 700 : 2000);
  std::vector<double> ours;
  std::vector<double> batch_sizes;
  std::map<std::string, std::vector<double>> engines;
  for (int round = 0; round < rounds; ++round) {
    Run run;
    {
      const Scratch scratch(options.directory);
      run = RunOurs(scratch.path(), workload, duration);
    }
    ours.push_back(absl::ToDoubleMilliseconds(run.elapsed) / static_cast<double>(run.updates));
    batch_sizes.push_back(static_cast<double>(run.updates) /
                          static_cast<double>(run.batches.size()));
    for (const auto& [name, open] : kEngines) {
      const Scratch scratch(options.directory);
      const std::unique_ptr<Engine> engine = open(scratch.path(), RecordsOf(workload));
      const absl::Time begin = absl::Now();
      for (const size_t batch : run.batches) engine->Commit(batch);
      engines[name].push_back(absl::ToDoubleMilliseconds(absl::Now() - begin) /
                              static_cast<double>(run.updates));
    }
  }

  const std::string name =
      fmt::format("update/batchnorm2d/c{}/w{}{}", workload.channels, workload.writers,
                  workload.slower > absl::ZeroDuration() ? "/slow" : "");
  const double ours_ms = Median(ours);
  const double floor_ms = Median(engines["sqlite"]);
  fmt::print("{:<30} {:>10.0f} {:>7.1f}% {:>8.1f}", name, 1e3 / ours_ms, 100 * Spread(ours),
             Median(batch_sizes));
  std::string peers;
  double best_peer = 0;
  for (const auto& [engine, open] : kEngines) {
    const double ms = Median(engines[engine]);
    fmt::print(" {:>10.0f}", 1e3 / ms);
    if (std::string_view(engine) != "lmdb") continue;
    peers = fmt::format(R"("{}": {:.6f})", engine, ms);
    best_peer = ms;
  }
  fmt::print(" {:>8.2f}", floor_ms / ours_ms);
  if (one_writer_per_s > 0) fmt::print(" {:>8.1f}", 1e3 / ours_ms / one_writer_per_s);
  fmt::print("\n");
  std::fflush(stdout);
  std::string json = fmt::format(
      R"({{"suite": "durability", "case": "{}", "ours_ms": {:.6f}, "floor_ms": {:.6f}, )"
      R"("peers": {{{}}}, "floor_ratio": {:.4f}, "peer_ratio": {}, "ours_per_s": {:.1f}, )"
      R"("batch": {:.2f}, "log_ms": {:.6f}, "times_one_writer": {}}})",
      name, ours_ms, floor_ms, peers, floor_ms / ours_ms,
      best_peer > 0 ? fmt::format("{:.4f}", best_peer / ours_ms) : "null", 1e3 / ours_ms,
      Median(batch_sizes), Median(engines["log"]),
      one_writer_per_s > 0 ? fmt::format("{:.3f}", 1e3 / ours_ms / one_writer_per_s) : "null");
  return {.per_s = 1e3 / ours_ms, .json = std::move(json)};
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  fmt::print(
      "acknowledged updates a second; batch: updates a commit; ratio: of the bare engine's rate;\n"
      "times w1: one writer's rate; slow: each sync takes {} more\n",
      absl::FormatDuration(kSlower));
  fmt::print("{:<30} {:>10} {:>8} {:>8}", "case", "ours", "spread", "batch");
  for (const auto& [name, open] : kEngines) fmt::print(" {:>10}", name);
  fmt::print(" {:>8} {:>8}\n", "ratio", "times w1");
  std::vector<std::string> rows;
  for (const absl::Duration slower : {absl::ZeroDuration(), kSlower}) {
    for (const int channels : {64, 1024}) {
      double one_writer_per_s = 0;
      for (const int writers : {1, 8, 64}) {
        if (options.quick && writers == 8) continue;
        Measured measured = Measure({.writers = writers, .channels = channels, .slower = slower},
                                    one_writer_per_s, options);
        if (writers == 1) one_writer_per_s = measured.per_s;
        rows.push_back(std::move(measured.json));
      }
    }
  }
  if (!options.json.empty()) {
    std::ofstream file(options.json);
    file << "[\n";
    for (size_t i = 0; i < rows.size(); ++i)
      file << rows[i] << (i + 1 < rows.size() ? ",\n" : "\n");
    file << "]\n";
    if (!file.flush()) Die("cannot write " + options.json);
  }
  return 0;
}

}  // namespace
}  // namespace normd

int main(int argc, char** argv) {
  // As normd itself does, see server/main.cc.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  return normd::Main(argc, argv);
}
