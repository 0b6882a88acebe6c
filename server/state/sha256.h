// SHA-256, which tells damaged files and records from sound ones.
#ifndef NORMD_SERVER_STATE_SHA256_H_
#define NORMD_SERVER_STATE_SHA256_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace normd {

// 64 lower-case hexadecimal digits.
std::string Sha256Hex(std::string_view bytes);

// The first 8 bytes, big-endian, of the digest of `bytes` and, behind them, `more`.
uint64_t Sha256Prefix(std::string_view bytes, std::string_view more = {});

}  // namespace normd

#endif  // NORMD_SERVER_STATE_SHA256_H_
