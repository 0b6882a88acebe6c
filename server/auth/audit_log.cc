#include "server/auth/audit_log.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "spdlog/sinks/basic_file_sink.h"
#include "spdlog/spdlog.h"

namespace normd {
namespace {

constexpr int kStrangersASecond = 100;

}  // namespace

absl::StatusOr<std::unique_ptr<AuditLog>> AuditLog::Open(const std::string& path) {
  if (path.empty()) return absl::WrapUnique(new AuditLog(nullptr));
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (file < 0) {
    return absl::FailedPreconditionError(absl::StrCat("cannot write --audit_log=", path, ": ",
                                                      std::strerror(errno), "; give another file"));
  }
  close(file);
  auto logger = std::make_shared<spdlog::logger>(
      "audit", std::make_shared<spdlog::sinks::basic_file_sink_mt>(path));
  logger->set_pattern("%v");
  logger->flush_on(spdlog::level::info);
  return absl::WrapUnique(new AuditLog(std::move(logger)));
}

void AuditLog::Write(const AuditRecord& record) {
  if (logger_ == nullptr) return;
  if (record.outcome == absl::StatusCode::kUnauthenticated && StrangersTooLoud()) return;
  const nlohmann::ordered_json line = {
      {"time", absl::FormatTime("%Y-%m-%dT%H:%M:%E6SZ", absl::Now(), absl::UTCTimeZone())},
      {"who", record.who},
      {"peer", record.peer},
      {"method", record.method},
      {"instance", record.instance},
      {"request_id", record.request_id},
      {"outcome", absl::StatusCodeToString(record.outcome)},
      {"version", record.version},
      {"replayed", record.replayed}};
  logger_->info("{}", line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

bool AuditLog::StrangersTooLoud() {
  const int64_t now = absl::ToUnixSeconds(absl::Now());
  if (second_.exchange(now) != now) strangers_ = 0;
  return ++strangers_ > kStrangersASecond;
}

}  // namespace normd
