#include "server/registry/saved_contexts.h"

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "server/clock.h"
#include "server/error/error.h"

namespace normd {
namespace {

absl::Status ContextError(absl::StatusCode code, const std::string& id, absl::string_view what,
                          absl::string_view allowed) {
  return FieldError(code, "context_id", id, allowed,
                    absl::StrCat("context_id ", what, "; allowed: ", allowed));
}

}  // namespace

SavedContexts::Lease::~Lease() {
  if (contexts_ != nullptr) contexts_->Release(id_, /*committed=*/false, /*retain=*/false);
}

void SavedContexts::Lease::Commit(bool retain) {
  std::exchange(contexts_, nullptr)->Release(id_, /*committed=*/true, retain);
}

absl::StatusOr<MemoryClaim> SavedContexts::Claim(int64_t bytes) {
  absl::MutexLock lock(&mutex_);
  absl::StatusOr<MemoryClaim> claim = budget_->Claim(bytes);
  if (!claim.ok() && bytes <= budget_->limit()) {
    DropExpired(SteadyNow());
    claim = budget_->Claim(bytes);
    while (!claim.ok() && DropOneSpent()) claim = budget_->Claim(bytes);
  }
  if (!claim.ok()) return ForField(claim.status(), "save_for_backward");
  return claim;
}

std::string SavedContexts::Put(SavedForward forward, MemoryClaim claim) {
  Entry entry{.uid = forward.uid, .expires = SteadyNow() + ttl_};
  entry.claim = std::move(claim);
  entry.forward = std::make_shared<const SavedForward>(std::move(forward));
  absl::BitGen bits;
  std::string id =
      absl::StrFormat("%016x%016x", absl::Uniform<uint64_t>(bits), absl::Uniform<uint64_t>(bits));
  absl::MutexLock lock(&mutex_);
  entries_.emplace(id, std::move(entry));
  return id;
}

absl::StatusOr<SavedContexts::Lease> SavedContexts::Use(const std::string& id,
                                                        const std::string& uid,
                                                        std::optional<absl::uint128> request_id) {
  absl::MutexLock lock(&mutex_);
  const auto it = entries_.find(id);
  if (it == entries_.end() || it->second.uid != uid || it->second.expires <= SteadyNow()) {
    return ContextError(absl::StatusCode::kNotFound, id, "names no context of this instance",
                        "what a Forward with save_for_backward returned, within --context_ttl");
  }
  Entry& entry = it->second;
  const bool own_retry =
      entry.spent && entry.forward != nullptr && request_id.has_value() && entry.user == request_id;
  if (entry.in_use || (entry.spent && !own_retry)) {
    return ContextError(absl::StatusCode::kFailedPrecondition, id,
                        entry.in_use ? "is under use by another Backward" : "was used before",
                        "one Backward a context, unless each sets retain_context");
  }
  entry.in_use = true;
  entry.user = request_id;
  return Lease(this, id, entry.forward);
}

void SavedContexts::Release(const std::string& id, bool committed, bool retain) {
  absl::MutexLock lock(&mutex_);
  const auto it = entries_.find(id);
  if (it == entries_.end()) return;  // expired meanwhile
  Entry& entry = it->second;
  entry.in_use = false;
  if (!committed || retain) return;
  entry.spent = true;
  if (!entry.user.has_value()) {  // nobody can retry
    entry.forward = nullptr;
    entry.claim = MemoryClaim();
  }
}

bool SavedContexts::DropOneSpent() {
  Entry* oldest = nullptr;
  for (auto& [id, entry] : entries_) {
    if (!entry.spent || entry.in_use || entry.forward == nullptr) continue;
    if (oldest == nullptr || entry.expires < oldest->expires) oldest = &entry;
  }
  if (oldest == nullptr) return false;
  oldest->forward = nullptr;
  oldest->claim = MemoryClaim();
  return true;
}

void SavedContexts::Drop(const std::string& id) {
  absl::MutexLock lock(&mutex_);
  entries_.erase(id);
}

void SavedContexts::DropOf(const std::string& uid) {
  absl::MutexLock lock(&mutex_);
  absl::erase_if(entries_, [&uid](auto& entry) {
    if (entry.second.uid != uid) return false;
    entry.second.expires = absl::InfinitePast();  // where a Backward still uses it
    return !entry.second.in_use;
  });
}

void SavedContexts::Sweep() {
  absl::MutexLock lock(&mutex_);
  DropExpired(SteadyNow());
}

void SavedContexts::DropExpired(absl::Time now) {
  absl::erase_if(entries_, [now](const auto& entry) {
    return entry.second.expires <= now && !entry.second.in_use;
  });
}

}  // namespace normd
