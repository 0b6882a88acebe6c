#include "server/instance/request_log.h"

#include <algorithm>

namespace normd {

std::optional<AppliedRequest> RequestLog::Find(absl::uint128 id, absl::Time now) const {
  // Newest first: a retry follows soon.
  const auto it = std::find_if(entries_.rbegin(), entries_.rend(),
                               [id](const AppliedRequest& entry) { return entry.id == id; });
  if (it == entries_.rend() || now - it->time > kKeep) return std::nullopt;
  return *it;
}

void RequestLog::Add(const AppliedRequest& request) {
  // Trimmed when twice full, so that each entry is moved once on average.
  if (entries_.size() >= 2 * kCapacity) {
    entries_.erase(entries_.begin(), entries_.end() - (kCapacity - 1));
  }
  entries_.push_back(request);
}

void RequestLog::NoneAfter(absl::Time now) {
  for (AppliedRequest& entry : entries_) entry.time = std::min(entry.time, now);
}

void RequestLog::DropAfter(uint64_t version) {
  while (!entries_.empty() && entries_.back().version > version) entries_.pop_back();
}

}  // namespace normd
