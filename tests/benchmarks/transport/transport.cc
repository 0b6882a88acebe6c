// What the service adds to the wire: normd's Forward and Backward, unary over TCP and a Unix
// socket and as streams, beside
//
//   floor     a bare gRPC server that takes the same request bytes as a ByteBuffer and
//             answers as many bytes as normd does, with the same settings; for a stream, one
//             that returns each chunk as it has come, or, in train mode, when all have
//   unary     the floor of the unary call, beside a stream of the same tensor
//   ordinary  the service as most would write it (servers.h)
//   torch     the service in Python, with torch.nn.functional.batch_norm (torch_server.py)
//
// All are processes of their own; rounds are interleaved, and medians compared. What the
// floor takes of a peer's time is shown too: nobody who moves these bytes gets past that.
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
#include <time.h>
#include <unistd.h>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "normd/v1/norm_service.grpc.pb.h"
#include "tests/benchmarks/transport/servers.h"
#include "tests/benchmarks/transport/shared_memory.h"

ABSL_FLAG(std::string, normd, "build/release/bin/normd", "The server to measure");
ABSL_FLAG(bool, quick, false, "A telling part, in under a minute");
ABSL_FLAG(std::string, only, "", "Cases whose names have this in them: train_forward/tcp/100MiB");
ABSL_FLAG(std::vector<std::string>, lanes, {},
          "Of ours, floor, unary, ordinary, torch; empty: all");
ABSL_FLAG(std::string, json, "", "File for the rows");
ABSL_FLAG(std::string, python, "/usr/bin/python3",
          "With grpcio, torch and the stubs on PYTHONPATH");
ABSL_FLAG(std::string, torch_server, "", "torch_server.py; empty: no such contender");
ABSL_FLAG(std::string, serve, "", "The benchmark calls itself as this contender");
ABSL_FLAG(std::string, directory, "", "where that one serves");

namespace {

extern "C" char** environ;

constexpr int64_t kKiB = 1024;
constexpr int64_t kMiB = 1024 * kKiB;
constexpr int64_t kChunkBytes = kMiB;
constexpr int kUnlimited = -1;

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

  // Begins anew to remember the most memory that the process has had resident.
  void ForgetPeak() const { std::ofstream(absl::StrCat("/proc/", pid_, "/clear_refs")) << 5; }
  // "VmHWM", the most since then, or "VmRSS", now; in bytes.
  int64_t Memory(const std::string& what) const {
    std::ifstream status(absl::StrCat("/proc/", pid_, "/status"));
    for (std::string word; status >> word;) {
      int64_t kib = 0;
      if (word == what + ":" && status >> kib) return kib * kKiB;
    }
    return 0;
  }
  // Seconds of the cores' time that it has had so far.
  double CpuSeconds() const {
    clockid_t clock;
    timespec time = {};
    if (clock_getcpuclockid(pid_, &clock) == 0) clock_gettime(clock, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
  }

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

// A stream's messages: the header, and a tensor of `bytes` in chunks.
std::vector<grpc::ByteBuffer> StreamMessages(const normd::v1::ForwardRequest& header, int64_t bytes,
                                             const std::string& chunk_bytes) {
  normd::v1::ForwardStreamRequest first;
  *first.mutable_header() = header;
  normd::v1::ForwardStreamRequest part;
  part.set_chunk(chunk_bytes);
  std::vector<grpc::ByteBuffer> messages = {ToByteBuffer(first)};
  // The same bytes again and again: the server cannot tell, and memory is saved.
  const grpc::ByteBuffer chunk = ToByteBuffer(part);
  messages.resize(static_cast<size_t>(1 + bytes / static_cast<int64_t>(chunk_bytes.size())), chunk);
  return messages;
}

// One stream whose answer is read and dropped. Deletes itself after `done`.
class StreamCall final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  StreamCall(grpc::GenericStub& stub, const std::string& method,
             const std::vector<grpc::ByteBuffer>& messages,
             std::function<void(const grpc::Status&)> done)
      : messages_(messages), done_(std::move(done)) {
    stub.PrepareBidiStreamingCall(&context_, method, grpc::StubOptions(), this);
    StartRead(&answer_);
    OnWriteDone(true);
    StartCall();
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return;
    if (next_ == messages_.size()) return StartWritesDone();
    written_ = messages_[next_++];
    StartWrite(&written_);
  }
  void OnReadDone(bool ok) override {
    if (ok) StartRead(&answer_);
  }
  void OnDone(const grpc::Status& status) override {
    done_(status);
    delete this;
  }

 private:
  grpc::ClientContext context_;
  const std::vector<grpc::ByteBuffer>& messages_;
  const std::function<void(const grpc::Status&)> done_;
  size_t next_ = 0;
  grpc::ByteBuffer written_;
  grpc::ByteBuffer answer_;
};

// As Send does, streams of these messages.
std::vector<double> SendStreams(grpc::GenericStub& stub, const std::string& method,
                                const std::vector<grpc::ByteBuffer>& messages, int in_flight,
                                int count) {
  std::vector<double> latencies(static_cast<size_t>(count));
  std::atomic<int> next = 0;
  absl::BlockingCounter chains(in_flight);
  std::function<void()> step = [&] {
    const int i = next.fetch_add(1);
    if (i >= count) return (void)chains.DecrementCount();
    const absl::Time start = absl::Now();
    new StreamCall(stub, method, messages, [&, i, start](const grpc::Status& status) {
      CheckOk(status, method);
      latencies[static_cast<size_t>(i)] = absl::ToDoubleMilliseconds(absl::Now() - start);
      step();
    });
  };
  for (int chain = 0; chain < in_flight; ++chain) step();
  chains.Wait();
  return latencies;
}

// One of the table.
constexpr char kRow[] =
    "%-30s %9s %9s %9s %7s %8s  %6s %6s %8s %6s  %6s %8s %6s  %6s %6s %6s %6s\n";

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

// A server beside its channels.
struct Contender {
  std::string name;
  std::unique_ptr<Process> process;
  std::unique_ptr<grpc::GenericStub> tcp;
  std::unique_ptr<grpc::GenericStub> unix_socket;
  int64_t idle_bytes = 0;  // resident, before the first call
};

struct Contenders {
  Contender ours, echo, ordinary, torch;  // torch: no process where it is not wanted
  // Of ours: tensors where the server reads them, and tensors that the client copies there.
  std::unique_ptr<SharedMemoryCalls> shared, copied;
};

struct Case {
  std::string op;         // eval, train_forward, backward
  std::string transport;  // tcp, unix, stream, shared, copied
  int64_t bytes;
  int in_flight;
};

std::string NameOf(const Case& c) {
  return absl::StrCat(c.op, "/", c.transport, "/", SizeText(c.bytes), "/k", c.in_flight);
}

// The instance that serves it.
std::string InstanceFor(const Case& c) { return c.bytes < 64 * kKiB ? "small" : "large"; }

normd::v1::ForwardRequest ForwardHeader(const Case& c) {
  normd::v1::ForwardRequest request;
  request.set_name(InstanceFor(c));
  request.set_mode(c.op == "eval" ? normd::v1::MODE_EVAL : normd::v1::MODE_TRAIN);
  return request;
}

std::pair<std::string, grpc::ByteBuffer> Request(const Case& c) {
  if (c.op == "backward") {
    normd::v1::BackwardRequest request;
    request.set_name(InstanceFor(c));
    request.set_mode(normd::v1::MODE_TRAIN);
    FillTensor(c.bytes, *request.mutable_input());
    *request.mutable_grad_output() = request.input();
    return {"/normd.v1.NormService/Backward", ToByteBuffer(request)};
  }
  normd::v1::ForwardRequest request = ForwardHeader(c);
  FillTensor(c.bytes, *request.mutable_input());
  return {"/normd.v1.NormService/Forward", ToByteBuffer(request)};
}

std::vector<grpc::ByteBuffer> StreamOf(const Case& c) {
  normd::v1::Tensor chunk;
  FillTensor(kChunkBytes, chunk);
  normd::v1::ForwardRequest header = ForwardHeader(c);
  normd::v1::Tensor& input = *header.mutable_input();
  input = chunk;
  input.clear_data();
  input.set_shape(0, input.shape(0) * (c.bytes / kChunkBytes));
  return StreamMessages(header, c.bytes, chunk.data());
}

// One contender in one case: what it is sent, and how it fared.
struct Lane {
  std::string name;  // ours, floor, unary, ordinary, torch
  Contender* contender;
  std::function<std::vector<double>(int in_flight, int count)> send;
  std::vector<double> round_ms = {};  // milliseconds a request: the throughput's inverse
  std::vector<double> latencies = {};
  double server_cpu_s = 0;  // in all rounds
  int calls = 0;
  int64_t peak_bytes = 0;  // over idle

  double ms() const { return Median(round_ms); }
};

// Ours, then the floor where there is one, then the peers.
std::vector<Lane> LanesFor(Contenders& all, const Case& c) {
  std::vector<Lane> lanes;
  const auto unary = [&](const std::string& name, Contender& contender, grpc::GenericStub& stub,
                         std::string method, const grpc::ByteBuffer& request) {
    lanes.push_back({name, &contender, [&stub, method, request](int in_flight, int count) {
                       int64_t response_bytes = 0;
                       return Send(stub, method, request, in_flight, count, &response_bytes);
                     }});
  };
  if (c.transport == "stream") {
    const auto stream = [&](const std::string& name, Contender& contender, std::string method) {
      lanes.push_back(
          {name, &contender,
           [&stub = *contender.tcp, method, messages = StreamOf(c)](int in_flight, int count) {
             return SendStreams(stub, method, messages, in_flight, count);
           }});
    };
    stream("ours", all.ours, "/normd.v1.NormService/ForwardStream");
    stream("floor", all.echo, c.op == "eval" ? kEchoChunks : kEchoHeldChunks);
    if (c.bytes > 100 * kMiB) return lanes;
  }
  const auto [method, request] = Request(c);
  const bool unix_socket = c.transport == "unix";
  grpc::GenericStub& ours = unix_socket ? *all.ours.unix_socket : *all.ours.tcp;
  int64_t response_bytes = c.bytes;
  if (c.transport != "stream") Send(ours, method, request, 1, 1, &response_bytes);
  if (c.transport == "shared" || c.transport == "copied") {
    SharedMemoryCalls& calls = c.transport == "shared" ? *all.shared : *all.copied;
    normd::v1::Tensor tensor;
    FillTensor(c.bytes, tensor);
    calls.Put(tensor, c.in_flight);
    lanes.push_back({"ours", &all.ours, [&calls, c](int in_flight, int count) {
                       return calls.Send(InstanceFor(c), c.op, std::max(in_flight, count));
                     }});
  } else if (c.transport != "stream") {
    unary("ours", all.ours, ours, method, request);
  }
  unary(c.transport == "stream" ? "unary" : "floor", all.echo,
        unix_socket ? *all.echo.unix_socket : *all.echo.tcp, absl::StrCat("/echo/", response_bytes),
        request);
  if (c.transport == "tcp") {
    unary("ordinary", all.ordinary, *all.ordinary.tcp, method, request);
    if (all.torch.process != nullptr) unary("torch", all.torch, *all.torch.tcp, method, request);
  }
  return lanes;
}

nlohmann::json Run(Contenders& all, const Case& c, bool quick) {
  std::vector<Lane> lanes = LanesFor(all, c);
  if (const auto wanted = absl::GetFlag(FLAGS_lanes); !wanted.empty()) {
    std::erase_if(lanes, [&](const Lane& lane) {
      return lane.name != "ours" &&
             std::find(wanted.begin(), wanted.end(), lane.name) == wanted.end();
    });
  }
  const int rounds = quick ? 5 : 9;
  const int64_t per_round =
      std::clamp<int64_t>((quick ? 32 : 64) * kMiB / c.bytes, 1, quick ? 300 : 2000);
  const int count = static_cast<int>(std::max<int64_t>(per_round, 2 * c.in_flight));
  for (Lane& lane : lanes) {
    lane.contender->process->ForgetPeak();
    lane.send(c.in_flight, c.in_flight);  // warm
  }
  for (int round = 0; round < rounds; ++round) {
    for (Lane& lane : lanes) {
      const double cpu = lane.contender->process->CpuSeconds();
      const absl::Time start = absl::Now();
      const auto each = lane.send(c.in_flight, count);
      lane.round_ms.push_back(absl::ToDoubleMilliseconds(absl::Now() - start) / count);
      lane.server_cpu_s += lane.contender->process->CpuSeconds() - cpu;
      lane.calls += count;
      lane.latencies.insert(lane.latencies.end(), each.begin(), each.end());
    }
    // Whoever goes first in a round has no advantage in the next.
    std::reverse(lanes.begin(), lanes.end());
  }
  const auto find = [&](const char* name) -> Lane* {
    for (Lane& lane : lanes) {
      if (lane.name == name) return &lane;
    }
    return nullptr;
  };
  for (Lane& lane : lanes) {
    lane.peak_bytes = lane.contender->process->Memory("VmHWM") - lane.contender->idle_bytes;
  }

  const Lane& ours = *find("ours");
  const Lane* floor = find("floor");
  const std::string name = NameOf(c);
  const auto over = [&](const char* peer, const Lane* lane) {
    const Lane* other = find(peer);
    return other == nullptr || lane == nullptr ? std::string("-")
                                               : absl::StrFormat("%.2f", other->ms() / lane->ms());
  };
  const auto peak = [&](const char* who) {
    const Lane* lane = find(who);
    return lane == nullptr ? std::string("-") : absl::StrCat(lane->peak_bytes / kMiB);
  };
  absl::PrintF(kRow, name, absl::StrFormat("%.3f", ours.ms()),
               absl::StrFormat("%.3f", Percentile(ours.latencies, 0.5)),
               absl::StrFormat("%.3f", Percentile(ours.latencies, 0.99)),
               absl::StrFormat("%.2f", static_cast<double>(c.bytes) / 1e6 / ours.ms()),
               absl::StrFormat("%.0f", 1000 / ours.ms()), over("floor", &ours),
               over("unary", &ours), over("ordinary", &ours), over("torch", &ours),
               over("unary", floor), over("ordinary", floor), over("torch", floor), peak("ours"),
               peak("floor"), peak("ordinary"), peak("torch"));
  std::fflush(stdout);

  nlohmann::json row = {{"suite", "transport"},  {"case", name},
                        {"ours_ms", ours.ms()},  {"peers", nlohmann::json::object()},
                        {"floor_ms", nullptr},   {"floor_ratio", nullptr},
                        {"peer_ratio", nullptr}, {"details", nlohmann::json::object()}};
  for (const Lane& lane : lanes) {
    const double lane_ratio = lane.ms() / ours.ms();
    if (lane.name == "floor") {
      row["floor_ms"] = lane.ms();
      row["floor_ratio"] = lane_ratio;
    } else if (lane.name != "ours") {
      row["peers"][lane.name] = lane.ms();
      nlohmann::json& best = row["peer_ratio"];
      best = best.is_null() ? lane_ratio : std::min(best.get<double>(), lane_ratio);
    }
    row["details"][lane.name] = {
        {"p50_ms", Percentile(lane.latencies, 0.5)},
        {"p99_ms", Percentile(lane.latencies, 0.99)},
        {"bytes_per_second", static_cast<double>(c.bytes) * 1e3 / lane.ms()},
        {"requests_per_second", 1e3 / lane.ms()},
        {"server_cpu_ms", 1e3 * lane.server_cpu_s / lane.calls},
        {"peak_bytes_over_idle", lane.peak_bytes},
        {"round_ms", lane.round_ms}};
  }
  return row;
}

std::vector<Case> CasesFor(bool quick) {
  std::vector<Case> cases;
  const auto add = [&](const char* transport, std::vector<const char*> ops,
                       std::vector<int64_t> sizes, std::vector<int> in_flights) {
    for (const int64_t bytes : sizes) {
      for (const char* op : ops) {
        for (const int in_flight : in_flights) cases.push_back({op, transport, bytes, in_flight});
      }
    }
  };
  if (quick) {
    add("tcp", {"eval", "train_forward", "backward"}, {kMiB, 10 * kMiB}, {1});
    add("unix", {"eval"}, {10 * kMiB}, {1});
    add("stream", {"eval", "train_forward"}, {10 * kMiB}, {1});
    add("shared", {"eval"}, {10 * kMiB}, {1});
    add("tcp", {"eval"}, {kKiB}, {16});
    return cases;
  }
  const std::vector<int64_t> sizes = {64 * kKiB, kMiB, 10 * kMiB, 100 * kMiB};
  add("tcp", {"eval", "train_forward", "backward"}, sizes, {1, 4});
  add("unix", {"eval", "train_forward", "backward"}, sizes, {1, 4});
  add("stream", {"eval", "train_forward"}, {kMiB, 10 * kMiB, 100 * kMiB, 1024 * kMiB}, {1, 4});
  add("shared", {"eval", "train_forward", "backward"}, sizes, {1, 4});
  add("copied", {"eval", "train_forward", "backward"}, sizes, {1, 4});
  add("tcp", {"eval"}, {kKiB}, {1, 16, 64});
  add("unix", {"eval"}, {kKiB}, {1, 16, 64});
  return cases;
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

Contenders Start(const std::string& directory) {
  Contenders all;
  const auto start = [&](Contender& contender, const std::string& name,
                         std::vector<std::string> command) {
    contender.name = name;
    contender.process = std::make_unique<Process>(std::move(command));
  };
  const auto itself = [&](Contender& contender, const std::string& name) {
    start(contender, name, {"/proc/self/exe", "--serve=" + name, "--directory=" + directory});
  };
  start(
      all.ours, "ours",
      {absl::GetFlag(FLAGS_normd),
       absl::StrCat("--listen=127.0.0.1:0,", SocketAddress(directory, "ours")),
       absl::StrCat("--port_file=", PortFile(directory, "ours")),
       absl::StrCat("--state_dir=", directory, "/state"), "--durability=none",
       absl::StrCat("--max_message_bytes=", 512 * kMiB), "--shared_memory=on", "--log_level=warn"});
  itself(all.echo, "echo");
  itself(all.ordinary, "ordinary");
  if (const std::string script = absl::GetFlag(FLAGS_torch_server); !script.empty()) {
    start(all.torch, "torch", {absl::GetFlag(FLAGS_python), script, PortFile(directory, "torch")});
  }
  for (Contender* contender : {&all.ours, &all.echo, &all.ordinary, &all.torch}) {
    if (contender->process == nullptr) continue;
    const std::string address = AwaitLine(PortFile(directory, contender->name));
    if (contender == &all.ours) CreateInstances(address);
    contender->tcp = std::make_unique<grpc::GenericStub>(Connect(address));
    contender->unix_socket =
        std::make_unique<grpc::GenericStub>(Connect(SocketAddress(directory, contender->name)));
    contender->idle_bytes = contender->process->Memory("VmRSS");
    if (contender == &all.ours) {
      all.shared = std::make_unique<SharedMemoryCalls>(address, "shared");
      all.copied = std::make_unique<SharedMemoryCalls>(address, "copied");
    }
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  if (const std::string name = absl::GetFlag(FLAGS_serve); !name.empty()) {
    return Serve(name, absl::GetFlag(FLAGS_directory));
  }
  const bool quick = absl::GetFlag(FLAGS_quick);
  std::string directory = (std::filesystem::temp_directory_path() / "normd-bench-XXXXXX").string();
  if (mkdtemp(directory.data()) == nullptr) return 1;
  nlohmann::json rows = nlohmann::json::array();
  {
    Contenders all = Start(directory);
    absl::PrintF(kRow, "", "ours", "ours", "ours", "ours", "ours", "over", "ours", "", "", "over",
                 "floor", "", "peak", "MiB", "over", "idle");
    absl::PrintF(kRow, "case", "ms", "p50 ms", "p99 ms", "GB/s", "req/s", "floor", "unary",
                 "ordinary", "torch", "unary", "ordinary", "torch", "ours", "floor", "ordin.",
                 "torch");
    for (const Case& c : CasesFor(quick)) {
      const bool wanted = NameOf(c).find(absl::GetFlag(FLAGS_only)) != std::string::npos;
      if (wanted) rows.push_back(Run(all, c, quick));
    }
  }
  std::filesystem::remove_all(directory);
  if (const std::string json = absl::GetFlag(FLAGS_json); !json.empty()) {
    std::ofstream(json) << rows.dump(1) << "\n";
  }
  return 0;
}
