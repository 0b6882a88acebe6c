#!/usr/bin/env bash
# The fault tests against build/release, with more kills than the ordinary test run has.
#   tests/faults/run.sh [--kills N] [TEST...]      (default: 20 kills of each durability)
# TEST: history, kill, disk, clock; default all. NORMD_BIN: another build's normd.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
usage() {
  echo "usage: $0 [--kills N] [history] [kill] [disk] [clock]" >&2
  exit 2
}
if [[ ${1:-} == --kills ]]; then
  [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage
  export NORMD_KILLS=$2
  shift 2
fi
(($#)) || set -- history kill disk clock
export NORMD_BIN=${NORMD_BIN:-$root/build/release/bin/normd}
export PYTHONPATH=$root/tests:$root/build/release/python PYTHONDONTWRITEBYTECODE=1
for name in "$@"; do
  [[ -f $root/tests/faults/${name}_test.py ]] || usage
  /usr/bin/python3 "$root/tests/faults/${name}_test.py" --verbose
done
