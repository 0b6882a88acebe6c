#include "server/state/strict_json.h"

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace normd {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 8;

// Builds the document itself: json::parse keeps one of two equal keys silently, and
// with a callback to find them it takes quadratic time over long arrays.
class Builder : public nlohmann::json_sax<json> {
 public:
  json root;

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t&) override { return Add(value); }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override { return Open(json::object()); }
  bool start_array(size_t) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& key) override {
    const auto [member, is_new] =
        open_.back()->get_ref<json::object_t&>().try_emplace(std::move(key), nullptr);
    member_ = &member->second;
    return is_new;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override {
    return false;
  }

 private:
  json* Put(json value) {
    if (open_.empty()) return &(root = std::move(value));
    if (open_.back()->is_object()) return &(*member_ = std::move(value));
    auto& array = open_.back()->get_ref<json::array_t&>();
    return &array.emplace_back(std::move(value));
  }
  bool Add(json value) {
    Put(std::move(value));
    return true;
  }
  bool Open(json value) {
    if (open_.size() == kMaxDepth) return false;
    // Pointers stay good: an array grows only while none of its elements is open.
    open_.push_back(Put(std::move(value)));
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  std::vector<json*> open_;
  json* member_ = nullptr;
};

}  // namespace

std::optional<json> ParseStrictJson(std::string_view text) {
  // The parser takes a NUL for the end and skips a byte order mark.
  if (text.find('\0') != std::string_view::npos || text.substr(0, 1) == "\xEF") return std::nullopt;
  Builder builder;
  if (!json::sax_parse(text.begin(), text.end(), &builder)) return std::nullopt;
  return std::move(builder.root);
}

JsonMembers::JsonMembers(const json& json, std::string_view what) : json_(json), what_(what) {
  if (!json.is_object()) status_ = absl::DataLossError(fmt::format("{} is no JSON object", what));
}

void JsonMembers::Fail(std::string_view key, std::string_view problem) {
  if (!status_.ok()) return;
  status_ = absl::DataLossError(fmt::format("{}.{} {}", what_, key, problem));
}

const json* JsonMembers::TakeOptional(std::string_view key) {
  if (!status_.ok()) return nullptr;
  const auto member = json_.find(key);
  if (member == json_.end()) return nullptr;
  ++taken_;
  return &*member;
}

const json* JsonMembers::Take(std::string_view key) {
  const json* member = TakeOptional(key);
  if (member == nullptr) Fail(key, "is missing");
  return member;
}

std::string JsonMembers::String(std::string_view key) {
  const json* member = Take(key);
  if (member == nullptr) return {};
  if (!member->is_string()) {
    Fail(key, "is no string");
    return {};
  }
  return member->get_ref<const std::string&>();
}

bool JsonMembers::Bool(std::string_view key) {
  const json* member = Take(key);
  if (member == nullptr) return false;
  if (!member->is_boolean()) {
    Fail(key, "is neither true nor false");
    return false;
  }
  return member->get<bool>();
}

int64_t JsonMembers::Int(std::string_view key, int64_t min, int64_t max) {
  const json* member = Take(key);
  if (member == nullptr) return min;
  const bool fits =
      member->is_number_unsigned()
          ? member->get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())
          : member->is_number_integer();
  const int64_t value = fits ? member->get<int64_t>() : min;
  if (!fits || value < min || value > max) {
    Fail(key, fmt::format("is no integer from {} to {}", min, max));
    return min;
  }
  return value;
}

uint64_t JsonMembers::Uint(std::string_view key, uint64_t min) {
  const json* member = Take(key);
  if (member == nullptr) return min;
  if (!member->is_number_unsigned() || member->get<uint64_t>() < min) {
    Fail(key, fmt::format("is no integer of {} or more", min));
    return min;
  }
  return member->get<uint64_t>();
}

double JsonMembers::Number(std::string_view key) {
  const std::optional<double> value = NumberOrNull(key);
  if (!value.has_value()) Fail(key, "is no finite number");
  return value.value_or(0);
}

std::optional<double> JsonMembers::NumberOrNull(std::string_view key) {
  const json* member = Take(key);
  if (member == nullptr || member->is_null()) return std::nullopt;
  const double value = member->is_number() ? member->get<double>() : std::nan("");
  if (!std::isfinite(value)) {
    Fail(key, "is no finite number");
    return 0;
  }
  return value;
}

absl::Status JsonMembers::Finish() {
  if (status_.ok() && taken_ != json_.size()) {
    status_ = absl::DataLossError(fmt::format("{} has unknown members", what_));
  }
  return status_;
}

}  // namespace normd
