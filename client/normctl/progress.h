// How far long work has come, on a line of the terminal that is written over.
#ifndef NORMD_CLIENT_NORMCTL_PROGRESS_H_
#define NORMD_CLIENT_NORMCTL_PROGRESS_H_

#include <ostream>
#include <string_view>

#include "absl/time/time.h"

namespace normd::normctl {

// Not thread-safe.
class Progress {
 public:
  // Writes nothing unless `terminal`.
  Progress(std::ostream& stream, bool terminal) : stream_(stream), terminal_(terminal) {}
  ~Progress() { Clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Shows `line`, at most ten times a second.
  void Show(std::string_view line);
  void Clear();

 private:
  std::ostream& stream_;
  const bool terminal_;
  bool shown_ = false;
  absl::Time next_ = absl::InfinitePast();
};

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_PROGRESS_H_
