#include "server/service/arriving_moments.h"

#include <algorithm>

#include "server/service/tensor_answer.h"

namespace normd {
namespace {

// Half of a usual L2, so that what has been copied there is still in it.
constexpr int64_t kPieceBytes = int64_t{1} << 20;

// Elements of a piece: whole samples, or else whole channels, as long as these are not much
// larger than a piece should be. Of channels_last it is rows, in which samples make no difference.
int64_t PieceOf(const NormProblem& problem) {
  const int64_t wanted = kPieceBytes / static_cast<int64_t>(SizeOf(problem.dtype));
  const auto whole = [&](int64_t unit) {
    return std::max<int64_t>(1, wanted / std::max<int64_t>(1, unit)) * unit;
  };
  if (problem.format == MemoryFormat::kChannelsLast) return whole(problem.channels);
  for (const int64_t unit : {problem.channels * problem.positions, problem.positions}) {
    if (unit <= 2 * wanted) return whole(unit);
  }
  return wanted;
}

}  // namespace

ArrivingMoments::ArrivingMoments(const NormProblem& problem)
    : problem_(problem),
      piece_(PieceOf(problem)),
      channels_(static_cast<size_t>(problem.channels)) {}

absl::Status ArrivingMoments::Take(Core& core, const char* x, int64_t arrived,
                                   const std::stop_token& stop) {
  const auto element_bytes = static_cast<int64_t>(SizeOf(problem_.dtype));
  while (taken_ < arrived) {
    const int64_t end = std::min(problem_.size(), (taken_ / piece_ + 1) * piece_);
    if (end > arrived) return absl::OkStatus();
    const Part part = PartOf(taken_, end);
    const auto moments =
        MomentsOf(core, part.problem, x + taken_ * element_bytes, Place::kHost, stop);
    if (!moments.ok()) return moments.status();
    PartialMoments* channel = &channels_[static_cast<size_t>(part.first_channel)];
    for (size_t i = 0; i < moments->mean.size(); ++i) {
      channel[i].Merge({static_cast<double>(moments->count), moments->mean[i], moments->m2[i]});
    }
    taken_ += part.problem.size();
  }
  return absl::OkStatus();
}

ArrivingMoments::Part ArrivingMoments::PartOf(int64_t begin, int64_t end) const {
  Part part{problem_};
  if (problem_.format == MemoryFormat::kChannelsLast) {
    part.problem.batch = 1;
    part.problem.positions = (end - begin) / problem_.channels;
    return part;
  }
  const int64_t sample = problem_.channels * problem_.positions;
  const int64_t within = begin % sample;
  if (within == 0 && end - begin >= sample) {
    part.problem.batch = (end - begin) / sample;
    return part;
  }
  part.problem.batch = 1;
  part.first_channel = within / problem_.positions;
  const int64_t position = within % problem_.positions;
  const int64_t count = std::min(end - begin, sample - within);
  if (position == 0 && count >= problem_.positions) {
    part.problem.channels = count / problem_.positions;
  } else {
    part.problem.channels = 1;
    part.problem.positions = std::min(count, problem_.positions - position);
  }
  return part;
}

BatchMoments ArrivingMoments::Get() const {
  BatchMoments moments = MomentsFor(problem_);
  for (size_t i = 0; i < channels_.size(); ++i) {
    moments.mean[i] = channels_[i].mean;
    moments.m2[i] = channels_[i].m2;
  }
  return moments;
}

}  // namespace normd
