#include <thread>
#include <utility>

#include <fmt/format.h>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "server/state/instance_codec.h"
#include "server/state/persister.h"
#include "server/state/sqlite_store.h"
#include "tests/benchmarks/durability/contender.h"

namespace normd {
namespace {

std::string NameOf(int writer) { return fmt::format("net/layer{}/bn", writer); }

InstanceState StateOf(const Workload& workload, int writer) {
  Layer layer;
  layer.num_features = workload.channels;
  return InitialState(
      std::make_shared<const Identity>(Identity{.name = NameOf(writer),
                                                .uid = "0b5cd3c1-30aa-4e3c-9f4e-6b1f5ec6a001",
                                                .layer = layer,
                                                .create_time = absl::Now()}),
      Mode::kTrain);
}

// Notes how many changes each commit carries.
class CountingStore : public StateStore {
 public:
  explicit CountingStore(std::unique_ptr<StateStore> store) : store_(std::move(store)) {}
  std::vector<absl::Status> Commit(absl::Span<const Change> changes) override {
    batches.push_back(changes.size());
    return store_->Commit(changes);
  }
  absl::Status Load(absl::FunctionRef<absl::Status(StoredInstance)> instance,
                    absl::FunctionRef<absl::Status(Tombstone)> tombstone) override {
    return store_->Load(instance, tombstone);
  }

  std::vector<size_t> batches;  // the persister's writer thread's

 private:
  std::unique_ptr<StateStore> store_;
};

// What a train-mode forward leaves behind.
InstanceState NextState(const InstanceState& state) {
  InstanceState next = state;
  ++next.version;
  ++next.num_batches_tracked;
  next.update_time = absl::Now();
  const auto moved = [&](const Values& values) {
    return Values::Map(values.dtype(), values.size(),
                       [&](int64_t i) { return 0.9 * values[i] + 0.1 * static_cast<double>(i); });
  };
  next.running_mean = moved(state.running_mean);
  next.running_var = moved(state.running_var);
  return next;
}

}  // namespace

Records RecordsOf(const Workload& workload) {
  Records records;
  for (int writer = 0; writer < workload.writers; ++writer) {
    records.keys.push_back(NameOf(writer));
    records.records.push_back(EncodeRecord(NextState(StateOf(workload, writer))));
  }
  return records;
}

Run RunOurs(const std::string& directory, const Workload& workload, absl::Duration duration) {
  auto opened = OpenSqliteStore(directory);
  if (!opened.ok()) Die(std::string(opened.status().message()));
  CountingStore store(*std::move(opened));
  std::vector<InstanceState> states;
  for (int writer = 0; writer < workload.writers; ++writer) {
    states.push_back(StateOf(workload, writer));
    const Change create{.name = NameOf(writer),
                        .previous_version = 0,
                        .state = std::make_shared<const InstanceState>(states.back()),
                        .requests = {}};
    if (const absl::Status status = store.Commit({&create, 1}).front(); !status.ok()) {
      Die(std::string(status.message()));
    }
  }
  store.batches.clear();

  auto persister = Persister::Start(&store, Durability::kUpdate, absl::ZeroDuration());
  const absl::Time begin = absl::Now();
  const absl::Time end = begin + duration;
  {
    std::vector<std::jthread> writers;
    for (int writer = 0; writer < workload.writers; ++writer) {
      writers.emplace_back([&, writer] {
        InstanceState state = states[static_cast<size_t>(writer)];
        while (absl::Now() < end) {
          InstanceState next = NextState(state);
          Change change{
              .name = NameOf(writer),
              .previous_version = state.version,
              .state = std::make_shared<const InstanceState>(next),
              .requests = {{.id = absl::MakeUint128(static_cast<uint64_t>(writer), next.version),
                            .method = Method::kForward,
                            .version = next.version,
                            .num_batches_tracked = next.num_batches_tracked,
                            .time = absl::Now()}}};
          absl::Notification acknowledged;
          persister->Submit(std::move(change), [&](const absl::Status& status) {
            if (!status.ok()) Die(std::string(status.message()));
            acknowledged.Notify();
          });
          acknowledged.WaitForNotification();
          state = std::move(next);
        }
      });
    }
  }
  Run run{.elapsed = absl::Now() - begin, .batches = {}};
  persister.reset();
  run.batches = store.batches;
  for (const size_t batch : run.batches) run.updates += batch;
  return run;
}

}  // namespace normd
