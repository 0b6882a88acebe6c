// The safetensors file format (https://github.com/huggingface/safetensors):
//
//   8 bytes   N, the header's length, little-endian unsigned
//   N bytes   the header: a JSON object, padded with spaces so that the data
//             begin at a multiple of 8. A key for each tensor:
//               "weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}
//             and "__metadata__", an object of strings
//   rest      the data: offsets count from its beginning, are sorted and leave
//             no gap; the last one is the end of the file
#ifndef NORMD_FORMATS_SAFETENSORS_H_
#define NORMD_FORMATS_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace normd {

// One tensor of a file. Owns nothing: `data` is the caller's (writing) or lies in
// the bytes that were parsed (reading).
struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // "F32", "F64", "F16", "BF16", "I64", "U8", ...
  std::vector<int64_t> shape;
  std::string_view data;  // little-endian, dense
};

struct Safetensors {
  std::map<std::string, std::string> metadata;
  std::vector<SafetensorsEntry> tensors;  // in the order of their data

  // Null when there is none.
  const SafetensorsEntry* Find(std::string_view name) const;
};

// The whole file. Preconditions: names are unique, and each entry's data are as
// many bytes as its dtype and shape say.
std::string WriteSafetensors(const Safetensors& file);

// Parses a whole file. Every claim is checked before it is used: header length
// (at most 100 MB, as the reference implementation has it), unknown dtypes,
// negative or overflowing shapes, offsets that overlap, leave gaps or do not
// match the shape, duplicate keys, bytes missing or left over.
// InvalidArgument says which of them and where.
absl::StatusOr<Safetensors> ParseSafetensors(std::string_view bytes);

// Bytes of one element of a safetensors dtype; 0: unknown.
size_t SafetensorsElementSize(std::string_view dtype);

}  // namespace normd

#endif  // NORMD_FORMATS_SAFETENSORS_H_
