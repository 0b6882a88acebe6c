// Memory that another process has on the GPU, with a real driver between both. The other
// process is this program again, which has the tensors.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/cuda/cuda_backend.h"

extern char** environ;

namespace normd {
namespace {

constexpr char kAsClient[] = "--as_client";
constexpr int64_t kBatch = 5, kChannels = 3, kPositions = 77;
constexpr int64_t kCount = kBatch * kChannels * kPositions;
constexpr size_t kBytes = static_cast<size_t>(kCount) * sizeof(float);

float InputAt(int64_t i) { return static_cast<float>(i % 101) * 0.25F - 7; }

bool WriteAll(int to, const void* data, size_t bytes) {
  return write(to, data, bytes) == static_cast<ssize_t>(bytes);
}

bool ReadAll(int from, void* data, size_t bytes) {
  for (size_t got = 0; got < bytes;) {
    const ssize_t more = read(from, static_cast<char*>(data) + got, bytes - got);
    if (more <= 0) return false;
    got += static_cast<size_t>(more);
  }
  return true;
}

// Has x and room for y, one behind the other, in one allocation. Tells its handle, waits for a
// byte, tells y, and waits for the end of its input.
int RunClient() {
  std::vector<float> x(kCount), y(kCount);
  for (int64_t i = 0; i < kCount; ++i) x[static_cast<size_t>(i)] = InputAt(i);
  char* memory = nullptr;
  cudaIpcMemHandle_t handle;
  if (cudaMalloc(&memory, 2 * kBytes) != cudaSuccess ||
      cudaMemcpy(memory, x.data(), kBytes, cudaMemcpyHostToDevice) != cudaSuccess ||
      cudaIpcGetMemHandle(&handle, memory) != cudaSuccess ||
      !WriteAll(STDOUT_FILENO, &handle, sizeof(handle))) {
    return 1;
  }
  char byte = 0;
  if (!ReadAll(STDIN_FILENO, &byte, 1) ||
      cudaMemcpy(y.data(), memory + kBytes, kBytes, cudaMemcpyDeviceToHost) != cudaSuccess ||
      !WriteAll(STDOUT_FILENO, y.data(), kBytes)) {
    return 1;
  }
  (void)ReadAll(STDIN_FILENO, &byte, 1);
  return 0;
}

// The other process, for as long as this lives.
class Client {
 public:
  Client() {
    int in[2], out[2];
    if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0) return;
    to_ = in[1];
    from_ = out[0];
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_adddup2(&files, in[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&files, out[1], STDOUT_FILENO);
    std::string program = "cuda_ipc_test", flag = kAsClient;
    char* const arguments[] = {program.data(), flag.data(), nullptr};
    if (posix_spawn(&process_, "/proc/self/exe", &files, nullptr, arguments, environ) != 0) {
      process_ = 0;
    }
    posix_spawn_file_actions_destroy(&files);
    close(in[0]);
    close(out[1]);
  }
  ~Client() {
    close(to_);
    close(from_);
    if (process_ != 0) waitpid(process_, nullptr, 0);
  }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  bool ReadHandle(DeviceHandle& handle) { return ReadAll(from_, handle.data(), handle.size()); }
  bool ReadOutput(std::vector<float>& y) {
    return WriteAll(to_, "", 1) && ReadAll(from_, y.data(), kBytes);
  }

 private:
  int to_ = -1, from_ = -1;
  pid_t process_ = 0;
};

class CudaIpc : public testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    backend_ = MakeCudaBackend({.devices = {0}}, &why);
    if (backend_ == nullptr) GTEST_SKIP() << why;
  }

  std::unique_ptr<Backend> backend_;
};

TEST_F(CudaIpc, NormalizesWhereTheOtherProcessHasItsTensors) {
  Client client;
  DeviceHandle handle;
  ASSERT_TRUE(client.ReadHandle(handle));
  std::shared_ptr<void> memory;
  int64_t bytes = 0;
  ASSERT_EQ(backend_->OpenShared(handle, &memory, &bytes), Outcome::kOk);
  ASSERT_GE(bytes, static_cast<int64_t>(2 * kBytes));

  const NormProblem problem{.batch = kBatch, .channels = kChannels, .positions = kPositions};
  const std::vector<double> mean = {1, -2, 3}, var = {4, 0.25, 9};
  char* const tensors = static_cast<char*>(memory.get());
  ASSERT_EQ(
      backend_->ForwardByStatistics(
          problem, {.x = tensors, .y = tensors + kBytes, .statistics = {mean.data(), var.data()}},
          Place::kDevice, {}),
      Outcome::kOk);

  std::vector<float> y(kCount);
  ASSERT_TRUE(client.ReadOutput(y));
  for (int64_t i = 0; i < kCount; ++i) {
    const auto c = static_cast<size_t>(i / kPositions % kChannels);
    const double expected =
        (static_cast<double>(InputAt(i)) - mean[c]) / std::sqrt(var[c] + problem.eps);
    ASSERT_NEAR(static_cast<double>(y[static_cast<size_t>(i)]), expected, 1e-5) << "at " << i;
  }
}

TEST_F(CudaIpc, RefusesAHandleOfNothingAndGoesOn) {
  std::shared_ptr<void> memory;
  int64_t bytes = 0;
  EXPECT_EQ(backend_->OpenShared(DeviceHandle{}, &memory, &bytes), Outcome::kRefused);
  EXPECT_EQ(memory, nullptr);

  const NormProblem problem{.batch = 1, .channels = 1, .positions = 4};
  const std::vector<float> x = {1, 2, 3, 4};
  std::vector<float> y(4);
  double mean = 0, m2 = 0;
  EXPECT_EQ(backend_->ForwardByBatch(
                problem, {.x = x.data(), .y = y.data(), .moments = {&mean, &m2}}, Place::kHost, {}),
            Outcome::kOk);
  EXPECT_DOUBLE_EQ(mean, 2.5);
}

}  // namespace
}  // namespace normd

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], normd::kAsClient) == 0) return normd::RunClient();
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
