#!/usr/bin/env bash
# Builds with ThreadSanitizer and runs the unit tests of what threads share: the registry,
# its contexts and its persister, the store, the gate, authentication, the threads that compute.
#   tests/tsan/run.sh [CTEST-OPTION...]
# Not the tests with a server in them: Debian's gRPC is built without ThreadSanitizer, which
# takes every hand-over between its threads for a race.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cmake --preset tsan
cmake --build --preset tsan -j"$(nproc)" \
  --target server_state_test server_registry_test server_auth_test kernels_executor_test
TSAN_OPTIONS="suppressions=$PWD/tests/tsan/suppressions.txt" \
  ctest --test-dir build/tsan --output-on-failure -j"$(nproc)" -R '^unit\.' \
  -E '_NOT_BUILT' "$@"
