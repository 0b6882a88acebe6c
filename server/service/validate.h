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

// Whether a tensor is shaped, typed and laid out as another, which `other_name` names
// in the error.
absl::Status CheckSameTensor(const TensorSpec& spec, absl::string_view field,
                             const TensorSpec& other, absl::string_view other_name);

// Statistics of a batch as Forward returned them, for `problem`.
absl::StatusOr<BatchMoments> ToBatchMoments(const v1::BatchStatistics& statistics,
                                            const NormProblem& problem);

absl::StatusOr<OptimizerSettings> ToOptimizerSettings(const v1::Optimizer& optimizer);

// A page's size: 1 to 1,000; 100 for 0.
absl::StatusOr<int> ToPageSize(int32_t page_size);

// load_state_dict(strict=True) into `state`.
absl::Status LoadStateDict(const v1::State& from, InstanceState& state);

// INVALID_ARGUMENT for what is not finite; or is below 0.
absl::Status CheckFinite(double value, absl::string_view field);
absl::Status CheckNotNegative(double value, absl::string_view field);

// FAILED_PRECONDITION with `message`, naming the field, its value and what is allowed.
absl::Status FailedField(absl::string_view field, absl::string_view value,
                         absl::string_view allowed, absl::string_view message);

// "DATA_TYPE_FLOAT32", or the number of an unknown one.
std::string DataTypeText(v1::DataType dtype);

// "[32, 64, 7, 7]".
std::string ShapeText(const std::vector<int64_t>& shape);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_VALIDATE_H_
