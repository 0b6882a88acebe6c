#include "server/state/sqlite_store.h"

#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sqlite3.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include "server/state/instance_codec.h"
#include "server/state/sha256.h"
#include "tests/unit/server/sample_instances.h"
#include "tests/unit/server/temporary_directory.h"

namespace normd {
namespace {

using ::testing::HasSubstr;

struct Contents {
  std::map<std::string, StoredInstance> instances;
  std::vector<Tombstone> tombstones;
};

absl::StatusOr<Contents> ContentsOf(StateStore& store) {
  Contents contents;
  absl::Status status = store.Load(
      [&](StoredInstance instance) {
        const std::string name = instance.state->identity->name;
        contents.instances[name] = std::move(instance);
        return absl::OkStatus();
      },
      [&](Tombstone tombstone) {
        contents.tombstones.push_back(std::move(tombstone));
        return absl::OkStatus();
      });
  if (!status.ok()) return status;
  return contents;
}

std::unique_ptr<StateStore> Open(const std::string& directory) {
  auto store = OpenSqliteStore(directory);
  EXPECT_TRUE(store.ok()) << store.status();
  return store.ok() ? *std::move(store) : nullptr;
}

Change CreateChange(const InstanceState& state) {
  return {.name = state.identity->name,
          .previous_version = 0,
          .state = Share(state),
          .requests = {},
          .replace_requests = true};
}

Change UpdateChange(const InstanceState& before, const InstanceState& after) {
  return {.name = before.identity->name,
          .previous_version = before.version,
          .state = Share(after),
          .requests = {}};
}

Change RemoveChange(const InstanceState& state) {
  return {.name = state.identity->name,
          .previous_version = state.version,
          .state = nullptr,
          .requests = {}};
}

absl::Status CommitOne(StateStore& store, Change change) {
  return store.Commit({&change, 1}).front();
}

TEST(SqliteStore, HoldsWhatWasCommittedAfterReopening) {
  const TemporaryDirectory directory;
  const InstanceState first = TrainedState("net/bn1");
  Layer wide = SampleLayer(2048);
  wide.state_dtype = DType::kFloat64;
  const InstanceState second = TrainedState("bn2", wide);
  const InstanceState changed = Next(first);
  const absl::Time now = absl::Now();
  Change update = UpdateChange(first, changed);
  update.requests = {SampleRequest(1, now), SampleRequest(2, now)};
  {
    const auto store = Open(directory.File("deep/state"));
    const std::vector<Change> changes = {CreateChange(first), CreateChange(second), update};
    for (const absl::Status& status : store->Commit(changes)) EXPECT_TRUE(status.ok()) << status;
  }
  const auto store = Open(directory.File("deep/state"));
  const auto contents = ContentsOf(*store);
  ASSERT_TRUE(contents.ok()) << contents.status();
  ASSERT_EQ(contents->instances.size(), 2u);
  EXPECT_TRUE(SameState(*contents->instances.at("net/bn1").state, changed));
  EXPECT_EQ(contents->instances.at("net/bn1").requests, update.requests);
  EXPECT_TRUE(SameState(*contents->instances.at("bn2").state, second));
  EXPECT_TRUE(contents->instances.at("bn2").requests.empty());
}

TEST(SqliteStore, AppliesAChangeOnlyOverItsPreviousVersion) {
  const TemporaryDirectory directory;
  const auto store = Open(directory.path());
  const InstanceState first = TrainedState("bn");
  const InstanceState second = Next(first);
  const InstanceState third = Next(second);
  EXPECT_EQ(CommitOne(*store, UpdateChange(first, second)).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(CommitOne(*store, RemoveChange(first)).code(), absl::StatusCode::kAborted);
  ASSERT_TRUE(CommitOne(*store, CreateChange(first)).ok());
  EXPECT_EQ(CommitOne(*store, CreateChange(first)).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(CommitOne(*store, UpdateChange(second, third)).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(CommitOne(*store, RemoveChange(second)).code(), absl::StatusCode::kAborted);

  // One that does not fit leaves the others of its commit alone.
  const InstanceState other = TrainedState("other");
  const std::vector<absl::Status> statuses =
      store->Commit(std::vector<Change>{UpdateChange(first, second), UpdateChange(first, second),
                                        CreateChange(other), UpdateChange(second, third)});
  EXPECT_TRUE(statuses[0].ok());
  EXPECT_EQ(statuses[1].code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(statuses[2].ok());
  EXPECT_TRUE(statuses[3].ok());

  const auto contents = ContentsOf(*store);
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_TRUE(SameState(*contents->instances.at("bn").state, third));
  EXPECT_EQ(contents->instances.count("other"), 1u);
}

TEST(SqliteStore, KeepsVersionsPast63Bits) {
  const TemporaryDirectory directory;
  const auto store = Open(directory.path());
  InstanceState state = TrainedState("bn");
  state.version = std::numeric_limits<uint64_t>::max() - 1;
  ASSERT_TRUE(CommitOne(*store, CreateChange(state)).ok());
  ASSERT_TRUE(CommitOne(*store, UpdateChange(state, Next(state))).ok());
  const auto contents = ContentsOf(*store);
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_EQ(contents->instances.at("bn").state->version, std::numeric_limits<uint64_t>::max());
}

TEST(SqliteStore, ForgetsTheRequestsOfARemovedInstanceAndKeepsTheRemoval) {
  const TemporaryDirectory directory;
  const InstanceState state = TrainedState("bn");
  const AppliedRequest removal = SampleRequest(9, absl::Now(), Method::kDelete);
  {
    const auto store = Open(directory.path());
    Change create = CreateChange(state);
    create.requests = {SampleRequest(1, absl::Now(), Method::kCreate)};
    ASSERT_TRUE(CommitOne(*store, create).ok());
    Change remove = RemoveChange(state);
    remove.requests = {removal};
    ASSERT_TRUE(CommitOne(*store, remove).ok());
    // The next instance of that name may get the same row.
    ASSERT_TRUE(CommitOne(*store, CreateChange(state)).ok());
  }
  const auto store = Open(directory.path());
  const auto contents = ContentsOf(*store);
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_TRUE(contents->instances.at("bn").requests.empty());
  ASSERT_EQ(contents->tombstones.size(), 1u);
  EXPECT_EQ(contents->tombstones[0].name, "bn");
  EXPECT_EQ(contents->tombstones[0].request, removal);
}

TEST(SqliteStore, TakesTheRemovalOfWhatItNeverHeld) {
  const TemporaryDirectory directory;
  const auto store = Open(directory.path());
  Change remove{.name = "brief",
                .previous_version = 0,
                .state = nullptr,
                .requests = {SampleRequest(9, absl::Now(), Method::kDelete)}};
  ASSERT_TRUE(CommitOne(*store, remove).ok());
  ASSERT_TRUE(CommitOne(*store, CreateChange(TrainedState("brief"))).ok());
  EXPECT_EQ(CommitOne(*store, remove).code(), absl::StatusCode::kAborted);
  const auto contents = ContentsOf(*store);
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_EQ(contents->tombstones.size(), 1u);
}

TEST(SqliteStore, ReplacesRequestsWhenAsked) {
  const TemporaryDirectory directory;
  const auto store = Open(directory.path());
  InstanceState state = TrainedState("bn");
  Change create = CreateChange(state);
  create.requests = {SampleRequest(1, absl::Now()), SampleRequest(2, absl::Now())};
  ASSERT_TRUE(CommitOne(*store, create).ok());
  Change update = UpdateChange(state, Next(state));
  update.requests = {SampleRequest(3, absl::Now())};
  update.replace_requests = true;
  ASSERT_TRUE(CommitOne(*store, update).ok());
  const auto contents = ContentsOf(*store);
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_EQ(contents->instances.at("bn").requests, update.requests);
}

// Rows in a table, read past the store.
int64_t CountRows(const std::string& directory, const std::string& table) {
  sqlite3* db = nullptr;
  EXPECT_EQ(sqlite3_open((directory + "/state.sqlite").c_str(), &db), SQLITE_OK);
  int64_t count = -1;
  sqlite3_exec(
      db, ("SELECT count(*) FROM " + table).c_str(),
      [](void* to, int, char** values, char**) {
        *static_cast<int64_t*>(to) = std::stoll(values[0]);
        return 0;
      },
      &count, nullptr);
  sqlite3_close(db);
  return count;
}

TEST(SqliteStore, KeepsTheLastRequestsOfAnInstanceAndNoMore) {
  const TemporaryDirectory directory;
  const absl::Time now = absl::Now();
  uint64_t sent = 0;
  {
    const auto store = Open(directory.path());
    InstanceState state = TrainedState("bn");
    ASSERT_TRUE(CommitOne(*store, CreateChange(state)).ok());
    for (int i = 0; i < 50; ++i) {
      const InstanceState next = Next(state);
      Change update = UpdateChange(state, next);
      for (int k = 0; k < 100; ++k) update.requests.push_back(SampleRequest(++sent, now));
      ASSERT_TRUE(CommitOne(*store, update).ok());
      state = next;
    }
    const auto contents = ContentsOf(*store);
    ASSERT_TRUE(contents.ok()) << contents.status();
    const std::vector<AppliedRequest>& kept = contents->instances.at("bn").requests;
    ASSERT_EQ(kept.size(), RequestLog::kCapacity);
    EXPECT_EQ(kept.back(), SampleRequest(sent, now));
    EXPECT_EQ(kept.front(), SampleRequest(sent - RequestLog::kCapacity + 1, now));
  }
  EXPECT_LT(CountRows(directory.path(), "requests"),
            static_cast<int64_t>(2 * RequestLog::kCapacity));
}

TEST(SqliteStore, ForgetsExpiredRequestsAndRemovals) {
  const TemporaryDirectory directory;
  const absl::Time expired = absl::Now() - RequestLog::kKeep - absl::Seconds(1);
  const InstanceState state = TrainedState("bn");
  {
    const auto store = Open(directory.path());
    Change create = CreateChange(state);
    create.requests = {SampleRequest(1, expired), SampleRequest(2, absl::Now())};
    ASSERT_TRUE(CommitOne(*store, create).ok());
    Change remove{.name = "gone",
                  .previous_version = 0,
                  .state = nullptr,
                  .requests = {SampleRequest(9, expired, Method::kDelete)}};
    ASSERT_TRUE(CommitOne(*store, remove).ok());
    const auto contents = ContentsOf(*store);
    ASSERT_TRUE(contents.ok()) << contents.status();
    EXPECT_EQ(contents->instances.at("bn").requests.size(), 1u);
    EXPECT_TRUE(contents->tombstones.empty());
    // While running, too: the expired rows go as new ones come.
    InstanceState now_state = state;
    for (int i = 0; i < 600; ++i) {
      const InstanceState next = Next(now_state);
      Change update = UpdateChange(now_state, next);
      update.requests = {SampleRequest(100 + i, i < 300 ? expired : absl::Now())};
      ASSERT_TRUE(CommitOne(*store, update).ok());
      now_state = next;
    }
  }
  EXPECT_LT(CountRows(directory.path(), "requests"), 350);
  Open(directory.path());
  EXPECT_EQ(CountRows(directory.path(), "requests"), 301);
  EXPECT_EQ(CountRows(directory.path(), "tombstones"), 0);
}

TEST(SqliteStore, IsRefusedToASecondServer) {
  const TemporaryDirectory directory;
  const auto store = Open(directory.path());
  // In another process, as locks between processes are meant.
  const pid_t child = fork();
  if (child == 0) {
    const auto second = OpenSqliteStore(directory.path());
    const bool refused =
        second.status().code() == absl::StatusCode::kFailedPrecondition &&
        std::string(second.status().message()).find("in use by another normd") != std::string::npos;
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(OpenSqliteStore(directory.path()).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(SqliteStore, HoldsEveryAcknowledgedCommitAfterAKill) {
  const TemporaryDirectory directory;
  for (int round = 0; round < 5; ++round) {
    int acknowledged[2];
    ASSERT_EQ(pipe(acknowledged), 0);
    const pid_t child = fork();
    if (child == 0) {
      close(acknowledged[0]);
      const auto store = OpenSqliteStore(directory.path());
      if (!store.ok()) _exit(1);
      InstanceState state = TrainedState("bn");
      const auto contents = ContentsOf(**store);
      if (contents->instances.empty()) {
        if (!CommitOne(**store, CreateChange(state)).ok()) _exit(1);
      } else {
        state = *contents->instances.at("bn").state;
      }
      for (;;) {
        const InstanceState next = Next(state);
        Change update = UpdateChange(state, next);
        update.requests = {SampleRequest(next.version, absl::Now())};
        if (!CommitOne(**store, update).ok()) _exit(1);
        if (write(acknowledged[1], &next.version, sizeof(next.version)) < 0) _exit(1);
        state = next;
      }
    }
    close(acknowledged[1]);
    uint64_t version = 0;
    for (int i = 0; i < 40 + 13 * round; ++i) {
      ASSERT_EQ(read(acknowledged[0], &version, sizeof(version)),
                static_cast<ssize_t>(sizeof(version)));
    }
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    while (read(acknowledged[0], &version, sizeof(version)) > 0) {
    }
    close(acknowledged[0]);

    const auto store = Open(directory.path());
    const auto contents = ContentsOf(*store);
    ASSERT_TRUE(contents.ok()) << contents.status();
    const StoredInstance& stored = contents->instances.at("bn");
    // At least what was acknowledged, and whole: the state and its request together.
    EXPECT_GE(stored.state->version, version);
    EXPECT_LE(stored.state->version, version + 1);
    ASSERT_FALSE(stored.requests.empty());
    EXPECT_EQ(stored.requests.back().version, stored.state->version);
    EXPECT_EQ(stored.state->running_mean[0], stored.state->version * 0.5);
  }
}

TEST(SqliteStore, SaysWhatToDoWithAFileThatIsNoDatabase) {
  const TemporaryDirectory directory;
  WriteFile(directory.File("state.sqlite"), std::string(8192, 'x'));
  const auto store = OpenSqliteStore(directory.path());
  EXPECT_EQ(store.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(store.status().message()), HasSubstr(directory.File("state.sqlite")));
  EXPECT_THAT(std::string(store.status().message()), HasSubstr("aside"));
}

void ExecuteSql(const std::string& directory, const char* sql) {
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open((directory + "/state.sqlite").c_str(), &db), SQLITE_OK);
  EXPECT_EQ(sqlite3_exec(db, sql, nullptr, nullptr, nullptr), SQLITE_OK) << sqlite3_errmsg(db);
  sqlite3_close(db);
}

TEST(SqliteStore, RefusesDatabasesOfOthersAndOfTheFuture) {
  const TemporaryDirectory directory;
  ExecuteSql(directory.path(), "CREATE TABLE photos (id INTEGER)");
  EXPECT_EQ(OpenSqliteStore(directory.path()).status().code(), absl::StatusCode::kDataLoss);

  Open(directory.File("future"));
  ExecuteSql(directory.File("future"), "PRAGMA user_version = 3");
  const auto store = OpenSqliteStore(directory.File("future"));
  EXPECT_EQ(store.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(store.status().message()), HasSubstr("newer normd"));
}

TEST(SqliteStore, ReadsTheFilesThatFormat1HeldAsRecords) {
  const TemporaryDirectory directory;
  const InstanceState state = TrainedState("net/bn");
  ASSERT_TRUE(CommitOne(*Open(directory.path()), CreateChange(state)).ok());
  // As format 1 has it.
  const std::string file = EncodeInstance({.state = Share(state), .requests = {}});
  std::string checked(8, '\0');
  checked[7] = static_cast<char>(state.version);
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open((directory.File("state.sqlite")).c_str(), &db), SQLITE_OK);
  sqlite3_stmt* update = nullptr;
  ASSERT_EQ(sqlite3_prepare_v2(db, "UPDATE instances SET record = ?1, checksum = ?2", -1, &update,
                               nullptr),
            SQLITE_OK);
  sqlite3_bind_blob64(update, 1, file.data(), file.size(), SQLITE_STATIC);
  sqlite3_bind_int64(update, 2, static_cast<int64_t>(Sha256Prefix(checked + file)));
  EXPECT_EQ(sqlite3_step(update), SQLITE_DONE);
  sqlite3_finalize(update);
  sqlite3_close(db);
  ExecuteSql(directory.path(), "PRAGMA user_version = 1");

  const InstanceState next = Next(state);
  {
    const auto store = Open(directory.path());
    auto contents = ContentsOf(*store);
    ASSERT_TRUE(contents.ok()) << contents.status();
    EXPECT_TRUE(SameState(*contents->instances.at("net/bn").state, state));
    ASSERT_TRUE(CommitOne(*store, UpdateChange(state, next)).ok());
  }
  const auto contents = ContentsOf(*Open(directory.path()));
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_TRUE(SameState(*contents->instances.at("net/bn").state, next));
}

TEST(SqliteStore, RefusesADirectoryThatCannotBeMade) {
  const TemporaryDirectory directory;
  WriteFile(directory.File("file"), "");
  const auto store = OpenSqliteStore(directory.File("file/state"));
  EXPECT_EQ(store.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(store.status().message()), HasSubstr("file"));
}

// Whether the database in `bytes` is refused as damaged, or gives exactly what was
// stored.
void ExpectLossOrUnharmed(const std::string& bytes, const Contents& sound, const std::string& how) {
  const TemporaryDirectory directory(FastTemporaryDirectory());
  WriteFile(directory.File("state.sqlite"), bytes);
  auto store = OpenSqliteStore(directory.path());
  if (!store.ok()) {
    ASSERT_EQ(store.status().code(), absl::StatusCode::kDataLoss) << how << store.status();
    return;
  }
  const auto contents = ContentsOf(**store);
  if (!contents.ok()) {
    ASSERT_EQ(contents.status().code(), absl::StatusCode::kDataLoss) << how << contents.status();
    return;
  }
  ASSERT_EQ(contents->instances.size(), sound.instances.size()) << how;
  for (const auto& [name, instance] : sound.instances) {
    const StoredInstance& stored = contents->instances.at(name);
    ASSERT_TRUE(SameState(*stored.state, *instance.state)) << how;
    ASSERT_EQ(stored.requests, instance.requests) << how;
    // It also takes the next change.
    ASSERT_TRUE(CommitOne(**store, UpdateChange(*stored.state, Next(*stored.state))).ok()) << how;
  }
  ASSERT_EQ(contents->tombstones.size(), sound.tombstones.size()) << how;
  for (size_t i = 0; i < sound.tombstones.size(); ++i) {
    ASSERT_EQ(contents->tombstones[i].name, sound.tombstones[i].name) << how;
    ASSERT_EQ(contents->tombstones[i].request, sound.tombstones[i].request) << how;
  }
}

TEST(SqliteStore, DamageIsFoundOrHarmless) {
  const TemporaryDirectory directory(FastTemporaryDirectory());
  {
    const auto store = Open(directory.path());
    for (const char* name : {"a", "b/c"}) {
      const InstanceState state = TrainedState(name);
      Change create = CreateChange(state);
      create.requests = {SampleRequest(1, absl::Now() + absl::Hours(1)),
                         SampleRequest(2, absl::Now() + absl::Hours(1))};
      ASSERT_TRUE(CommitOne(*store, create).ok());
    }
    Change remove{.name = "gone",
                  .previous_version = 0,
                  .state = nullptr,
                  .requests = {SampleRequest(9, absl::Now() + absl::Hours(1), Method::kDelete)}};
    ASSERT_TRUE(CommitOne(*store, remove).ok());
  }
  const std::string sound = ReadFile(directory.File("state.sqlite"));
  const auto contents = ContentsOf(*Open(directory.path()));
  ASSERT_TRUE(contents.ok()) << contents.status();
  ASSERT_EQ(contents->instances.size(), 2u);
  for (size_t at = 0; at < sound.size(); ++at) {
    // Most of the file is empty space: every byte that says something, and a sample
    // of the others.
    if (sound[at] == 0 && at % 97 != 0) continue;
    std::string damaged = sound;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << (at % 8)));
    ExpectLossOrUnharmed(damaged, *contents, "flipped at " + std::to_string(at) + ": ");
    if (HasFatalFailure()) return;
  }
  for (size_t size = 1; size < sound.size(); size += 509) {
    ExpectLossOrUnharmed(sound.substr(0, size), *contents, "cut at " + std::to_string(size) + ": ");
    if (HasFatalFailure()) return;
  }
}

TEST(SqliteStore, SurvivesAFullDisk) {
  // A small file system of its own, in a child that may mount one.
  const TemporaryDirectory directory;
  const pid_t child = fork();
  if (child == 0) {
    if (unshare(CLONE_NEWNS) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) _exit(77);
    mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
    if (mount("tmpfs", directory.path().c_str(), "tmpfs", 0, "size=1m") != 0) _exit(77);
    WriteFile(directory.File("somebody_elses"), std::string(400'000, 'x'));
    auto store = OpenSqliteStore(directory.path());
    if (!store.ok()) _exit(1);
    InstanceState state = TrainedState("bn", SampleLayer(256));
    if (!CommitOne(**store, CreateChange(state)).ok()) _exit(2);
    absl::Status status;
    for (int i = 0; status.ok() && i < 10000; ++i) {
      const InstanceState next = Next(state);
      status = CommitOne(**store, UpdateChange(state, next));
      if (status.ok()) state = next;
    }
    if (status.code() != absl::StatusCode::kResourceExhausted) _exit(3);
    // As acknowledged, and as before once there is room again: without reopening,
    // and after it.
    auto contents = ContentsOf(**store);
    if (!contents.ok() || !SameState(*contents->instances.at("bn").state, state)) _exit(4);
    unlink(directory.File("somebody_elses").c_str());
    for (int i = 0; i < 3; ++i) {
      const InstanceState next = Next(state);
      if (!CommitOne(**store, UpdateChange(state, next)).ok()) _exit(5);
      state = next;
    }
    store->reset();
    store = OpenSqliteStore(directory.path());
    if (!store.ok()) _exit(6);
    contents = ContentsOf(**store);
    if (!contents.ok() || !SameState(*contents->instances.at("bn").state, state)) _exit(7);
    store->reset();
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
    GTEST_SKIP() << "no file system can be mounted here";
  }
  EXPECT_EQ(status, 0) << "exit " << WEXITSTATUS(status);
}

}  // namespace
}  // namespace normd
