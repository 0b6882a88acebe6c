// The answer of Forward and Backward before it goes on the wire.
#ifndef NORMD_SERVER_SERVICE_TENSOR_ANSWER_H_
#define NORMD_SERVER_SERVICE_TENSOR_ANSWER_H_

#include <stop_token>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "server/admission/memory_budget.h"
#include "server/service/core.h"
#include "server/service/validate.h"
#include "server/shared_memory/regions.h"
#include "server/wire/buffer.h"
#include "server/wire/message.h"

namespace normd {

template <class Response>
struct TensorAnswer {
  Response header;  // without the tensors
  std::vector<AnswerTensor> tensors;
  bool changed = false;  // whether the call changed the instance
};

// RESOURCE_EXHAUSTED: the budget had room, the system has none.
absl::Status NoSystemMemory();

// Pooled memory, claimed first: from `spare`, which its owner has claimed for such ends, and
// from the budget where that is not enough.
absl::StatusOr<ClaimedBuffer> GetBuffer(Core& core, int64_t bytes, MemoryClaim& spare);

// Where a tensor of an answer is written: memory that the answer takes along, or shared
// memory that the client named for it.
struct OutputMemory {
  ClaimedBuffer own = {};
  SharedBytes shared = {};

  bool present() const { return shared.region != nullptr || own.buffer.data() != nullptr; }
  char* data() { return shared.region != nullptr ? shared.data : own.buffer.data(); }
};

// `memory` as the tensor field `number` of an answer, of `spec`'s type and shape.
AnswerTensor ToAnswer(int number, const TensorSpec& spec, OutputMemory memory);

// The status that a kernel's outcome means.
absl::Status ToStatus(Outcome outcome);

// Values of a float32 or float64 array as the kernels' double statistics.
std::vector<double> ToDoubles(const Values& values);
// Room for the moments of a batch.
BatchMoments MomentsFor(const NormProblem& problem);
// The moments of `input` itself. Runs on the calling thread and those of the backend.
absl::StatusOr<BatchMoments> MomentsOf(Core& core, const NormProblem& problem, const char* input,
                                       Place place, const std::stop_token& stop);
// Biased variance of a batch.
std::vector<double> BiasedVariance(const BatchMoments& moments);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_TENSOR_ANSWER_H_
