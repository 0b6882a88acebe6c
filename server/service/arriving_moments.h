// ArrivingMoments: the moments of a tensor whose elements still come, in the order of memory.
#ifndef NORMD_SERVER_SERVICE_ARRIVING_MOMENTS_H_
#define NORMD_SERVER_SERVICE_ARRIVING_MOMENTS_H_

#include <cstdint>
#include <stop_token>
#include <vector>

#include "absl/status/status.h"
#include "kernels/moments.h"
#include "kernels/problem.h"
#include "server/instance/running_stats.h"
#include "server/service/core.h"

namespace normd {

// Takes them a piece at a time, while the piece is still in the nearest caches. Pieces are cut
// by the problem alone: however the elements come, the moments are the same to the last bit,
// and those that the backend finds in the whole to rounding.
//
// A piece is a problem of its own (some samples, some channels of a sample, some positions of a
// channel), so that any backend serves.
class ArrivingMoments {
 public:
  // Precondition: problem.reduction is kPerChannel.
  explicit ArrivingMoments(const NormProblem& problem);

  const NormProblem& problem() const { return problem_; }

  // `arrived` elements of the tensor at `x` are there, those of the calls before among them.
  absl::Status Take(Core& core, const char* x, int64_t arrived, const std::stop_token& stop);

  // Precondition: problem().size() elements have been taken.
  BatchMoments Get() const;

 private:
  struct Part {
    NormProblem problem;
    int64_t first_channel = 0;
  };
  // The first part of elements [begin, end).
  Part PartOf(int64_t begin, int64_t end) const;

  NormProblem problem_;
  int64_t piece_;      // elements
  int64_t taken_ = 0;  // elements
  std::vector<PartialMoments> channels_;
};

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_ARRIVING_MOMENTS_H_
