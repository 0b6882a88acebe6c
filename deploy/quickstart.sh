#!/usr/bin/env bash
# From a fresh clone on Debian 12 to a normd at work, in one command:
#
#   deploy/quickstart.sh [--keep] [--no-install]
#
# Installs the packages that are missing, builds normd and normctl, starts a server and
# does its main job on real photographs: trains a BatchNorm2d instance, differentiates
# it, steps it, saves it, kills the server with SIGKILL, brings it back and compares.
# Everything goes through normctl over gRPC; NumPy only prepares tensors and checks the
# answers in float64. Any difference ends the script with an error.
#
#   --keep         leave the server running at the end
#   --no-install   ask apt for nothing: the packages are there
#
# All it writes is under build/. The first run takes minutes (apt and compiling), later
# ones seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

keep=false install=true
for argument in "$@"; do
  case $argument in
    --keep) keep=true ;;
    --no-install) install=false ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "usage: $0 [--keep] [--no-install]" >&2; exit 2 ;;
  esac
done

bin=build/release/bin
work=build/quickstart
name=photos/bn1
python() { /usr/bin/python3 deploy/quickstart/photographs.py "$@"; }

bold='' dim='' green='' reset=''
if [[ -t 1 ]]; then bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' reset=$'\e[0m'; fi
stage=0
say() { printf '\n%s%d. %s%s\n' "$bold" $((++stage)) "$*" "$reset"; }
proved=()
passed() { proved+=("$*"); printf '  %s✓%s %s\n' "$green" "$reset" "$*"; }
fail() { printf '\nFAILED: %s\nThe server log is %s/normd.log\n' "$*" "$work" >&2; exit 1; }

# normctl itself, and normctl shown as one would type it.
ctl() { "$bin/normctl" --server="$address" "$@"; }
show() { printf '  %s$ normctl %s%s\n' "$dim" "$*" "$reset"; ctl "$@" | sed 's/^/  /'; }

server=
stop_server() {
  [[ -n $server ]] || return 0
  kill -TERM "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  server=
}
trap stop_server EXIT
trap 'exit 130' INT TERM

start_server() {
  rm -f "$work/port"
  "$bin/normd" --listen=127.0.0.1:0 --port_file="$work/port" --state_dir="$work/state" \
    >>"$work/normd.log" 2>&1 &
  server=$!
  for _ in {1..200}; do
    if [[ -s $work/port ]]; then
      address=$(head -1 "$work/port")
      return
    fi
    kill -0 "$server" 2>/dev/null || { tail -5 "$work/normd.log" >&2; fail "normd ended"; }
    sleep 0.05
  done
  fail "normd was not up after ten seconds"
}

started=$SECONDS
say "Packages"
if $install; then deploy/install_dependencies.sh build demo; fi
echo "  all there"

say "Build"
[[ -f build/release/build.ninja ]] || cmake --preset release | sed -n 's/^-- \(The CXX\|Build files\)/  \1/p'
NINJA_STATUS='  [%f/%t, %e s] ' cmake --build --preset release --target normd normctl
echo "  $bin/normd, $bin/normctl"
built=$SECONDS

say "A server on a free port, with its state in $work/state"
rm -rf "$work"
mkdir -p "$work"
start_server
echo "  normd serves at $address (process $server)"
show info

say "Real input"
python batches "$work"

say "Train: a BatchNorm2d finds the statistics of the photographs' colours"
show create "$name" --num_features=3
python statistics "$work"
batch=0
for file in "$work"/batch-*.npy; do
  ctl forward "$name" --input="$file" --output="$work/y.npy" >/dev/null
  batch=$((batch + 1))
  case $batch in
    1 | 2 | 5 | 10 | 20 | 30 | 40 | 50 | 60)
      ctl state get "$name" --output="$work/state.safetensors" >/dev/null
      python statistics "$work" "$work/state.safetensors" "$batch"
      ;;
  esac
done
passed "$batch train-mode batches: running_mean and running_var moved to the photographs' own"

say "Backward and step: it learns to give every colour the mean 0.5 and the deviation 0.22"
echo "  step   loss       weight                   bias"
for step in {0..11}; do
  x=$(printf '%s/batch-%03d.npy' "$work" "$step")
  context=$(ctl forward "$name" --input="$x" --output="$work/y.npy" --save_for_backward --json |
    /usr/bin/python3 -c 'import json, sys; print(json.load(sys.stdin)["context_id"])')
  loss=$(python learn "$x" "$work/y.npy" "$work/grad_y.npy")
  ctl backward "$name" --context="$context" --grad_output="$work/grad_y.npy" --accumulate \
    --grad_input="$work/grad_x.npy" --grad_weight="$work/grad_w.npy" --grad_bias="$work/grad_b.npy" >/dev/null
  if ((step == 0)); then
    cp "$work"/grad_{y,x,w,b}.npy -t "$(mkdir -p "$work/first" && echo "$work/first")"
  fi
  if ((step % 2 == 0 || step == 11)); then
    ctl state get "$name" --output="$work/state.safetensors" >/dev/null
    python parameters "$work/state.safetensors" "$step" "$loss"
  fi
  ctl step "$name" --optimizer=sgd --lr=0.5 --zero_grad >/dev/null
done
echo "  the first step's gradients against the formulas of Ioffe and Szegedy (2015):"
python gradients "$work/batch-000.npy" "$work"/first/grad_{y,x,w,b}.npy
passed "gradients are right, and twelve SGD steps brought weight to 0.22 and bias to 0.5"

say "Eval and checkpoint"
show eval "$name"
show forward "$name" --input="$work/whole.npy" --output="$work/before.npy"
ctl state get "$name" --output="$work/state.safetensors" >/dev/null
python judge "$work" "$work/state.safetensors" "$work/before.npy"
show checkpoint save
passed "the eval output is what float64 computes from the instance's state"

say "kill -9, and back"
kill -KILL "$server"
wait "$server" 2>/dev/null || true
echo "  process $server was killed"
if ctl health --timeout=1s >/dev/null 2>&1; then fail "a killed server answers"; fi
start_server
echo "  normd serves at $address (process $server)"
show describe "$name"
ctl forward "$name" --input="$work/whole.npy" --output="$work/after.npy" >/dev/null
cmp "$work/before.npy" "$work/after.npy" || fail "the eval output changed"
passed "after the restart the eval output is the same, bit for bit ($(stat -c %s "$work/after.npy") bytes)"

say "A picture"
python picture "$work" "$work/after.npy" "$work/photographs.png"
echo "  $work/photographs.png: the photographs, and below them the server's answer"

printf '\n%sIt works:%s\n' "$bold" "$reset"
printf '  ✓ %s\n' "${proved[@]}"
printf '  built in %d s, shown in %d s\n' $((built - started)) $((SECONDS - built))

if $keep; then
  trap - EXIT
  disown "$server"
  printf '\nThe server goes on at %s (process %d; kill -TERM %d ends it).\n' "$address" "$server" "$server"
  serve=''
else
  serve="  $bin/normd --state_dir=$work/state &"$'\n'
  address=127.0.0.1:50051
fi
cat <<END

${bold}Try next${reset}
$serve  $bin/normctl --server=$address list
  $bin/normctl --server=$address describe $name
  $bin/normctl --server=$address bench $name --shape=32,3,224,224
  $bin/normctl --server=$address checkpoint list
  $bin/normctl --help
  tests/run.sh
END
