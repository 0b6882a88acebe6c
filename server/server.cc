#include "server/server.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/tbb_executor.h"
#include "server/service/background.h"
#include "server/service/core.h"
#include "server/service/norm_service.h"
#include "server/state/checkpoints.h"
#include "server/state/sqlite_store.h"
#include "server/state_directory.h"
#include "spdlog/spdlog.h"

namespace normd {
namespace {

constexpr char kServiceName[] = "normd.v1.NormService";

const char* NameOf(Durability durability) {
  switch (durability) {
    case Durability::kNone: return "none";
    case Durability::kInterval: return "interval";
    case Durability::kUpdate: return "update";
  }
  return "";
}

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const Config& config, Executor& executor) {
  if (config.backend == "cuda") {
    return absl::FailedPreconditionError(
        "--backend=cuda, but this build has no CUDA backend; use --backend=cpu or auto");
  }
  return MakeCpuBackend(executor, {.deterministic = config.deterministic});
}

class ServerImpl final : public Server {
 public:
  explicit ServerImpl(const Config& config)
      : config_(config),
        executor_(config.threads),
        pool_(static_cast<size_t>(config.memory_budget / 4)),
        concurrency_(config.max_concurrent_requests),
        memory_(config.memory_budget, "--memory_budget"),
        context_memory_(config.context_budget, "--context_budget"),
        contexts_(&context_memory_, config.context_ttl) {}

  ~ServerImpl() override {
    if (grpc_ != nullptr) Drain().IgnoreError();
  }

  absl::Status Start() {
    auto backend = MakeBackend(config_, executor_);
    if (!backend.ok()) return backend.status();
    backend_ = *std::move(backend);
    if (absl::Status opened = OpenState(); !opened.ok()) return opened;
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
             .pool = &pool_,
             .concurrency = &concurrency_,
             .memory = &memory_,
             .context_memory = &context_memory_,
             .persister = persister_.get(),
             .registry = &*registry_,
             .contexts = &contexts_,
             .checkpoints = checkpoints_.get(),
             .saved_checkpoints = &saved_checkpoints_,
             .background = &*background_};
    service_ = MakeNormService(core_);
    return Listen();
  }

  const std::vector<std::string>& addresses() const override { return addresses_; }

  absl::Status Drain() override {
    spdlog::info("draining: no new calls; those under way have {}",
                 absl::FormatDuration(config_.drain_timeout));
    grpc_->GetHealthCheckService()->SetServingStatus(false);
    grpc_->Shutdown(absl::ToChronoTime(absl::Now() + config_.drain_timeout));
    grpc_->Wait();
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
    persister_ = Persister::Start(store_.get(), config_.durability, config_.checkpoint_interval);
    registry_.emplace(persister_.get(), config_.max_instances);
    if (store_ != nullptr && had_store) return RestoreFromStore();
    return RestoreFromCheckpoint();
  }

  absl::Status RestoreFromStore() {
    const absl::Time start = absl::Now();
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
                 absl::FormatDuration(absl::Now() - start));
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
    builder.RegisterService(service_.get());
    // gRPC cuts a message here, before the service can name the flag; up to this
    // the service refuses it itself, with a message that says what to do.
    builder.SetMaxReceiveMessageSize(static_cast<int>(
        std::min<int64_t>(2 * config_.max_message_bytes, std::numeric_limits<int>::max())));
    builder.SetMaxSendMessageSize(-1);
    // A second normd on the port is an error, not a silent share of its calls.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    std::vector<int> ports(config_.listen.size(), 0);
    for (size_t i = 0; i < config_.listen.size(); ++i) {
      builder.AddListeningPort(config_.listen[i], grpc::InsecureServerCredentials(), &ports[i]);
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
    return absl::OkStatus();
  }

  // Runs on the background thread, every --checkpoint_interval.
  void Tick() {
    contexts_.Sweep();
    if (config_.durability == Durability::kNone) return;
    if (absl::Status saved = SaveIfChanged("interval"); !saved.ok()) {
      spdlog::error("the automatic checkpoint failed: {}", std::string(saved.message()));
    }
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
  TbbExecutor executor_;
  std::unique_ptr<Backend> backend_;
  BufferPool pool_;
  ConcurrencyLimit concurrency_;
  MemoryBudget memory_;
  MemoryBudget context_memory_;
  std::unique_ptr<StateDirectory> directory_;
  std::unique_ptr<StateStore> store_;
  std::unique_ptr<Checkpoints> checkpoints_;
  std::unique_ptr<Persister> persister_;
  std::optional<Registry> registry_;
  SavedContexts contexts_;
  SavedCheckpoints saved_checkpoints_;
  uint64_t saved_changes_ = 0;
  std::optional<Background> background_;
  Core core_;
  std::unique_ptr<grpc::Service> service_;
  std::unique_ptr<grpc::Server> grpc_;
  std::vector<std::string> addresses_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const Config& config) {
  auto server = std::make_unique<ServerImpl>(config);
  if (absl::Status started = server->Start(); !started.ok()) return started;
  return server;
}

}  // namespace normd
