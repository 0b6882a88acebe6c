#!/usr/bin/env bash
# Builds the fuzz targets and runs each for some time, beginning from its seeds, as many
# at once as there are cores.
#   tests/fuzz/run.sh [SECONDS] [TARGET...]    (default: 10 s each, all targets)
#   tests/fuzz/run.sh --hours H [TARGET...]    H hours each
# What crashes a target stays in build/fuzz/crashes: run the target on that file.
set -euo pipefail

usage() {
  echo "usage: $0 [SECONDS | --hours H] [TARGET...]" >&2
  exit 2
}
seconds=10
if [[ ${1:-} == --hours ]]; then
  [[ ${2:-} =~ ^[0-9]+$ ]] || usage
  seconds=$(($2 * 3600))
  shift 2
elif [[ $# -gt 0 ]]; then
  [[ $1 =~ ^[0-9]+$ ]] || usage
  seconds=$1
  shift
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

targets=("$@")
if [[ ${#targets[@]} -eq 0 ]]; then
  for source in "$root"/tests/fuzz/*.cc; do
    name=$(basename "$source" .cc)
    [[ $name == make_corpus ]] || targets+=("$name")
  done
fi

fuzz() {  # fuzz NAME
  local name=$1 seeds=$root/tests/fuzz/corpus/$1
  if [[ ! -d $seeds ]]; then
    echo "fuzz $name: no seeds in $seeds; fuzz_make_corpus writes them" >&2
    return 1
  fi
  # New finds go beside the build, the seeds stay as they are.
  mkdir -p "$build/corpus/$name" "$build/logs"
  local log=$build/logs/$name result=0
  "$build/bin/fuzz_$name" -max_total_time="$seconds" -max_len=8192 -rss_limit_mb=2048 -timeout=10 \
    -verbosity=0 -print_final_stats=1 -artifact_prefix="$build/crashes/$name-" \
    "$build/corpus/$name" "$seeds" >"$log" 2>&1 || result=$?
  if [[ $result -ne 0 ]]; then
    echo "fuzz $name: FAILED"
    grep -vE "^(INFO|WARNING)" "$log" || true
    return 1
  fi
  echo "fuzz $name: $seconds s, $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs"
}
export -f fuzz
export root build seconds

mkdir -p "$build/crashes"
printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I{} bash -c 'set -uo pipefail; fuzz {}'
echo "fuzz: no target failed"
