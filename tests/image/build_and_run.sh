#!/usr/bin/env bash
# Builds deploy/Dockerfile and runs the image, without a container daemon.
#
#   tests/image/build_and_run.sh [--fresh]     (as root; needs the network; minutes)
#
# debootstrap makes the base image from the mirror that this machine's apt uses,
# buildah builds on it with chroot isolation, and the image's own server is then
# called by the image's own normctl: health, an instance, a tensor, a shutdown on
# SIGTERM, and the state again in a second run on the same volume.
# --fresh makes the base image anew; otherwise one made before is used.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/image/debian_root.sh

work=${NORMD_IMAGE_WORK:-$PWD/build/image}
image=localhost/normd-under-test
base=localhost/normd-test-base:bookworm
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

((EUID == 0)) || fail "run this as root: debootstrap and buildah's chroot isolation need it"
deploy/install_dependencies.sh image
mkdir -p "$work"
buildah_() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }

container=
server=
cleanup() {
  [[ -z $server ]] || kill -KILL "$server" 2>/dev/null || true
  [[ -z $container ]] || buildah_ rm "$container" >/dev/null 2>&1 || true
}
trap cleanup EXIT

[[ ${1:-} == --fresh ]] && buildah_ rmi --force "$base" >/dev/null 2>&1 || true
if ! buildah_ inspect --type image "$base" >/dev/null 2>&1; then
  say "Base image: a minimal Debian 12"
  make_debian_root "$work/base"
  scratch=$(buildah_ from scratch)
  buildah_ copy --quiet "$scratch" "$work/base" / >/dev/null
  buildah_ config --cmd /bin/sh "$scratch"
  buildah_ commit --quiet --rm "$scratch" "$base" >/dev/null
  rm -rf "$work/base"
fi

say "deploy/Dockerfile"
# What a clone would have: the build must not lean on files that nobody committed.
context=$work/context
rm -rf "$context" && mkdir -p "$context"
git ls-files -z | xargs -0 cp --parents -t "$context"
buildah_ bud --quiet --pull-never --build-arg BASE="$base" --format docker \
  --ignorefile "$context/.dockerignore" -f "$context/deploy/Dockerfile" -t "$image" "$context"

say "What the image says of itself"
inspect() { buildah_ inspect --type image --format "$1" "$image"; }
user=$(inspect '{{.OCIv1.Config.User}}')
[[ $user != "" && $user != root && $user != 0* ]] || fail "the image runs as '$user'"
[[ $(inspect '{{.OCIv1.Config.Volumes}}') == *"/var/lib/normd"* ]] || fail "no state volume"
[[ $(inspect '{{.Docker.Config.Healthcheck}}') == *normctl*health* ]] || fail "no health check"
echo "user $user, a state volume, a health check"

say "The image at work"
container=$(buildah_ from --pull-never "$image")
volume=$work/volume
rm -rf "$volume" && mkdir -p "$volume" && chown "${user/:/ }" "$volume" 2>/dev/null || chown "$user" "$volume"
port=$((20000 + RANDOM % 20000))
in_image() { buildah_ run --volume "$volume:/var/lib/normd" "$container" -- "$@"; }
ctl() { in_image normctl --server="127.0.0.1:$port" "$@"; }
start() {
  # The environment is the image's own but for the port: this test shares the network
  # with its host.
  in_image env NORMD_LISTEN="127.0.0.1:$port" normd >"$work/normd.log" 2>&1 &
  server=$!
  for _ in {1..150}; do
    if ctl health --timeout=1s >/dev/null 2>&1; then return; fi
    kill -0 "$server" 2>/dev/null || { cat "$work/normd.log"; fail "the server ended"; }
    sleep 0.2
  done
  fail "the server did not become healthy"
}
# The process of normd itself, which runs under buildah's.
normd_pid() {
  local pid
  for pid in $(pgrep -x normd); do
    if grep -qzx "NORMD_LISTEN=127.0.0.1:$port" "/proc/$pid/environ" 2>/dev/null; then
      echo "$pid"
      return
    fi
  done
  fail "no process of normd"
}
stop() {
  local pid
  pid=$(normd_pid)
  [[ $(stat -c %u "/proc/$pid") == "${user%%:*}" ]] || fail "normd runs as uid $(stat -c %u "/proc/$pid")"
  kill -TERM "$pid"
  wait "$server" || fail "normd ended with status $? on SIGTERM"
  server=
}

start
ctl info
ctl create image/layer --num_features=3
ctl train image/layer
in_image sh -c 'test -w /var/lib/normd && ! test -w /usr/local/bin'
ctl describe image/layer
stop
if ctl health --timeout=1s >/dev/null 2>&1; then fail "healthy without a server"; fi
start
ctl describe image/layer | grep -q image/layer || fail "the state did not survive"
stop
ls -R "$volume" | grep -q shutdown || fail "no checkpoint at shutdown"

say "The image was built, ran as uid ${user%%:*}, stopped on SIGTERM and kept its state."
