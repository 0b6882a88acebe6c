#!/usr/bin/env bash
# Builds the fuzz targets and runs each for some seconds, beginning from its seeds.
#   tests/fuzz/run.sh [SECONDS-PER-TARGET]     (default: 10)
# What crashes a target stays in build/fuzz/crashes: run the target on that file.
set -euo pipefail

seconds=${1:-10}
if [[ ! $seconds =~ ^[0-9]+$ ]]; then
  echo "usage: $0 [SECONDS-PER-TARGET]" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
build=$root/build/fuzz

# A build of its own: the parsers themselves are instrumented, so that the fuzzer
# sees which of their paths an input takes.
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" -DCMAKE_CXX_FLAGS=-fsanitize=fuzzer-no-link \
  -DCMAKE_C_COMPILER=clang-14 -DCMAKE_CXX_COMPILER=clang++-14 \
  -DNORMD_SANITIZE=address,undefined -DNORMD_CUDA=OFF -DNORMD_FUZZ=ON -DNORMD_TESTS=OFF \
  -DNORMD_BENCHMARKS=OFF >/dev/null
cmake --build "$build" --target fuzz_targets -- --quiet

mkdir -p "$build/crashes"
for source in "$root"/tests/fuzz/*.cc; do
  name=$(basename "$source" .cc)
  [[ $name == make_corpus ]] && continue
  target=$build/bin/fuzz_$name
  seeds=$root/tests/fuzz/corpus/$name
  if [[ ! -d $seeds ]]; then
    echo "fuzz $name: no seeds in $seeds; fuzz_make_corpus writes them" >&2
    exit 1
  fi
  # New finds go beside the build, the seeds stay as they are.
  mkdir -p "$build/corpus/$name"
  echo "fuzz $name: $seconds s"
  "$target" -max_total_time="$seconds" -max_len=8192 -rss_limit_mb=2048 -timeout=10 -verbosity=0 \
    -print_final_stats=1 -artifact_prefix="$build/crashes/$name-" \
    "$build/corpus/$name" "$seeds" 2>&1 |
    { grep -vE "^(INFO|WARNING)" || true; }
done
echo "fuzz: no target failed"
