#include "server/state/sha256.h"

#include <array>
#include <cstdlib>
#include <memory>

#include <openssl/evp.h>

namespace normd {
namespace {

constexpr size_t kDigestBytes = 32;

struct FreeContext {
  void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
};

std::array<uint8_t, kDigestBytes> Digest(std::string_view bytes, std::string_view more = {}) {
  // Looked up once: OpenSSL's one-shot calls look it up each time, which costs more
  // than hashing a record.
  static EVP_MD* const algorithm = EVP_MD_fetch(nullptr, "SHA256", nullptr);
  // Scratch memory of the thread's own, likewise.
  thread_local const std::unique_ptr<EVP_MD_CTX, FreeContext> context(EVP_MD_CTX_new());
  std::array<uint8_t, kDigestBytes> digest;
  if (EVP_DigestInit_ex2(context.get(), algorithm, nullptr) != 1 ||
      EVP_DigestUpdate(context.get(), bytes.data(), bytes.size()) != 1 ||
      EVP_DigestUpdate(context.get(), more.data(), more.size()) != 1 ||
      EVP_DigestFinal_ex(context.get(), digest.data(), nullptr) != 1) {
    std::abort();  // no memory, or an OpenSSL without SHA-256
  }
  return digest;
}

}  // namespace

std::string Sha256Hex(std::string_view bytes) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(2 * kDigestBytes);
  for (const uint8_t byte : Digest(bytes)) {
    hex += kHex[byte >> 4];
    hex += kHex[byte & 15];
  }
  return hex;
}

uint64_t Sha256Prefix(std::string_view bytes, std::string_view more) {
  const auto digest = Digest(bytes, more);
  uint64_t prefix = 0;
  for (int i = 0; i < 8; ++i) prefix = prefix << 8 | digest[i];
  return prefix;
}

}  // namespace normd
