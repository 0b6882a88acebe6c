#include "client/normctl/errors.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/normctl/usage_error.h"

namespace normd::normctl {
namespace {

// What to try next, by what went wrong; empty where the message says it all.
std::string Hint(const absl::Status& status, const ErrorDetail& detail, const std::string& server) {
  if (!detail.flag.empty()) {
    return absl::StrCat("The server's flag ", detail.flag, " sets this limit",
                        detail.limit != 0 ? absl::StrCat(", now ", detail.limit) : "", ".");
  }
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
      return absl::StrCat(
          "No answer from a server at ", server, ". Start one with:\n  normd --listen=", server,
          " --state_dir=./normd-state\n",
          "or name another with --server=HOST:PORT or NORMD_SERVER; if it speaks TLS, "
          "give --tls_ca=FILE.");
    case absl::StatusCode::kDeadlineExceeded:
      return "Give it longer with --timeout=DURATION, or see how the server is with: normctl info";
    case absl::StatusCode::kNotFound:
      if (absl::StrContains(detail.field, "checkpoint")) {
        return "See which there are with: normctl checkpoint list";
      }
      if (absl::StrContains(detail.field, "context")) {
        return "A context serves one backward (more with --retain_context), and expires.";
      }
      return "See which there are with: normctl list";
    case absl::StatusCode::kAlreadyExists:
      return "Look at it with: normctl describe NAME, or remove it with: normctl delete NAME";
    case absl::StatusCode::kAborted:
      if (detail.current_version != 0) {
        return absl::StrCat("It is at version ", detail.current_version,
                            " now: look again before changing it.");
      }
      return "";
    case absl::StatusCode::kDataLoss: return "See which are sound with: normctl checkpoint list";
    case absl::StatusCode::kUnauthenticated:
      return "Give a token with --token_file=FILE, or a certificate with --tls_cert and --tls_key.";
    case absl::StatusCode::kUnimplemented:
      return "The server does not know this call: compare normctl version and normctl info.";
    default: return "";
  }
}

}  // namespace

std::string HumanError(const absl::Status& status, const std::string& server) {
  if (IsUsageError(status)) {
    return absl::StrCat("normctl: ", status.message(), "\n");
  }
  const ErrorDetail detail = DetailOf(status);
  std::string text = absl::StrCat("normctl: ", absl::StatusCodeToString(status.code()), ": ",
                                  status.message(), "\n");
  // What the message says already is not said again; a hint says better what is allowed.
  if (!detail.field.empty() && !absl::StrContains(status.message(), detail.field)) {
    absl::StrAppend(&text, "field: ", detail.field, "\n");
  }
  if (!detail.value.empty() && !absl::StrContains(status.message(), detail.value)) {
    absl::StrAppend(&text, "value: ", detail.value, "\n");
  }
  const std::string hint = Hint(status, detail, server);
  if (hint.empty() && !detail.allowed.empty() &&
      !absl::StrContains(status.message(), detail.allowed)) {
    absl::StrAppend(&text, "allowed: ", detail.allowed, "\n");
  }
  if (!hint.empty()) absl::StrAppend(&text, hint, "\n");
  return text;
}

Json JsonError(const absl::Status& status) {
  const ErrorDetail detail = DetailOf(status);
  Json error = {{"code", absl::StatusCodeToString(status.code())},
                {"message", std::string(status.message())}};
  if (!detail.field.empty()) error["field"] = detail.field;
  if (!detail.value.empty()) error["value"] = detail.value;
  if (!detail.allowed.empty()) error["allowed"] = detail.allowed;
  if (detail.limit != 0) error["limit"] = detail.limit;
  if (!detail.flag.empty()) error["flag"] = detail.flag;
  if (detail.retry_delay != absl::ZeroDuration()) {
    error["retry_delay_ms"] = absl::ToInt64Milliseconds(detail.retry_delay);
  }
  if (detail.current_version != 0) error["current_version"] = detail.current_version;
  return {{"error", error}};
}

}  // namespace normd::normctl
