#include "server/auth/caller.h"

#include <algorithm>

#include "absl/strings/match.h"

namespace normd {

const char* NameOf(Role role) {
  switch (role) {
    case Role::kReader: return "reader";
    case Role::kUser: return "user";
    case Role::kAdmin: return "admin";
  }
  return "";
}

Caller::Caller(std::string name, std::vector<Grant> grants)
    : name_(std::move(name)), grants_(std::move(grants)) {
  std::sort(grants_.begin(), grants_.end(),
            [](const Grant& a, const Grant& b) { return a.prefix < b.prefix; });
}

bool Caller::May(Role role, absl::string_view instance) const {
  return std::any_of(grants_.begin(), grants_.end(), [&](const Grant& grant) {
    return grant.role >= role && absl::StartsWith(instance, grant.prefix);
  });
}

bool Caller::MayOnAll(Role role) const { return May(role, ""); }

bool Caller::MaySomewhere(Role role) const {
  return std::any_of(grants_.begin(), grants_.end(),
                     [&](const Grant& grant) { return grant.role >= role; });
}

std::vector<std::string> Caller::Visible(Role role, absl::string_view prefix) const {
  std::vector<std::string> visible;
  for (const Grant& grant : grants_) {
    if (grant.role < role) continue;
    // One of the two begins with the other, or they share no name.
    if (absl::StartsWith(prefix, grant.prefix)) return {std::string(prefix)};
    if (!absl::StartsWith(grant.prefix, prefix)) continue;
    // In the order of prefixes, what covers this one came right before it.
    if (!visible.empty() && absl::StartsWith(grant.prefix, visible.back())) continue;
    visible.push_back(grant.prefix);
  }
  return visible;
}

}  // namespace normd
