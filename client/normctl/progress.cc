#include "client/normctl/progress.h"

#include "absl/time/clock.h"

namespace normd::normctl {
namespace {

constexpr char kBeginningOfLine[] = "\r\x1b[K";

}  // namespace

void Progress::Show(std::string_view line) {
  if (!terminal_) return;
  const absl::Time now = absl::Now();
  if (now < next_) return;
  next_ = now + absl::Milliseconds(100);
  stream_ << kBeginningOfLine << line << std::flush;
  shown_ = true;
}

void Progress::Clear() {
  if (!shown_) return;
  stream_ << kBeginningOfLine << std::flush;
  shown_ = false;
}

}  // namespace normd::normctl
