#!/usr/bin/env bash
# Style of every file under version control.
#
#   tests/lint.sh            clang-format on C++, bash -n on scripts: seconds
#   tests/lint.sh --tidy     clang-tidy too, with .clang-tidy's checks: minutes
#   tests/lint.sh --tidy FILE...   on these sources alone
#
# clang-tidy reads build/release/compile_commands.json, and configures the release
# preset where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

tidy=false
if [[ ${1:-} == --tidy ]]; then
  tidy=true
  shift
fi

mapfile -d '' cpp < <(git ls-files -z -- '*.cc' '*.h' '*.cu')
mapfile -d '' scripts < <(git ls-files -z -- '*.sh' '.ci/run')

clang-format-14 --dry-run -Werror "${cpp[@]}"
for script in "${scripts[@]}"; do
  # The files that are only ever sourced are shell as well.
  if head -1 "$script" | grep -qE 'sh$|^#'; then bash -n "$script"; fi
done
echo "clang-format: ${#cpp[@]} files, bash: ${#scripts[@]} scripts: fine"
$tidy || exit 0

build=build/release
[[ -f $build/compile_commands.json ]] || cmake --preset release >/dev/null
# The generated protobuf headers.
cmake --build --preset release --target normd_proto >/dev/null

# Sources that the build knows, each once.
mapfile -t sources < <(
  python3 - "$build/compile_commands.json" "$PWD" "$@" <<'END'
import json, os, sys
database, root, wanted = sys.argv[1], sys.argv[2], {os.path.abspath(f) for f in sys.argv[3:]}
ours = set()
for entry in json.load(open(database)):
    path = os.path.normpath(os.path.join(entry["directory"], entry["file"]))
    if path.startswith(root + "/") and not path.startswith(root + "/build/"):
        if path.endswith(".cc") and (not wanted or path in wanted):
            ours.add(path)
print("\n".join(sorted(ours)))
END
)
echo "clang-tidy: ${#sources[@]} sources"
printf '%s\0' "${sources[@]}" |
  xargs -0 -n 1 -P "$(nproc)" clang-tidy-14 -p "$build" --quiet \
    --extra-arg=-Wno-unknown-warning-option 2> >(grep -v 'warnings\? generated' >&2)
echo "clang-tidy: fine"
