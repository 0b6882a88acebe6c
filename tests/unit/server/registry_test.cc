#include "server/registry/registry.h"

#include <atomic>
#include <random>
#include <thread>

#include <gtest/gtest.h>

#include "absl/container/btree_map.h"
#include "absl/synchronization/notification.h"
#include "kernels/problem.h"
#include "server/admission/call_gate.h"
#include "server/clock.h"
#include "server/registry/saved_contexts.h"
#include "server/state/checkpoints.h"
#include "server/state/sqlite_store.h"
#include "tests/unit/server/sample_instances.h"
#include "tests/unit/server/temporary_directory.h"

namespace normd {
namespace {

constexpr int kThreads = 32;
constexpr int kCalls = 60;  // a thread
constexpr const char* kNames[] = {"a", "net/b", "net/c"};

// Waits for the outcome of a call that may be answered on another thread.
template <class Call>
absl::StatusOr<Changed> Wait(Call call) {
  absl::StatusOr<Changed> outcome;
  absl::Notification done;
  call([&](absl::StatusOr<Changed> changed) {
    outcome = std::move(changed);
    done.Notify();
  });
  done.WaitForNotification();
  return outcome;
}

class RegistryStress : public testing::TestWithParam<Durability> {};

// What one thread does: everything, to the same few names.
class Worker {
 public:
  Worker(Registry& registry, Checkpoints& checkpoints, SavedContexts& contexts, uint64_t seed)
      : registry_(registry), checkpoints_(checkpoints), contexts_(contexts), random_(seed) {}

  void Call() {
    const std::string name = kNames[random_() % std::size(kNames)];
    switch (random_() % 10) {
      case 0: Create(name); break;
      case 1: Delete(name); break;
      case 2: Checkpoint(); break;
      case 3: registry_.List("net/", "", 10, &more_); break;
      default: Train(name); break;
    }
  }
  int64_t changes() const { return changes_; }

 private:
  absl::uint128 Id() { return absl::MakeUint128(random_(), random_()); }

  void Create(const std::string& name) {
    const auto made = Wait([&](ChangeDone done) {
      registry_.Create(name, SampleLayer(2 + static_cast<int64_t>(random_() % 2)), Mode::kTrain,
                       Id(), std::move(done));
    });
    EXPECT_TRUE(made.ok() || absl::IsAlreadyExists(made.status())) << made.status();
  }

  void Delete(const std::string& name) {
    const auto deleted = Wait([&](ChangeDone done) {
      registry_.Delete(name, {.method = Method::kDelete, .request_id = Id()}, std::move(done));
    });
    EXPECT_TRUE(deleted.ok() || absl::IsNotFound(deleted.status())) << deleted.status();
    if (deleted.ok()) contexts_.DropOf(deleted->state->identity->uid);
  }

  void Checkpoint() {
    // One thread's work in the server: a save removes the oldest while none is read.
    static absl::Mutex one_at_a_time;
    absl::MutexLock lock(&one_at_a_time);
    const auto saved = checkpoints_.Save("manual", registry_.ForCheckpoint());
    EXPECT_TRUE(saved.ok()) << saved.status();
    const auto loaded = checkpoints_.Load("", {});
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    const auto versions = registry_.Load(loaded->instances);
    // Somebody deleted or made one at the same moment.
    EXPECT_TRUE(versions.ok() || absl::IsNotFound(versions.status()) ||
                absl::IsAborted(versions.status()))
        << versions.status();
  }

  // A change and its retry, and a context that one Backward uses.
  void Train(const std::string& name) {
    const auto instance = registry_.Find(name);
    if (!instance.ok()) return;
    const Snapshot tip = (*instance)->tip();
    if (tip == nullptr) return;
    auto claim = contexts_.Claim(64);
    ASSERT_TRUE(claim.ok()) << claim.status();
    const std::string context =
        contexts_.Put({.uid = tip->identity->uid, .weight = tip->weight}, *std::move(claim));
    const ChangeOptions options{.method = Method::kForward, .request_id = Id()};
    const auto edit = [](InstanceState& next) {
      ++next.num_batches_tracked;
      return Edited::kChanged;
    };
    const auto change = [&] {
      return Wait([&](ChangeDone done) { (*instance)->Change(options, edit, std::move(done)); });
    };
    const auto first = change();
    if (first.ok()) {
      ++changes_;
      const auto again = change();
      if (again.ok()) {
        EXPECT_TRUE(again->replayed);
        EXPECT_EQ(again->version, first->version);
        EXPECT_EQ(again->num_batches_tracked, first->num_batches_tracked);
      }
    } else {
      EXPECT_TRUE(absl::IsNotFound(first.status())) << first.status();
    }
    auto lease = contexts_.Use(context, tip->identity->uid, std::nullopt);
    if (lease.ok()) lease->Commit(/*retain=*/false);
  }

  Registry& registry_;
  Checkpoints& checkpoints_;
  SavedContexts& contexts_;
  std::mt19937_64 random_;
  bool more_ = false;
  int64_t changes_ = 0;
};

TEST_P(RegistryStress, FromManyThreadsOnTheSameNamesMemoryAndDiskStayEqual) {
  const TemporaryDirectory directory(FastTemporaryDirectory());
  auto store = OpenSqliteStore(directory.path());
  ASSERT_TRUE(store.ok()) << store.status();
  auto checkpoints = Checkpoints::Open(directory.File("checkpoints"), 2);
  ASSERT_TRUE(checkpoints.ok()) << checkpoints.status();
  auto persister = Persister::Start(store->get(), GetParam(), absl::Milliseconds(5));
  Registry registry(persister.get(), 100);
  MemoryBudget budget(1 << 20, "--context_budget");
  SavedContexts contexts(&budget, absl::Hours(1));
  CallGate gate;

  std::atomic<int64_t> changes = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      Worker worker(registry, **checkpoints, contexts, static_cast<uint64_t>(i));
      for (int call = 0; call < kCalls; ++call) {
        if (!gate.Enter().ok()) break;
        worker.Call();
        gate.Leave();
      }
      changes += worker.changes();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(gate.Close(SteadyNow()));
  EXPECT_GT(changes.load(), kThreads);
  EXPECT_TRUE(persister->Flush().ok());

  absl::btree_map<std::string, StoredInstance> living;
  for (StoredInstance& instance : registry.ForCheckpoint()) {
    living.emplace(instance.state->identity->name, std::move(instance));
  }
  persister.reset();
  size_t stored = 0;
  const absl::Status loaded = (*store)->Load(
      [&](const StoredInstance& instance) {
        ++stored;
        const auto it = living.find(instance.state->identity->name);
        if (it == living.end()) return absl::InternalError("an instance that was deleted");
        EXPECT_TRUE(SameState(*instance.state, *it->second.state)) << it->first;
        return absl::OkStatus();
      },
      [](const Tombstone&) { return absl::OkStatus(); });
  EXPECT_TRUE(loaded.ok()) << loaded;
  EXPECT_EQ(stored, living.size());
}

INSTANTIATE_TEST_SUITE_P(Durabilities, RegistryStress,
                         testing::Values(Durability::kUpdate, Durability::kInterval));

}  // namespace
}  // namespace normd
