#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/handlers.h"
#include "server/service/shared_tensors.h"
#include "server/service/tensor_answer.h"

namespace normd {

namespace {

// `bytes` of device memory that another process has.
absl::StatusOr<std::shared_ptr<void>> Open(Core& core, const std::string& handle, int64_t bytes) {
  constexpr char kField[] = "cuda_ipc_handle";
  DeviceHandle opaque;
  if (handle.size() != opaque.size()) {
    return InvalidField(kField, absl::StrCat(handle.size(), " bytes"),
                        absl::StrCat(opaque.size(), " bytes, a cudaIpcMemHandle_t"));
  }
  std::memcpy(opaque.data(), handle.data(), opaque.size());
  std::shared_ptr<void> memory;
  int64_t there = 0;
  const Outcome outcome = core.backend->OpenShared(opaque, &memory, &there);
  if (outcome == Outcome::kRefused) {
    return InvalidField(kField, "no memory that the device can open",
                        "the handle of memory from cudaMalloc on the server's GPU, in another "
                        "process of this host that still has it");
  }
  if (absl::Status opened = ToStatus(outcome); !opened.ok()) return opened;
  if (bytes > there) {
    return InvalidField("region_bytes", absl::StrCat(bytes),
                        absl::StrCat("at most ", there, ", the bytes of the handle's memory"));
  }
  return memory;
}

}  // namespace

void RegisterSharedMemory(Core& core, const Caller& caller,
                          const v1::RegisterSharedMemoryRequest& request,
                          v1::RegisterSharedMemoryResponse& response, Done done) {
  if (core.regions == nullptr) return done(NoSharedMemory(""));
  if (!request.cuda_ipc_handle().empty()) {
    if (!core.cuda_ipc) return done(NoCudaIpc("cuda_ipc_handle"));
    // The driver takes its time.
    auto shared_done = std::make_shared<Done>(std::move(done));
    core.executor->Enqueue([&core, &caller, &request, &response, shared_done] {
      auto region = core.regions->RegisterOnDevice(
          request.connection(), caller.name(), request.region_bytes(),
          [&] { return Open(core, request.cuda_ipc_handle(), request.region_bytes()); });
      if (region.ok()) response.set_region(*region);
      (*shared_done)(region.status());
    });
    return;
  }
  auto region = core.regions->Register(request.connection(), caller.name(), request.region_bytes());
  if (region.ok()) response.set_region(*region);
  done(region.status());
}

void UnregisterSharedMemory(Core& core, const Caller& caller,
                            const v1::UnregisterSharedMemoryRequest& request,
                            v1::UnregisterSharedMemoryResponse&, Done done) {
  if (core.regions == nullptr) return done(NoSharedMemory(""));
  // To give much memory back takes a while.
  auto shared_done = std::make_shared<Done>(std::move(done));
  core.executor->Enqueue([&core, &caller, &request, shared_done] {
    (*shared_done)(core.regions->Unregister(request.region(), caller.name()));
  });
}

void GetSharedMemoryStatus(Core& core, const v1::GetSharedMemoryStatusRequest&,
                           v1::GetSharedMemoryStatusResponse& response, Done done) {
  if (core.regions != nullptr) {
    const Regions::Usage usage = core.regions->usage();
    response.set_enabled(true);
    response.set_socket(core.shared_memory_socket);
    response.set_connections(usage.connections);
    response.set_regions(usage.regions);
    response.set_bytes_in_use(usage.bytes);
    response.set_shared_memory_budget(core.regions->budget());
    response.set_max_region_bytes(core.regions->limits().max_region_bytes);
    response.set_max_regions(core.regions->limits().max_regions);
    response.set_cuda_ipc(core.cuda_ipc);
  }
  done(absl::OkStatus());
}

}  // namespace normd
