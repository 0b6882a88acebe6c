// From what a client claims to what is true: past these functions nothing in a
// request is hostile. Every error names the field, its value and what is allowed.
#ifndef NORMD_SERVER_SERVICE_VALIDATE_H_
#define NORMD_SERVER_SERVICE_VALIDATE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/numeric/int128.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/problem.h"
#include "normd/v1/instance.pb.h"
#include "normd/v1/optimizer.pb.h"
#include "normd/v1/tensor.pb.h"
#include "server/instance/instance_state.h"
#include "server/instance/layer.h"
#include "server/instance/optimizer.h"
#include "server/instance/running_stats.h"
#include "server/registry/instance.h"

namespace normd {

absl::Status CheckName(absl::string_view name);

// None for an empty string; else a UUID.
absl::StatusOr<std::optional<absl::uint128>> ToRequestId(absl::string_view request_id);

// The name is checked, and the parts that every changing call has are read.
template <class Request>
absl::StatusOr<ChangeOptions> ToChangeOptions(const Request& request, Method method) {
  if (absl::Status name = CheckName(request.name()); !name.ok()) return name;
  auto request_id = ToRequestId(request.request_id());
  if (!request_id.ok()) return request_id.status();
  ChangeOptions options{.method = method, .request_id = *request_id};
  if (request.has_expected_version()) options.expected_version = request.expected_version();
  return options;
}

absl::StatusOr<Layer> ToLayer(const v1::InstanceConfig& config, int64_t max_features);

// None for MODE_UNSPECIFIED.
absl::StatusOr<std::optional<Mode>> ToMode(v1::Mode mode);

// A tensor whose claims agree with each other and with its bytes.
struct TensorSpec {
  DType dtype = DType::kFloat32;
  MemoryFormat format = MemoryFormat::kContiguous;
  std::vector<int64_t> shape;
  int64_t elements = 0;

  int64_t bytes() const { return elements * static_cast<int64_t>(SizeOf(dtype)); }
};

// Everything but the number of bytes. `field` names the tensor in errors.
absl::StatusOr<TensorSpec> ToTensorSpec(const v1::Tensor& tensor, absl::string_view field);
absl::Status CheckBytes(const TensorSpec& spec, size_t data_bytes, absl::string_view field);

// How `layer` normalizes a tensor. PyTorch's checks of dtype, dimensions and
// channels.
absl::StatusOr<NormProblem> ToProblem(const Layer& layer, const TensorSpec& spec,
                                      absl::string_view field);

// FAILED_PRECONDITION where a set of the problem has one value: it has no
// variance to normalize by. PyTorch's reason.
absl::Status CheckMoreThanOneValue(const NormProblem& problem, const TensorSpec& spec);

// Statistics of a batch as Forward returned them, for `problem`.
absl::StatusOr<BatchMoments> ToBatchMoments(const v1::BatchStatistics& statistics,
                                            const NormProblem& problem);

absl::StatusOr<OptimizerSettings> ToOptimizerSettings(const v1::Optimizer& optimizer);

// A page's size: 1 to 1,000; 100 for 0.
absl::StatusOr<int> ToPageSize(int32_t page_size);

// load_state_dict(strict=True) into `state`.
absl::Status LoadStateDict(const v1::State& from, InstanceState& state);

// "[32, 64, 7, 7]".
std::string ShapeText(const std::vector<int64_t>& shape);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_VALIDATE_H_
