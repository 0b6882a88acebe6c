#!/usr/bin/env bash
# How fast updates are acknowledged when each is on disk before its answer, beside
# what the bare engine, LMDB and a bare log do with the same records and batches; on the
# disk as it is, and with each sync 5 ms slower.
#   tests/benchmarks/durability/run.sh [--quick] [--json FILE] [--directory DIR]
# DIR: on the disk to measure (default: the build folder's).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
build=$root/build/release
{
  cmake -S "$root" --preset release -DNORMD_BENCHMARKS=ON
  cmake --build "$build" --target normd_bench_durability
} >&2
exec "$build/bin/normd_bench_durability" --directory "$build" "$@"
