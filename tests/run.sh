#!/usr/bin/env bash
# Installs what the tests need, builds everything in release and runs every test.
#   tests/run.sh [options for ctest]     e.g. tests/run.sh -R bad_input
# Ends with ctest's closing lines, and non-zero when any test failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jobs=$(nproc)
step() { printf '\n=== %s\n' "$*"; }

step "Dependencies"
deploy/install_dependencies.sh build test

step "Configure (release)"
cmake --preset release

step "Build ($jobs jobs)"
cmake --build --preset release -j"$jobs"

step "Test"
ctest --test-dir build/release --output-on-failure -j"$jobs" "$@"
