#include "client/normctl/layout.h"

#include <cstring>
#include <utility>
#include <vector>

namespace normd::normctl {
namespace {

int64_t Product(absl::Span<const int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) product *= size;
  return product;
}

std::vector<int64_t> RowMajorStrides(absl::Span<const int64_t> shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

// (N, C, spatial...) to (N, spatial..., C), of sizes or strides.
std::vector<int64_t> ChannelsToBack(std::vector<int64_t> values) {
  const int64_t channels = values[1];
  values.erase(values.begin() + 1);
  values.push_back(channels);
  return values;
}

// And back.
std::vector<int64_t> ChannelsToFront(std::vector<int64_t> values) {
  const int64_t channels = values.back();
  values.pop_back();
  values.insert(values.begin() + 1, channels);
  return values;
}

}  // namespace

std::string Gather(std::string_view bytes, size_t element_size, absl::Span<const int64_t> shape,
                   absl::Span<const int64_t> strides) {
  const int64_t count = Product(shape);
  std::string gathered(count * element_size, '\0');
  if (count == 0) return gathered;
  // The last axis in the inner loop; the others count like the digits of a number.
  const int64_t inner = shape.empty() ? 1 : shape.back();
  const size_t inner_stride = (shape.empty() ? 1 : strides.back()) * element_size;
  std::vector<int64_t> index(shape.size(), 0);
  int64_t from = 0;
  char* to = gathered.data();
  for (int64_t done = 0; done < count; done += inner) {
    const char* source = bytes.data() + from * element_size;
    for (int64_t i = 0; i < inner; ++i) {
      std::memcpy(to, source, element_size);
      to += element_size;
      source += inner_stride;
    }
    for (size_t axis = shape.size() > 0 ? shape.size() - 1 : 0; axis-- > 0;) {
      from += strides[axis];
      if (++index[axis] < shape[axis]) break;
      from -= strides[axis] * shape[axis];
      index[axis] = 0;
    }
  }
  return gathered;
}

std::string FromFortranOrder(std::string_view bytes, size_t element_size,
                             absl::Span<const int64_t> shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = 1; i < shape.size(); ++i) strides[i] = strides[i - 1] * shape[i - 1];
  return Gather(bytes, element_size, shape, strides);
}

Tensor InFormat(MemoryFormat format, const Tensor& tensor) {
  if (tensor.memory_format() == format) return tensor;
  if (tensor.shape().size() < 3) {
    return Tensor::Share(tensor.dtype(), tensor.shape(), tensor.bytes(), tensor.owner(), format);
  }
  const std::vector<int64_t> back = ChannelsToBack(tensor.shape());
  std::string bytes;
  if (format == MemoryFormat::kChannelsLast) {
    bytes = Gather(tensor.bytes(), SizeOf(tensor.dtype()), back,
                   ChannelsToBack(RowMajorStrides(tensor.shape())));
  } else {
    bytes = Gather(tensor.bytes(), SizeOf(tensor.dtype()), tensor.shape(),
                   ChannelsToFront(RowMajorStrides(back)));
  }
  return Tensor::Own(tensor.dtype(), tensor.shape(), std::move(bytes), format);
}

}  // namespace normd::normctl
