#include "server/auth/authenticator.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include <sys/stat.h>

#include "absl/memory/memory.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpc/grpc_security_constants.h"
#include "spdlog/spdlog.h"

namespace normd {
namespace {

constexpr int64_t kLookEveryNs = 1'000'000'000;
constexpr absl::string_view kScheme = "Bearer ";
// What normctl makes has 49 characters.
constexpr size_t kLongestToken = 512;

// The name in logs of those who are not asked for one.
constexpr char kAnonymous[] = "anonymous";

std::vector<std::string> Property(const grpc::AuthContext& context, const char* name) {
  std::vector<std::string> values;
  for (const grpc::string_ref& value : context.FindPropertyValues(name)) {
    values.emplace_back(value.data(), value.size());
  }
  return values;
}

int64_t Nanoseconds(const timespec& time) { return time.tv_sec * 1'000'000'000 + time.tv_nsec; }

absl::Status Unauthenticated(absl::string_view why) {
  return absl::UnauthenticatedError(absl::StrCat(
      why,
      "; send the metadata \"authorization: Bearer TOKEN\" with a token of the server's "
      "--auth_file, or a client certificate that it names"));
}

}  // namespace

Presented PresentedBy(const grpc::ServerContextBase& context) {
  Presented presented;
  const auto [first, last] = context.client_metadata().equal_range("authorization");
  for (auto it = first; it != last; ++it) {
    presented.authorization.emplace_back(it->second.data(), it->second.size());
  }
  const auto tls = context.auth_context();
  // gRPC calls a peer authenticated when TLS has verified its certificate.
  if (tls != nullptr && tls->IsPeerAuthenticated()) {
    presented.common_names = Property(*tls, GRPC_X509_CN_PROPERTY_NAME);
    presented.alt_names = Property(*tls, GRPC_X509_SAN_PROPERTY_NAME);
  }
  return presented;
}

absl::StatusOr<std::unique_ptr<Authenticator>> Authenticator::Open(const std::string& path) {
  auto authenticator = absl::WrapUnique(new Authenticator(path));
  if (path.empty()) return authenticator;
  if (absl::Status read = authenticator->Read(); !read.ok()) return read;
  return authenticator;
}

absl::StatusOr<std::shared_ptr<const Caller>> Authenticator::Authenticate(
    const Presented& presented) {
  if (path_.empty()) {
    static const auto anonymous = std::make_shared<const Caller>(Caller::Everyone(kAnonymous));
    if (presented.common_names.empty()) return anonymous;
    return std::make_shared<const Caller>(Caller::Everyone(presented.common_names.front()));
  }
  ReadIfChanged();
  std::shared_ptr<const AuthFile> file;
  {
    absl::MutexLock lock(&mutex_);
    file = file_;
  }
  if (presented.authorization.size() > 1) {
    return Unauthenticated("the call has more than one authorization");
  }
  if (!presented.authorization.empty()) {
    const absl::string_view given = presented.authorization.front();
    if (!absl::StartsWithIgnoreCase(given, kScheme)) {
      return Unauthenticated("the call's authorization is no bearer token");
    }
    const absl::string_view token = given.substr(kScheme.size());
    auto caller = token.size() > kLongestToken ? nullptr : file->FindToken(token);
    if (caller == nullptr) return Unauthenticated("the call's token is unknown");
    return caller;
  }
  if (!presented.common_names.empty() || !presented.alt_names.empty()) {
    auto caller = file->FindCertificate(presented.common_names, presented.alt_names);
    if (caller == nullptr) return Unauthenticated("the call's client certificate is unknown");
    return caller;
  }
  return Unauthenticated("the call has no credentials");
}

absl::StatusOr<Authenticator::Stamp> Authenticator::StampOfFile() const {
  struct stat info;
  if (stat(path_.c_str(), &info) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot read --auth_file=", path_, ": ", std::strerror(errno)));
  }
  if (!S_ISREG(info.st_mode)) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot read --auth_file=", path_, ": it is no regular file"));
  }
  return Stamp{.device = static_cast<int64_t>(info.st_dev),
               .inode = static_cast<int64_t>(info.st_ino),
               .size = info.st_size,
               .modified_ns = Nanoseconds(info.st_mtim),
               .changed_ns = Nanoseconds(info.st_ctim)};
}

absl::Status Authenticator::Read() {
  // Before the content: what changes while it is read is seen at the next look.
  const auto stamp = StampOfFile();
  if (!stamp.ok()) return stamp.status();
  {
    absl::MutexLock lock(&mutex_);
    if (*stamp == stamp_) return absl::OkStatus();
    stamp_ = *stamp;  // an unsound file is told once
  }
  std::ifstream stream(path_, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (!stream.good() && !stream.eof()) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot read --auth_file=", path_, ": ", std::strerror(errno)));
  }
  auto file = AuthFile::Parse(text, absl::StrCat("--auth_file=", path_));
  if (!file.ok()) return file.status();
  spdlog::info("--auth_file={}: {} credentials", path_, file->size());
  absl::MutexLock lock(&mutex_);
  file_ = std::make_shared<const AuthFile>(*std::move(file));
  return absl::OkStatus();
}

void Authenticator::ReadIfChanged() {
  const int64_t now = absl::GetCurrentTimeNanos();
  int64_t due = next_look_ns_.load(std::memory_order_relaxed);
  // One caller looks; a clock that was set back must not put the look off.
  if (now < due && due - now <= kLookEveryNs) return;
  if (!next_look_ns_.compare_exchange_strong(due, now + kLookEveryNs)) return;
  if (absl::Status read = Read(); !read.ok()) {
    spdlog::error("the credentials of before stay in force: {}", std::string(read.message()));
  }
}

}  // namespace normd
