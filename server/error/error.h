// Errors that name the field, what was wrong and what is allowed, for people (the
// message) and programs (an ErrorDetail that travels with the status).
#ifndef NORMD_SERVER_ERROR_ERROR_H_
#define NORMD_SERVER_ERROR_ERROR_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "normd/v1/error.pb.h"

namespace normd {

// The field at fault as a path from the request ("input.shape"), what was found
// there, and what is allowed: INVALID_ARGUMENT "FIELD is VALUE; allowed: ALLOWED".
absl::Status InvalidField(absl::string_view field, absl::string_view value,
                          absl::string_view allowed);

// The same detail with another code, where `message` says it in words of its own.
absl::Status FieldError(absl::StatusCode code, absl::string_view field, absl::string_view value,
                        absl::string_view allowed, absl::string_view message);

// RESOURCE_EXHAUSTED: `what` ("a message of 300 bytes") is over the limit that
// `flag` ("--max_message_bytes") sets. A retry delay above 0 says that waiting
// may help.
absl::Status LimitExceeded(absl::string_view field, absl::string_view what, int64_t limit,
                           absl::string_view flag,
                           absl::Duration retry_delay = absl::ZeroDuration());

// PERMISSION_DENIED: `who` lacks what `needed` says ("Step takes the role user").
// `field` and `value` are the request's, empty where it is not about one.
absl::Status PermissionDenied(absl::string_view who, absl::string_view field,
                              absl::string_view value, absl::string_view needed);

// UNAVAILABLE or the like, with the delay after which a retry makes sense.
absl::Status Retryable(absl::StatusCode code, absl::string_view message, absl::Duration delay);

// `status` with its message unchanged and `field` named in its detail.
absl::Status ForField(absl::Status status, absl::string_view field);

void SetDetail(absl::Status& status, const v1::ErrorDetail& detail);
// The detail that `status` carries; an empty one where there is none.
v1::ErrorDetail DetailOf(const absl::Status& status);

}  // namespace normd

#endif  // NORMD_SERVER_ERROR_ERROR_H_
