// Writing JSON by appending to a string: what records and headers are made of is
// small and made often, so no document is built first.
#ifndef NORMD_FORMATS_JSON_TEXT_H_
#define NORMD_FORMATS_JSON_TEXT_H_

#include <string>
#include <string_view>

namespace normd {

// Appends `text` in quotes, escaped as JSON asks. Precondition: UTF-8.
void AppendJsonString(std::string& out, std::string_view text);

// Appends the shortest decimal that reads back as `value`. Precondition: finite.
void AppendJsonNumber(std::string& out, double value);

}  // namespace normd

#endif  // NORMD_FORMATS_JSON_TEXT_H_
