// Tensors in .npy and .safetensors files.
#ifndef NORMD_CLIENT_NORMCTL_TENSOR_FILE_H_
#define NORMD_CLIENT_NORMCTL_TENSOR_FILE_H_

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/normd_client.h"

namespace normd::normctl {

// One tensor, in logical row-major order.
//
//   x.npy              of '<f4', '<f8', '<f2' or '<i8', in C or Fortran order
//   x.safetensors      the only tensor of the file
//   x.safetensors:key  the one of that name
//
// Errors are of the user's making, and name the file.
absl::StatusOr<Tensor> ReadTensor(std::string_view spec);

// Writes the logical tensor, row-major whatever its format, in the same forms; a
// key not given is "tensor". A .npy file has no bfloat16: it gets float32, which
// holds the same values.
absl::Status WriteTensor(std::string_view spec, const Tensor& tensor);

// All tensors of a .safetensors file, in the order of their data.
absl::StatusOr<std::vector<NamedTensor>> ReadTensors(const std::string& path);
absl::Status WriteTensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                          const std::map<std::string, std::string>& metadata);

// Fails where WriteTensor would for want of a known ending, before the work.
absl::Status CheckTensorSpec(std::string_view spec);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_TENSOR_FILE_H_
