#!/usr/bin/env bash
# normd's RPCs beside a bare gRPC echo of the same bytes, the service as most would write it
# and the service in Python, interleaved in one run:
#   tests/benchmarks/run.sh transport [--quick] [--only=PART_OF_A_NAME] [--json=FILE]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

deploy/install_dependencies.sh build bench
[[ -f build/release/build.ninja ]] || cmake --preset release >/dev/null
cmake --build --preset release --target normd transport_benchmark normd_python >/dev/null
arguments=()
while (($#)); do
  case $1 in
    --json) arguments+=("--json=$2"); shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
PYTHONPATH=build/release/python PYTHONDONTWRITEBYTECODE=1 exec build/release/bin/transport_benchmark \
  --normd=build/release/bin/normd --torch_server=tests/benchmarks/transport/torch_server.py "${arguments[@]}"
