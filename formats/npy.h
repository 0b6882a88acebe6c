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

// Parses a whole file. Big-endian, structured and object types, overflowing
// shapes and missing or left-over bytes are InvalidArgument, saying which.
absl::StatusOr<Npy> ParseNpy(std::string_view bytes);

}  // namespace normd

#endif  // NORMD_FORMATS_NPY_H_
