// Reading small JSON documents that may be damaged or hostile.
#ifndef NORMD_SERVER_STATE_STRICT_JSON_H_
#define NORMD_SERVER_STATE_STRICT_JSON_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace normd {

// The document in `text`, or none: when it is no JSON, repeats a key of an object,
// has NUL bytes, or is nested deeper than 8. Never throws.
std::optional<nlohmann::json> ParseStrictJson(std::string_view text);

// Takes the members of an object one by one. The first that is missing, of the
// wrong type or out of range is kept as the error, and whatever is taken then or
// later is a default; Finish also refuses members that nobody took.
class JsonMembers {
 public:
  // `json` must outlive the members. `what` names the object in errors.
  JsonMembers(const nlohmann::json& json, std::string_view what);

  // Null, and an error, when the member is absent.
  const nlohmann::json* Take(std::string_view key);
  // Null when the member is absent.
  const nlohmann::json* TakeOptional(std::string_view key);

  std::string String(std::string_view key);
  bool Bool(std::string_view key);
  int64_t Int(std::string_view key, int64_t min, int64_t max);
  uint64_t Uint(std::string_view key, uint64_t min);
  // Finite.
  double Number(std::string_view key);
  // None when it is null.
  std::optional<double> NumberOrNull(std::string_view key);

  void Fail(std::string_view key, std::string_view problem);
  bool ok() const { return status_.ok(); }
  // DataLoss, or OK when everything was there and nothing else.
  absl::Status Finish();

 private:
  const nlohmann::json& json_;
  std::string_view what_;
  size_t taken_ = 0;
  absl::Status status_;
};

}  // namespace normd

#endif  // NORMD_SERVER_STATE_STRICT_JSON_H_
