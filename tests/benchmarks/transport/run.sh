#!/usr/bin/env bash
# normd's RPCs beside a bare gRPC echo of the same bytes, interleaved in one run:
#   tests/benchmarks/run.sh transport [--quick] [--json=FILE]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

deploy/install_dependencies.sh build
[[ -f build/release/build.ninja ]] || cmake --preset release >/dev/null
cmake --build --preset release --target normd transport_benchmark >/dev/null
arguments=()
while (($#)); do
  case $1 in
    --json) arguments+=("--json=$2"); shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
exec build/release/bin/transport_benchmark --normd=build/release/bin/normd "${arguments[@]}"
