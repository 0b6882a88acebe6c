#!/bin/bash
# The one benchmark command:
#   tests/benchmarks/run.sh SUITE [--quick] [--json FILE] [options of the suite]
# A suite is a folder beside this file with a run.sh of its own.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
suites=$(cd "$here" && for run in */run.sh; do echo -n "${run%/run.sh} "; done)
suite=${1:-}
if [[ -z $suite || ! -x $here/$suite/run.sh ]]; then
  echo "usage: $0 SUITE [--quick] [--json FILE]; suites: $suites" >&2
  exit 2
fi
shift
exec "$here/$suite/run.sh" "$@"
