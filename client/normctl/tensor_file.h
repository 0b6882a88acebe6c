// Tensors in .npy and .safetensors files.
#ifndef NORMD_CLIENT_NORMCTL_TENSOR_FILE_H_
#define NORMD_CLIENT_NORMCTL_TENSOR_FILE_H_

#include <cstdint>
#include <fstream>
#include <map>
#include <optional>
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

// The tensor of a file that can be sent part by part as it lies there: a .npy file in C order.
// Nothing for any other, which ReadTensor() takes as a whole.
absl::StatusOr<std::optional<TensorSource>> OpenTensor(std::string_view spec);

// Whether what is named there may be written part by part: a .npy file.
bool IsNpy(std::string_view spec);

// A file under another name, so that none that is half-written bears the right one.
class PartFile {
 public:
  explicit PartFile(std::string path);
  // Removes what was not finished.
  ~PartFile();
  PartFile(const PartFile&) = delete;
  PartFile& operator=(const PartFile&) = delete;

  // From `offset` on.
  absl::Status Write(int64_t offset, std::string_view bytes);
  // Gives it its name.
  absl::Status Finish();

 private:
  absl::Status CannotWrite(std::string_view why) const;

  const std::string path_;
  const std::string temporary_;
  std::ofstream file_;
  int64_t at_ = 0;
};

// What a .npy file has before the data of such a tensor. Precondition: not bfloat16.
std::string NpyFrontOf(DataType dtype, const std::vector<int64_t>& shape);

// All tensors of a .safetensors file, in the order of their data.
absl::StatusOr<std::vector<NamedTensor>> ReadTensors(const std::string& path);
absl::Status WriteTensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                          const std::map<std::string, std::string>& metadata);

// Fails where WriteTensor would for want of a known ending, before the work.
absl::Status CheckTensorSpec(std::string_view spec);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_TENSOR_FILE_H_
