#!/bin/bash
# Builds the kernels and their contenders in release and times them: see bench.py.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
build=$root/build/kernels
{
  cmake -S "$root/kernels" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DNORMD_CUDA=OFF \
    -DNORMD_BENCHMARKS=ON
  cmake --build "$build" --target normd_bench_kernels
} >&2
exec /usr/bin/python3 "$root/tests/benchmarks/kernels/bench.py" \
  --library "$build/lib/libnormd_bench_kernels.so" "$@"
