#include "server/service/tensor_answer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/convert.h"

namespace normd {
namespace {

// Without a retry delay: it never fits.
absl::Status TooLargeForDevice() {
  constexpr char kFlag[] = "--device_memory_budget";
  absl::Status status = absl::ResourceExhaustedError(
      absl::StrCat("the call needs more of the device's memory than ", kFlag,
                   " allows; send smaller tensors, or ", "set ", kFlag));
  v1::ErrorDetail detail;
  detail.set_flag(kFlag);
  SetDetail(status, detail);
  return status;
}

}  // namespace

absl::Status NoSystemMemory() {
  return Retryable(absl::StatusCode::kResourceExhausted,
                   "the system has no memory for the request's tensors", absl::Seconds(1));
}

absl::StatusOr<ClaimedBuffer> GetBuffer(Core& core, int64_t bytes, MemoryClaim& spare) {
  absl::StatusOr<MemoryClaim> claim = core.memory->Claim(bytes - std::min(bytes, spare.bytes()));
  if (!claim.ok()) return claim.status();
  claim->Merge(spare.Split(bytes - claim->bytes()));
  Buffer buffer = core.pool->Get(static_cast<size_t>(bytes));
  if (bytes > 0 && buffer.data() == nullptr) return NoSystemMemory();
  return ClaimedBuffer{std::move(buffer), *std::move(claim)};
}

AnswerTensor ToAnswer(int number, const TensorSpec& spec, OutputMemory memory) {
  AnswerTensor answer{.number = number, .header = ToProto(spec)};
  if (memory.shared.region != nullptr) {
    *answer.header.mutable_shared_memory() = std::move(memory.shared.name);
  } else {
    answer.data = std::move(memory.own);
  }
  return answer;
}

absl::Status ToStatus(Outcome outcome) {
  switch (outcome) {
    case Outcome::kOk: return absl::OkStatus();
    case Outcome::kStopped:
      return absl::CancelledError("the call was cancelled or its deadline passed");
    case Outcome::kOutOfMemory:
      return Retryable(absl::StatusCode::kResourceExhausted,
                       "no memory is left for the call on the device (--device_memory_budget), or "
                       "on the host to get there (--memory_budget)",
                       absl::Milliseconds(100));
    case Outcome::kTooLarge: return TooLargeForDevice();
    case Outcome::kDeviceFailed:
      return absl::InternalError("the device failed, and takes no more calls; see normd's log");
    case Outcome::kRefused: return absl::InternalError("the device refused what it was given");
  }
  return absl::InternalError("unknown outcome");
}

std::vector<double> ToDoubles(const Values& values) {
  const auto read = [&values](auto* data) {
    return std::vector<double>(data, data + values.size());
  };
  return values.dtype() == DType::kFloat64 ? read(static_cast<const double*>(values.data()))
                                           : read(static_cast<const float*>(values.data()));
}

BatchMoments MomentsFor(const NormProblem& problem) {
  const auto sets = static_cast<size_t>(problem.num_sets());
  return {.count = problem.set_size(),
          .mean = std::vector<double>(sets),
          .m2 = std::vector<double>(sets)};
}

absl::StatusOr<BatchMoments> MomentsOf(Core& core, const NormProblem& problem, const char* input,
                                       Place place, const std::stop_token& stop) {
  BatchMoments moments = MomentsFor(problem);
  const Outcome outcome = core.backend->ForwardByBatch(
      problem, {.x = input, .moments = {moments.mean.data(), moments.m2.data()}}, place, stop);
  if (absl::Status status = ToStatus(outcome); !status.ok()) return status;
  return moments;
}

std::vector<double> BiasedVariance(const BatchMoments& moments) {
  std::vector<double> var = moments.m2;
  if (moments.count > 0) {
    for (double& value : var) value /= static_cast<double>(moments.count);
  }
  return var;
}

}  // namespace normd
