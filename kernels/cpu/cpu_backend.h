// The CPU backend: Highway kernels for every problem, dispatched at run time to
// the best instruction set of this machine.
#ifndef NORMD_KERNELS_CPU_CPU_BACKEND_H_
#define NORMD_KERNELS_CPU_CPU_BACKEND_H_

#include <memory>

#include "kernels/backend.h"
#include "kernels/executor.h"

namespace normd {

struct CpuOptions {
  // Results do not depend on the number of threads, bit for bit. This backend keeps
  // the promise anyway: it cuts a problem by its shape alone and merges in order.
  bool deterministic = false;
};

// `executor` must outlive the backend. Only Place::kHost is supported.
std::unique_ptr<Backend> MakeCpuBackend(Executor& executor, const CpuOptions& options);

}  // namespace normd

#endif  // NORMD_KERNELS_CPU_CPU_BACKEND_H_
