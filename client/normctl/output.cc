#include "client/normctl/output.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/normctl/layer.h"

namespace normd::normctl {
namespace {

// Also of one whose bytes are in a file alone.
int64_t BytesOf(const Tensor& tensor) {
  return tensor.num_elements() * static_cast<int64_t>(SizeOf(tensor.dtype()));
}

}  // namespace

std::string Table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      const bool last = i + 1 == row.size();
      absl::StrAppend(&text, row[i], last ? "\n" : std::string(widths[i] - row[i].size() + 2, ' '));
    }
  }
  return text;
}

std::string Facts(const std::vector<std::pair<std::string, std::string>>& facts) {
  std::vector<std::vector<std::string>> rows;
  for (const auto& [name, value] : facts) rows.push_back({absl::StrCat(name, ":"), value});
  return Table(rows);
}

std::string HumanBytes(double bytes) {
  const char* const units[] = {"B", "kB", "MB", "GB", "TB"};
  size_t unit = 0;
  while (bytes >= 999.5 && unit + 1 < std::size(units)) {
    bytes /= 1000;
    ++unit;
  }
  return unit == 0 ? absl::StrFormat("%.0f B", bytes)
                   : absl::StrFormat("%.3g %s", bytes, units[unit]);
}

std::string HumanShape(absl::Span<const int64_t> shape) {
  return absl::StrCat("(", absl::StrJoin(shape, ", "), shape.size() == 1 ? ",)" : ")");
}

std::string HumanTime(absl::Time time) {
  return absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", time, absl::UTCTimeZone());
}

std::string HumanTensor(const Tensor& tensor) {
  return absl::StrCat(std::string(NameOf(tensor.dtype())), " ", HumanShape(tensor.shape()), ", ",
                      HumanBytes(static_cast<double>(BytesOf(tensor))));
}

std::string HumanVersion(const Changed& changed) {
  return absl::StrCat("version ", changed.version, changed.replayed ? " (replayed)" : "");
}

Json JsonTime(absl::Time time) {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", time, absl::UTCTimeZone());
}

Json JsonInstance(const Instance& instance) {
  return {{"name", instance.name},
          {"uid", instance.uid},
          {"layer", JsonLayer(instance.config.layer)},
          {"state_dtype", NameOf(instance.config.state_dtype)},
          {"mode", NameOf(instance.mode)},
          {"version", instance.version},
          {"num_batches_tracked", instance.num_batches_tracked},
          {"has_gradients", instance.has_gradients},
          {"optimizer", instance.optimizer},
          {"state_bytes", instance.state_bytes},
          {"create_time", JsonTime(instance.create_time)},
          {"update_time", JsonTime(instance.update_time)}};
}

Json JsonCheckpoint(const Checkpoint& checkpoint) {
  Json json = {{"id", checkpoint.id},
               {"create_time", JsonTime(checkpoint.create_time)},
               {"reason", checkpoint.reason},
               {"instance_count", checkpoint.instance_count},
               {"total_bytes", checkpoint.total_bytes},
               {"sound", checkpoint.sound}};
  if (!checkpoint.sound) json["problem"] = checkpoint.problem;
  return json;
}

Json JsonTensor(const Tensor& tensor) {
  return {{"dtype", NameOf(tensor.dtype())},
          {"shape", tensor.shape()},
          {"memory_format",
           tensor.memory_format() == MemoryFormat::kChannelsLast ? "channels_last" : "contiguous"},
          {"bytes", BytesOf(tensor)}};
}

Json JsonChanged(const Changed& changed) {
  return {{"version", changed.version}, {"replayed", changed.replayed}};
}

Report ChangeReport(const std::string& text, const Changed& changed) {
  return {.json = JsonChanged(changed),
          .text = absl::StrCat(text, ": ", HumanVersion(changed), "\n")};
}

}  // namespace normd::normctl
