// A loop over independent pieces of work, for loading and saving many instances.
#ifndef NORMD_SERVER_STATE_PARALLEL_H_
#define NORMD_SERVER_STATE_PARALLEL_H_

#include <cstddef>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace normd {

// Calls work(i) for 0 <= i < count, on up to one thread a processor, and returns
// when all calls have. Once one fails no further ones begin; of the errors, that
// of the smallest i is returned.
absl::Status ParallelFor(size_t count, absl::FunctionRef<absl::Status(size_t i)> work);

}  // namespace normd

#endif  // NORMD_SERVER_STATE_PARALLEL_H_
