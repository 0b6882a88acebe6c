#include <array>
#include <utility>

#include "client/normd_client.h"

namespace normd::inline client {
namespace {

struct TypeFacts {
  DataType dtype;
  std::string_view name;
  size_t size;
};

constexpr std::array<TypeFacts, 5> kTypes = {{
    {DataType::kFloat32, "float32", 4},
    {DataType::kFloat64, "float64", 8},
    {DataType::kFloat16, "float16", 2},
    {DataType::kBFloat16, "bfloat16", 2},
    {DataType::kInt64, "int64", 8},
}};

}  // namespace

std::string_view NameOf(DataType dtype) { return kTypes[static_cast<size_t>(dtype)].name; }

std::optional<DataType> DataTypeNamed(std::string_view name) {
  for (const TypeFacts& type : kTypes) {
    if (type.name == name) return type.dtype;
  }
  return std::nullopt;
}

size_t SizeOf(DataType dtype) { return kTypes[static_cast<size_t>(dtype)].size; }

std::string_view NameOf(Mode mode) { return mode == Mode::kEval ? "eval" : "train"; }

Tensor Tensor::Borrow(DataType dtype, std::vector<int64_t> shape, std::string_view bytes,
                      MemoryFormat format) {
  return Share(dtype, std::move(shape), bytes, nullptr, format);
}

Tensor Tensor::Own(DataType dtype, std::vector<int64_t> shape, std::string bytes,
                   MemoryFormat format) {
  auto owner = std::make_shared<const std::string>(std::move(bytes));
  const std::string_view view = *owner;
  return Share(dtype, std::move(shape), view, std::move(owner), format);
}

Tensor Tensor::Share(DataType dtype, std::vector<int64_t> shape, std::string_view bytes,
                     std::shared_ptr<const void> owner, MemoryFormat format) {
  Tensor tensor;
  tensor.dtype_ = dtype;
  tensor.shape_ = std::move(shape);
  tensor.format_ = format;
  tensor.bytes_ = bytes;
  tensor.owner_ = std::move(owner);
  return tensor;
}

Tensor TensorBuffer::AsTensor(DataType dtype, std::vector<int64_t> shape,
                              MemoryFormat format) const {
  Tensor tensor = Tensor::Share(dtype, std::move(shape), {}, owner_, format);
  const size_t bytes = static_cast<size_t>(tensor.num_elements()) * SizeOf(dtype);
  return Tensor::Share(dtype, tensor.shape(), {data_, bytes}, owner_, format);
}

int64_t Tensor::num_elements() const {
  int64_t count = 1;
  for (const int64_t size : shape_) count *= size;
  return count;
}

}  // namespace normd::inline client
