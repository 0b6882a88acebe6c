#include "client/normctl/tensor_file.h"

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

// Under another name first, so that no half-written file bears the right one.
absl::Status WriteFile(const std::string& path, std::string_view header, std::string_view data) {
  const std::string temporary = path + ".part";
  std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(data.data(), static_cast<std::streamsize>(data.size()));
  file.close();
  std::error_code error;
  if (file) {
    std::filesystem::rename(temporary, path, error);
    if (!error) return absl::OkStatus();
  }
  const std::string why = error ? error.message() : std::strerror(errno);
  std::filesystem::remove(temporary, error);
  return UsageError(absl::StrCat("cannot write ", path, ": ", why));
}

absl::Status AboutFile(const std::string& path, const absl::Status& status) {
  return UsageError(absl::StrCat(path, ": ", status.message()));
}

absl::StatusOr<Tensor> ReadNpy(const std::string& path) {
  const auto bytes = ReadFile(path);
  if (!bytes.ok()) return bytes.status();
  const auto array = ParseNpy(**bytes);
  if (!array.ok()) return AboutFile(path, array.status());
  for (const TypeNames& type : kTypes) {
    if (array->descr != type.npy) continue;
    if (array->fortran_order) {
      return Tensor::Own(type.dtype, array->shape,
                         FromFortranOrder(array->data, SizeOf(type.dtype), array->shape));
    }
    return Tensor::Share(type.dtype, array->shape, array->data, *bytes);
  }
  return UsageError(absl::StrCat(path, ": its dtype is '", array->descr,
                                 "'; save it as float32, float64 or float16 (bfloat16 goes into "
                                 ".safetensors)"));
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
  const Npy array = {.descr = std::string(NamesOf(storable.dtype()).npy),
                     .shape = storable.shape(),
                     .data = storable.bytes()};
  return WriteFile(spec->path, NpyHeader(array), array.data);
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
