// The whole of normctl behind main().
#ifndef NORMD_CLIENT_NORMCTL_NORMCTL_H_
#define NORMD_CLIENT_NORMCTL_NORMCTL_H_

#include <ostream>
#include <string>
#include <vector>

namespace normd::normctl {

enum ExitCode { kDone = 0, kRefused = 1, kUsage = 2 };

// Runs normctl with the arguments after its name. Answers go to `out`, errors to
// `err`, and progress there too when `err_is_terminal`.
int Run(std::vector<std::string> arguments, std::ostream& out, std::ostream& err,
        bool err_is_terminal);

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_NORMCTL_H_
