#include "server/state/checkpoints.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <limits>
#include <optional>
#include <utility>

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "server/state/files.h"
#include "server/state/instance_codec.h"
#include "server/state/manifest.h"
#include "server/state/parallel.h"
#include "server/state/sha256.h"

namespace normd {
namespace {

constexpr char kManifestName[] = "manifest.json";
// Names that no generation has: what is being written, and what is being removed.
// Either is rubbish once its maker is gone.
constexpr std::string_view kUnfinishedPrefix = ".new-";
constexpr std::string_view kRemovedPrefix = ".old-";

constexpr size_t kMaxManifestBytes = size_t{4} << 30;
// Past this many files one sync of the file system is cheaper than one of each.
constexpr size_t kSyncEachFile = 64;

// A file that is gone or cannot be read makes a checkpoint damaged; what is wrong
// with the machine (too many open files, say) does not.
absl::Status AsDamage(const absl::Status& status) {
  if (absl::IsNotFound(status) || absl::IsFailedPrecondition(status)) {
    return absl::DataLossError(status.message());
  }
  return status;
}

CheckpointInfo InfoOf(const Manifest& manifest, size_t manifest_bytes) {
  CheckpointInfo info;
  info.id = manifest.id;
  info.create_time = manifest.create_time;
  info.reason = manifest.reason;
  info.instance_count = static_cast<int64_t>(manifest.files.size());
  info.total_bytes = static_cast<int64_t>(manifest_bytes);
  for (const ManifestFile& file : manifest.files) info.total_bytes += file.bytes;
  return info;
}

absl::Status NoCheckpoint(std::string_view what) { return absl::NotFoundError(std::string(what)); }

class DirectoryCheckpoints : public Checkpoints {
 public:
  DirectoryCheckpoints(std::string path, Descriptor directory, int keep)
      : path_(std::move(path)), directory_(std::move(directory)), keep_(keep) {}

  absl::Status Prepare();

  absl::StatusOr<CheckpointInfo> Save(std::string_view reason,
                                      absl::Span<const StoredInstance> instances) override;
  absl::StatusOr<LoadedCheckpoint> Load(std::string_view id,
                                        absl::Span<const std::string> names) override;
  absl::StatusOr<std::vector<CheckpointInfo>> List() override;

 private:
  struct Generation {
    uint64_t number;
    std::string id;
  };
  // A generation whose manifest is sound.
  struct Opened {
    Descriptor directory;
    Descriptor instances;
    Manifest manifest;
    CheckpointInfo info;
  };

  std::string PathOf(std::string_view name) const { return fmt::format("{}/{}", path_, name); }
  std::string PathOf(std::string_view id, std::string_view file) const {
    return fmt::format("{}/{}/{}/{}", path_, id, kInstancesFolder, file);
  }

  absl::StatusOr<std::vector<std::string>> Names() const;
  // Newest first.
  absl::StatusOr<std::vector<Generation>> Generations() const;

  absl::StatusOr<Manifest> Write(const std::string& unfinished, std::string_view id,
                                 std::string_view reason,
                                 absl::Span<const StoredInstance> instances) const;
  void RemoveOldest();

  absl::StatusOr<Opened> Open(const std::string& id) const;
  absl::Status CheckSizes(const Opened& opened) const;
  // Verifies all files and decodes the wanted ones.
  absl::StatusOr<std::vector<StoredInstance>> Read(const Opened& opened,
                                                   absl::Span<const std::string> names) const;

  const std::string path_;
  const Descriptor directory_;
  const size_t keep_;
  absl::Mutex save_mutex_;
  uint64_t next_number_ ABSL_GUARDED_BY(save_mutex_) = 1;
};

absl::Status DirectoryCheckpoints::Prepare() {
  // Two savers would number alike and remove each other's work. The kernel lets go
  // of the lock when the process ends, however it ends.
  if (flock(directory_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return ErrnoStatus(errno, "cannot lock", path_);
    return absl::FailedPreconditionError(fmt::format(
        "{} is in use by another normd: stop that one, or give this one its own directory", path_));
  }
  absl::StatusOr<std::vector<std::string>> names = Names();
  if (!names.ok()) return names.status();
  for (const std::string& name : *names) {
    if (!name.starts_with(kUnfinishedPrefix) && !name.starts_with(kRemovedPrefix)) continue;
    spdlog::warn("removing {}, which an interrupted save left", PathOf(name));
    absl::Status status = RemoveTree(directory_.get(), name, PathOf(name));
    if (!status.ok()) return status;
  }
  absl::StatusOr<std::vector<Generation>> generations = Generations();
  if (!generations.ok()) return generations.status();
  absl::MutexLock lock(&save_mutex_);
  if (!generations->empty()) next_number_ = generations->front().number + 1;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> DirectoryCheckpoints::Names() const {
  // Opened anew: a duplicate would share its position with other listings.
  absl::StatusOr<Descriptor> opened = OpenDirectory(directory_.get(), ".", path_);
  if (!opened.ok()) return opened.status();
  const int fd = fcntl(opened->get(), F_DUPFD_CLOEXEC, 0);
  std::unique_ptr<DIR, int (*)(DIR*)> entries(fdopendir(fd), closedir);
  if (entries == nullptr) return ErrnoStatus(errno, "cannot read the directory", path_);
  std::vector<std::string> names;
  while (const dirent* entry = readdir(entries.get())) names.emplace_back(entry->d_name);
  return names;
}

absl::StatusOr<std::vector<DirectoryCheckpoints::Generation>> DirectoryCheckpoints::Generations()
    const {
  absl::StatusOr<std::vector<std::string>> names = Names();
  if (!names.ok()) return names.status();
  std::vector<Generation> generations;
  for (std::string& name : *names) {
    uint64_t number;
    if (ParseGenerationId(name, &number)) generations.push_back({number, std::move(name)});
  }
  std::sort(generations.begin(), generations.end(), [](const Generation& a, const Generation& b) {
    return std::tie(a.number, a.id) > std::tie(b.number, b.id);
  });
  return generations;
}

absl::StatusOr<CheckpointInfo> DirectoryCheckpoints::Save(
    std::string_view reason, absl::Span<const StoredInstance> instances) {
  if (!ValidReason(reason)) {
    return absl::InvalidArgumentError(
        fmt::format("the reason \"{}\" of a checkpoint is not 1 to 32 of [a-z0-9_]", reason));
  }
  absl::MutexLock lock(&save_mutex_);
  const std::string id = MakeGenerationId(next_number_, reason);
  const std::string unfinished = fmt::format("{}{}", kUnfinishedPrefix, id);
  absl::StatusOr<Manifest> manifest = Write(unfinished, id, reason, instances);
  absl::Status status = manifest.status();
  // Whole and synced under its temporary name, it may be seen now; and it is there
  // for good once the directory that names it is synced too.
  std::string left = unfinished;
  if (status.ok()) {
    if (renameat2(directory_.get(), unfinished.c_str(), directory_.get(), id.c_str(),
                  RENAME_NOREPLACE) != 0) {
      status = ErrnoStatus(errno, "cannot rename into place", PathOf(id));
    } else {
      left = id;
      status = SyncDirectory(directory_.get(), path_);
    }
  }
  if (!status.ok()) {
    if (absl::Status removed = RemoveTree(directory_.get(), left, PathOf(left)); !removed.ok()) {
      spdlog::warn("a checkpoint that failed was left behind: {}", std::string(removed.message()));
    }
    return status;
  }
  ++next_number_;
  RemoveOldest();
  CheckpointInfo info = InfoOf(*manifest, WriteManifest(*manifest).size());
  return info;
}

absl::StatusOr<Manifest> DirectoryCheckpoints::Write(
    const std::string& unfinished, std::string_view id, std::string_view reason,
    absl::Span<const StoredInstance> instances) const {
  const auto make_directory = [](int parent, const char* name,
                                 const std::string& path) -> absl::StatusOr<Descriptor> {
    if (mkdirat(parent, name, 0755) != 0) {
      return ErrnoStatus(errno, "cannot make the directory", path);
    }
    return OpenDirectory(parent, name, path);
  };
  const std::string path = PathOf(unfinished);
  absl::StatusOr<Descriptor> generation =
      make_directory(directory_.get(), unfinished.c_str(), path);
  if (!generation.ok()) return generation.status();
  const std::string folder_path = fmt::format("{}/{}", path, kInstancesFolder);
  absl::StatusOr<Descriptor> folder =
      make_directory(generation->get(), kInstancesFolder, folder_path);
  if (!folder.ok()) return folder.status();

  std::vector<const StoredInstance*> by_name;
  by_name.reserve(instances.size());
  for (const StoredInstance& instance : instances) by_name.push_back(&instance);
  std::sort(by_name.begin(), by_name.end(), [](const StoredInstance* a, const StoredInstance* b) {
    return a->state->identity->name < b->state->identity->name;
  });

  const bool sync_each = instances.size() <= kSyncEachFile;
  Manifest manifest;
  manifest.id = id;
  manifest.create_time = absl::Now();
  manifest.reason = reason;
  manifest.files.resize(by_name.size());
  absl::Status status = ParallelFor(by_name.size(), [&](size_t i) {
    const std::string& name = by_name[i]->state->identity->name;
    const std::string bytes = EncodeInstance(*by_name[i]);
    manifest.files[i] = {.file = InstanceFileName(name),
                         .instance = name,
                         .bytes = static_cast<int64_t>(bytes.size()),
                         .sha256 = Sha256Hex(bytes)};
    const std::string& file = manifest.files[i].file;
    return WriteNewFile(folder->get(), file, bytes, sync_each, PathOf(unfinished, file));
  });
  if (!status.ok()) return status;
  status = WriteNewFile(generation->get(), kManifestName, WriteManifest(manifest), sync_each,
                        fmt::format("{}/{}", path, kManifestName));
  if (!status.ok()) return status;
  if (!sync_each) status = SyncFileSystem(generation->get(), path);
  if (status.ok()) status = SyncDirectory(folder->get(), folder_path);
  if (status.ok()) status = SyncDirectory(generation->get(), path);
  if (!status.ok()) return status;
  return manifest;
}

void DirectoryCheckpoints::RemoveOldest() {
  absl::StatusOr<std::vector<Generation>> generations = Generations();
  absl::Status status = generations.status();
  for (size_t i = keep_; status.ok() && i < generations->size(); ++i) {
    const std::string& id = (*generations)[i].id;
    // Renamed first: half removed it would look damaged.
    const std::string removed = fmt::format("{}{}", kRemovedPrefix, id);
    if (renameat(directory_.get(), id.c_str(), directory_.get(), removed.c_str()) != 0) {
      status = ErrnoStatus(errno, "cannot rename", PathOf(id));
    } else {
      status = RemoveTree(directory_.get(), removed, PathOf(removed));
    }
  }
  if (!status.ok()) {
    spdlog::warn("old checkpoints were not all removed: {}", std::string(status.message()));
  }
}

absl::StatusOr<DirectoryCheckpoints::Opened> DirectoryCheckpoints::Open(
    const std::string& id) const {
  Opened opened;
  absl::StatusOr<Descriptor> directory = OpenDirectory(directory_.get(), id, PathOf(id));
  // Gone altogether is not damaged.
  if (absl::IsNotFound(directory.status())) {
    return NoCheckpoint(fmt::format("there is no checkpoint {} in {}", id, path_));
  }
  if (!directory.ok()) return AsDamage(directory.status());
  opened.directory = *std::move(directory);

  const std::string manifest_path = fmt::format("{}/{}", PathOf(id), kManifestName);
  absl::StatusOr<std::string> text =
      ReadWholeFile(opened.directory.get(), kManifestName, kMaxManifestBytes, manifest_path);
  if (!text.ok()) return AsDamage(text.status());
  absl::StatusOr<Manifest> manifest = ParseManifest(*text);
  if (!manifest.ok()) {
    return absl::DataLossError(
        fmt::format("{}: {}", manifest_path, std::string(manifest.status().message())));
  }
  if (manifest->id != id) {
    return absl::DataLossError(
        fmt::format("{}: it is the manifest of {}", manifest_path, manifest->id));
  }
  absl::StatusOr<Descriptor> instances =
      OpenDirectory(opened.directory.get(), kInstancesFolder, PathOf(id));
  if (!instances.ok()) return AsDamage(instances.status());
  opened.instances = *std::move(instances);
  opened.manifest = *std::move(manifest);

  opened.info = InfoOf(opened.manifest, text->size());
  return opened;
}

absl::Status DirectoryCheckpoints::CheckSizes(const Opened& opened) const {
  for (const ManifestFile& file : opened.manifest.files) {
    struct stat info;
    if (fstatat(opened.instances.get(), file.file.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0) {
      return AsDamage(ErrnoStatus(errno, "cannot find", PathOf(opened.info.id, file.file)));
    }
    if (!S_ISREG(info.st_mode) || info.st_size != file.bytes) {
      return absl::DataLossError(fmt::format("{}: {} bytes where the manifest says {}",
                                             PathOf(opened.info.id, file.file), info.st_size,
                                             file.bytes));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<StoredInstance>> DirectoryCheckpoints::Read(
    const Opened& opened, absl::Span<const std::string> names) const {
  const std::vector<ManifestFile>& files = opened.manifest.files;
  // Where in the answer a file's instance goes; the files are in order of names.
  constexpr size_t kUnwanted = std::numeric_limits<size_t>::max();
  std::vector<size_t> place(files.size(), names.empty() ? 0 : kUnwanted);
  for (const std::string& name : names) {
    const auto file = std::lower_bound(
        files.begin(), files.end(), name,
        [](const ManifestFile& a, const std::string& b) { return a.instance < b; });
    if (file == files.end() || file->instance != name) {
      return absl::NotFoundError(
          fmt::format("there is no instance \"{}\" in checkpoint {}", name, opened.info.id));
    }
    place[static_cast<size_t>(file - files.begin())] = 0;
  }
  size_t wanted = 0;
  for (size_t& at : place) {
    if (at != kUnwanted) at = wanted++;
  }

  std::vector<StoredInstance> instances(wanted);
  absl::Status status = ParallelFor(files.size(), [&](size_t i) {
    const ManifestFile& file = files[i];
    const std::string path = PathOf(opened.info.id, file.file);
    absl::StatusOr<std::string> bytes =
        ReadWholeFile(opened.instances.get(), file.file, static_cast<size_t>(file.bytes), path);
    if (!bytes.ok()) return AsDamage(bytes.status());
    if (static_cast<int64_t>(bytes->size()) != file.bytes || Sha256Hex(*bytes) != file.sha256) {
      return absl::DataLossError(
          fmt::format("{}: its bytes are not those that were saved (SHA-256)", path));
    }
    if (place[i] == kUnwanted) return absl::OkStatus();
    absl::StatusOr<StoredInstance> instance = DecodeInstance(*bytes);
    if (!instance.ok()) {
      return absl::DataLossError(
          fmt::format("{}: {}", path, std::string(instance.status().message())));
    }
    if (instance->state->identity->name != file.instance) {
      return absl::DataLossError(fmt::format("{}: it holds another instance, \"{}\"", path,
                                             instance->state->identity->name));
    }
    instances[place[i]] = *std::move(instance);
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return instances;
}

absl::StatusOr<LoadedCheckpoint> DirectoryCheckpoints::Load(std::string_view id,
                                                            absl::Span<const std::string> names) {
  std::vector<Generation> candidates;
  if (id.empty()) {
    absl::StatusOr<std::vector<Generation>> generations = Generations();
    if (!generations.ok()) return generations.status();
    candidates = *std::move(generations);
  } else {
    uint64_t number;
    if (!ParseGenerationId(id, &number)) {
      return absl::InvalidArgumentError(
          fmt::format("\"{}\" is no checkpoint id: they look like 00000042-manual", id));
    }
    candidates.push_back({number, std::string(id)});
  }

  LoadedCheckpoint loaded;
  absl::Status newest_damage;
  for (const Generation& generation : candidates) {
    absl::StatusOr<Opened> opened = Open(generation.id);
    absl::Status status = opened.status();
    if (opened.ok()) {
      absl::StatusOr<std::vector<StoredInstance>> instances = Read(*opened, names);
      if (instances.ok()) {
        loaded.info = std::move(opened->info);
        loaded.instances = *std::move(instances);
        return loaded;
      }
      status = instances.status();
    }
    // Removed by a save since it was listed.
    if (id.empty() && !opened.ok() && absl::IsNotFound(status)) continue;
    if (!absl::IsDataLoss(status) || !id.empty()) return status;
    spdlog::error("checkpoint {} is damaged: {}", generation.id, std::string(status.message()));
    if (newest_damage.ok()) newest_damage = status;
    CheckpointInfo damaged;
    if (opened.ok()) damaged = std::move(opened->info);
    damaged.id = generation.id;
    damaged.sound = false;
    damaged.problem = std::string(status.message());
    loaded.damaged.push_back(std::move(damaged));
  }
  if (!newest_damage.ok()) return newest_damage;
  return NoCheckpoint(fmt::format("there is no checkpoint in {}", path_));
}

absl::StatusOr<std::vector<CheckpointInfo>> DirectoryCheckpoints::List() {
  absl::StatusOr<std::vector<Generation>> generations = Generations();
  if (!generations.ok()) return generations.status();
  std::vector<CheckpointInfo> list;
  for (const Generation& generation : *generations) {
    CheckpointInfo info;
    absl::StatusOr<Opened> opened = Open(generation.id);
    absl::Status status = opened.status();
    if (opened.ok()) {
      info = opened->info;
      status = CheckSizes(*opened);
    } else if (absl::IsNotFound(status)) {
      continue;  // removed by a save since it was listed
    }
    info.id = generation.id;
    info.sound = status.ok();
    if (!status.ok()) info.problem = std::string(status.message());
    list.push_back(std::move(info));
  }
  return list;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoints>> Checkpoints::Open(const std::string& directory,
                                                               int keep) {
  if (keep < 1) {
    return absl::InvalidArgumentError(
        fmt::format("{} checkpoints cannot be kept: 1 or more", keep));
  }
  if (absl::Status status = MakeDirectories(directory); !status.ok()) return status;
  absl::StatusOr<Descriptor> opened = OpenDirectory(AT_FDCWD, directory, directory);
  if (!opened.ok()) return opened.status();
  auto checkpoints = std::make_unique<DirectoryCheckpoints>(directory, *std::move(opened), keep);
  if (absl::Status status = checkpoints->Prepare(); !status.ok()) return status;
  return checkpoints;
}

}  // namespace normd
