// Preloaded into normd: a disk that goes bad, or a clock that is set back, when it is told to.
//
// The file that NORMD_TEST_DISK names says what is wrong now; empty or missing: nothing.
//   write ERRNO   writing to a file of the store fails
//   sync ERRNO    syncing one fails
//   slow MICROS   syncing one takes so long
//   clock SECONDS the wall clock is so far behind
// Files of the store: those with "state.sqlite" in their path.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

namespace {

// The number behind `what`, if that is what is wrong now; else 0.
int Wrong(const char* what) {
  const char* control = getenv("NORMD_TEST_DISK");
  const int file = control != nullptr ? open(control, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return 0;
  char text[64];
  char word[16];
  const ssize_t size = read(file, text, sizeof text - 1);
  close(file);
  text[size > 0 ? size : 0] = 0;
  int number = 0;
  return sscanf(text, "%15s %d", word, &number) == 2 && strcmp(word, what) == 0 ? number : 0;
}

// The same where `fd` is a file of the store.
int Fault(int fd, const char* what) {
  const int saved = errno;
  int number = 0;
  char link[64];
  char path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, path, sizeof path - 1);
  if (size > 0) {
    path[size] = 0;
    if (strstr(path, "state.sqlite") != nullptr) number = Wrong(what);
  }
  errno = saved;
  return number;
}

// The function that this one stands before.
template <typename Function>
Function* Next(Function*, const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

template <typename Call>
auto Write(int fd, Call call) -> decltype(call()) {
  const int error = Fault(fd, "write");
  if (error == 0) return call();
  errno = error;
  return -1;
}

template <typename Call>
int Sync(int fd, Call call) {
  if (const int micros = Fault(fd, "slow"); micros > 0) usleep(static_cast<useconds_t>(micros));
  const int error = Fault(fd, "sync");
  if (error == 0) return call();
  errno = error;
  return -1;
}

}  // namespace

extern "C" {

ssize_t write(int fd, const void* data, size_t size) {
  return Write(fd, [&] { return Next(write, "write")(fd, data, size); });
}
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  return Write(fd, [&] { return Next(pwrite, "pwrite")(fd, data, size, offset); });
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) {
  return Write(fd, [&] { return Next(pwrite64, "pwrite64")(fd, data, size, offset); });
}
int clock_gettime(clockid_t clock, timespec* time) {
  const int result = Next(clock_gettime, "clock_gettime")(clock, time);
  const int saved = errno;
  if (result == 0 && clock == CLOCK_REALTIME) time->tv_sec -= Wrong("clock");
  errno = saved;
  return result;
}
int fsync(int fd) {
  return Sync(fd, [&] { return Next(fsync, "fsync")(fd); });
}
int fdatasync(int fd) {
  return Sync(fd, [&] { return Next(fdatasync, "fdatasync")(fd); });
}

}  // extern "C"
