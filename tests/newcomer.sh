#!/usr/bin/env bash
# The README's two commands as a newcomer meets them: a bare Debian 12, a fresh clone.
#
#   tests/newcomer.sh [quickstart] [tests]     (as root; needs the network; default: both)
#
# Makes a root directory with debootstrap (minimal Debian with git, ca-certificates and
# sudo, and a user who may use it), clones the committed state of this repository into
# it, and runs deploy/quickstart.sh and tests/run.sh there as that user. Nothing of this
# machine's packages, caches or build folders is visible inside. Keep half an hour of two
# cores for it.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/image/debian_root.sh

root=${NORMD_NEWCOMER_ROOT:-$PWD/build/newcomer/root}
what=("$@")
((${#what[@]})) || what=(quickstart tests)

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
((EUID == 0)) || { echo "FAILED: run this as root: debootstrap and chroot need it" >&2; exit 1; }
[[ -z $(git status --porcelain) ]] || echo "note: changes that are not committed are left out"
command -v debootstrap >/dev/null || deploy/install_dependencies.sh image

# Unmounted whatever happens, and before anything is removed.
unmount() {
  local point
  for point in dev/shm dev/pts dev sys proc; do
    if mountpoint -q "$root/$point"; then umount -l "$root/$point"; fi
  done
}
trap unmount EXIT
unmount

say "A bare Debian 12"
mkdir -p "$(dirname "$root")"
make_debian_root "$root" git ca-certificates sudo
cp /etc/resolv.conf /etc/hosts "$root/etc/"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sys "$root/sys"
mount --bind /dev "$root/dev"
mount -t devpts devpts "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm"
chroot "$root" useradd --create-home --shell /bin/bash newcomer
echo 'newcomer ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/newcomer"
chroot "$root" dpkg-query -W | wc -l | sed 's/$/ packages/'

say "git clone"
# The repository as one file: what the clone holds is what was committed.
git bundle create -q "$root/home/newcomer/normd.bundle" HEAD
chmod a+r "$root/home/newcomer/normd.bundle"
as_newcomer() {
  chroot "$root" /usr/bin/env -i HOME=/home/newcomer USER=newcomer LANG=C.UTF-8 TERM="${TERM:-dumb}" \
    PATH=/usr/local/bin:/usr/bin:/bin \
    su newcomer -s /bin/bash -c "$1"
}
as_newcomer "git clone -q -c advice.detachedHead=false ~/normd.bundle ~/normd && cd ~/normd && git log --oneline -1"

# Wall time is this machine's mood; processor time is what the work took.
timed() {
  say "$1"
  local TIMEFORMAT=$'\n\033[1m== '"$1"$': passed in %0lR, %0U s + %0S s of processor time\033[0m'
  time as_newcomer "cd ~/normd && $1"
}
for part in "${what[@]}"; do
  case $part in
    quickstart)
      timed deploy/quickstart.sh
      timed deploy/quickstart.sh  # again: seconds
      ;;
    tests) timed tests/run.sh ;;
    *) echo "usage: $0 [quickstart] [tests]" >&2; exit 2 ;;
  esac
done
