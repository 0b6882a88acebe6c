#include "client/normctl/tensor_file.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/normctl/float_types.h"
#include "client/normctl/layout.h"
#include "client/normctl/usage_error.h"
#include "formats/npy.h"
#include "formats/safetensors.h"

namespace normd::normctl {
namespace {

constexpr char kNpy[] = ".npy";
constexpr char kSafetensors[] = ".safetensors";
constexpr char kDefaultKey[] = "tensor";

// The names of a type in both formats.
struct TypeNames {
  DataType dtype;
  std::string_view npy;  // empty: it has none
  std::string_view safetensors;
};
constexpr std::array<TypeNames, 5> kTypes = {{
    {DataType::kFloat32, "<f4", "F32"},
    {DataType::kFloat64, "<f8", "F64"},
    {DataType::kFloat16, "<f2", "F16"},
    {DataType::kBFloat16, "", "BF16"},
    {DataType::kInt64, "<i8", "I64"},
}};

const TypeNames& NamesOf(DataType dtype) { return kTypes[static_cast<size_t>(dtype)]; }

// A file's name and, for .safetensors, what follows the colon.
struct Spec {
  std::string path;
  std::string key;
  bool is_npy = false;
};

absl::StatusOr<Spec> ParseSpec(std::string_view spec) {
  if (absl::EndsWith(absl::string_view(spec.data(), spec.size()), kNpy)) {
    return Spec{.path = std::string(spec), .key = "", .is_npy = true};
  }
  const size_t ending = spec.rfind(kSafetensors);
  if (ending != std::string_view::npos) {
    const size_t end = ending + strlen(kSafetensors);
    if (end == spec.size()) return Spec{.path = std::string(spec), .key = ""};
    if (spec[end] == ':' && end + 1 < spec.size()) {
      return Spec{.path = std::string(spec.substr(0, end)),
                  .key = std::string(spec.substr(end + 1))};
    }
  }
  return UsageError(absl::StrCat("'", std::string(spec),
                                 "' does not name a tensor: give FILE.npy, FILE.safetensors or "
                                 "FILE.safetensors:KEY"));
}

absl::StatusOr<std::shared_ptr<const std::string>> ReadFile(const std::string& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  std::ifstream file(path, std::ios::binary);
  if (error || !file) {
    return UsageError(
        absl::StrCat("cannot read ", path, ": ", error ? error.message() : std::strerror(errno)));
  }
  auto bytes = std::make_shared<std::string>(size, '\0');
  if (!file.read(bytes->data(), static_cast<std::streamsize>(size))) {
    return UsageError(absl::StrCat("cannot read ", path, " to its end"));
  }
  return bytes;
}

absl::Status WriteFile(const std::string& path, std::string_view header, std::string_view data) {
  PartFile file(path);
  absl::Status written = file.Write(0, header);
  if (written.ok()) written = file.Write(static_cast<int64_t>(header.size()), data);
  return written.ok() ? file.Finish() : written;
}

absl::Status AboutFile(const std::string& path, const absl::Status& status) {
  return UsageError(absl::StrCat(path, ": ", status.message()));
}

absl::StatusOr<DataType> TypeOf(const std::string& path, const Npy& array) {
  for (const TypeNames& type : kTypes) {
    if (array.descr == type.npy) return type.dtype;
  }
  return UsageError(absl::StrCat(path, ": its dtype is '", array.descr,
                                 "'; save it as float32, float64 or float16 (bfloat16 goes into "
                                 ".safetensors)"));
}

absl::StatusOr<Tensor> ReadNpy(const std::string& path) {
  const auto bytes = ReadFile(path);
  if (!bytes.ok()) return bytes.status();
  const auto array = ParseNpy(**bytes);
  if (!array.ok()) return AboutFile(path, array.status());
  const auto dtype = TypeOf(path, *array);
  if (!dtype.ok()) return dtype.status();
  if (array->fortran_order) {
    return Tensor::Own(*dtype, array->shape,
                       FromFortranOrder(array->data, SizeOf(*dtype), array->shape));
  }
  return Tensor::Share(*dtype, array->shape, array->data, *bytes);
}

absl::StatusOr<Tensor> TensorOf(const std::string& path, const SafetensorsEntry& entry,
                                const std::shared_ptr<const std::string>& owner) {
  for (const TypeNames& type : kTypes) {
    if (entry.dtype == type.safetensors) {
      return Tensor::Share(type.dtype, entry.shape, entry.data, owner);
    }
  }
  return UsageError(absl::StrCat(path, ": '", entry.name, "' is of dtype ", entry.dtype,
                                 ", not F32, F64, F16, BF16 or I64"));
}

}  // namespace

absl::StatusOr<Tensor> ReadTensor(std::string_view text) {
  const auto spec = ParseSpec(text);
  if (!spec.ok()) return spec.status();
  if (spec->is_npy) return ReadNpy(spec->path);

  const auto tensors = ReadTensors(spec->path);
  if (!tensors.ok()) return tensors.status();
  if (spec->key.empty() && tensors->size() == 1) return tensors->front().tensor;
  std::vector<std::string> names;
  for (const NamedTensor& named : *tensors) {
    if (named.name == spec->key) return named.tensor;
    names.push_back(named.name);
  }
  return UsageError(absl::StrCat(
      spec->path,
      spec->key.empty() ? " has not one tensor" : absl::StrCat(" has no '", spec->key, "'"),
      ": pick one of them as ", spec->path, ":KEY, of ", absl::StrJoin(names, ", ")));
}

absl::Status WriteTensor(std::string_view text, const Tensor& tensor) {
  const auto spec = ParseSpec(text);
  if (!spec.ok()) return spec.status();
  const Tensor contiguous = InFormat(MemoryFormat::kContiguous, tensor);
  if (!spec->is_npy) {
    return WriteTensors(spec->path, {{spec->key.empty() ? kDefaultKey : spec->key, contiguous}},
                        {});
  }
  const Tensor storable =
      NamesOf(tensor.dtype()).npy.empty() ? ConvertTo(DataType::kFloat32, contiguous) : contiguous;
  return WriteFile(spec->path, NpyFrontOf(storable.dtype(), storable.shape()), storable.bytes());
}

std::string NpyFrontOf(DataType dtype, const std::vector<int64_t>& shape) {
  return NpyHeader({.descr = std::string(NamesOf(dtype).npy), .shape = shape});
}

bool IsNpy(std::string_view text) {
  const auto spec = ParseSpec(text);
  return spec.ok() && spec->is_npy;
}

absl::StatusOr<std::optional<TensorSource>> OpenTensor(std::string_view text) {
  const auto spec = ParseSpec(text);
  if (!spec.ok()) return spec.status();
  std::error_code error;
  const auto size = std::filesystem::file_size(spec->path, error);
  if (!spec->is_npy || error) return std::nullopt;
  const auto file = std::make_shared<std::ifstream>(spec->path, std::ios::binary);
  std::string front(std::min<uint64_t>(size, kLongestNpyHeader), '\0');
  if (!file->read(front.data(), static_cast<std::streamsize>(front.size()))) return std::nullopt;
  const auto parsed = ParseNpyFront(front, size);
  if (!parsed.ok()) return AboutFile(spec->path, parsed.status());
  const Npy& array = parsed->array;
  if (array.fortran_order) return std::nullopt;
  const auto dtype = TypeOf(spec->path, array);
  if (!dtype.ok()) return dtype.status();
  // Read, not mapped: a mapped file that somebody else cuts short kills who reads it.
  const auto read = [file, path = spec->path, begin = parsed->data_offset](
                        int64_t offset, absl::Span<char> to) -> absl::Status {
    file->seekg(static_cast<std::streamoff>(begin) + offset);
    if (file->read(to.data(), static_cast<std::streamsize>(to.size()))) return absl::OkStatus();
    return UsageError(absl::StrCat("cannot read ", path, " to its end"));
  };
  return TensorSource{.dtype = *dtype, .shape = array.shape, .read = read};
}

PartFile::PartFile(std::string path)
    : path_(std::move(path)),
      temporary_(path_ + ".part"),
      file_(temporary_, std::ios::binary | std::ios::trunc) {}

PartFile::~PartFile() {
  if (!file_.is_open()) return;
  file_.close();
  std::error_code ignored;
  std::filesystem::remove(temporary_, ignored);
}

absl::Status PartFile::Write(int64_t offset, std::string_view bytes) {
  if (offset != at_) file_.seekp(offset);
  at_ = offset + static_cast<int64_t>(bytes.size());
  if (file_.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    return absl::OkStatus();
  }
  return CannotWrite(std::strerror(errno));
}

absl::Status PartFile::Finish() {
  file_.close();
  std::error_code error;
  if (file_) {
    std::filesystem::rename(temporary_, path_, error);
    if (!error) return absl::OkStatus();
  }
  absl::Status failed = CannotWrite(error ? error.message() : std::strerror(errno));
  std::filesystem::remove(temporary_, error);
  return failed;
}

absl::Status PartFile::CannotWrite(std::string_view why) const {
  return UsageError(absl::StrCat("cannot write ", path_, ": ", std::string(why)));
}

absl::StatusOr<std::vector<NamedTensor>> ReadTensors(const std::string& path) {
  const auto bytes = ReadFile(path);
  if (!bytes.ok()) return bytes.status();
  const auto file = ParseSafetensors(**bytes);
  if (!file.ok()) return AboutFile(path, file.status());
  std::vector<NamedTensor> tensors;
  for (const SafetensorsEntry& entry : file->tensors) {
    auto tensor = TensorOf(path, entry, *bytes);
    if (!tensor.ok()) return tensor.status();
    tensors.push_back({entry.name, *std::move(tensor)});
  }
  return tensors;
}

absl::Status WriteTensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                          const std::map<std::string, std::string>& metadata) {
  Safetensors file;
  file.metadata = metadata;
  for (const NamedTensor& named : tensors) {
    file.tensors.push_back({named.name, std::string(NamesOf(named.tensor.dtype()).safetensors),
                            named.tensor.shape(), named.tensor.bytes()});
  }
  return WriteFile(path, WriteSafetensors(file), "");
}

absl::Status CheckTensorSpec(std::string_view spec) { return ParseSpec(spec).status(); }

}  // namespace normd::normctl
