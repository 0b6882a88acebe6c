#include <memory>
#include <utility>

#include "server/service/handlers.h"
#include "server/service/shared_tensors.h"

namespace normd {

void RegisterSharedMemory(Core& core, const Caller& caller,
                          const v1::RegisterSharedMemoryRequest& request,
                          v1::RegisterSharedMemoryResponse& response, Done done) {
  if (core.regions == nullptr) return done(NoSharedMemory(""));
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
  }
  done(absl::OkStatus());
}

}  // namespace normd
