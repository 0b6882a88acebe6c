// Preloaded into normd: a system clock that is set while the server runs. It is ahead by as
// many seconds as the file that NORMD_TEST_CLOCK names says; the monotonic clocks are right.
#include <cerrno>
#include <cstdlib>
#include <ctime>

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

namespace {

time_t Ahead() {
  const int saved = errno;
  const char* control = getenv("NORMD_TEST_CLOCK");
  char text[32] = "";
  const int file = control == nullptr ? -1 : open(control, O_RDONLY | O_CLOEXEC);
  if (file >= 0) {
    const ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    text[size > 0 ? size : 0] = 0;
  }
  errno = saved;
  return strtol(text, nullptr, 10);
}

}  // namespace

extern "C" {

int clock_gettime(clockid_t clock, timespec* now) noexcept {
  const auto result = static_cast<int>(syscall(SYS_clock_gettime, clock, now));
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    now->tv_sec += Ahead();
  }
  return result;
}

int gettimeofday(timeval* __restrict result, void* __restrict) noexcept {
  timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now) != 0) return -1;
  *result = {.tv_sec = now.tv_sec, .tv_usec = now.tv_nsec / 1000};
  return 0;
}

time_t time(time_t* result) noexcept {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (result != nullptr) *result = now.tv_sec;
  return now.tv_sec;
}

}  // extern "C"
