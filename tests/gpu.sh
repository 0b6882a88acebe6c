#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes, on a machine with CUDA and CMake 3.25
# alone (no network): builds kernels/, tests it on the device, runs the tests again under
# compute-sanitizer, and benchmarks.
#
#   tests/gpu.sh [--quick] [--json FILE]     --quick: a short benchmark; FILE: its rows
#   tests/gpu.sh --pack FILE.tar.gz          what to carry to such a machine
#
# GoogleTest is taken from the system, or from its source in $NORMD_GTEST_SOURCE,
# third_party/googletest (where --pack puts it) or /usr/src/googletest. Fails where
# anything fails, and where there is no device to test.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
quick=()
json=$root/build/gpu/gpu.json
while (($#)); do
  case $1 in
    --quick) quick=(--quick) ;;
    --json) json=$(realpath -m "${2:?--json takes a file}"); shift ;;
    --pack)
      pack=$(realpath -m "${2:?--pack takes a file}")
      staging=$(mktemp -d)
      trap 'rm -rf "$staging"' EXIT
      git archive --prefix=normd/ HEAD | tar -x -C "$staging"
      mkdir -p "$staging/normd/third_party"
      cp -r "${NORMD_GTEST_SOURCE:-/usr/src/googletest}" "$staging/normd/third_party/googletest"
      tar -czf "$pack" -C "$staging" normd
      echo "$pack: unpack it there, and run normd/tests/gpu.sh"
      exit 0
      ;;
    *) sed -n '2,13s/^# \?//p' "$0" >&2; exit 2 ;;
  esac
  shift
done

export PATH=$PATH:/usr/local/cuda/bin
for tool in nvcc cmake; do
  command -v $tool >/dev/null || { echo "gpu.sh: there is no $tool here" >&2; exit 1; }
done
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader ||
  { echo "gpu.sh: nvidia-smi finds no GPU here: nothing was tested" >&2; exit 1; }

build=$root/build/gpu
options=(-DCMAKE_BUILD_TYPE=Release -DNORMD_CUDA=ON -DNORMD_BENCHMARKS=ON
  -DCMAKE_CUDA_ARCHITECTURES=native)
for source in "${NORMD_GTEST_SOURCE:-}" "$root/third_party/googletest"; do
  if [[ -f $source/CMakeLists.txt ]]; then options+=("-DNORMD_GTEST_SOURCE=$source"); fi
done
step() { echo "== $1 ($SECONDS s)"; }

step "build"
cmake -S kernels -B "$build" "${options[@]}" >/dev/null
cmake --build "$build" -j "$(nproc)" \
  --target kernels_backend_test kernels_cuda_backend_test kernels_cuda_ipc_test normd_bench_gpu

step "tests on the device"
log=$build/tests.log
"$build/bin/kernels_backend_test" --gtest_filter='*/Cuda' | tee "$log" | tail -3
"$build/bin/kernels_cuda_ipc_test" | tee -a "$log" | tail -3
# Skipped is not passed.
if grep -q 'SKIPPED' "$log"; then
  echo "gpu.sh: tests were skipped: $(grep -m1 -A1 ': Skipped' "$log" | tail -1)" >&2
  exit 1
fi
"$build/bin/kernels_cuda_backend_test" | tail -1

if command -v compute-sanitizer >/dev/null; then
  step "compute-sanitizer"
  check() {
    local outcome=0
    timeout 90 compute-sanitizer --tool "$1" --error-exitcode 9 "$build/bin/kernels_backend_test" \
      --gtest_filter="$2" >"$build/$1.log" 2>&1 || outcome=$?
    if ((outcome == 124)); then
      echo "$1: stopped after 90 s, nothing found until then"
    elif ((outcome)); then
      tail -40 "$build/$1.log" >&2
      exit 1
    else
      echo "$1: clean"
    fi
  }
  check memcheck '*Conformance.*/Cuda'
  check racecheck '*Conformance.LeavesOutWhatIsNotWanted/Cuda:*Conformance.KeepsNanAndInf*/Cuda:*Conformance.Adds*/Cuda:*Conformance.TakesLarge*/Cuda'
  check synccheck '*Conformance.LeavesOutWhatIsNotWanted/Cuda:*Conformance.Adds*/Cuda:*Conformance.TakesLarge*/Cuda'
else
  echo "there is no compute-sanitizer here: not run"
fi

step "benchmark"
tests/benchmarks/run.sh gpu "${quick[@]}" --json "$json"
step "done; rows in $json"
