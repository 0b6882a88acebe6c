#include "server/instance/instance_name.h"

#include <algorithm>

namespace normd {
namespace {

bool ValidCharacter(char c) {
  return ('a' <= c && c <= 'z') || ('A' <= c && c <= 'Z') || ('0' <= c && c <= '9') || c == '.' ||
         c == '_' || c == '-';
}

bool ValidSegment(std::string_view segment) {
  return !segment.empty() && segment != "." && segment != ".." &&
         std::all_of(segment.begin(), segment.end(), ValidCharacter);
}

}  // namespace

bool ValidInstanceName(std::string_view name) {
  if (name.size() > kMaxInstanceNameBytes) return false;
  for (size_t slash; (slash = name.find('/')) != std::string_view::npos;) {
    if (!ValidSegment(name.substr(0, slash))) return false;
    name.remove_prefix(slash + 1);
  }
  return ValidSegment(name);
}

}  // namespace normd
