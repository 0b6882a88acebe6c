// Preloaded into normd: a disk that goes bad when it is told to.
//
// The file that NORMD_TEST_DISK names says what is wrong now; empty or missing: nothing.
//   write ERRNO   writing to a file of the store fails
//   sync ERRNO    syncing one fails
//   slow MICROS   syncing one takes so long
// Files of the store: those with "state.sqlite" in their path.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

namespace {

// The number behind `what`, if that is what is wrong with `fd` now; else 0.
int Fault(int fd, const char* what) {
  const int saved = errno;
  int number = 0;
  char link[64];
  char path[4096];
  char text[64];
  char word[16];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, path, sizeof path - 1);
  const char* control = getenv("NORMD_TEST_DISK");
  if (size > 0 && control != nullptr) {
    path[size] = 0;
    const int file = strstr(path, "state.sqlite") ? open(control, O_RDONLY | O_CLOEXEC) : -1;
    if (file >= 0) {
      const ssize_t read_bytes = read(file, text, sizeof text - 1);
      close(file);
      text[read_bytes > 0 ? read_bytes : 0] = 0;
      int value = 0;
      if (sscanf(text, "%15s %d", word, &value) == 2 && strcmp(word, what) == 0) number = value;
    }
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
int fsync(int fd) {
  return Sync(fd, [&] { return Next(fsync, "fsync")(fd); });
}
int fdatasync(int fd) {
  return Sync(fd, [&] { return Next(fdatasync, "fdatasync")(fd); });
}

}  // extern "C"
