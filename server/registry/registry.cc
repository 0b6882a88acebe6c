#include "server/registry/registry.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/time/clock.h"
#include "server/clock.h"
#include "server/error/error.h"

namespace normd {
namespace {

absl::Status NoSuchInstance(absl::string_view name) {
  return FieldError(absl::StatusCode::kNotFound, "name", name,
                    "the name of an instance; ListInstances lists them",
                    absl::StrCat("there is no instance named \"", name, "\""));
}

absl::Status NameTaken(absl::string_view name) {
  return FieldError(absl::StatusCode::kAlreadyExists, "name", name, "a name that is not taken",
                    absl::StrCat("an instance named \"", name, "\" exists already"));
}

}  // namespace

void Registry::Restore(StoredInstance stored) {
  std::string name = stored.state->identity->name;
  auto instance = Instance::Restored(persister_, std::move(stored));
  absl::MutexLock lock(&mutex_);
  instances_.insert_or_assign(std::move(name), std::move(instance));
}

void Registry::Restore(Tombstone tombstone) {
  // Of a clock that was set back since.
  tombstone.request.time = std::min(tombstone.request.time, SteadyNow());
  Remember(std::move(tombstone));
}

void Registry::Remember(Tombstone tombstone) {
  absl::MutexLock lock(&mutex_);
  const absl::Time oldest = SteadyNow() - RequestLog::kKeep;
  // Swept as it grows, so that it holds no more than ten minutes of removals.
  if (tombstones_.size() >= 1024 && (tombstones_.size() & (tombstones_.size() - 1)) == 0) {
    absl::erase_if(tombstones_, [&](const auto& entry) { return entry.second.time < oldest; });
  }
  if (tombstone.request.time >= oldest) {
    tombstones_.insert_or_assign(std::move(tombstone.name), tombstone.request);
  }
}

std::optional<AppliedRequest> Registry::FindRemoval(const std::string& name,
                                                    std::optional<absl::uint128> request_id) const {
  if (!request_id.has_value()) return std::nullopt;
  absl::ReaderMutexLock lock(&mutex_);
  const auto it = tombstones_.find(name);
  if (it == tombstones_.end() || it->second.id != *request_id ||
      SteadyNow() - it->second.time > RequestLog::kKeep) {
    return std::nullopt;
  }
  return it->second;
}

void Registry::Create(const std::string& name, const Layer& layer, Mode mode,
                      std::optional<absl::uint128> request_id, ChangeDone done) {
  auto identity = std::make_shared<const Identity>(
      Identity{.name = name, .uid = NewUid(), .layer = layer, .create_time = absl::Now()});
  StoredInstance initial{std::make_shared<const InstanceState>(InitialState(identity, mode)), {}};
  if (request_id.has_value()) {
    initial.requests.push_back(
        {.id = *request_id, .method = Method::kCreate, .version = 1, .time = SteadyNow()});
  }
  auto instance = std::make_shared<Instance>(persister_, initial);

  std::shared_ptr<Instance> taken;
  int64_t count = 0;
  {
    absl::MutexLock lock(&mutex_);
    count = static_cast<int64_t>(instances_.size());
    if (const auto it = instances_.find(name); it != instances_.end()) {
      taken = it->second;
    } else if (count < max_instances_) {
      instances_.emplace(name, instance);
    }
  }
  if (taken != nullptr) {
    // Answered by the instance that is there, if this very call made it.
    taken->Change(
        {.method = Method::kCreate, .request_id = request_id},
        [&](InstanceState&) -> absl::StatusOr<Edited> { return NameTaken(name); },
        [name, done = std::move(done)](absl::StatusOr<Changed> changed) mutable {
          const bool gone = absl::IsNotFound(changed.status());  // being made or removed
          done(gone ? NameTaken(name) : std::move(changed));
        });
    return;
  }
  if (count >= max_instances_) {
    return done(LimitExceeded("name",
                              absl::StrCat("one instance more than the ", count, " there are"),
                              max_instances_, "--max_instances"));
  }
  instance->Create([this, name, instance, done = std::move(done)](absl::Status status) mutable {
    const Snapshot state = instance->published();
    if (!status.ok()) {
      Erase(name, instance.get());
      return done(status);
    }
    done(Changed{.version = 1, .state = state});
  });
}

absl::StatusOr<std::shared_ptr<Instance>> Registry::Find(absl::string_view name) const {
  absl::ReaderMutexLock lock(&mutex_);
  const auto it = instances_.find(name);
  if (it == instances_.end()) return NoSuchInstance(name);
  return it->second;
}

absl::StatusOr<Snapshot> Registry::Published(absl::string_view name) const {
  const auto instance = Find(name);
  if (!instance.ok()) return instance.status();
  Snapshot state = (*instance)->published();
  if (state == nullptr) return NoSuchInstance(name);
  return state;
}

void Registry::Delete(const std::string& name, const ChangeOptions& options, ChangeDone done) {
  if (const auto removal = FindRemoval(name, options.request_id)) {
    return done(Changed{.version = removal->version, .replayed = true});
  }
  const absl::StatusOr<std::shared_ptr<Instance>> found = Find(name);
  if (!found.ok()) return done(found.status());
  (*found)->Remove(options, [this, instance = *found, name, id = options.request_id,
                             done = std::move(done)](absl::StatusOr<Changed> changed) mutable {
    if (changed.ok()) {
      Erase(name, instance.get());
      if (id.has_value()) {
        Remember({.name = name,
                  .request = {.id = *id,
                              .method = Method::kDelete,
                              .version = changed->version,
                              .time = SteadyNow()}});
      }
    }
    done(std::move(changed));
  });
}

void Registry::Erase(const std::string& name, const Instance* instance) {
  absl::MutexLock lock(&mutex_);
  const auto it = instances_.find(name);
  if (it != instances_.end() && it->second.get() == instance) instances_.erase(it);
}

std::vector<Snapshot> Registry::List(absl::string_view prefix, absl::string_view after,
                                     size_t limit, bool* more) const {
  std::vector<Snapshot> page;
  *more = false;
  absl::ReaderMutexLock lock(&mutex_);
  auto it = after >= prefix && !after.empty() ? instances_.upper_bound(after)
                                              : instances_.lower_bound(prefix);
  for (; it != instances_.end() && absl::StartsWith(it->first, prefix); ++it) {
    Snapshot state = it->second->published();
    if (state == nullptr) continue;
    if (page.size() == limit) {
      *more = true;
      break;
    }
    page.push_back(std::move(state));
  }
  return page;
}

std::vector<StoredInstance> Registry::ForCheckpoint() const {
  std::vector<StoredInstance> all;
  absl::ReaderMutexLock lock(&mutex_);
  all.reserve(instances_.size());
  for (const auto& [name, instance] : instances_) {
    StoredInstance stored = instance->ForCheckpoint();
    if (stored.state != nullptr) all.push_back(std::move(stored));
  }
  return all;
}

absl::StatusOr<std::vector<uint64_t>> Registry::Load(absl::Span<const StoredInstance> instances) {
  // Room for all the new ones before the first is made.
  int64_t made = 0;
  for (const StoredInstance& loaded : instances) {
    if (!Find(loaded.state->identity->name).ok()) ++made;
  }
  if (const int64_t total = size() + made; total > max_instances_) {
    return LimitExceeded("names", absl::StrCat(total, " instances after loading"), max_instances_,
                         "--max_instances");
  }
  std::vector<absl::StatusOr<uint64_t>> versions(instances.size(), 0);
  absl::BlockingCounter left(static_cast<int>(instances.size()));
  for (size_t i = 0; i < instances.size(); ++i) {
    const StoredInstance& loaded = instances[i];
    const std::string& name = loaded.state->identity->name;
    auto fresh = std::make_shared<Instance>(persister_, loaded);
    std::shared_ptr<Instance> living;
    {
      absl::MutexLock lock(&mutex_);
      const auto [it, inserted] = instances_.try_emplace(name, fresh);
      if (!inserted) living = it->second;
    }
    if (living != nullptr) {
      living->Replace(loaded, [&, i](absl::StatusOr<Changed> changed) {
        if (changed.ok()) {
          versions[i] = changed->version;
        } else {
          versions[i] = changed.status();
        }
        left.DecrementCount();
      });
    } else {
      fresh->Create([&, i, fresh](const absl::Status& status) {
        if (status.ok()) {
          versions[i] = loaded.state->version;
        } else {
          Erase(loaded.state->identity->name, fresh.get());
          versions[i] = status;
        }
        left.DecrementCount();
      });
    }
  }
  left.Wait();
  std::vector<uint64_t> result;
  result.reserve(versions.size());
  for (absl::StatusOr<uint64_t>& version : versions) {
    if (!version.ok()) return version.status();
    result.push_back(*version);
  }
  return result;
}

int64_t Registry::size() const {
  absl::ReaderMutexLock lock(&mutex_);
  return static_cast<int64_t>(instances_.size());
}

}  // namespace normd
