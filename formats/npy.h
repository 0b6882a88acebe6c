// The .npy file format (numpy.lib.format), versions 1.0, 2.0 and 3.0.
#ifndef NORMD_FORMATS_NPY_H_
#define NORMD_FORMATS_NPY_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace normd {

// An array. `data` is the caller's (writing) or lies in the bytes that were
// parsed (reading).
struct Npy {
  std::string descr;  // "<f4", "<f8", "<f2", "<i8", ...: numpy's dtype string
  std::vector<int64_t> shape = {};
  bool fortran_order = false;  // first dimension varies fastest
  std::string_view data = {};
};

// Magic, version and header of the file, padded so that the data begin at a
// multiple of 64; the data follow it as they are.
std::string NpyHeader(const Npy& array);

// An array of a file that has not been read as a whole.
struct NpyFront {
  Npy array;                 // without data
  uint64_t data_offset = 0;  // where these begin in the file; they end it
};

// No file has more before its data.
inline constexpr uint64_t kLongestNpyHeader = (1 << 20) + 12;

// Parses what precedes the data of a file of `file_bytes` bytes; `front`: the first
// kLongestNpyHeader of them, or all. Refuses what ParseNpy would.
absl::StatusOr<NpyFront> ParseNpyFront(std::string_view front, uint64_t file_bytes);

// Parses a whole file. Big-endian, structured and object types, overflowing
// shapes and missing or left-over bytes are InvalidArgument, saying which.
absl::StatusOr<Npy> ParseNpy(std::string_view bytes);

}  // namespace normd

#endif  // NORMD_FORMATS_NPY_H_
