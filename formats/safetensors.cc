#include "formats/safetensors.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <unordered_set>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "formats/json_text.h"

namespace normd {
namespace {

constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kDataAlignment = 8;
constexpr size_t kMaxDimensions = 64;
constexpr std::string_view kMetadataKey = "__metadata__";

uint64_t LoadLittleEndian(std::string_view bytes) {
  uint64_t value = 0;
  for (size_t i = kLengthBytes; i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes[i]);
  return value;
}

// For messages: a hostile name may be long.
std::string Quoted(std::string_view name) {
  return fmt::format("\"{}{}\"", name.substr(0, 100), name.size() > 100 ? "..." : "");
}

// A tensor of the header before its data are looked up.
struct Claim {
  SafetensorsEntry entry;
  uint64_t begin = 0;
  uint64_t end = 0;
};

// Receives the header's JSON piece by piece: nothing is built but what is valid,
// whatever the text claims, and a key that comes twice is seen (a document would
// keep one of them silently).
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::map<std::string, std::string> metadata;
  std::vector<Claim> claims;
  std::string error;

  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return Unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    return Unexpected("a number that is no 64-bit integer");
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (in_ == In::kShape) {
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return Unexpected("a dimension past 63 bits");
      }
      std::vector<int64_t>& shape = claims.back().entry.shape;
      if (shape.size() == kMaxDimensions) return Unexpected("a dimension too many");
      shape.push_back(static_cast<int64_t>(value));
      return true;
    }
    if (in_ == In::kOffsets) {
      if (offsets_ == 2) return Unexpected("a third offset");
      (offsets_++ == 0 ? claims.back().begin : claims.back().end) = value;
      return true;
    }
    return Unexpected("a number");
  }

  bool string(string_t& value) override {
    if (in_ == In::kMetadata) {
      return metadata.emplace(key_, std::move(value)).second || Unexpected("a repeated key");
    }
    if (in_ == In::kTensor && key_ == "dtype") {
      claims.back().entry.dtype = std::move(value);
      return true;
    }
    return Unexpected("a string");
  }

  bool start_object(size_t) override {
    if (in_ == In::kNothing) {
      in_ = In::kRoot;
    } else if (in_ == In::kRoot && key_ == kMetadataKey) {
      in_ = In::kMetadata;
    } else if (in_ == In::kRoot) {
      in_ = In::kTensor;
      claims.emplace_back().entry.name = key_;
      seen_ = 0;
    } else {
      return Unexpected("an object");
    }
    return true;
  }

  bool key(string_t& key) override {
    key_ = std::move(key);
    if (in_ == In::kRoot) return names_.insert(key_).second || Unexpected("a repeated key");
    if (in_ == In::kTensor) {
      const unsigned bit = key_ == "dtype"          ? kSawDtype
                           : key_ == "shape"        ? kSawShape
                           : key_ == "data_offsets" ? kSawOffsets
                                                    : kSawUnknown;
      if (bit == kSawUnknown) return Unexpected("an unknown key");
      if (seen_ & bit) return Unexpected("a repeated key");
      seen_ |= bit;
    }
    return true;
  }

  bool end_object() override {
    if (in_ == In::kTensor && seen_ != (kSawDtype | kSawShape | kSawOffsets)) {
      return Unexpected("no dtype, shape or data_offsets");
    }
    in_ = in_ == In::kRoot ? In::kNothing : In::kRoot;
    return true;
  }

  bool start_array(size_t) override {
    if (in_ == In::kTensor && key_ == "shape") {
      in_ = In::kShape;
    } else if (in_ == In::kTensor && key_ == "data_offsets") {
      in_ = In::kOffsets;
      offsets_ = 0;
    } else {
      return Unexpected("an array");
    }
    return true;
  }

  bool end_array() override {
    if (in_ == In::kOffsets && offsets_ != 2) return Unexpected("fewer than two offsets");
    in_ = In::kTensor;
    return true;
  }

  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return Unexpected(fmt::format("no JSON, at byte {},", position));
  }

 private:
  enum class In { kNothing, kRoot, kMetadata, kTensor, kShape, kOffsets };
  enum : unsigned { kSawUnknown = 0, kSawDtype = 1, kSawShape = 2, kSawOffsets = 4 };

  bool Unexpected(std::string_view what) {
    const bool in_tensor = in_ >= In::kTensor;
    error = fmt::format("{} in {}{}, at key {}", what,
                        in_tensor              ? "tensor "
                        : in_ == In::kMetadata ? "__metadata__"
                                               : "the header",
                        in_tensor ? Quoted(claims.back().entry.name) : "", Quoted(key_));
    return false;
  }

  In in_ = In::kNothing;
  std::string key_;
  std::unordered_set<std::string> names_;
  unsigned seen_ = 0;
  int offsets_ = 0;
};

// Bytes of a tensor; none: unknown dtype, or more than 64 bits can count.
std::optional<uint64_t> ByteCount(const SafetensorsEntry& entry) {
  uint64_t product = SafetensorsElementSize(entry.dtype);
  if (product == 0) return std::nullopt;
  // A dimension of 0 makes the tensor empty, however large the others are.
  if (std::find(entry.shape.begin(), entry.shape.end(), 0) != entry.shape.end()) product = 0;
  for (const int64_t size : entry.shape) {
    if (__builtin_mul_overflow(product, static_cast<uint64_t>(size), &product)) return std::nullopt;
  }
  return product;
}

}  // namespace

const SafetensorsEntry* Safetensors::Find(std::string_view name) const {
  for (const SafetensorsEntry& entry : tensors) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

size_t SafetensorsElementSize(std::string_view dtype) {
  for (const auto& [name, size] :
       std::initializer_list<std::pair<std::string_view, size_t>>{{"F32", 4},
                                                                  {"F64", 8},
                                                                  {"F16", 2},
                                                                  {"BF16", 2},
                                                                  {"I64", 8},
                                                                  {"I32", 4},
                                                                  {"I16", 2},
                                                                  {"I8", 1},
                                                                  {"U8", 1},
                                                                  {"U16", 2},
                                                                  {"U32", 4},
                                                                  {"U64", 8},
                                                                  {"BOOL", 1},
                                                                  {"F8_E4M3", 1},
                                                                  {"F8_E5M2", 1},
                                                                  {"C64", 8}}) {
    if (name == dtype) return size;
  }
  return 0;
}

std::string WriteSafetensors(const Safetensors& file) {
  size_t data_bytes = 0;
  size_t text_bytes = 0;
  for (const SafetensorsEntry& entry : file.tensors) {
    data_bytes += entry.data.size();
    text_bytes += entry.name.size() + 96;
  }
  for (const auto& [key, value] : file.metadata) text_bytes += 2 * (key.size() + value.size());

  std::string out;
  out.reserve(kLengthBytes + text_bytes + data_bytes + 64);
  out.append(kLengthBytes, '\0');
  out += '{';
  const char* separator = "";
  if (!file.metadata.empty()) {
    out += "\"__metadata__\":{";
    for (const auto& [key, value] : file.metadata) {
      out += separator;
      separator = ",";
      AppendJsonString(out, key);
      out += ':';
      AppendJsonString(out, value);
    }
    out += '}';
  }
  size_t offset = 0;
  for (const SafetensorsEntry& entry : file.tensors) {
    out += separator;
    separator = ",";
    AppendJsonString(out, entry.name);
    fmt::format_to(std::back_inserter(out),
                   R"(:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", entry.dtype,
                   fmt::join(entry.shape, ","), offset, offset + entry.data.size());
    offset += entry.data.size();
  }
  out += '}';
  out.append((kDataAlignment - out.size() % kDataAlignment) % kDataAlignment, ' ');
  const uint64_t header_bytes = out.size() - kLengthBytes;
  for (size_t i = 0; i < kLengthBytes; ++i) out[i] = static_cast<char>(header_bytes >> (8 * i));
  for (const SafetensorsEntry& entry : file.tensors) out += entry.data;
  return out;
}

absl::StatusOr<Safetensors> ParseSafetensors(std::string_view bytes) {
  const auto invalid = [](const std::string& what) {
    return absl::InvalidArgumentError(fmt::format("no valid safetensors file: {}", what));
  };
  if (bytes.size() < kLengthBytes) {
    return invalid(fmt::format("its {} bytes do not hold a header's length", bytes.size()));
  }
  const uint64_t header_bytes = LoadLittleEndian(bytes);
  if (header_bytes > kMaxHeaderBytes) {
    return invalid(fmt::format("its header claims {} bytes, and {} are allowed", header_bytes,
                               kMaxHeaderBytes));
  }
  if (header_bytes > bytes.size() - kLengthBytes) {
    return invalid(fmt::format("its header claims {} bytes, and {} are there", header_bytes,
                               bytes.size() - kLengthBytes));
  }
  const std::string_view header = bytes.substr(kLengthBytes, header_bytes);
  const std::string_view data = bytes.substr(kLengthBytes + header_bytes);
  // The JSON parser would skip a byte order mark and stop at a NUL.
  if (header.empty() || header.front() != '{') return invalid("its header is no JSON object");
  if (header.find('\0') != std::string_view::npos) return invalid("a NUL byte in the header");

  HeaderReader reader;
  if (!nlohmann::json::sax_parse(header.begin(), header.end(), &reader)) {
    return invalid(reader.error);
  }

  std::vector<Claim>& claims = reader.claims;
  for (const Claim& claim : claims) {
    const std::optional<uint64_t> due = ByteCount(claim.entry);
    if (!due.has_value()) {
      return invalid(fmt::format("tensor {} has dtype {} and shape ({}): unknown, or too large",
                                 Quoted(claim.entry.name), Quoted(claim.entry.dtype),
                                 fmt::join(claim.entry.shape, ", ")));
    }
    if (claim.begin > claim.end || claim.end - claim.begin != *due) {
      return invalid(
          fmt::format("tensor {} lies at [{}, {}), but its dtype and shape make {} bytes",
                      Quoted(claim.entry.name), claim.begin, claim.end, *due));
    }
  }
  std::stable_sort(claims.begin(), claims.end(), [](const Claim& a, const Claim& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });

  Safetensors file;
  file.metadata = std::move(reader.metadata);
  file.tensors.reserve(claims.size());
  uint64_t offset = 0;
  for (Claim& claim : claims) {
    if (claim.begin != offset) {
      return invalid(fmt::format("tensor {} begins at {}, and the one before it ends at {}",
                                 Quoted(claim.entry.name), claim.begin, offset));
    }
    if (claim.end > data.size()) {
      return invalid(fmt::format("tensor {} ends at {}, and the data end at {}",
                                 Quoted(claim.entry.name), claim.end, data.size()));
    }
    claim.entry.data = data.substr(claim.begin, claim.end - claim.begin);
    offset = claim.end;
    file.tensors.push_back(std::move(claim.entry));
  }
  if (offset != data.size()) {
    return invalid(
        fmt::format("{} bytes are left over after the last tensor", data.size() - offset));
  }
  return file;
}

}  // namespace normd
