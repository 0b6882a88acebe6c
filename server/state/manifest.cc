#include "server/state/manifest.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <limits>
#include <optional>

#include <fmt/format.h>

#include "formats/json_text.h"
#include "server/instance/instance_name.h"
#include "server/state/sha256.h"
#include "server/state/strict_json.h"

namespace normd {
namespace {

constexpr char kFormat[] = "normd-checkpoint";
constexpr int64_t kVersion = 1;
constexpr size_t kDigestDigits = 64;
// The sum of all sizes stays below 2^63.
constexpr int64_t kMaxFiles = int64_t{1} << 26;
constexpr int64_t kMaxFileBytes = int64_t{1} << 36;
constexpr size_t kMaxFileNameBytes = 255;  // NAME_MAX of the usual file systems
constexpr std::string_view kExtension = ".safetensors";
constexpr size_t kMaxReasonBytes = 32;
constexpr size_t kMinIdDigits = 8;
constexpr size_t kMaxIdDigits = 18;

absl::Status Damaged(std::string_view problem) {
  return absl::DataLossError(fmt::format("damaged manifest: {}", problem));
}

bool IsHexDigest(std::string_view text) {
  return text.size() == kDigestDigits && std::all_of(text.begin(), text.end(), [](char c) {
           return ('0' <= c && c <= '9') || ('a' <= c && c <= 'f');
         });
}

// A name in a folder, and nothing that leads out of it or into another.
bool IsPlainFileName(std::string_view name) {
  return name.size() <= kMaxFileNameBytes && name != "." && name != ".." && !name.empty() &&
         name.find('/') == std::string_view::npos &&
         std::all_of(name.begin(), name.end(),
                     [](unsigned char c) { return c > 0x20 && c < 0x7f; });
}

// Takes a line off the front of `text`; none: no line's end is left.
std::optional<std::string_view> TakeLine(std::string_view& text) {
  const size_t end = text.find('\n');
  if (end == std::string_view::npos) return std::nullopt;
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(end + 1);
  return line;
}

}  // namespace

std::string InstanceFileName(std::string_view instance) {
  std::string name;
  for (const char c : instance) {
    if (c == '/') {
      name += "%2F";
    } else {
      name += c;
    }
  }
  if (name.size() + kExtension.size() > kMaxFileNameBytes) {
    name.resize(kMaxFileNameBytes - kExtension.size() - kDigestDigits - 1);
    name += '~';
    name += Sha256Hex(instance);
  }
  name += kExtension;
  return name;
}

bool ValidReason(std::string_view reason) {
  return !reason.empty() && reason.size() <= kMaxReasonBytes &&
         std::all_of(reason.begin(), reason.end(), [](char c) {
           return ('a' <= c && c <= 'z') || ('0' <= c && c <= '9') || c == '_';
         });
}

std::string MakeGenerationId(uint64_t number, std::string_view reason) {
  return fmt::format("{:0{}}-{}", number, kMinIdDigits, reason);
}

bool ParseGenerationId(std::string_view id, uint64_t* number) {
  const size_t digits = id.find('-');
  if (digits == std::string_view::npos || digits < kMinIdDigits || digits > kMaxIdDigits) {
    return false;
  }
  const char* const end = id.data() + digits;
  const auto parsed = std::from_chars(id.data(), end, *number);
  // Written back, so that one generation has one id.
  return parsed.ec == std::errc() && parsed.ptr == end && ValidReason(id.substr(digits + 1)) &&
         MakeGenerationId(*number, id.substr(digits + 1)) == id;
}

std::string WriteManifest(const Manifest& manifest) {
  std::string out;
  out.reserve(256 + 256 * manifest.files.size());
  fmt::format_to(std::back_inserter(out), R"({{"format":"{}","version":{},"id":)", kFormat,
                 kVersion);
  AppendJsonString(out, manifest.id);
  fmt::format_to(std::back_inserter(out), R"(,"create_time":"{}","reason":)",
                 absl::FormatTime(absl::RFC3339_full, manifest.create_time, absl::UTCTimeZone()));
  AppendJsonString(out, manifest.reason);
  fmt::format_to(std::back_inserter(out), ",\"files\":{}}}\n", manifest.files.size());
  for (const ManifestFile& file : manifest.files) {
    out += R"({"file":)";
    AppendJsonString(out, fmt::format("{}/{}", kInstancesFolder, file.file));
    out += R"(,"instance":)";
    AppendJsonString(out, file.instance);
    fmt::format_to(std::back_inserter(out), ",\"bytes\":{},\"sha256\":\"{}\"}}\n", file.bytes,
                   file.sha256);
  }
  out += Sha256Hex(out);
  out += '\n';
  return out;
}

absl::StatusOr<Manifest> ParseManifest(std::string_view text) {
  if (text.size() < kDigestDigits + 1 || text.back() != '\n') {
    return Damaged("it does not end with its checksum");
  }
  std::string_view lines = text.substr(0, text.size() - kDigestDigits - 1);
  if (Sha256Hex(lines) != text.substr(lines.size(), kDigestDigits)) {
    return Damaged("its checksum does not match");
  }

  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  const std::optional<std::string_view> first = TakeLine(lines);
  const std::optional<nlohmann::json> head = ParseStrictJson(first.value_or(""));
  if (!head.has_value()) return Damaged("its first line is no JSON");
  JsonMembers members(*head, "manifest");
  Manifest manifest;
  if (members.String("format") != kFormat) members.Fail("format", "is not normd-checkpoint");
  if (members.Int("version", 1, kMax) != kVersion) {
    members.Fail("version", "is that of a newer normd");
  }
  manifest.id = members.String("id");
  manifest.reason = members.String("reason");
  uint64_t number;
  if (!ParseGenerationId(manifest.id, &number) ||
      manifest.id != MakeGenerationId(number, manifest.reason)) {
    members.Fail("id", "is no id of a generation");
  }
  if (!absl::ParseTime(absl::RFC3339_full, members.String("create_time"), &manifest.create_time,
                       nullptr)) {
    members.Fail("create_time", "is no time");
  }
  const int64_t count = members.Int("files", 0, kMaxFiles);
  if (absl::Status status = members.Finish(); !status.ok()) {
    return Damaged(std::string(status.message()));
  }

  const std::string folder = fmt::format("{}/", kInstancesFolder);
  while (const std::optional<std::string_view> line = TakeLine(lines)) {
    const std::optional<nlohmann::json> json = ParseStrictJson(*line);
    if (!json.has_value()) return Damaged("a line is no JSON");
    JsonMembers entry(*json, "file");
    ManifestFile file;
    const std::string path = entry.String("file");
    if (path.starts_with(folder)) file.file = path.substr(folder.size());
    if (!IsPlainFileName(file.file)) entry.Fail("file", "is no file of instances/");
    file.instance = entry.String("instance");
    if (!ValidInstanceName(file.instance)) entry.Fail("instance", "is no name of an instance");
    file.bytes = entry.Int("bytes", 0, kMaxFileBytes);
    file.sha256 = entry.String("sha256");
    if (!IsHexDigest(file.sha256)) entry.Fail("sha256", "is no SHA-256");
    if (absl::Status status = entry.Finish(); !status.ok()) {
      return Damaged(std::string(status.message()));
    }
    if (!manifest.files.empty() && file.instance <= manifest.files.back().instance) {
      return Damaged("its instances are not in the order of their names");
    }
    manifest.files.push_back(std::move(file));
  }
  if (!lines.empty()) return Damaged("its last line has no end");
  if (static_cast<int64_t>(manifest.files.size()) != count) {
    return Damaged("it has not as many files as it says");
  }
  return manifest;
}

}  // namespace normd
