#include "server/error/error.h"

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace normd {
namespace {

constexpr absl::string_view kDetailUrl = "normd.v1.ErrorDetail";
constexpr size_t kLongestValue = 256;

// Text from outside, made safe to show and to send as UTF-8.
std::string Shown(absl::string_view value) {
  const bool cut = value.size() > kLongestValue;
  std::string shown = absl::Utf8SafeCHexEscape(value.substr(0, kLongestValue));
  // Escaping may lengthen it, and the cut may split a character.
  if (shown.size() > kLongestValue || cut) {
    shown = absl::CHexEscape(value.substr(0, kLongestValue / 4));
    shown += "...";
  }
  return shown;
}

}  // namespace

void SetDetail(absl::Status& status, const v1::ErrorDetail& detail) {
  status.SetPayload(kDetailUrl, absl::Cord(detail.SerializeAsString()));
}

v1::ErrorDetail DetailOf(const absl::Status& status) {
  v1::ErrorDetail detail;
  if (const auto payload = status.GetPayload(kDetailUrl)) {
    detail.ParseFromString(std::string(*payload));
  }
  return detail;
}

absl::Status FieldError(absl::StatusCode code, absl::string_view field, absl::string_view value,
                        absl::string_view allowed, absl::string_view message) {
  v1::ErrorDetail detail;
  detail.set_field(std::string(field));
  detail.set_value(Shown(value));
  detail.set_allowed(std::string(allowed));
  absl::Status status(code, message);
  SetDetail(status, detail);
  return status;
}

absl::Status InvalidField(absl::string_view field, absl::string_view value,
                          absl::string_view allowed) {
  return FieldError(
      absl::StatusCode::kInvalidArgument, field, value, allowed,
      absl::StrCat(field, " is ", value.empty() ? "empty" : Shown(value), "; allowed: ", allowed));
}

absl::Status LimitExceeded(absl::string_view field, absl::string_view what, int64_t limit,
                           absl::string_view flag, absl::Duration retry_delay) {
  v1::ErrorDetail detail;
  detail.set_field(std::string(field));
  detail.set_value(std::string(what));
  detail.set_allowed(absl::StrCat("at most ", limit));
  detail.set_limit(limit);
  detail.set_flag(std::string(flag));
  detail.set_retry_delay_ms(absl::ToInt64Milliseconds(retry_delay));
  auto status = absl::ResourceExhaustedError(
      absl::StrCat(what, " is over the server's limit of ", limit, ", which ", flag, " sets"));
  SetDetail(status, detail);
  return status;
}

absl::Status PermissionDenied(absl::string_view who, absl::string_view field,
                              absl::string_view value, absl::string_view needed) {
  v1::ErrorDetail detail;
  detail.set_field(std::string(field));
  detail.set_value(Shown(value));
  detail.set_allowed(std::string(needed));
  auto status = absl::PermissionDeniedError(
      absl::StrCat(who, " may not do this",
                   field.empty() ? "" : absl::StrCat(" with ", field, " \"", detail.value(), "\""),
                   ": ", needed));
  SetDetail(status, detail);
  return status;
}

absl::Status Retryable(absl::StatusCode code, absl::string_view message, absl::Duration delay) {
  v1::ErrorDetail detail;
  detail.set_retry_delay_ms(absl::ToInt64Milliseconds(delay));
  absl::Status status(code, message);
  SetDetail(status, detail);
  return status;
}

absl::Status ForField(absl::Status status, absl::string_view field) {
  v1::ErrorDetail detail = DetailOf(status);
  detail.set_field(std::string(field));
  SetDetail(status, detail);
  return status;
}

}  // namespace normd
