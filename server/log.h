// The log: lines of text, or of JSON for machines to read, on standard error.
#ifndef NORMD_SERVER_LOG_H_
#define NORMD_SERVER_LOG_H_

#include "server/config.h"

namespace normd {

// Sets spdlog's default logger up, once, before other threads run.
void SetUpLog(const Config& config);

}  // namespace normd

#endif  // NORMD_SERVER_LOG_H_
