// In which order a tensor's elements lie.
#ifndef NORMD_CLIENT_NORMCTL_LAYOUT_H_
#define NORMD_CLIENT_NORMCTL_LAYOUT_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/types/span.h"
#include "client/normd_client.h"

namespace normd::normctl {

// Elements of `element_size` bytes, read from `bytes` at the given strides (in
// elements) and written one after another in row-major order of `shape`.
// Precondition: the strides stay within `bytes`.
std::string Gather(std::string_view bytes, size_t element_size, absl::Span<const int64_t> shape,
                   absl::Span<const int64_t> strides);

// Column-major (Fortran) bytes of `shape` as row-major ones.
std::string FromFortranOrder(std::string_view bytes, size_t element_size,
                             absl::Span<const int64_t> shape);

// The same logical tensor in another memory format; itself where it has that.
Tensor InFormat(MemoryFormat format, const Tensor& tensor);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_LAYOUT_H_
