#!/usr/bin/env bash
# Builds with ThreadSanitizer and runs the unit tests of what threads share: thread pool,
# registry, contexts, persister, gate, authentication; and computations on several threads.
#   tests/tsan/run.sh
# Not the tests with a server in them: Debian's gRPC is built without ThreadSanitizer, which
# takes each hand-over between its threads for a race.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
cmake --preset tsan
cmake --build --preset tsan -j"$(nproc)" \
  --target kernels_thread_pool_test kernels_cpu_determinism_test server_registry_test server_state_test server_auth_test
export TSAN_OPTIONS="suppressions=$PWD/tests/tsan/suppressions.txt"
build/tsan/bin/kernels_thread_pool_test
build/tsan/bin/kernels_cpu_determinism_test
build/tsan/bin/server_registry_test
build/tsan/bin/server_state_test --gtest_filter='Persister*:*Persister*:RequestLog*'
build/tsan/bin/server_auth_test
