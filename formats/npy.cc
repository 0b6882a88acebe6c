#include "formats/npy.h"

#include <charconv>
#include <cstddef>
#include <limits>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"

namespace normd {
namespace {

constexpr std::string_view kMagic("\x93NUMPY", 6);
constexpr size_t kAlignment = 64;
// The header of an unstructured array has some hundred bytes; a longer one is hostile.
constexpr uint32_t kMaxHeaderBytes = kLongestNpyHeader - 12;

absl::Status Invalid(std::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat("not a usable .npy file: ", absl::string_view(what.data(), what.size())));
}

uint32_t LittleEndian(std::string_view bytes) {
  uint32_t value = 0;
  for (size_t i = bytes.size(); i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes[i]);
  return value;
}

// The header is a Python literal: {'descr': '<f4', 'fortran_order': False,
// 'shape': (2, 3), }. This reads just the literals that occur in it; a failed
// Read... leaves the position anywhere, and parsing ends there.
class HeaderReader {
 public:
  explicit HeaderReader(std::string_view text) : text_(text) {}

  bool Skip(char c) {
    SkipSpace();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  bool AtEnd() {
    SkipSpace();
    return at_ == text_.size();
  }

  std::optional<std::string> ReadString() {
    SkipSpace();
    if (at_ == text_.size() || (text_[at_] != '\'' && text_[at_] != '"')) return std::nullopt;
    const char quote = text_[at_++];
    const size_t end = text_.find(quote, at_);
    if (end == std::string_view::npos) return std::nullopt;
    std::string value(text_.substr(at_, end - at_));
    at_ = end + 1;
    return value;
  }

  std::optional<bool> ReadBool() {
    SkipSpace();
    for (const bool value : {true, false}) {
      const std::string_view word = value ? "True" : "False";
      if (text_.substr(at_, word.size()) == word) {
        at_ += word.size();
        return value;
      }
    }
    return std::nullopt;
  }

  // (), (3,), (3, 4) and (3, 4, ).
  std::optional<std::vector<int64_t>> ReadTuple() {
    std::vector<int64_t> values;
    if (!Skip('(')) return std::nullopt;
    while (!Skip(')')) {
      const auto value = ReadInteger();
      if (!value) return std::nullopt;
      values.push_back(*value);
      if (!Skip(',')) {
        // Without a comma (3) would be a number in parentheses.
        if (values.size() == 1 || !Skip(')')) return std::nullopt;
        break;
      }
    }
    return values;
  }

 private:
  void SkipSpace() {
    while (at_ < text_.size() && absl::ascii_isspace(text_[at_])) ++at_;
  }

  std::optional<int64_t> ReadInteger() {
    SkipSpace();
    int64_t value = 0;
    const char* begin = text_.data() + at_;
    const auto [end, error] = std::from_chars(begin, text_.data() + text_.size(), value);
    if (error != std::errc()) return std::nullopt;
    at_ += end - begin;
    if (at_ < text_.size() && text_[at_] == 'L') ++at_;  // Python 2's long
    return value;
  }

  std::string_view text_;
  size_t at_ = 0;
};

// Bytes of one element of a numpy dtype string; an error names what it is instead
// of a plain little-endian number.
absl::StatusOr<size_t> ElementSize(const std::string& descr) {
  const auto refuse = [&](absl::string_view why) {
    return Invalid(absl::StrCat("its dtype '", descr, "' ", why));
  };
  if (descr.size() < 3) return refuse("is not one of a number");
  if (descr[0] == '>') return refuse("is big-endian; convert it with array.astype('<f4')");
  size_t size = 0;
  const char* end = descr.data() + descr.size();
  const auto [parsed, error] = std::from_chars(descr.data() + 2, end, size);
  const bool is_number = absl::string_view("fiubc").find(descr[1]) != absl::string_view::npos;
  if (!is_number || error != std::errc() || parsed != end || size == 0 || size > 32) {
    return refuse("is not one of a number");
  }
  if (descr[0] != '<' && !(descr[0] == '|' && size == 1)) {
    return refuse("has no known byte order");
  }
  return size;
}

absl::Status ParseHeader(std::string_view text, Npy* array) {
  HeaderReader reader(text);
  std::optional<std::string> descr;
  std::optional<bool> fortran_order;
  std::optional<std::vector<int64_t>> shape;

  if (!reader.Skip('{')) return Invalid("its header is not a dictionary");
  while (!reader.Skip('}')) {
    const auto key = reader.ReadString();
    if (!key || !reader.Skip(':')) return Invalid("its header has a malformed key");
    const bool repeated = (*key == "descr" && descr) ||
                          (*key == "fortran_order" && fortran_order) || (*key == "shape" && shape);
    if (repeated) return Invalid(absl::StrCat("its header has '", *key, "' twice"));
    bool read = false;
    if (*key == "descr") {
      // Structured types have a list of fields here.
      read = (descr = reader.ReadString()).has_value();
    } else if (*key == "fortran_order") {
      read = (fortran_order = reader.ReadBool()).has_value();
    } else if (*key == "shape") {
      read = (shape = reader.ReadTuple()).has_value();
    } else {
      return Invalid(absl::StrCat("its header has an unknown key '", *key, "'"));
    }
    if (!read) {
      return Invalid(absl::StrCat("its header has a malformed or unsupported '", *key, "'"));
    }
    if (!reader.Skip(',')) {
      if (!reader.Skip('}')) return Invalid("its header's dictionary does not end");
      break;
    }
  }
  if (!reader.AtEnd()) return Invalid("its header goes on after the dictionary");
  if (!descr || !fortran_order || !shape) {
    return Invalid(absl::StrCat("its header lacks '",
                                !descr           ? "descr"
                                : !fortran_order ? "fortran_order"
                                                 : "shape",
                                "'"));
  }
  array->descr = *std::move(descr);
  array->fortran_order = *fortran_order;
  array->shape = *std::move(shape);
  return absl::OkStatus();
}

// Bytes that the shape asks for. A zero makes it 0, whatever the others are, so
// they are multiplied without it to see that each prefix can be counted.
absl::StatusOr<uint64_t> DataBytes(const std::vector<int64_t>& shape, size_t element_size) {
  constexpr uint64_t kMax = std::numeric_limits<int64_t>::max();
  uint64_t bytes = element_size;
  bool empty = false;
  for (const int64_t size : shape) {
    if (size < 0) return Invalid(absl::StrCat("its shape has a negative size, ", size));
    if (size == 0) {
      empty = true;
      continue;
    }
    if (bytes > kMax / static_cast<uint64_t>(size)) {
      return Invalid(absl::StrCat("its shape (", absl::StrJoin(shape, ", "), ") overflows"));
    }
    bytes *= static_cast<uint64_t>(size);
  }
  return empty ? 0 : bytes;
}

}  // namespace

std::string NpyHeader(const Npy& array) {
  std::string dictionary = absl::StrCat(
      "{'descr': '", array.descr, "', 'fortran_order': ", array.fortran_order ? "True" : "False",
      ", 'shape': (", absl::StrJoin(array.shape, ", "), array.shape.size() == 1 ? "," : "", "), }");
  // Version 2 has a longer length field, and is otherwise the same.
  const auto prefix_size = [](int version) { return kMagic.size() + 2 + (version == 1 ? 2 : 4); };
  const auto padded_size = [&](int version) {
    const size_t total = prefix_size(version) + dictionary.size() + 1;
    return (total + kAlignment - 1) / kAlignment * kAlignment - prefix_size(version);
  };
  const int version = padded_size(1) <= std::numeric_limits<uint16_t>::max() ? 1 : 2;
  const size_t length = padded_size(version);
  dictionary.resize(length - 1, ' ');
  dictionary += '\n';

  std::string header(kMagic);
  header += static_cast<char>(version);
  header += '\0';
  for (size_t i = 0; i < (version == 1 ? 2u : 4u); ++i) {
    header += static_cast<char>(length >> (8 * i) & 0xff);
  }
  return header + dictionary;
}

absl::StatusOr<NpyFront> ParseNpyFront(std::string_view bytes, uint64_t file_bytes) {
  const size_t front_bytes = bytes.size();
  if (bytes.substr(0, kMagic.size()) != kMagic) {
    return Invalid("it does not begin with \"\\x93NUMPY\"");
  }
  bytes.remove_prefix(kMagic.size());
  if (bytes.size() < 2) return Invalid("it ends before its version");
  const int major = static_cast<uint8_t>(bytes[0]);
  const int minor = static_cast<uint8_t>(bytes[1]);
  if (major < 1 || major > 3 || minor != 0) {
    return Invalid(absl::StrCat("its version is ", major, ".", minor, ", not 1.0, 2.0 or 3.0"));
  }
  bytes.remove_prefix(2);
  const size_t length_bytes = major == 1 ? 2 : 4;
  if (bytes.size() < length_bytes) return Invalid("it ends before its header");
  const uint32_t header_bytes = LittleEndian(bytes.substr(0, length_bytes));
  bytes.remove_prefix(length_bytes);
  if (header_bytes > kMaxHeaderBytes) {
    return Invalid(
        absl::StrCat("its header claims ", header_bytes, " bytes, more than ", kMaxHeaderBytes));
  }
  if (header_bytes > bytes.size()) {
    return Invalid(absl::StrCat("its header claims ", header_bytes, " bytes, and ", bytes.size(),
                                " are left"));
  }

  NpyFront front;
  Npy& array = front.array;
  absl::Status status = ParseHeader(bytes.substr(0, header_bytes), &array);
  if (!status.ok()) return status;
  front.data_offset = front_bytes - bytes.size() + header_bytes;
  const uint64_t left = file_bytes - front.data_offset;
  const auto element_size = ElementSize(array.descr);
  if (!element_size.ok()) return element_size.status();
  const auto data_bytes = DataBytes(array.shape, *element_size);
  if (!data_bytes.ok()) return data_bytes.status();
  if (*data_bytes != left) {
    return Invalid(absl::StrCat("its shape (", absl::StrJoin(array.shape, ", "), ") of ",
                                array.descr, " takes ", *data_bytes, " bytes of data, and it has ",
                                left));
  }
  return front;
}

absl::StatusOr<Npy> ParseNpy(std::string_view bytes) {
  auto front = ParseNpyFront(bytes, bytes.size());
  if (!front.ok()) return front.status();
  front->array.data = bytes.substr(front->data_offset);
  return front->array;
}

}  // namespace normd
