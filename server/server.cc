#include "server/server.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/impl/server_builder_option.h"
#include "grpcpp/resource_quota.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/thread_pool.h"
#include "server/admission/admission_queue.h"
#include "server/admission/call_gate.h"
#include "server/admission/concurrency_limit.h"
#include "server/auth/audit_log.h"
#include "server/auth/authenticator.h"
#include "server/auth/tls.h"
#include "server/clock.h"
#include "server/service/background.h"
#include "server/service/core.h"
#include "server/service/norm_service.h"
#include "server/shared_memory/hand_over.h"
#include "server/shared_memory/regions.h"
#include "server/state/checkpoints.h"
#include "server/state/sqlite_store.h"
#include "server/state_directory.h"
#include "spdlog/spdlog.h"

namespace normd {
namespace {

constexpr char kServiceName[] = "normd.v1.NormService";
// What the health service answers for changes alone: with --durability=interval they are
// refused, and reads are not, while the store cannot be written.
constexpr char kChangesName[] = "normd.v1.NormService/changes";

const char* NameOf(Durability durability) {
  switch (durability) {
    case Durability::kNone: return "none";
    case Durability::kInterval: return "interval";
    case Durability::kUpdate: return "update";
  }
  return "";
}

// Takes away what registers itself with every builder of a program: reflection.
class WithoutPlugins final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->clear();
  }
};

// Automatic checkpoints take one part of this many of the time: with a million instances, a
// file each, one takes longer than the default interval.
constexpr int kCheckpointShare = 10;

class ServerImpl final : public Server {
 public:
  explicit ServerImpl(const Config& config)
      : config_(config),
        concurrency_(config.max_concurrent_requests),
        memory_(config.memory_budget, "--memory_budget"),
        admission_(
            concurrency_, memory_,
            [this](std::function<void()> task) { executor_.Enqueue(std::move(task)); },
            config.admission_queue_timeout),
        executor_(config.threads),
        pool_(static_cast<size_t>(config.memory_budget / 4), &memory_),
        context_memory_(config.context_budget, "--context_budget"),
        shared_memory_(config.shared_memory_budget, "--shared_memory_budget"),
        contexts_(&context_memory_, config.context_ttl) {}

  ~ServerImpl() override {
    if (grpc_ != nullptr) Drain().IgnoreError();
  }

  absl::Status Start(const MakeCuda& make_cuda) {
    if (absl::Status made = MakeBackend(make_cuda); !made.ok()) return made;
    if (absl::Status opened = OpenDoors(); !opened.ok()) return opened;
    if (absl::Status opened = OpenState(); !opened.ok()) return opened;
    if (absl::Status shared = ShareMemory(); !shared.ok()) return shared;
    background_.emplace(config_.checkpoint_interval, [this] { Tick(); });
    core_ = {.limits = {.max_message_bytes = config_.max_message_bytes,
                        .max_instances = config_.max_instances,
                        .max_features = config_.max_features,
                        .memory_budget = config_.memory_budget,
                        .context_budget = config_.context_budget,
                        .context_ttl = config_.context_ttl},
             .durability = NameOf(config_.durability),
             .start_time = absl::Now(),
             .executor = &executor_,
             .backend = backend_.get(),
             .backend_reason = backend_reason_,
             .pool = &pool_,
             .admission = &admission_,
             .memory = &memory_,
             .context_memory = &context_memory_,
             .regions = regions_.has_value() ? &*regions_ : nullptr,
             .shared_memory_socket = hand_over_ != nullptr ? hand_over_->path() : "",
             .cuda_ipc = config_.cuda_ipc,
             .persister = persister_.get(),
             .registry = &*registry_,
             .contexts = &contexts_,
             .checkpoints = checkpoints_.get(),
             .saved_checkpoints = &saved_checkpoints_,
             .background = &*background_,
             .gate = &gate_,
             .authenticator = authenticator_.get(),
             .audit_log = audit_log_.get()};
    service_ = MakeNormService(core_);
    return Listen();
  }

  const std::vector<std::string>& addresses() const override { return addresses_; }

  absl::Status Drain() override {
    spdlog::info("draining: no new calls; those under way have {}",
                 absl::FormatDuration(config_.drain_timeout));
    {
      absl::MutexLock lock(&health_mutex_);
      health_->SetServingStatus(false);
      health_ = nullptr;
    }
    if (!gate_.Close(SteadyNow() + config_.drain_timeout)) {
      spdlog::warn("calls still under way are cancelled: --drain_timeout={} is over",
                   absl::FormatDuration(config_.drain_timeout));
    }
    // Whatever is left now is not to be waited for.
    grpc_->Shutdown(absl::ToChronoTime(absl::Now()));
    grpc_->Wait();
    hand_over_.reset();
    background_.reset();
    absl::Status kept = persister_->Flush();
    if (config_.durability != Durability::kNone) {
      const auto saved = SaveIfChanged("shutdown");
      if (kept.ok()) kept = saved;
    }
    grpc_.reset();
    return kept;
  }

 private:
  absl::Status MakeBackend(const MakeCuda& make_cuda) {
    if (config_.backend != "cpu") {
      const CudaOptions options{
          .devices = config_.cuda_devices,
          .on_failure = [this](const DeviceInfo& failed, int left) { DeviceFailed(failed, left); },
          .memory_budget = config_.device_memory_budget,
          .claim_pinned = [this](size_t bytes) { return ClaimPinned(bytes); }};
      backend_ = make_cuda(options, &backend_reason_);
      if (backend_ != nullptr) {
        memory_.ReclaimBy([this] { backend_->ReleaseIdle(); });
        for (const DeviceInfo& device : backend_->devices()) {
          spdlog::info("computing on {}", device.name);
        }
        return absl::OkStatus();
      }
      if (config_.backend == "cuda") {
        return absl::FailedPreconditionError(
            absl::StrCat("--backend=cuda, but ", backend_reason_, "; use --backend=cpu or auto"));
      }
      spdlog::info("computing on the CPU: {}", backend_reason_);
    }
    backend_ = MakeCpuBackend(executor_, {.deterministic = config_.deterministic});
    return absl::OkStatus();
  }

  std::shared_ptr<void> ClaimPinned(size_t bytes) {
    auto claim = memory_.Claim(static_cast<int64_t>(bytes));
    if (!claim.ok()) return nullptr;
    pool_.MakeRoom();
    return std::make_shared<MemoryClaim>(*std::move(claim));
  }

  // What a device that failed has in memory is lost to this process: with the last one,
  // whoever watches health should start another.
  void DeviceFailed(const DeviceInfo& failed, int left) {
    spdlog::error("{} failed and is not used any more; {} left", failed.name, left);
    if (left > 0) return;
    absl::MutexLock lock(&health_mutex_);
    no_device_left_ = true;
    if (health_ != nullptr) health_->SetServingStatus(false);
  }

  // Who may come in. Before the state, which takes longer to read than flags to mend.
  absl::Status OpenDoors() {
    if (!config_.tls.cert.empty()) {
      auto tls = MakeTlsCredentials(config_.tls);
      if (!tls.ok()) return tls.status();
      tcp_credentials_ = *std::move(tls);
    }
    auto authenticator = Authenticator::Open(config_.auth_file);
    if (!authenticator.ok()) return authenticator.status();
    authenticator_ = *std::move(authenticator);
    auto audit_log = AuditLog::Open(config_.audit_log);
    if (!audit_log.ok()) return audit_log.status();
    audit_log_ = *std::move(audit_log);
    if (config_.insecure) {
      spdlog::warn("--insecure: whoever reaches {} may read what is sent{}",
                   absl::StrJoin(config_.listen, ", "),
                   config_.auth_file.empty() ? ", and do all" : "");
    }
    return absl::OkStatus();
  }

  absl::Status OpenState() {
    auto directory = StateDirectory::Open(config_.state_dir);
    if (!directory.ok()) return directory.status();
    directory_ = *std::move(directory);
    auto checkpoints = Checkpoints::Open(directory_->checkpoints(), config_.keep_checkpoints);
    if (!checkpoints.ok()) return checkpoints.status();
    checkpoints_ = *std::move(checkpoints);
    const bool had_store = directory_->has_store();
    if (config_.durability != Durability::kNone) {
      auto store = OpenSqliteStore(config_.state_dir);
      if (!store.ok()) return store.status();
      store_ = *std::move(store);
    }
    persister_ = Persister::Start(store_.get(), config_.durability, config_.checkpoint_interval,
                                  [this](bool refusing) { ShowChanges(!refusing); });
    registry_.emplace(persister_.get(), config_.max_instances);
    if (store_ != nullptr && had_store) return RestoreFromStore();
    return RestoreFromCheckpoint();
  }

  absl::Status RestoreFromStore() {
    const absl::Time start = SteadyNow();
    absl::Status loaded = store_->Load(
        [this](StoredInstance instance) {
          registry_->Restore(std::move(instance));
          return absl::OkStatus();
        },
        [this](Tombstone tombstone) {
          registry_->Restore(std::move(tombstone));
          return absl::OkStatus();
        });
    if (!loaded.ok()) return loaded;
    spdlog::info("restored {} instances from {} in {}", registry_->size(), config_.state_dir,
                 absl::FormatDuration(SteadyNow() - start));
    return absl::OkStatus();
  }

  // After the state: its lock says that nobody else listens in the directory.
  absl::Status ShareMemory() {
    if (!config_.shared_memory) return absl::OkStatus();
    if (absl::Status able = Region::CheckSystem(); !able.ok()) return able;
    if (config_.cuda_ipc && !backend_->Supports(Place::kDevice)) {
      return absl::FailedPreconditionError(
          "--cuda_ipc=on needs one GPU that computes: --backend=cuda, and --cuda_devices with one "
          "number where there are several");
    }
    regions_.emplace(&shared_memory_, &memory_,
                     RegionLimits{.max_region_bytes = config_.max_region_bytes,
                                  .max_regions = config_.max_regions});
    auto hand_over =
        HandOver::Listen(config_.shared_memory_socket, &*regions_, config_.handshake_timeout);
    if (!hand_over.ok()) return hand_over.status();
    hand_over_ = *std::move(hand_over);
    return absl::OkStatus();
  }

  // Without a store (a new one, or --durability=none): the newest sound checkpoint.
  absl::Status RestoreFromCheckpoint() {
    const auto all = checkpoints_->List();
    if (!all.ok()) return all.status();
    if (all->empty()) return absl::OkStatus();
    const auto loaded = checkpoints_->Load("", {});
    if (!loaded.ok()) return loaded.status();
    for (const CheckpointInfo& damaged : loaded->damaged) {
      spdlog::error("checkpoint {} is damaged and was passed over: {}", damaged.id,
                    damaged.problem);
    }
    const auto versions = registry_->Load(loaded->instances);
    if (!versions.ok()) return versions.status();
    spdlog::info("restored {} instances from checkpoint {}", versions->size(), loaded->info.id);
    return persister_->Flush();
  }

  absl::Status Listen() {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    // Reflection knows no callers, so it is there only where nobody is asked.
    if (!config_.auth_file.empty()) builder.SetOption(std::make_unique<WithoutPlugins>());
    builder.RegisterService(service_.get());
    // gRPC cuts a message here, before the service can name the flag; up to this
    // the service refuses it itself, with a message that says what to do.
    builder.SetMaxReceiveMessageSize(static_cast<int>(
        std::min<int64_t>(2 * config_.max_message_bytes, std::numeric_limits<int>::max())));
    builder.SetMaxSendMessageSize(-1);
    // gRPC 1.51 unpacks a message before it looks at its size, and outside the quota: half a
    // MiB became 512 MiB. Tensors hardly shrink, so nothing is lost.
    for (const auto algorithm : {GRPC_COMPRESS_DEFLATE, GRPC_COMPRESS_GZIP}) {
      builder.SetCompressionAlgorithmSupportStatus(algorithm, false);
    }
    // A second normd on the port is an error, not a silent share of its calls.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    LimitConnections(builder);
    LimitBuffers(builder);
    std::vector<int> ports(config_.listen.size(), 0);
    for (size_t i = 0; i < config_.listen.size(); ++i) {
      const std::string& address = config_.listen[i];
      // A Unix socket is guarded by its file's permissions, and nobody listens in between.
      builder.AddListeningPort(
          address,
          absl::StartsWith(address, "unix:") ? grpc::InsecureServerCredentials() : tcp_credentials_,
          &ports[i]);
    }
    grpc_ = builder.BuildAndStart();
    if (grpc_ == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("cannot listen on ", absl::StrJoin(config_.listen, ", "),
                       ": is another server there? Give free addresses with --listen, like "
                       "--listen=127.0.0.1:0"));
    }
    for (size_t i = 0; i < ports.size(); ++i) {
      const std::string& address = config_.listen[i];
      addresses_.push_back(absl::StartsWith(address, "unix:")
                               ? address
                               : absl::StrCat(address.substr(0, address.rfind(':') + 1), ports[i]));
    }
    grpc_->GetHealthCheckService()->SetServingStatus(true);
    grpc_->GetHealthCheckService()->SetServingStatus(kServiceName, true);
    absl::MutexLock lock(&health_mutex_);
    health_ = grpc_->GetHealthCheckService();
    health_->SetServingStatus(kChangesName, changes_taken_);
    // A device may have failed since the first call came in.
    if (no_device_left_) health_->SetServingStatus(false);
    return absl::OkStatus();
  }

  void ShowChanges(bool taken) {
    absl::MutexLock lock(&health_mutex_);
    changes_taken_ = taken;
    if (health_ != nullptr) health_->SetServingStatus(kChangesName, taken);
  }

  // Against connections that cost more than they are worth: those that are opened and never
  // speak, whose other end is gone, or that ask for too much at once.
  void LimitConnections(grpc::ServerBuilder& builder) const {
    const auto set = [&](const char* argument, absl::Duration value) {
      builder.AddChannelArgument(argument, static_cast<int>(absl::ToInt64Milliseconds(value)));
    };
    set(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, config_.handshake_timeout);
    set(GRPC_ARG_KEEPALIVE_TIME_MS, config_.keepalive_time);
    set(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, config_.keepalive_timeout);
    set(GRPC_ARG_MAX_CONNECTION_IDLE_MS, config_.max_connection_idle);
    set(GRPC_ARG_MAX_CONNECTION_AGE_MS, config_.max_connection_age);
    set(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, config_.max_connection_age_grace);
    // Without these, gRPC asks only connections with a call on them, and twice at most.
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, config_.max_concurrent_streams);
    builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, config_.max_metadata_bytes);
  }

  // What gRPC holds of messages that have not been claimed yet.
  void LimitBuffers(grpc::ServerBuilder& builder) const {
    // Off, a call whose message is not asked for yet costs the protocol's 64 KiB. On, gRPC
    // estimates the connection and lets each call send megabytes ahead: with 64 clients and a
    // budget of 128 MiB, the server's peak was 330 to 420 MiB instead of 160 to 200. On
    // loopback and Unix sockets nothing was slower without, at any size.
    builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    // The last resort, against messages whose length nobody announced. gRPC 1.51 lets no call
    // wait for the quota, and refuses none: past it, it resets calls that it picks at random
    // (the client sees RESOURCE_EXHAUSTED, without a reason) and closes idle connections
    // (UNAVAILABLE). So it comes after the budget, with room for one message that the
    // service refuses in its own words.
    grpc::ResourceQuota quota("normd");
    quota.Resize(static_cast<size_t>(config_.memory_budget + 2 * config_.max_message_bytes));
    builder.SetResourceQuota(quota);
  }

  // Runs on the background thread, every --checkpoint_interval.
  void Tick() {
    contexts_.Sweep();
    const absl::Time begin = SteadyNow();
    if (config_.durability == Durability::kNone || begin < next_checkpoint_) return;
    if (absl::Status saved = SaveIfChanged("interval"); !saved.ok()) {
      spdlog::error("the automatic checkpoint failed: {}", std::string(saved.message()));
    }
    const absl::Time end = SteadyNow();
    next_checkpoint_ = end + (kCheckpointShare - 1) * (end - begin);
  }

  absl::Status SaveIfChanged(const char* reason) {
    const uint64_t changes = persister_->submitted();
    if (changes == saved_changes_) return absl::OkStatus();
    const auto info = checkpoints_->Save(reason, registry_->ForCheckpoint());
    if (!info.ok()) return info.status();
    saved_changes_ = changes;
    spdlog::info("checkpoint {}: {} instances, {} bytes", info->id, info->instance_count,
                 info->total_bytes);
    return absl::OkStatus();
  }

  // In the order of dependence: each uses only those above it.
  const Config config_;
  std::shared_ptr<grpc::ServerCredentials> tcp_credentials_ = grpc::InsecureServerCredentials();
  std::unique_ptr<Authenticator> authenticator_;
  std::unique_ptr<AuditLog> audit_log_;
  ConcurrencyLimit concurrency_;
  MemoryBudget memory_;
  // Its turns are run by the executor, whose destructor runs the last.
  AdmissionQueue admission_;
  ThreadPool executor_;
  // What the health service says, while there is one.
  absl::Mutex health_mutex_;
  bool changes_taken_ ABSL_GUARDED_BY(health_mutex_) = true;
  bool no_device_left_ ABSL_GUARDED_BY(health_mutex_) = false;
  grpc::HealthCheckServiceInterface* health_ ABSL_GUARDED_BY(health_mutex_) = nullptr;
  std::unique_ptr<Backend> backend_;
  std::string backend_reason_;  // why it is not another, where --backend does not say
  BufferPool pool_;
  CallGate gate_;
  MemoryBudget context_memory_;
  MemoryBudget shared_memory_;
  std::unique_ptr<StateDirectory> directory_;
  std::unique_ptr<StateStore> store_;
  std::unique_ptr<Checkpoints> checkpoints_;
  std::unique_ptr<Persister> persister_;
  std::optional<Registry> registry_;
  std::optional<Regions> regions_;
  std::unique_ptr<HandOver> hand_over_;
  SavedContexts contexts_;
  SavedCheckpoints saved_checkpoints_;
  uint64_t saved_changes_ = 0;
  absl::Time next_checkpoint_ = absl::InfinitePast();  // the background thread's
  std::optional<Background> background_;
  Core core_;
  std::unique_ptr<grpc::Service> service_;
  std::unique_ptr<grpc::Server> grpc_;
  std::vector<std::string> addresses_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const Config& config,
                                                      const MakeCuda& make_cuda) {
  auto server = std::make_unique<ServerImpl>(config);
  if (absl::Status started = server->Start(make_cuda); !started.ok()) return started;
  return server;
}

}  // namespace normd
