#!/bin/bash
# The kernels on this machine's GPU: see gpu.cu, and peers.py for PyTorch and cuDNN.
#   tests/benchmarks/run.sh gpu [--quick] [--json FILE] [--filter PART,...]
# Needs a GPU, nvcc and CMake; Python with PyTorch for the peers alone.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
build=${NORMD_GPU_BUILD:-$root/build/gpu}
quick=()
filter=()
json=
while (($#)); do
  case $1 in
    --quick) quick=(--quick) ;;
    --json) json=${2:?--json takes a file}; shift ;;
    --filter) filter=(--filter "${2:?--filter takes parts of names}"); shift ;;
    --json=*) json=${1#--json=} ;;
    *) echo "usage: $0 [--quick] [--json FILE] [--filter PART,...]" >&2; exit 2 ;;
  esac
  shift
done
rows=${json:-$build/gpu.json}
{
  cmake -S "$root/kernels" -B "$build" -DCMAKE_BUILD_TYPE=Release -DNORMD_CUDA=ON \
    -DNORMD_BENCHMARKS=ON -DCMAKE_CUDA_ARCHITECTURES="${NORMD_GPU_ARCHITECTURES:-native}"
  cmake --build "$build" --target normd_bench_gpu -j "$(nproc)"
} >&2
"$build/bin/normd_bench_gpu" "${quick[@]}" "${filter[@]}" --json "$rows"
python=$(command -v python3 || true)
if [[ -n $python ]] && "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  "$python" "$root/tests/benchmarks/gpu/peers.py" "$rows"
else
  echo "no PyTorch with CUDA here: without peers" >&2
fi
