// ForwardPieces: a Forward whose output is computed piece by piece, in the order of
// memory; by the same statistics with the same bits as in one.
#ifndef NORMD_SERVER_SERVICE_FORWARD_PIECES_H_
#define NORMD_SERVER_SERVICE_FORWARD_PIECES_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <stop_token>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/problem.h"
#include "normd/v1/norm_service.pb.h"
#include "server/registry/instance.h"
#include "server/service/arriving_moments.h"
#include "server/service/core.h"
#include "server/service/forward.h"

namespace normd {

class ForwardPieces {
 public:
  // How a Forward may be computed.
  enum class Way {
    kAsItArrives,      // a piece of the input is all that its output needs
    kAfterStatistics,  // once the statistics of the whole input were folded in
    kWhole,            // as the unary call does
  };

  struct Plan;

  // Checks what may be checked without the tensor, and answers the way by the instance as
  // it is now. A request with a residual needs both tensors, and so is never kAsItArrives.
  static absl::StatusOr<Plan> Begin(Core& core, const Caller& caller,
                                    const v1::ForwardRequest& request, const ForwardSpec& spec);

  // kAfterStatistics: folds the statistics of `input` in, and calls `done` when
  // the change is durable. `input` is used until then. Where the mode has changed
  // meanwhile, `done` gets nothing: the way is another now. `arrived`: those statistics, if
  // they were taken already.
  using Done = absl::AnyInvocable<void(absl::StatusOr<std::optional<ForwardPieces>>)>;
  static void Fold(Core& core, const Caller& caller, const v1::ForwardRequest& request,
                   const ForwardSpec& spec, const char* input, const ArrivingMoments* arrived,
                   const std::stop_token& stop, Done done);

  // The answer without its tensor's data.
  const v1::ForwardResponse& header() const { return header_; }
  // Pieces begin and end at multiples of so many elements.
  int64_t grain() const { return grain_; }

  // Normalizes `count` elements, of which the first is element `first`, in place;
  // `residual`: theirs, or null.
  absl::Status Normalize(char* data, const char* residual, int64_t first, int64_t count,
                         const std::stop_token& stop) const;

 private:
  Backend* backend_ = nullptr;
  Snapshot state_;
  NormProblem problem_;
  Activation activation_ = Activation::kNone;
  bool by_batch_ = false;
  int64_t grain_ = 1;
  // What all pieces are normalized by; null where each sample has its own.
  std::shared_ptr<const std::vector<double>> mean_;
  std::shared_ptr<const std::vector<double>> var_;
  Lasting lasting_;
  v1::ForwardResponse header_;
};

struct ForwardPieces::Plan {
  Way way = Way::kWhole;
  NormProblem problem;
  std::optional<ForwardPieces> pieces;  // kAsItArrives
};

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_FORWARD_PIECES_H_
