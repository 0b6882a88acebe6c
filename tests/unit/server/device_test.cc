// A whole server on devices that are not there: what its calls, its health and its state
// make of what happens to them.
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "absl/time/clock.h"
#include "kernels/cuda/cuda_backend.h"
#include "normd/v1/norm_service.grpc.pb.h"
#include "server/admission/memory_budget.h"
#include "server/config.h"
#include "server/error/error.h"
#include "server/server.h"
#include "server/shared_memory/owned_fd.h"
#include "tests/unit/kernels/emulated_device.h"
#include "tests/unit/server/temporary_directory.h"

namespace normd {
namespace {

constexpr int64_t kChannels = 2048;
constexpr int64_t kSamples = 3;
constexpr int64_t kTensorBytes = kSamples * kChannels * 4;
constexpr char kName[] = "net/bn";

Config Defaults() {
  // Which a process can read but once.
  char name[] = "normd";
  char* argv[] = {name};
  static const absl::StatusOr<Config> kDefaults = ReadConfig(1, argv);
  EXPECT_TRUE(kDefaults.ok()) << kDefaults.status();
  return *kDefaults;
}

std::vector<float> Input(float scale = 1) {
  std::vector<float> values(kSamples * kChannels);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = scale * static_cast<float>(i * 7919 % 1000) / 100;
  }
  return values;
}

v1::Tensor ToTensor(const std::vector<float>& values) {
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_FLOAT32);
  tensor.add_shape(static_cast<int64_t>(values.size()) / kChannels);
  tensor.add_shape(kChannels);
  tensor.set_data(values.data(), values.size() * sizeof(float));
  return tensor;
}

std::vector<float> ValuesOf(const v1::Tensor& tensor) {
  std::vector<float> values(tensor.data().size() / sizeof(float));
  std::memcpy(values.data(), tensor.data().data(), tensor.data().size());
  return values;
}

class ServedDevices {
 public:
  // `devices` 0: on the CPU.
  explicit ServedDevices(int devices, Config config = Defaults()) {
    config.listen = {"127.0.0.1:0"};
    config.state_dir = directory_.File("state");
    config.shared_memory_socket = config.state_dir + "/shared-memory.sock";
    socket = config.shared_memory_socket;
    config.backend = devices == 0 ? "cpu" : "cuda";
    auto server = Server::Start(config, [&](const CudaOptions& options, std::string*) {
      std::vector<std::unique_ptr<cuda::Device>> made;
      for (int i = 0; i < devices; ++i) {
        states.push_back(std::make_shared<EmulatedState>());
        made.push_back(MakeEmulatedDevice(states.back()));
      }
      return cuda::MakeBackend(std::move(made), options);
    });
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ =
        grpc::CreateChannel(server_->addresses().front(), grpc::InsecureChannelCredentials());
    stub = v1::NormService::NewStub(channel_);
  }

  void Create() {
    v1::CreateInstanceRequest request;
    request.set_name(kName);
    request.mutable_config()->mutable_batch_norm_1d()->set_num_features(kChannels);
    v1::CreateInstanceResponse response;
    grpc::ClientContext context;
    const grpc::Status status = stub->CreateInstance(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
  }

  grpc::Status Forward(v1::Mode mode, v1::ForwardResponse* response = nullptr,
                       const std::vector<float>& input = Input()) {
    v1::ForwardRequest request;
    request.set_name(kName);
    request.set_mode(mode);
    *request.mutable_input() = ToTensor(input);
    request.set_save_for_backward(mode == v1::MODE_TRAIN);
    v1::ForwardResponse ignored;
    grpc::ClientContext context;
    return stub->Forward(&context, request, response != nullptr ? response : &ignored);
  }

  v1::GetServerInfoResponse Info() {
    grpc::ClientContext context;
    v1::GetServerInfoResponse info;
    EXPECT_TRUE(stub->GetServerInfo(&context, {}, &info).ok());
    return info;
  }

  // Whether grpc.health.v1.Health/Check says SERVING.
  bool IsServing(const std::string& service) {
    std::string request;  // HealthCheckRequest: field 1 is the service
    if (!service.empty()) {
      request = std::string("\x0a") + static_cast<char>(service.size()) + service;
    }
    grpc::GenericStub health(channel_);
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const grpc::Slice slice(request);
    const auto call = health.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check",
                                              grpc::ByteBuffer(&slice, 1), &queue);
    call->StartCall();
    grpc::ByteBuffer response;
    grpc::Status status;
    call->Finish(&response, &status, &queue);
    void* tag = nullptr;
    bool ok = false;
    EXPECT_TRUE(queue.Next(&tag, &ok) && ok && status.ok()) << status.error_message();
    std::vector<grpc::Slice> slices;
    EXPECT_TRUE(response.Dump(&slices).ok());
    std::string bytes;
    for (const grpc::Slice& part : slices) bytes.append(part.begin(), part.end());
    EXPECT_TRUE(bytes == "\x08\x01" || bytes == "\x08\x02");
    return bytes == "\x08\x01";
  }

  absl::Status Drain() { return server_->Drain(); }

  std::vector<std::shared_ptr<EmulatedState>> states;
  std::string socket;
  std::unique_ptr<v1::NormService::Stub> stub;

 private:
  const TemporaryDirectory directory_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST(ServedDevice, HealthFlipsWithTheLastDeviceAndTheServerLives) {
  ServedDevices served(1);
  served.Create();
  v1::ForwardResponse before;
  ASSERT_TRUE(served.Forward(v1::MODE_TRAIN, &before).ok());
  EXPECT_TRUE(served.Info().devices(0).healthy());
  for (const char* service : {"", "normd.v1.NormService"}) EXPECT_TRUE(served.IsServing(service));

  served.states[0]->fail = true;
  const grpc::Status failed = served.Forward(v1::MODE_TRAIN);
  EXPECT_EQ(failed.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_NE(failed.error_message().find("device failed"), std::string::npos);
  EXPECT_FALSE(served.Info().devices(0).healthy());
  for (const char* service : {"", "normd.v1.NormService"}) EXPECT_FALSE(served.IsServing(service));

  // It stays so, and what needs no device goes on: the failed calls have changed nothing.
  served.states[0]->fail = false;
  EXPECT_EQ(served.Forward(v1::MODE_EVAL).error_code(), grpc::StatusCode::INTERNAL);
  v1::GetInstanceRequest request;
  request.set_name(kName);
  v1::GetInstanceResponse response;
  grpc::ClientContext context;
  ASSERT_TRUE(served.stub->GetInstance(&context, request, &response).ok());
  EXPECT_EQ(response.version(), before.version());
  EXPECT_TRUE(served.Drain().ok());
}

TEST(ServedDevice, AnotherDeviceGoesOn) {
  ServedDevices served(2);
  served.Create();
  ASSERT_TRUE(served.Forward(v1::MODE_EVAL).ok());
  const int at = served.states[0]->launches > 0 ? 0 : 1;
  served.states[at]->fail = true;
  EXPECT_EQ(served.Forward(v1::MODE_EVAL).error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_FALSE(served.Info().devices(at).healthy());
  EXPECT_TRUE(served.Info().devices(1 - at).healthy());
  EXPECT_TRUE(served.IsServing(""));
  EXPECT_TRUE(served.Forward(v1::MODE_EVAL).ok());
}

TEST(ServedDevice, MemoryIsWithinItsBudgets) {
  Config config = Defaults();
  config.device_memory_budget = 1 << 20;
  config.memory_budget = int64_t{256} << 20;
  ServedDevices served(1, config);
  served.Create();
  ASSERT_TRUE(served.Forward(v1::MODE_EVAL).ok());
  const v1::GetServerInfoResponse info = served.Info();
  EXPECT_EQ(info.devices(0).memory_budget(), config.device_memory_budget);
  EXPECT_EQ(info.devices(0).memory_in_use(), served.states[0]->bytes_in_use);
  EXPECT_GT(info.devices(0).memory_in_use(), 0);
  // The lane that waits for the next call has its staging.
  EXPECT_GT(served.states[0]->pinned_bytes, 0);
  EXPECT_GE(info.memory_in_use(), served.states[0]->pinned_bytes);

  const grpc::Status refused =
      served.Forward(v1::MODE_EVAL, nullptr, std::vector<float>(100 * kChannels));
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_NE(refused.error_message().find("--device_memory_budget"), std::string::npos);
  EXPECT_TRUE(served.IsServing(""));
  EXPECT_TRUE(served.Forward(v1::MODE_EVAL).ok());
}

TEST(ServedDevice, RefusesWhereTheHostHasNoRoomForStaging) {
  Config config = Defaults();
  config.memory_budget = 4 << 20;
  ServedDevices served(1, config);
  served.Create();
  const grpc::Status refused = served.Forward(v1::MODE_EVAL);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_NE(refused.error_message().find("--memory_budget"), std::string::npos);
  EXPECT_EQ(served.states[0]->pinned_bytes, 0);
}

// Whatever changes parameters and statistics, the copies on the device are never old.
TEST(ServedDevice, ParametersOnTheDeviceAreTheInstancesOwn) {
  ServedDevices cuda(1), cpu(0);
  for (ServedDevices* served : {&cuda, &cpu}) served->Create();
  const auto expect_same = [&](const char* after) {
    SCOPED_TRACE(after);
    v1::ForwardResponse ours, due;
    for (int i = 0; i < 2; ++i) {
      const int64_t before = cuda.states[0]->bytes_in;
      ASSERT_TRUE(cuda.Forward(v1::MODE_EVAL, &ours).ok());
      // The second time they are there.
      if (i == 1) {
        EXPECT_EQ(cuda.states[0]->bytes_in - before, kTensorBytes);
      }
    }
    ASSERT_TRUE(cpu.Forward(v1::MODE_EVAL, &due).ok());
    const std::vector<float> a = ValuesOf(ours.output()), b = ValuesOf(due.output());
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-4) << i;
  };
  const auto both = [&](auto change) {
    for (ServedDevices* served : {&cuda, &cpu}) {
      const grpc::Status status = change(*served);
      ASSERT_TRUE(status.ok()) << status.error_message();
    }
  };
  expect_same("birth");
  for (const float scale : {1.F, 3.F}) {
    both([&](ServedDevices& served) {
      v1::ForwardResponse forward;
      grpc::Status status = served.Forward(v1::MODE_TRAIN, &forward, Input(scale));
      if (!status.ok()) return status;
      v1::BackwardRequest request;
      request.set_name(kName);
      request.set_context_id(forward.context_id());
      request.set_accumulate(true);
      *request.mutable_grad_output() = ToTensor(Input(0.01F));
      v1::BackwardResponse response;
      grpc::ClientContext context;
      return served.stub->Backward(&context, request, &response);
    });
    expect_same("a batch");
    both([](ServedDevices& served) {
      v1::StepRequest request;
      request.set_name(kName);
      request.mutable_optimizer()->mutable_sgd()->set_lr(0.5);
      request.set_zero_grad(true);
      v1::StepResponse response;
      grpc::ClientContext context;
      return served.stub->Step(&context, request, &response);
    });
    expect_same("a step");
  }
  both([](ServedDevices& served) {
    v1::ResetParametersRequest request;
    request.set_name(kName);
    v1::ResetParametersResponse response;
    grpc::ClientContext context;
    return served.stub->ResetParameters(&context, request, &response);
  });
  expect_same("a reset");
}

// A client's connection to the socket of shared memory.
class Connection {
 public:
  explicit Connection(const std::string& path)
      : socket_(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof(address.sun_path) - 1);
    EXPECT_EQ(connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)),
              0);
    name_.resize(64);
    name_.resize(static_cast<size_t>(recv(socket_.get(), name_.data(), name_.size(), 0)));
  }
  const std::string& name() const { return name_; }

 private:
  const OwnedFd socket_;
  std::string name_;
};

std::string ToBytes(const DeviceHandle& handle) {
  return {reinterpret_cast<const char*>(handle.data()), handle.size()};
}

Config WithCudaIpc() {
  Config config = Defaults();
  config.shared_memory = true;
  config.cuda_ipc = true;
  return config;
}

// A server with one device, where a client has some tensors.
class CudaIpc : public ::testing::Test {
 protected:
  CudaIpc() : connection_(std::in_place, served_.socket) { served_.Create(); }

  // Memory of the client's on the device, of a tensor's bytes and some more.
  std::vector<char>& Memory(int number) {
    auto& memory = served_.states[0]->shared[HandleOf(number)];
    memory.resize(kTensorBytes + 64);
    return memory;
  }
  static DeviceHandle HandleOf(int number) {
    DeviceHandle handle = {};
    handle.fill(static_cast<std::byte>(number));
    return handle;
  }

  grpc::Status Register(const std::string& handle, int64_t bytes, std::string* region) {
    v1::RegisterSharedMemoryRequest request;
    request.set_connection(connection_->name());
    request.set_region_bytes(bytes);
    request.set_cuda_ipc_handle(handle);
    return Call(&v1::NormService::Stub::RegisterSharedMemory, request, region);
  }
  // A region of the memory's tensor, filled with these values.
  v1::SharedMemory Share(int number, const std::vector<float>& values) {
    std::memcpy(Memory(number).data(), values.data(), values.size() * sizeof(float));
    v1::SharedMemory name;
    const grpc::Status status =
        Register(ToBytes(HandleOf(number)), kTensorBytes, name.mutable_region());
    EXPECT_TRUE(status.ok()) << status.error_message();
    name.set_length(kTensorBytes);
    return name;
  }
  std::vector<float> ValuesAt(int number) {
    std::vector<float> values(kTensorBytes / sizeof(float));
    std::memcpy(values.data(), Memory(number).data(), kTensorBytes);
    return values;
  }

  static v1::Tensor At(const v1::SharedMemory& name) {
    v1::Tensor tensor = ToTensor(Input());
    tensor.clear_data();
    *tensor.mutable_shared_memory() = name;
    return tensor;
  }
  static v1::ForwardRequest Request(v1::Mode mode, v1::Tensor input,
                                    const v1::SharedMemory* output = nullptr) {
    v1::ForwardRequest request;
    request.set_name(kName);
    request.set_mode(mode);
    *request.mutable_input() = std::move(input);
    if (output != nullptr) *request.mutable_output_memory() = *output;
    return request;
  }

  // Calls, and remembers the detail of an error.
  template <class Request, class Response>
  grpc::Status Call(grpc::Status (v1::NormService::Stub::*method)(grpc::ClientContext*,
                                                                  const Request&, Response*),
                    const Request& request, Response* response) {
    grpc::ClientContext context;
    const grpc::Status status = (served_.stub.get()->*method)(&context, request, response);
    detail_.Clear();
    const auto& trailing = context.GetServerTrailingMetadata();
    const auto found = trailing.find("normd-error-detail-bin");
    if (found != trailing.end()) {
      detail_.ParseFromArray(found->second.data(), static_cast<int>(found->second.size()));
    }
    return status;
  }
  template <class Request>
  grpc::Status Call(grpc::Status (v1::NormService::Stub::*method)(
                        grpc::ClientContext*, const Request&, v1::RegisterSharedMemoryResponse*),
                    const Request& request, std::string* region) {
    v1::RegisterSharedMemoryResponse response;
    const grpc::Status status = Call(method, request, &response);
    *region = response.region();
    return status;
  }
  v1::ForwardResponse Forward(const v1::ForwardRequest& request) {
    v1::ForwardResponse response;
    const grpc::Status status = Call(&v1::NormService::Stub::Forward, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  v1::BackwardResponse Backward(const v1::BackwardRequest& request) {
    v1::BackwardResponse response;
    const grpc::Status status = Call(&v1::NormService::Stub::Backward, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  // The field that such a call is refused for.
  std::string FieldRefused(const v1::ForwardRequest& request) {
    v1::ForwardResponse response;
    const grpc::Status status = Call(&v1::NormService::Stub::Forward, request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    return detail_.field();
  }
  std::string FieldRefused(const v1::BackwardRequest& request) {
    v1::BackwardResponse response;
    const grpc::Status status = Call(&v1::NormService::Stub::Backward, request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    return detail_.field();
  }

  ServedDevices served_{1, WithCudaIpc()};
  std::optional<Connection> connection_;
  v1::ErrorDetail detail_;
};

TEST_F(CudaIpc, TensorsStayOnTheDevice) {
  const v1::SharedMemory x = Share(1, Input()), y = Share(2, {}), dx = Share(3, {});
  // In eval mode, also over the input; nothing but the parameters travels, once.
  const std::vector<float> due =
      ValuesOf(Forward(Request(v1::MODE_EVAL, ToTensor(Input()))).output());
  const int64_t before = served_.states[0]->bytes_in;
  const v1::ForwardResponse answer = Forward(Request(v1::MODE_EVAL, At(x), &y));
  EXPECT_EQ(answer.output().shared_memory().region(), y.region());
  EXPECT_EQ(answer.output().data(), "");
  EXPECT_EQ(ValuesAt(2), due);
  Forward(Request(v1::MODE_EVAL, At(x), &x));
  EXPECT_EQ(ValuesAt(1), due);
  EXPECT_EQ(served_.states[0]->bytes_in, before);

  // In train mode, and the gradients.
  v1::ForwardResponse host_forward;
  v1::BackwardResponse host_gradients;
  for (const bool on_device : {false, true}) {
    std::memcpy(Memory(1).data(), Input().data(), kTensorBytes);
    const v1::Tensor input = on_device ? At(x) : ToTensor(Input());
    v1::ForwardRequest forward = Request(v1::MODE_TRAIN, input, on_device ? &y : nullptr);
    forward.set_return_batch_statistics(true);
    const v1::ForwardResponse trained = Forward(forward);
    EXPECT_EQ(trained.num_batches_tracked(), on_device ? 2 : 1);
    v1::BackwardRequest backward;
    backward.set_name(kName);
    backward.set_mode(v1::MODE_TRAIN);
    *backward.mutable_input() = input;
    *backward.mutable_grad_output() = on_device ? At(y) : trained.output();
    if (on_device) *backward.mutable_grad_input_memory() = dx;
    const v1::BackwardResponse gradients = Backward(backward);
    if (!on_device) {
      host_forward = trained;
      host_gradients = gradients;
      continue;
    }
    EXPECT_EQ(ValuesAt(2), ValuesOf(host_forward.output()));
    EXPECT_EQ(trained.batch_statistics().SerializeAsString(),
              host_forward.batch_statistics().SerializeAsString());
    EXPECT_EQ(ValuesAt(3), ValuesOf(host_gradients.grad_input()));
    EXPECT_EQ(gradients.grad_weight().data(), host_gradients.grad_weight().data());
  }
}

TEST_F(CudaIpc, RefusesMemoryThatIsNotThere) {
  Memory(1);
  std::string region;
  const auto field_refused = [&](const std::string& handle, int64_t bytes) {
    const grpc::Status status = Register(handle, bytes, &region);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    EXPECT_EQ(region, "");
    return detail_.field();
  };
  const std::string good = ToBytes(HandleOf(1));
  EXPECT_EQ(field_refused(std::string(63, 'x'), 64), "cuda_ipc_handle");
  EXPECT_EQ(field_refused(std::string(65, 'x'), 64), "cuda_ipc_handle");
  EXPECT_EQ(field_refused(std::string(1 << 20, 'x'), 64), "cuda_ipc_handle");
  EXPECT_EQ(field_refused(std::string(64, 'x'), 64), "cuda_ipc_handle");
  EXPECT_EQ(field_refused(good, kTensorBytes + 65), "region_bytes");
  EXPECT_EQ(field_refused(good, std::numeric_limits<int64_t>::max()), "region_bytes");
  EXPECT_EQ(field_refused(good, 0), "region_bytes");
  EXPECT_EQ(field_refused(good, std::numeric_limits<int64_t>::min()), "region_bytes");
  EXPECT_EQ(served_.states[0]->shared_open, 0);
  EXPECT_TRUE(Register(good, kTensorBytes + 64, &region).ok());
  EXPECT_EQ(served_.states[0]->shared_open, 1);
}

TEST_F(CudaIpc, EveryUseIsWithinTheMemoryAndWhereTheOthersAre) {
  const v1::SharedMemory x = Share(1, Input()), y = Share(2, Input());
  v1::SharedMemory past = x;
  past.set_offset(64);
  EXPECT_EQ(FieldRefused(Request(v1::MODE_EVAL, At(past), &y)), "input.shared_memory.length");
  past.set_offset(kTensorBytes + 64);
  EXPECT_EQ(FieldRefused(Request(v1::MODE_EVAL, At(past), &y)), "input.shared_memory.offset");
  past = y;
  past.set_length(kTensorBytes + 1);
  EXPECT_EQ(FieldRefused(Request(v1::MODE_EVAL, At(x), &past)), "output_memory.length");

  EXPECT_EQ(FieldRefused(Request(v1::MODE_EVAL, At(x))), "output_memory");
  EXPECT_EQ(FieldRefused(Request(v1::MODE_EVAL, ToTensor(Input()), &y)), "input");
  v1::ForwardRequest request = Request(v1::MODE_EVAL, At(x), &y);
  *request.mutable_residual() = ToTensor(Input());
  EXPECT_EQ(FieldRefused(request), "residual");
  request = Request(v1::MODE_EVAL, At(x), &y);
  request.set_save_for_backward(true);
  EXPECT_EQ(FieldRefused(request), "save_for_backward");
  EXPECT_EQ(FieldRefused(Request(v1::MODE_TRAIN, At(x), &x)), "output_memory");

  v1::ForwardRequest saving = Request(v1::MODE_TRAIN, ToTensor(Input()));
  saving.set_save_for_backward(true);
  v1::BackwardRequest backward;
  backward.set_name(kName);
  backward.set_context_id(Forward(saving).context_id());
  *backward.mutable_grad_output() = At(x);
  *backward.mutable_grad_input_memory() = y;
  EXPECT_EQ(FieldRefused(backward), "context_id");
  backward.clear_context_id();
  *backward.mutable_input() = ToTensor(Input());
  EXPECT_EQ(FieldRefused(backward), "input");
  *backward.mutable_input() = At(y);
  backward.clear_grad_input_memory();
  EXPECT_EQ(FieldRefused(backward), "grad_input_memory");
  *backward.mutable_grad_input_memory() = x;
  backward.set_accumulate(true);
  EXPECT_EQ(FieldRefused(backward), "grad_input_memory");
  backward.clear_grad_input_memory();
  backward.set_skip_grad_input(true);
  Backward(backward);
  // None of that has harmed the device.
  EXPECT_TRUE(served_.Info().devices(0).healthy());
  EXPECT_EQ(ValuesAt(1), Input());
}

TEST_F(CudaIpc, MemoryIsClosedWithItsRegionAndItsConnection) {
  const v1::SharedMemory x = Share(1, Input()), y = Share(2, {});
  EXPECT_EQ(served_.states[0]->shared_open, 2);
  v1::UnregisterSharedMemoryRequest request;
  request.set_region(x.region());
  v1::UnregisterSharedMemoryResponse response;
  ASSERT_TRUE(Call(&v1::NormService::Stub::UnregisterSharedMemory, request, &response).ok());
  EXPECT_EQ(served_.states[0]->shared_open, 1);
  v1::ForwardResponse ignored;
  EXPECT_EQ(Call(&v1::NormService::Stub::Forward, Request(v1::MODE_EVAL, At(x), &y), &ignored)
                .error_code(),
            grpc::StatusCode::NOT_FOUND);
  connection_.reset();
  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  while (served_.states[0]->shared_open > 0 && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_EQ(served_.states[0]->shared_open, 0);
  EXPECT_EQ(Call(&v1::NormService::Stub::Forward, Request(v1::MODE_EVAL, At(y), &y), &ignored)
                .error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(CudaIpc, ACallKeepsWhatItUses) {
  const v1::SharedMemory x = Share(1, Input()), y = Share(2, {});
  const std::vector<float> due =
      ValuesOf(Forward(Request(v1::MODE_EVAL, ToTensor(Input()))).output());
  // Given up by its owner while the kernels are about to run.
  served_.states[0]->on_launch = [&] {
    for (const v1::SharedMemory& name : {x, y}) {
      v1::UnregisterSharedMemoryRequest request;
      request.set_region(name.region());
      v1::UnregisterSharedMemoryResponse response;
      grpc::ClientContext context;
      EXPECT_TRUE(served_.stub->UnregisterSharedMemory(&context, request, &response).ok());
    }
    EXPECT_EQ(served_.states[0]->shared_open, 2);
  };
  Forward(Request(v1::MODE_EVAL, At(x), &y));
  served_.states[0]->on_launch = nullptr;
  EXPECT_EQ(ValuesAt(2), due);
  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  while (served_.states[0]->shared_open > 0 && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_EQ(served_.states[0]->shared_open, 0);
}

TEST(CudaIpcFlag, IsOffUnlessAskedForAndNeedsOneDevice) {
  Config config = WithCudaIpc();
  config.cuda_ipc = false;
  ServedDevices served(1, config);
  const Connection connection(served.socket);
  v1::RegisterSharedMemoryRequest request;
  request.set_connection(connection.name());
  request.set_region_bytes(64);
  request.set_cuda_ipc_handle(std::string(64, 'x'));
  v1::RegisterSharedMemoryResponse response;
  grpc::ClientContext context;
  const grpc::Status status = served.stub->RegisterSharedMemory(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_NE(status.error_message().find("--cuda_ipc=on"), std::string::npos);

  const TemporaryDirectory directory;
  config = WithCudaIpc();
  config.backend = "cpu";
  config.listen = {"127.0.0.1:0"};
  config.state_dir = directory.File("state");
  const auto refused = Server::Start(config);
  EXPECT_TRUE(absl::IsFailedPrecondition(refused.status())) << refused.status();
}

TEST(MemoryBudget, WhatCanBeReclaimedStandsInNobodysWay) {
  MemoryBudget budget(10, "--memory_budget");
  std::optional<MemoryClaim> idle = *budget.Claim(6);
  int asked = 0;
  budget.ReclaimBy([&] {
    ++asked;
    idle.reset();
  });
  EXPECT_TRUE(budget.Claim(4).ok());
  EXPECT_FALSE(budget.Claim(11).ok());
  EXPECT_EQ(asked, 0);
  EXPECT_TRUE(budget.Claim(8).ok());
  EXPECT_EQ(asked, 1);
}

}  // namespace
}  // namespace normd
