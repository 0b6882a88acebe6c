// Values as people and as programs read them.
#ifndef NORMD_CLIENT_NORMCTL_OUTPUT_H_
#define NORMD_CLIENT_NORMCTL_OUTPUT_H_

#include <string>
#include <vector>

#include "absl/time/time.h"
#include "client/normctl/command.h"
#include "client/normd_client.h"

namespace normd::normctl {

// Columns as wide as their widest cell; the first row is the header.
std::string Table(const std::vector<std::vector<std::string>>& rows);
// "name:  value" lines, values aligned.
std::string Facts(const std::vector<std::pair<std::string, std::string>>& facts);

std::string HumanBytes(double bytes);                     // "12.8 MB"
std::string HumanShape(absl::Span<const int64_t> shape);  // "(8, 64, 56, 56)"
std::string HumanTime(absl::Time time);                   // "2023-11-14 22:13:20 UTC"
std::string HumanTensor(const Tensor& tensor);            // "float32 (8, 64, 56, 56), 12.8 MB"
std::string HumanVersion(const Changed& changed);         // "version 7", "version 7 (replayed)"

Json JsonTime(absl::Time time);  // RFC 3339, UTC
Json JsonInstance(const Instance& instance);
Json JsonCheckpoint(const Checkpoint& checkpoint);
Json JsonTensor(const Tensor& tensor);  // what it is, without its values
// {"version": 7, "replayed": false}
Json JsonChanged(const Changed& changed);

// The report of a change that has no more to tell than its version.
Report ChangeReport(const std::string& text, const Changed& changed);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_OUTPUT_H_
