#include "client/internal/wire_format.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include "client/internal/convert.h"

namespace normd::inline client::internal {
namespace {

uint32_t LengthDelimitedTag(int field_number) {
  constexpr uint32_t kLengthDelimited = 2;
  return static_cast<uint32_t>(field_number) << 3 | kLengthDelimited;
}

// Tag and length of a field, whose bytes are to follow.
std::string FieldPrefix(int field_number, uint64_t length) {
  std::string prefix;
  google::protobuf::io::StringOutputStream stream(&prefix);
  google::protobuf::io::CodedOutputStream coded(&stream);
  coded.WriteTag(LengthDelimitedTag(field_number));
  coded.WriteVarint64(length);
  coded.Trim();
  return prefix;
}

}  // namespace

grpc::Slice LendBytes(const Tensor& tensor) {
  const std::string_view bytes = tensor.bytes();
  if (tensor.owner() == nullptr) return grpc::Slice(bytes.data(), bytes.size());
  auto* owner = new std::shared_ptr<const void>(tensor.owner());
  return grpc::Slice(
      const_cast<char*>(bytes.data()), bytes.size(),
      [](void* data) { delete static_cast<std::shared_ptr<const void>*>(data); }, owner);
}

grpc::ByteBuffer MessageWithTensors(const google::protobuf::MessageLite& message,
                                    absl::Span<const TensorField> fields) {
  std::vector<grpc::Slice> slices;
  std::string header = message.SerializeAsString();
  for (const TensorField& field : fields) {
    const std::string_view bytes = field.tensor->bytes();
    std::string tensor_header = HeaderOf(*field.tensor).SerializeAsString();
    tensor_header += FieldPrefix(v1::Tensor::kDataFieldNumber, bytes.size());
    header += FieldPrefix(field.number, tensor_header.size() + bytes.size());
    header += tensor_header;
    slices.emplace_back(header);
    slices.push_back(LendBytes(*field.tensor));
    header.clear();
  }
  if (!header.empty()) slices.emplace_back(header);
  return grpc::ByteBuffer(slices.data(), slices.size());
}

grpc::ByteBuffer MessageOfBytes(int field_number, grpc::Slice bytes) {
  const grpc::Slice slices[] = {FieldPrefix(field_number, bytes.size()), std::move(bytes)};
  return grpc::ByteBuffer(slices, 2);
}

grpc::ByteBuffer MessageOf(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

bool TakeBytesOf(const grpc::ByteBuffer& message, int field_number,
                 absl::FunctionRef<void(std::string_view)> take) {
  std::vector<grpc::Slice> slices;
  if (!message.Dump(&slices).ok()) return false;
  // Tag and length, wherever the slices are cut: a varint of 32 bits takes five bytes.
  constexpr size_t kLongestFront = 10;
  std::string front;
  for (const grpc::Slice& slice : slices) {
    const size_t more = std::min(kLongestFront - front.size(), slice.size());
    front.append(reinterpret_cast<const char*>(slice.begin()), more);
  }
  google::protobuf::io::CodedInputStream in(reinterpret_cast<const uint8_t*>(front.data()),
                                            static_cast<int>(front.size()));
  uint32_t size = 0;
  if (in.ReadTag() != LengthDelimitedTag(field_number) || !in.ReadVarint32(&size)) return false;
  auto skip = static_cast<size_t>(in.CurrentPosition());
  if (message.Length() != skip + size) return false;
  for (const grpc::Slice& slice : slices) {
    const size_t skipped = std::min(skip, slice.size());
    skip -= skipped;
    if (skipped == slice.size()) continue;
    take({reinterpret_cast<const char*>(slice.begin()) + skipped, slice.size() - skipped});
  }
  return true;
}

}  // namespace normd::inline client::internal
