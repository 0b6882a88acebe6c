#include "server/state/persister.h"

#include <atomic>
#include <map>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "tests/unit/server/sample_instances.h"

namespace normd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr absl::Duration kLong = absl::Hours(1);

// A store in memory that can be held up and made to fail.
class FakeStore : public StateStore {
 public:
  std::vector<absl::Status> Commit(absl::Span<const Change> changes) override {
    absl::MutexLock lock(&mutex_);
    ++begun_;
    mutex_.Await(absl::Condition(&open_));
    commits_.emplace_back(changes.begin(), changes.end());
    if (!failure_.ok()) return std::vector<absl::Status>(changes.size(), failure_);
    std::vector<absl::Status> statuses;
    for (const Change& change : changes) {
      const auto held = versions_.find(change.name);
      if ((held == versions_.end() ? 0 : held->second) != change.previous_version) {
        statuses.push_back(absl::AbortedError("another version"));
        continue;
      }
      if (change.state == nullptr) {
        versions_.erase(change.name);
      } else {
        versions_[change.name] = change.state->version;
      }
      statuses.push_back(absl::OkStatus());
    }
    return statuses;
  }
  absl::Status Load(absl::FunctionRef<absl::Status(StoredInstance)>,
                    absl::FunctionRef<absl::Status(Tombstone)>) override {
    return absl::OkStatus();
  }

  void HoldUp() {
    absl::MutexLock lock(&mutex_);
    open_ = false;
  }
  void LetGo() {
    absl::MutexLock lock(&mutex_);
    open_ = true;
  }
  void WaitForCommit(int number) {
    absl::MutexLock lock(&mutex_);
    const auto begun = [&] { return begun_ >= number; };
    mutex_.Await(absl::Condition(&begun));
  }
  void Fail(absl::Status failure) {
    absl::MutexLock lock(&mutex_);
    failure_ = std::move(failure);
  }
  std::vector<std::vector<Change>> commits() {
    absl::MutexLock lock(&mutex_);
    return commits_;
  }
  std::map<std::string, uint64_t> versions() {
    absl::MutexLock lock(&mutex_);
    return versions_;
  }

 private:
  absl::Mutex mutex_;
  bool open_ = true;
  int begun_ = 0;
  absl::Status failure_;
  std::vector<std::vector<Change>> commits_;
  std::map<std::string, uint64_t> versions_;
};

// The change that brings `name` from one version to another; 0: none.
Change Step(const std::string& name, uint64_t from, uint64_t to, int requests = 0) {
  Change change{.name = name, .previous_version = from, .state = nullptr, .requests = {}};
  if (to != 0) {
    InstanceState state = TrainedState(name);
    state.version = to;
    change.state = Share(state);
  }
  for (int i = 0; i < requests; ++i) {
    change.requests.push_back(SampleRequest(1000 * to + i, absl::UnixEpoch()));
  }
  return change;
}

constexpr auto kIgnore = [](const absl::Status&) {};

TEST(PersisterNone, AcknowledgesWithoutAStore) {
  const auto persister = Persister::Start(nullptr, Durability::kNone, kLong);
  EXPECT_TRUE(persister->acknowledges_at_once());
  bool done = false;
  persister->Submit(Step("a", 0, 1), [&](const absl::Status& status) { done = status.ok(); });
  EXPECT_TRUE(done);
  EXPECT_TRUE(persister->Flush().ok());
  EXPECT_TRUE(persister->health().ok());
}

TEST(PersisterUpdate, AcknowledgesAfterTheCommitInTheOrderOfSubmit) {
  FakeStore store;
  store.HoldUp();
  const auto persister = Persister::Start(&store, Durability::kUpdate, kLong);
  EXPECT_FALSE(persister->acknowledges_at_once());
  absl::Mutex mutex;
  std::vector<uint64_t> acknowledged;
  for (uint64_t version = 1; version <= 20; ++version) {
    persister->Submit(Step("a", version - 1, version), [&, version](const absl::Status& status) {
      EXPECT_TRUE(status.ok()) << status;
      absl::MutexLock lock(&mutex);
      acknowledged.push_back(version);
    });
  }
  store.WaitForCommit(1);
  {
    absl::MutexLock lock(&mutex);
    EXPECT_THAT(acknowledged, IsEmpty());
  }
  store.LetGo();
  EXPECT_TRUE(persister->Flush().ok());
  absl::MutexLock lock(&mutex);
  ASSERT_THAT(acknowledged, SizeIs(20));
  EXPECT_TRUE(std::is_sorted(acknowledged.begin(), acknowledged.end()));
  EXPECT_EQ(store.versions().at("a"), 20u);
}

TEST(PersisterUpdate, PutsEverythingThatWaitsIntoOneCommit) {
  FakeStore store;
  store.HoldUp();
  const auto persister = Persister::Start(&store, Durability::kUpdate, kLong);
  persister->Submit(Step("first", 0, 1), kIgnore);
  store.WaitForCommit(1);
  for (int i = 0; i < 64; ++i) persister->Submit(Step(absl::StrCat("a", i), 0, 1), kIgnore);
  store.LetGo();
  ASSERT_TRUE(persister->Flush().ok());
  const auto commits = store.commits();
  ASSERT_THAT(commits, SizeIs(2));
  EXPECT_THAT(commits[0], SizeIs(1));
  EXPECT_THAT(commits[1], SizeIs(64));
}

TEST(PersisterUpdate, AnswersAFailedCommitToAllAndStartsAfresh) {
  FakeStore store;
  store.Fail(absl::ResourceExhaustedError("full"));
  const auto persister = Persister::Start(&store, Durability::kUpdate, kLong);
  absl::Status answer;
  persister->Submit(Step("a", 0, 1), [&](absl::Status status) { answer = std::move(status); });
  EXPECT_EQ(persister->Flush().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(answer.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(persister->health().code(), absl::StatusCode::kResourceExhausted);
  store.Fail(absl::OkStatus());
  persister->Submit(Step("a", 0, 1), [&](absl::Status status) { answer = std::move(status); });
  EXPECT_TRUE(persister->Flush().ok());
  EXPECT_TRUE(answer.ok());
  EXPECT_TRUE(persister->health().ok());
  // A version that does not match is not the store's illness.
  persister->Submit(Step("a", 7, 8), [&](absl::Status status) { answer = std::move(status); });
  EXPECT_TRUE(persister->Flush().ok());
  EXPECT_EQ(answer.code(), absl::StatusCode::kAborted);
}

TEST(PersisterUpdate, TakesChangesFromItsOwnAnswers) {
  FakeStore store;
  const auto persister = Persister::Start(&store, Durability::kUpdate, kLong);
  absl::Notification done;
  persister->Submit(Step("a", 0, 1), [&](const absl::Status&) {
    persister->Submit(Step("a", 1, 2), [&](const absl::Status& status) {
      EXPECT_TRUE(status.ok()) << status;
      done.Notify();
    });
  });
  done.WaitForNotification();
  EXPECT_EQ(store.versions().at("a"), 2u);
}

TEST(PersisterUpdate, AnswersAllWhenItEnds) {
  FakeStore store;
  store.HoldUp();
  std::atomic<int> answered = 0;
  auto persister = Persister::Start(&store, Durability::kUpdate, kLong);
  for (uint64_t version = 1; version <= 10; ++version) {
    persister->Submit(Step("a", version - 1, version),
                      [&](const absl::Status& status) { answered += status.ok() ? 1 : 0; });
  }
  store.LetGo();
  persister.reset();
  EXPECT_EQ(answered, 10);
}

TEST(PersisterUpdate, ServesManyWriters) {
  FakeStore store;
  const auto persister = Persister::Start(&store, Durability::kUpdate, kLong);
  constexpr int kWriters = 8;
  constexpr uint64_t kChanges = 200;
  {
    std::vector<std::jthread> writers;
    for (int w = 0; w < kWriters; ++w) {
      writers.emplace_back([&, name = absl::StrCat("a", w)] {
        for (uint64_t version = 1; version <= kChanges; ++version) {
          absl::Notification done;
          persister->Submit(Step(name, version - 1, version), [&](const absl::Status& status) {
            EXPECT_TRUE(status.ok()) << status;
            done.Notify();
          });
          done.WaitForNotification();
        }
      });
    }
  }
  EXPECT_THAT(store.versions(), SizeIs(kWriters));
  for (const auto& [name, version] : store.versions()) EXPECT_EQ(version, kChanges) << name;
}

TEST(PersisterInterval, AcknowledgesAtOnceAndCoalesces) {
  FakeStore store;
  const auto persister = Persister::Start(&store, Durability::kInterval, kLong);
  EXPECT_TRUE(persister->acknowledges_at_once());
  int acknowledged = 0;
  for (uint64_t version = 1; version <= 5; ++version) {
    persister->Submit(Step("a", version - 1, version, 1),
                      [&](const absl::Status& status) { acknowledged += status.ok() ? 1 : 0; });
    EXPECT_EQ(acknowledged, static_cast<int>(version));
  }
  EXPECT_THAT(store.commits(), IsEmpty());
  ASSERT_TRUE(persister->Flush().ok());
  const auto commits = store.commits();
  ASSERT_THAT(commits, SizeIs(1));
  ASSERT_THAT(commits[0], SizeIs(1));
  EXPECT_EQ(commits[0][0].previous_version, 0u);
  EXPECT_EQ(commits[0][0].state->version, 5u);
  ASSERT_THAT(commits[0][0].requests, SizeIs(5));
  EXPECT_EQ(commits[0][0].requests[0].id, SampleRequest(1000, absl::UnixEpoch()).id);
  EXPECT_EQ(commits[0][0].requests[4].id, SampleRequest(5000, absl::UnixEpoch()).id);
  // Nothing new, nothing to commit.
  ASSERT_TRUE(persister->Flush().ok());
  EXPECT_THAT(store.commits(), SizeIs(1));
}

TEST(PersisterInterval, WritesWhenTheIntervalHasPassed) {
  FakeStore store;
  const auto persister = Persister::Start(&store, Durability::kInterval, absl::Milliseconds(20));
  persister->Submit(Step("a", 0, 1), kIgnore);
  store.WaitForCommit(1);
  persister->Submit(Step("a", 1, 2), kIgnore);
  store.WaitForCommit(2);
  EXPECT_TRUE(persister->Flush().ok());
  EXPECT_EQ(store.versions().at("a"), 2u);
}

TEST(PersisterInterval, KeepsEachRemovalAndItsRequest) {
  FakeStore store;
  const auto persister = Persister::Start(&store, Durability::kInterval, kLong);
  persister->Submit(Step("a", 0, 1, 1), kIgnore);
  persister->Submit(Step("a", 1, 0, 1), kIgnore);
  Change again = Step("a", 0, 1, 2);
  again.replace_requests = true;
  persister->Submit(again, kIgnore);
  persister->Submit(Step("a", 1, 2, 1), kIgnore);
  ASSERT_TRUE(persister->Flush().ok());
  const auto commits = store.commits();
  ASSERT_THAT(commits, SizeIs(1));
  ASSERT_THAT(commits[0], SizeIs(2));
  EXPECT_EQ(commits[0][0].state, nullptr);
  EXPECT_EQ(commits[0][0].previous_version, 0u);
  EXPECT_THAT(commits[0][0].requests, SizeIs(1));
  EXPECT_EQ(commits[0][1].state->version, 2u);
  EXPECT_TRUE(commits[0][1].replace_requests);
  EXPECT_THAT(commits[0][1].requests, SizeIs(3));
}

TEST(PersisterInterval, KeepsTheChangesOfAFailedCommitForTheNext) {
  FakeStore store;
  store.Fail(absl::UnavailableError("gone"));
  const auto persister = Persister::Start(&store, Durability::kInterval, kLong);
  persister->Submit(Step("a", 0, 1, 1), kIgnore);
  persister->Submit(Step("b", 0, 1), kIgnore);
  EXPECT_EQ(persister->Flush().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(persister->health().code(), absl::StatusCode::kUnavailable);
  // One failure alone refuses nothing.
  persister->Submit(Step("a", 1, 2, 1), [](const absl::Status& s) { EXPECT_TRUE(s.ok()) << s; });
  store.Fail(absl::OkStatus());
  ASSERT_TRUE(persister->Flush().ok());
  EXPECT_TRUE(persister->health().ok());
  EXPECT_EQ(store.versions().at("a"), 2u);
  EXPECT_EQ(store.versions().at("b"), 1u);
  const auto commits = store.commits();
  for (const Change& change : commits.back()) {
    if (change.name != "a") continue;
    EXPECT_EQ(change.previous_version, 0u);
    EXPECT_THAT(change.requests, SizeIs(2));
  }
}

TEST(PersisterInterval, TriesAgainByItself) {
  FakeStore store;
  store.Fail(absl::UnavailableError("gone"));
  const auto persister = Persister::Start(&store, Durability::kInterval, absl::Milliseconds(10));
  persister->Submit(Step("a", 0, 1), kIgnore);
  store.WaitForCommit(3);
  store.Fail(absl::OkStatus());
  EXPECT_TRUE(persister->Flush().ok());
  EXPECT_EQ(store.versions().at("a"), 1u);
}

TEST(PersisterInterval, RefusesChangesOnceTheOldestCouldNotBeStoredForTooLong) {
  FakeStore store;
  store.Fail(absl::ResourceExhaustedError("full"));
  std::atomic<int> begun = 0;
  std::atomic<int> ended = 0;
  const auto persister = Persister::Start(
      &store, Durability::kInterval, absl::Milliseconds(10),
      [&](bool refusing) { ++(refusing ? begun : ended); }, absl::Milliseconds(100));
  const auto submit = [&](uint64_t from, uint64_t to) {
    absl::Status answer = absl::UnknownError("not answered");
    persister->Submit(Step("a", from, to), [&](const absl::Status& status) { answer = status; });
    return answer;
  };
  ASSERT_TRUE(submit(0, 1).ok());
  while (begun == 0) absl::SleepFor(absl::Milliseconds(1));
  const absl::Status refused = submit(1, 2);
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("full"));
  EXPECT_EQ(ended, 0);
  store.Fail(absl::OkStatus());
  while (ended == 0) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(store.versions().at("a"), 1u);  // by itself
  ASSERT_TRUE(submit(1, 2).ok());
  ASSERT_TRUE(persister->Flush().ok());
  EXPECT_EQ(store.versions().at("a"), 2u);
  EXPECT_EQ(begun, 1);
  EXPECT_EQ(ended, 1);
}

TEST(PersisterInterval, WritesWhatWaitsWhenItEnds) {
  FakeStore store;
  Persister::Start(&store, Durability::kInterval, kLong)->Submit(Step("a", 0, 1), kIgnore);
  EXPECT_EQ(store.versions().at("a"), 1u);
}

}  // namespace
}  // namespace normd
