// The word that somebody may have meant.
#ifndef NORMD_CLIENT_NORMCTL_SUGGEST_H_
#define NORMD_CLIENT_NORMCTL_SUGGEST_H_

#include <string>
#include <string_view>
#include <vector>

namespace normd::normctl {

// The candidate with the fewest letters wrong; empty where even that one differs
// in more than a third of them.
std::string Nearest(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_SUGGEST_H_
