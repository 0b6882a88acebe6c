#!/usr/bin/env bash
# A real server with many instances of 64 channels, beside one with a single instance: how long a
# restart takes, the memory it needs, a forward's latency, and a page of ListInstances.
#   tests/benchmarks/run.sh scale [--quick] [--json FILE] [--instances N] [--directory DIR]
# N: a million; --quick: 100,000. DIR: on the disk to measure (default: the build folder's).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
build=$root/build/release
{
  cmake -S "$root" --preset release
  cmake --build "$build" --target normd normd_fill_store normd_python_stubs
} >&2
export NORMD_BIN=$build/bin/normd
export PYTHONPATH=$root/tests:$build/python PYTHONDONTWRITEBYTECODE=1
exec /usr/bin/python3 "$root/tests/benchmarks/scale/scale.py" --directory "$build" "$@"
