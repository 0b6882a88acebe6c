// What the service adds to the wire: normd's Forward and Backward beside a bare gRPC
// server that takes the same request bytes as a ByteBuffer and answers as many bytes
// as normd does, with the same settings. Both are processes of their own; rounds are
// interleaved, and medians compared.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "normd/v1/norm_service.grpc.pb.h"
#include "tests/benchmarks/transport/shared_memory.h"

ABSL_FLAG(std::string, normd, "build/release/bin/normd", "The server to measure");
ABSL_FLAG(bool, quick, false, "A telling part, in under a minute");
ABSL_FLAG(std::string, json, "", "File for the rows");
ABSL_FLAG(std::string, echo, "", "Serve the echo on these addresses (the benchmark calls itself)");

namespace {

extern "C" char** environ;

constexpr int64_t kKiB = 1024;
constexpr int64_t kMiB = 1024 * kKiB;
constexpr int kUnlimited = -1;

// --- the floor -------------------------------------------------------------

// Answers any method "/echo/N" with N bytes.
class Echo final : public grpc::CallbackGenericService {
 public:
  explicit Echo(int64_t most) : bytes_(static_cast<size_t>(most), 'x') {}

 private:
  class Call final : public grpc::ServerGenericBidiReactor {
   public:
    Call(const std::string& bytes, int64_t size) : bytes_(bytes), size_(static_cast<size_t>(size)) {
      StartRead(&request_);
    }
    void OnReadDone(bool ok) override {
      if (!ok) return Finish(grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no message"));
      // Lent, as normd lends its output.
      const grpc::Slice slice(
          const_cast<char*>(bytes_.data()), std::min(size_, bytes_.size()), [](void*) {}, nullptr);
      response_ = grpc::ByteBuffer(&slice, 1);
      StartWriteAndFinish(&response_, grpc::WriteOptions(), grpc::Status::OK);
    }
    void OnDone() override { delete this; }

   private:
    const std::string& bytes_;
    const size_t size_;
    grpc::ByteBuffer request_;
    grpc::ByteBuffer response_;
  };

  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override {
    int64_t size = 0;
    const std::string method = context->method();
    (void)absl::SimpleAtoi(method.substr(method.rfind('/') + 1), &size);
    return new Call(bytes_, size);
  }

  const std::string bytes_;
};

int ServeEcho(const std::string& addresses) {
  Echo echo(256 * kMiB);
  grpc::ServerBuilder builder;
  builder.RegisterCallbackGenericService(&echo);
  builder.SetMaxReceiveMessageSize(kUnlimited);
  builder.SetMaxSendMessageSize(kUnlimited);
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.AddListeningPort(addresses, grpc::InsecureServerCredentials());
  const auto server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  std::ofstream(addresses.substr(5) + ".port.tmp") << "127.0.0.1:" << port << "\n" << std::flush;
  std::filesystem::rename(addresses.substr(5) + ".port.tmp", addresses.substr(5) + ".port");
  server->Wait();
  return 0;
}

// --- processes -------------------------------------------------------------

class Process {
 public:
  explicit Process(std::vector<std::string> command) {
    std::vector<char*> argv;
    for (std::string& word : command) argv.push_back(word.data());
    argv.push_back(nullptr);
    if (posix_spawn(&pid_, argv[0], nullptr, nullptr, argv.data(), environ) != 0) pid_ = -1;
  }
  ~Process() {
    if (pid_ <= 0) return;
    kill(pid_, SIGTERM);
    waitpid(pid_, nullptr, 0);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

 private:
  pid_t pid_ = -1;
};

// The first line of a file that a server writes when it serves.
std::string AwaitLine(const std::string& path) {
  for (int tries = 0; tries < 300; ++tries) {
    std::string line;
    if (std::ifstream file(path); std::getline(file, line)) return line;
    absl::SleepFor(absl::Milliseconds(100));
  }
  std::cerr << "no server wrote " << path << "\n";
  std::exit(1);
}

// --- calls -----------------------------------------------------------------

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kUnlimited);
  arguments.SetMaxSendMessageSize(kUnlimited);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

grpc::ByteBuffer ToByteBuffer(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return {&slice, 1};
}

void CheckOk(const grpc::Status& status, const std::string& what) {
  if (status.ok()) return;
  std::cerr << what << ": " << status.error_message() << "\n";
  std::exit(1);
}

// Sends `request` `count` times with `in_flight` at once, and returns the latency of
// each in milliseconds; the response's size goes to `response_bytes`.
std::vector<double> Send(grpc::GenericStub& stub, const std::string& method,
                         const grpc::ByteBuffer& request, int in_flight, int count,
                         int64_t* response_bytes) {
  std::vector<double> latencies(static_cast<size_t>(count));
  std::atomic<int> next = 0;
  absl::BlockingCounter chains(in_flight);
  struct Chain {
    std::unique_ptr<grpc::ClientContext> context;
    grpc::ByteBuffer request, response;
    absl::Time start;
  };
  std::vector<Chain> chain(static_cast<size_t>(in_flight));
  std::function<void(size_t)> step = [&](size_t c) {
    const int i = next.fetch_add(1);
    if (i >= count) {
      chains.DecrementCount();
      return;
    }
    Chain& one = chain[c];
    one.context = std::make_unique<grpc::ClientContext>();
    one.request = request;
    one.response.Clear();
    one.start = absl::Now();
    stub.UnaryCall(one.context.get(), method, grpc::StubOptions(), &one.request, &one.response,
                   [&, c, i](const grpc::Status& status) {
                     CheckOk(status, method);
                     latencies[static_cast<size_t>(i)] =
                         absl::ToDoubleMilliseconds(absl::Now() - chain[c].start);
                     *response_bytes = static_cast<int64_t>(chain[c].response.Length());
                     step(c);
                   });
  };
  for (size_t c = 0; c < static_cast<size_t>(in_flight); ++c) step(c);
  chains.Wait();
  return latencies;
}

// --- cases -----------------------------------------------------------------

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double Percentile(std::vector<double> values, double p) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1,
                         static_cast<size_t>(p * static_cast<double>(values.size())))];
}

struct Target {
  std::unique_ptr<grpc::GenericStub> ours;
  std::unique_ptr<grpc::GenericStub> floor;
  // In the place of `ours`, whose messages still say what the floor sends.
  std::unique_ptr<SharedMemoryCalls> shared_memory;
};

std::string SizeText(int64_t bytes) {
  return bytes >= kMiB ? absl::StrCat(bytes / kMiB, "MiB") : absl::StrCat(bytes / kKiB, "KiB");
}

// A float32 tensor (N, 64, 16, 16), or (N, 16, 1, 1) for the smallest.
void FillTensor(int64_t bytes, normd::v1::Tensor& tensor) {
  const int64_t elements = bytes / 4;
  const std::vector<int64_t> shape = bytes < 64 * kKiB
                                         ? std::vector<int64_t>{elements / 16, 16, 1, 1}
                                         : std::vector<int64_t>{elements / 16384, 64, 16, 16};
  tensor.set_dtype(normd::v1::DATA_TYPE_FLOAT32);
  tensor.mutable_shape()->Add(shape.begin(), shape.end());
  std::string& data = *tensor.mutable_data();
  data.resize(static_cast<size_t>(bytes));
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  auto* values = reinterpret_cast<float*>(data.data());
  for (int64_t i = 0; i < elements; ++i) values[i] = normal(random);
}

struct Case {
  std::string op;  // eval, train_forward, backward
  int64_t bytes;
  int in_flight;
};

std::pair<std::string, grpc::ByteBuffer> Request(const Case& c) {
  const std::string name = c.bytes < 64 * kKiB ? "small" : "large";
  if (c.op == "backward") {
    normd::v1::BackwardRequest request;
    request.set_name(name);
    request.set_mode(normd::v1::MODE_TRAIN);
    FillTensor(c.bytes, *request.mutable_input());
    *request.mutable_grad_output() = request.input();
    return {"Backward", ToByteBuffer(request)};
  }
  normd::v1::ForwardRequest request;
  request.set_name(name);
  request.set_mode(c.op == "eval" ? normd::v1::MODE_EVAL : normd::v1::MODE_TRAIN);
  FillTensor(c.bytes, *request.mutable_input());
  return {"Forward", ToByteBuffer(request)};
}

nlohmann::json Run(const std::string& transport, Target& target, const Case& c, bool quick) {
  const auto [method, request] = Request(c);
  const std::string path = absl::StrCat("/normd.v1.NormService/", method);
  const int rounds = quick ? 5 : 9;
  const int64_t per_round = std::clamp<int64_t>(64 * kMiB / c.bytes, 1, quick ? 500 : 2000);
  const int count = static_cast<int>(std::max<int64_t>(per_round, 2 * c.in_flight));

  int64_t response_bytes = 0;
  Send(*target.ours, path, request, c.in_flight, c.in_flight, &response_bytes);
  const std::string echo = absl::StrCat("/echo/", response_bytes);
  const std::string instance = c.bytes < 64 * kKiB ? "small" : "large";
  if (target.shared_memory != nullptr) {
    normd::v1::Tensor tensor;
    FillTensor(c.bytes, tensor);
    target.shared_memory->Put(tensor, c.in_flight);
    target.shared_memory->Send(instance, c.op, c.in_flight);
  }
  Send(*target.floor, echo, request, c.in_flight, c.in_flight, &response_bytes);

  // Milliseconds a request at this many in flight: the inverse of the throughput.
  std::vector<double> ours, floor, latencies;
  for (int round = 0; round < rounds; ++round) {
    const auto measure = [&](grpc::GenericStub& stub, const std::string& to,
                             std::vector<double>& into, bool keep) {
      const absl::Time start = absl::Now();
      const auto each = keep && target.shared_memory != nullptr
                            ? target.shared_memory->Send(instance, c.op, count)
                            : Send(stub, to, request, c.in_flight, count, &response_bytes);
      into.push_back(absl::ToDoubleMilliseconds(absl::Now() - start) / count);
      if (keep) latencies.insert(latencies.end(), each.begin(), each.end());
    };
    if (round % 2 == 0) {
      measure(*target.ours, path, ours, true);
      measure(*target.floor, echo, floor, false);
    } else {
      measure(*target.floor, echo, floor, false);
      measure(*target.ours, path, ours, true);
    }
  }
  const double ours_ms = Median(ours), floor_ms = Median(floor);
  const std::string name =
      absl::StrCat(c.op, "/", transport, "/", SizeText(c.bytes), "/k", c.in_flight);
  absl::PrintF("%-34s %10.3f %10.3f %8.2f %10.3f %10.3f %9.2f %9.0f\n", name, ours_ms, floor_ms,
               floor_ms / ours_ms, Percentile(latencies, 0.5), Percentile(latencies, 0.99),
               static_cast<double>(c.bytes) / 1e6 / ours_ms, 1000 / ours_ms);
  std::fflush(stdout);
  return {{"suite", "transport"},
          {"case", name},
          {"ours_ms", ours_ms},
          {"floor_ms", floor_ms},
          {"peers", nlohmann::json::object()},
          {"floor_ratio", floor_ms / ours_ms},
          {"peer_ratio", nullptr},
          {"p50_ms", Percentile(latencies, 0.5)},
          {"p99_ms", Percentile(latencies, 0.99)}};
}

void CreateInstances(const std::string& address) {
  const auto stub = normd::v1::NormService::NewStub(Connect(address));
  for (const auto& [name, channels] : {std::pair("small", 16), std::pair("large", 64)}) {
    grpc::ClientContext context;
    context.set_wait_for_ready(true);
    normd::v1::CreateInstanceRequest request;
    normd::v1::CreateInstanceResponse response;
    request.set_name(name);
    request.mutable_config()->mutable_batch_norm_2d()->set_num_features(channels);
    CheckOk(stub->CreateInstance(&context, request, &response), "CreateInstance");
  }
}

}  // namespace

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  if (const std::string echo = absl::GetFlag(FLAGS_echo); !echo.empty()) return ServeEcho(echo);

  const bool quick = absl::GetFlag(FLAGS_quick);
  std::string directory = (std::filesystem::temp_directory_path() / "normd-bench-XXXXXX").string();
  if (mkdtemp(directory.data()) == nullptr) return 1;
  nlohmann::json rows = nlohmann::json::array();
  {
    const Process ours({absl::GetFlag(FLAGS_normd),
                        absl::StrCat("--listen=127.0.0.1:0,unix:", directory, "/normd.sock"),
                        absl::StrCat("--port_file=", directory, "/normd.port"),
                        absl::StrCat("--state_dir=", directory, "/state"), "--durability=none",
                        absl::StrCat("--max_message_bytes=", 512 * kMiB), "--shared_memory=on",
                        "--log_level=warn"});
    const Process floor({"/proc/self/exe", absl::StrCat("--echo=unix:", directory, "/echo.sock")});
    const std::string ours_tcp = AwaitLine(directory + "/normd.port");
    const std::string floor_tcp = AwaitLine(directory + "/echo.sock.port");
    CreateInstances(ours_tcp);

    absl::PrintF("%-34s %10s %10s %8s %10s %10s %9s %9s\n", "case", "ours ms", "echo ms", "ratio",
                 "p50 ms", "p99 ms", "GB/s", "req/s");
    std::vector<Case> cases;
    for (const int64_t bytes : quick
                                   ? std::vector<int64_t>{kMiB, 10 * kMiB}
                                   : std::vector<int64_t>{64 * kKiB, kMiB, 10 * kMiB, 100 * kMiB}) {
      for (const char* op : {"eval", "train_forward", "backward"}) {
        for (const int in_flight : quick ? std::vector<int>{1} : std::vector<int>{1, 4}) {
          cases.push_back({op, bytes, in_flight});
        }
      }
    }
    for (const int in_flight : quick ? std::vector<int>{16} : std::vector<int>{1, 16, 64}) {
      cases.push_back({"eval", kKiB, in_flight});
    }
    for (const auto& [transport, ours_address, floor_address] :
         {std::tuple("tcp", ours_tcp, floor_tcp),
          std::tuple("unix", "unix:" + directory + "/normd.sock",
                     "unix:" + directory + "/echo.sock"),
          std::tuple("shared", ours_tcp, floor_tcp), std::tuple("copied", ours_tcp, floor_tcp)}) {
      Target target{std::make_unique<grpc::GenericStub>(Connect(ours_address)),
                    std::make_unique<grpc::GenericStub>(Connect(floor_address)), nullptr};
      if (ours_address == ours_tcp && transport != std::string("tcp")) {
        target.shared_memory = std::make_unique<SharedMemoryCalls>(ours_address, transport);
      }
      for (const Case& c : cases) {
        // Smaller tensors go in messages: sharing them saves nothing.
        if (target.shared_memory != nullptr && c.bytes < 64 * kKiB) continue;
        rows.push_back(Run(transport, target, c, quick));
      }
    }
  }
  std::filesystem::remove_all(directory);
  if (const std::string json = absl::GetFlag(FLAGS_json); !json.empty()) {
    std::ofstream(json) << rows.dump(1) << "\n";
  }
  return 0;
}
