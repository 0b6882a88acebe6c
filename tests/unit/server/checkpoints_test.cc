#include "server/state/checkpoints.h"

#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "formats/safetensors.h"
#include "server/state/instance_codec.h"
#include "server/state/manifest.h"
#include "server/state/sha256.h"
#include "tests/unit/server/sample_instances.h"
#include "tests/unit/server/temporary_directory.h"

namespace normd {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::unique_ptr<Checkpoints> Open(const std::string& directory, int keep = 5) {
  auto checkpoints = Checkpoints::Open(directory, keep);
  EXPECT_TRUE(checkpoints.ok()) << checkpoints.status();
  return checkpoints.ok() ? *std::move(checkpoints) : nullptr;
}

std::vector<StoredInstance> SomeInstances(uint64_t version = 41) {
  std::vector<StoredInstance> instances;
  for (const char* name : {"net/layer1.0/bn", "a", "net/bn1"}) {
    InstanceState state = TrainedState(name);
    state.version = version;
    instances.push_back(
        {.state = Share(state), .requests = {SampleRequest(version, absl::UnixEpoch())}});
  }
  return instances;
}

std::string Message(const absl::Status& status) { return std::string(status.message()); }

std::vector<std::string> EntriesOf(const std::string& directory) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

void ExpectSame(const StoredInstance& a, const StoredInstance& b) {
  EXPECT_TRUE(SameState(*a.state, *b.state)) << a.state->identity->name;
  EXPECT_EQ(a.requests, b.requests);
}

TEST(Checkpoint, GivesBackWhatWasSaved) {
  const TemporaryDirectory directory;
  const auto saved = SomeInstances();
  const auto checkpoints = Open(directory.File("deep/checkpoints"));
  const auto info = checkpoints->Save("manual", saved);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->id, "00000001-manual");
  EXPECT_EQ(info->reason, "manual");
  EXPECT_EQ(info->instance_count, 3);
  EXPECT_TRUE(info->sound);

  const auto loaded = checkpoints->Load("", {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->info.id, info->id);
  EXPECT_EQ(loaded->info.create_time, info->create_time);
  EXPECT_EQ(loaded->info.total_bytes, info->total_bytes);
  EXPECT_THAT(loaded->damaged, IsEmpty());
  ASSERT_EQ(loaded->instances.size(), 3u);
  // In the order of their names.
  ExpectSame(loaded->instances[0], saved[1]);
  ExpectSame(loaded->instances[1], saved[2]);
  ExpectSame(loaded->instances[2], saved[0]);
}

TEST(Checkpoint, GivesTheNamedInstancesOnly) {
  const TemporaryDirectory directory;
  const auto saved = SomeInstances();
  const auto checkpoints = Open(directory.path());
  const std::string id = checkpoints->Save("manual", saved)->id;
  const std::vector<std::string> names = {"net/bn1", "a", "a"};
  const auto loaded = checkpoints->Load(id, names);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_EQ(loaded->instances.size(), 2u);
  ExpectSame(loaded->instances[0], saved[1]);
  ExpectSame(loaded->instances[1], saved[2]);
  const auto missing = checkpoints->Load(id, std::vector<std::string>{"a", "nobody"});
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(missing.status()), HasSubstr("nobody"));
}

TEST(Checkpoint, SavesNoInstancesAtAll) {
  const TemporaryDirectory directory;
  const auto checkpoints = Open(directory.path());
  ASSERT_TRUE(checkpoints->Save("shutdown", {}).ok());
  const auto loaded = checkpoints->Load("", {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_THAT(loaded->instances, IsEmpty());
}

TEST(Checkpoint, IsLaidOutForTorchAndForPeople) {
  const TemporaryDirectory directory;
  const auto saved = SomeInstances();
  ASSERT_TRUE(Open(directory.path())->Save("manual", saved).ok());
  EXPECT_THAT(EntriesOf(directory.File("00000001-manual")),
              ElementsAre("instances", "manifest.json"));
  EXPECT_THAT(
      EntriesOf(directory.File("00000001-manual/instances")),
      ElementsAre("a.safetensors", "net%2Fbn1.safetensors", "net%2Flayer1.0%2Fbn.safetensors"));
  const std::string bytes = ReadFile(directory.File("00000001-manual/instances/a.safetensors"));
  const auto file = ParseSafetensors(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->Find("running_mean")->data, saved[1].state->running_mean.bytes());

  const std::string manifest = ReadFile(directory.File("00000001-manual/manifest.json"));
  const size_t last_line = manifest.rfind('\n', manifest.size() - 2) + 1;
  EXPECT_EQ(manifest.substr(last_line), Sha256Hex(manifest.substr(0, last_line)) + "\n");
  EXPECT_THAT(manifest, HasSubstr(Sha256Hex(bytes)));
}

TEST(Checkpoint, GivesLongNamesFilesOfTheirOwn) {
  const TemporaryDirectory directory;
  std::string slashes;
  while (slashes.size() < 254) slashes += "a/";
  std::vector<StoredInstance> saved;
  for (const std::string& name :
       {slashes + 'a', slashes + 'b', std::string(255, 'x'), std::string(243, 'y')}) {
    saved.push_back({.state = Share(TrainedState(name)), .requests = {}});
    EXPECT_LE(InstanceFileName(name).size(), 255u);
  }
  const auto checkpoints = Open(directory.path());
  const auto info = checkpoints->Save("manual", saved);
  ASSERT_TRUE(info.ok()) << info.status();
  const auto loaded = checkpoints->Load("", {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_EQ(loaded->instances.size(), 4u);
  ExpectSame(loaded->instances[0], saved[0]);
  ExpectSame(loaded->instances[1], saved[1]);
}

TEST(Checkpoint, NumbersOnAcrossRestartsAndReasons) {
  const TemporaryDirectory directory;
  const auto saved = SomeInstances();
  {
    const auto checkpoints = Open(directory.path(), 2);
    EXPECT_EQ(checkpoints->Save("manual", saved)->id, "00000001-manual");
    EXPECT_EQ(checkpoints->Save("interval", saved)->id, "00000002-interval");
    fs::remove_all(directory.File("00000001-manual"));
    fs::remove_all(directory.File("00000002-interval"));
    EXPECT_EQ(checkpoints->Save("shutdown", saved)->id, "00000003-shutdown");
  }
  EXPECT_EQ(Open(directory.path())->Save("manual", saved)->id, "00000004-manual");
  fs::create_directory(directory.File("100000000-manual"));
  EXPECT_EQ(Open(directory.path())->Save("manual", saved)->id, "100000001-manual");
}

TEST(Checkpoint, KeepsAsManyGenerationsAsAsked) {
  const TemporaryDirectory directory;
  const auto checkpoints = Open(directory.path(), 2);
  for (uint64_t version = 1; version <= 5; ++version) {
    ASSERT_TRUE(checkpoints->Save("interval", SomeInstances(version)).ok());
  }
  EXPECT_THAT(EntriesOf(directory.path()), ElementsAre("00000004-interval", "00000005-interval"));
  const auto list = checkpoints->List();
  ASSERT_TRUE(list.ok()) << list.status();
  ASSERT_EQ(list->size(), 2u);
  EXPECT_EQ((*list)[0].id, "00000005-interval");
  EXPECT_EQ((*list)[1].id, "00000004-interval");
  EXPECT_EQ(checkpoints->Load("", {})->instances[0].state->version, 5u);
  EXPECT_EQ(checkpoints->Load("00000004-interval", {})->instances[0].state->version, 4u);
  EXPECT_EQ(checkpoints->Load("00000003-interval", {}).status().code(),
            absl::StatusCode::kNotFound);
}

TEST(Checkpoint, FallsBackWhenTheNewestIsTorn) {
  const TemporaryDirectory directory;
  const auto checkpoints = Open(directory.path());
  for (uint64_t version = 1; version <= 3; ++version) {
    ASSERT_TRUE(checkpoints->Save("interval", SomeInstances(version)).ok());
  }
  const std::string torn = directory.File("00000003-interval/instances/a.safetensors");
  fs::resize_file(torn, fs::file_size(torn) / 2);
  const std::string flipped = directory.File("00000002-interval/manifest.json");
  std::string manifest = ReadFile(flipped);
  manifest[10] ^= 1;
  WriteFile(flipped, manifest);

  const auto loaded = checkpoints->Load("", {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->info.id, "00000001-interval");
  EXPECT_EQ(loaded->instances[0].state->version, 1u);
  ASSERT_EQ(loaded->damaged.size(), 2u);
  EXPECT_EQ(loaded->damaged[0].id, "00000003-interval");
  EXPECT_FALSE(loaded->damaged[0].sound);
  EXPECT_THAT(loaded->damaged[0].problem, HasSubstr(torn));
  EXPECT_EQ(loaded->damaged[1].id, "00000002-interval");
  EXPECT_THAT(loaded->damaged[1].problem, HasSubstr(flipped));

  // The list sees sizes and manifests; asked for by id, damage is the answer.
  const auto list = checkpoints->List();
  ASSERT_TRUE(list.ok());
  ASSERT_EQ(list->size(), 3u);
  EXPECT_FALSE((*list)[0].sound);
  EXPECT_THAT((*list)[0].problem, HasSubstr(torn));
  EXPECT_FALSE((*list)[1].sound);
  EXPECT_TRUE((*list)[2].sound);
  EXPECT_EQ((*list)[2].problem, "");
  EXPECT_EQ(checkpoints->Load("00000003-interval", {}).status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message(checkpoints->Load("00000003-interval", {}).status()), HasSubstr(torn));

  fs::remove_all(directory.File("00000001-interval"));
  EXPECT_EQ(checkpoints->Load("", {}).status().code(), absl::StatusCode::kDataLoss);
}

TEST(Checkpoint, FindsEveryFlippedByteAndEveryCut) {
  const TemporaryDirectory directory(FastTemporaryDirectory());
  const auto checkpoints = Open(directory.path());
  const std::vector<StoredInstance> saved = {
      {.state = Share(TrainedState("net/bn", SampleLayer(1))),
       .requests = {SampleRequest(7, absl::UnixEpoch())}}};
  const std::string id = checkpoints->Save("manual", saved)->id;
  for (const std::string& file : {directory.File(id + "/manifest.json"),
                                  directory.File(id + "/instances/net%2Fbn.safetensors")}) {
    const std::string sound = ReadFile(file);
    for (size_t at = 0; at < sound.size(); ++at) {
      std::string damaged = sound;
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << at % 8));
      WriteFile(file, damaged);
      const absl::Status status = checkpoints->Load("", {}).status();
      ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << file << " flipped at " << at;
      ASSERT_THAT(Message(status), HasSubstr(file));
    }
    for (size_t size = 0; size < sound.size(); ++size) {
      WriteFile(file, sound.substr(0, size));
      const absl::Status status = checkpoints->Load(id, {}).status();
      ASSERT_EQ(status.code(), absl::StatusCode::kDataLoss) << file << " cut to " << size;
    }
    WriteFile(file, sound + "\n");
    ASSERT_EQ(checkpoints->Load("", {}).status().code(), absl::StatusCode::kDataLoss);
    WriteFile(file, sound);
    ASSERT_TRUE(checkpoints->Load("", {}).ok());
  }
}

TEST(Checkpoint, FindsMissingFiles) {
  const TemporaryDirectory directory;
  const auto checkpoints = Open(directory.path());
  for (const char* missing : {"/instances/a.safetensors", "/instances", "/manifest.json"}) {
    const std::string id = checkpoints->Save("manual", SomeInstances())->id;
    fs::remove_all(directory.File(id + missing));
    EXPECT_EQ(checkpoints->Load(id, {}).status().code(), absl::StatusCode::kDataLoss) << missing;
    EXPECT_FALSE(checkpoints->List()->front().sound) << missing;
  }
}

TEST(Checkpoint, FollowsNoLinksAndWaitsForNoPipe) {
  const TemporaryDirectory directory;
  const auto checkpoints = Open(directory.File("checkpoints"));
  const auto replaced = [&](const std::string& what, auto&& make) {
    const std::string id = checkpoints->Save("manual", SomeInstances())->id;
    const std::string path = directory.File("checkpoints/" + id + what);
    fs::rename(path, directory.File("elsewhere"));
    make(path);
    const absl::Status status = checkpoints->Load(id, {}).status();
    fs::remove_all(directory.File("elsewhere"));
    return status;
  };
  const auto link = [&](const std::string& path) {
    fs::create_symlink(directory.File("elsewhere"), path);
  };
  const auto pipe = [](const std::string& path) { ASSERT_EQ(mkfifo(path.c_str(), 0600), 0); };
  for (const char* what : {"", "/manifest.json", "/instances", "/instances/a.safetensors"}) {
    EXPECT_EQ(replaced(what, link).code(), absl::StatusCode::kDataLoss) << "link at " << what;
  }
  for (const char* what : {"/manifest.json", "/instances/a.safetensors"}) {
    EXPECT_EQ(replaced(what, pipe).code(), absl::StatusCode::kDataLoss) << "pipe at " << what;
  }
}

TEST(Checkpoint, RefusesIdsThatAreNone) {
  const TemporaryDirectory directory;
  const auto checkpoints = Open(directory.path());
  ASSERT_TRUE(checkpoints->Save("manual", SomeInstances()).ok());
  for (const char* id :
       {"..", ".", "/", "/etc", "../00000001-manual", "00000001-manual/", "00000001-manual/..",
        "00000001", "1-manual", "00000001-", "00000001-MANUAL", "00000001-manual\n",
        "+0000001-manual", "-0000001-manual", "000000001-manual", "99999999999999999999-manual",
        ".new-00000001-manual", "00000001-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}) {
    EXPECT_EQ(checkpoints->Load(id, {}).status().code(), absl::StatusCode::kInvalidArgument) << id;
  }
  EXPECT_EQ(checkpoints->Load(std::string_view("00000001-manual\0", 16), {}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(checkpoints->Load("00000002-manual", {}).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(checkpoints->Save("no/thing", {}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(checkpoints->Save("", {}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Checkpoint, IsNotFoundWhereThereIsNone) {
  const TemporaryDirectory directory;
  const auto checkpoints = Open(directory.path());
  EXPECT_EQ(checkpoints->Load("", {}).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(*checkpoints->List(), IsEmpty());
}

TEST(Checkpoint, RemovesWhatAnInterruptedSaveLeft) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(Open(directory.path())->Save("manual", SomeInstances()).ok());
  fs::create_directories(directory.File(".new-00000002-manual/instances"));
  WriteFile(directory.File(".new-00000002-manual/instances/a.safetensors"), "half");
  fs::create_directories(directory.File(".old-00000000-manual/instances"));
  WriteFile(directory.File("notes.txt"), "somebody's own");
  const auto checkpoints = Open(directory.path());
  EXPECT_THAT(EntriesOf(directory.path()), ElementsAre("00000001-manual", "notes.txt"));
  EXPECT_EQ(checkpoints->Save("manual", SomeInstances())->id, "00000002-manual");
}

TEST(Checkpoint, IsWholeOrNotThereAfterAKill) {
  const TemporaryDirectory directory;
  std::vector<StoredInstance> instances;
  for (int i = 0; i < 40; ++i) {
    instances.push_back({.state = Share(TrainedState(absl::StrCat("bn", i))), .requests = {}});
  }
  uint64_t saved = 0;
  for (int round = 0; round < 8; ++round) {
    int ready[2];
    ASSERT_EQ(pipe(ready), 0);
    const pid_t child = fork();
    if (child == 0) {
      auto checkpoints = Checkpoints::Open(directory.path(), 3);
      if (!checkpoints.ok()) _exit(1);
      for (;;) {
        if (!(*checkpoints)->Save("interval", instances).ok()) _exit(1);
        if (write(ready[1], "x", 1) != 1) _exit(1);
      }
    }
    close(ready[1]);
    char byte;
    for (int i = 0; i <= round % 3; ++i) saved += read(ready[0], &byte, 1) == 1 ? 1 : 0;
    usleep(static_cast<useconds_t>(1500 * round));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    close(ready[0]);
    const auto checkpoints = Open(directory.path(), 3);
    const auto loaded = checkpoints->Load("", {});
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_THAT(loaded->damaged, IsEmpty());
    EXPECT_EQ(loaded->instances.size(), 40u);
    for (const std::string& name : EntriesOf(directory.path())) {
      EXPECT_FALSE(name.starts_with(".")) << name;
    }
    uint64_t number = 0;
    ASSERT_TRUE(ParseGenerationId(loaded->info.id, &number));
    EXPECT_GE(number, saved);
  }
}

TEST(Checkpoint, LeavesNothingBehindWhereTheDiskIsFull) {
  const TemporaryDirectory directory;
  const auto before = SomeInstances(1);
  ASSERT_TRUE(Open(directory.path())->Save("manual", before).ok());
  // A limit on the size of files ends a write as a full disk does, for anybody.
  const pid_t child = fork();
  if (child == 0) {
    auto checkpoints = Checkpoints::Open(directory.path(), 1);
    if (!checkpoints.ok()) _exit(1);
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {20'000, 20'000};
    setrlimit(RLIMIT_FSIZE, &limit);
    auto instances = SomeInstances(2);
    instances.push_back({.state = Share(TrainedState("large", SampleLayer(4096))), .requests = {}});
    const absl::Status status = (*checkpoints)->Save("manual", instances).status();
    if (status.code() != absl::StatusCode::kResourceExhausted) _exit(2);
    if (Message(status).find("large.safetensors") == std::string::npos) _exit(3);
    if (EntriesOf(directory.path()) != std::vector<std::string>{"00000001-manual"}) _exit(4);
    const auto loaded = (*checkpoints)->Load("", {});
    if (!loaded.ok() || loaded->instances[0].state->version != 1) _exit(5);
    // With room again it goes on.
    if (!(*checkpoints)->Save("manual", SomeInstances(2)).ok()) _exit(6);
    checkpoints->reset();
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  ASSERT_EQ(status, 0) << "exit " << WEXITSTATUS(status);
  EXPECT_EQ(Open(directory.path())->Load("", {})->instances[0].state->version, 2u);
}

TEST(Checkpoint, IsRefusedToASecondServer) {
  const TemporaryDirectory directory;
  const auto checkpoints = Open(directory.path());
  const auto second = Checkpoints::Open(directory.path(), 5);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Message(second.status()), HasSubstr("in use by another normd"));
}

TEST(Checkpoint, RefusesADirectoryThatIsAFile) {
  const TemporaryDirectory directory;
  WriteFile(directory.File("file"), "");
  EXPECT_EQ(Checkpoints::Open(directory.File("file"), 5).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Checkpoints::Open(directory.path(), 0).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(Checkpoint, SavesAndLoadsSideBySide) {
  const TemporaryDirectory directory;
  const auto checkpoints = Open(directory.path(), 2);
  ASSERT_TRUE(checkpoints->Save("interval", SomeInstances()).ok());
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 2; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < 10; ++i) {
          EXPECT_TRUE(checkpoints->Save("interval", SomeInstances()).ok());
        }
      });
    }
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        const auto loaded = checkpoints->Load("", {});
        // One may be removed while it is read, but then a newer one is there.
        if (loaded.ok()) {
          EXPECT_EQ(loaded->instances.size(), 3u);
        } else {
          EXPECT_NE(loaded.status().code(), absl::StatusCode::kInternal);
        }
      }
    });
  }
  EXPECT_EQ(checkpoints->Load("", {})->info.id, "00000021-interval");
}

TEST(Manifest, SurvivesWritingAndParsing) {
  Manifest manifest{.id = "00000042-manual",
                    .create_time = absl::FromUnixNanos(1'900'000'000'123'456'789),
                    .reason = "manual",
                    .files = {}};
  EXPECT_EQ(*ParseManifest(WriteManifest(manifest)), manifest);
  for (const char* name : {"a", "b/c"}) {
    manifest.files.push_back(
        {.file = InstanceFileName(name), .instance = name, .bytes = 7, .sha256 = Sha256Hex(name)});
  }
  EXPECT_EQ(*ParseManifest(WriteManifest(manifest)), manifest);
}

TEST(Manifest, RefusesWhatLeadsOutOfItsFolderOrMakesNoSense) {
  const Manifest sound{
      .id = "00000042-manual",
      .create_time = absl::UnixEpoch(),
      .reason = "manual",
      .files = {{.file = "a.safetensors", .instance = "a", .bytes = 7, .sha256 = Sha256Hex("a")}}};
  ASSERT_TRUE(ParseManifest(WriteManifest(sound)).ok());
  for (const char* file : {"../a", "a/b", "..", ".", "", "a b", "a\n"}) {
    Manifest manifest = sound;
    manifest.files[0].file = file;
    EXPECT_EQ(ParseManifest(WriteManifest(manifest)).status().code(), absl::StatusCode::kDataLoss)
        << file;
  }
  const auto refused = [&](auto&& edit) {
    Manifest manifest = sound;
    edit(manifest);
    return ParseManifest(WriteManifest(manifest)).status().code() == absl::StatusCode::kDataLoss;
  };
  EXPECT_TRUE(refused([](Manifest& m) { m.files[0].instance = "../a"; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.files[0].bytes = -1; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.files[0].bytes = int64_t{1} << 62; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.files[0].sha256 = "abc"; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.files.push_back(m.files[0]); }));
  EXPECT_TRUE(refused([](Manifest& m) { m.id = "../../etc"; }));
  EXPECT_TRUE(refused([](Manifest& m) { m.reason = "interval"; }));
  const std::string newer = [&] {
    std::string text = WriteManifest(sound);
    text.resize(text.size() - 65);
    text.replace(text.find("\"version\":1"), 11, "\"version\":2");
    return text + Sha256Hex(text) + "\n";
  }();
  EXPECT_THAT(Message(ParseManifest(newer).status()), HasSubstr("newer normd"));
}

}  // namespace
}  // namespace normd
