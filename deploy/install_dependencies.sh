#!/usr/bin/env bash
# Installs what normd needs on Debian 12, by purpose. Installs nothing and needs
# no network where all of it is there already.
#   deploy/install_dependencies.sh [build] [run] [demo] [python] [test] [bench] [image]   (default: build)
set -euo pipefail

declare -A PACKAGES=(
  [build]="g++ cmake ninja-build ccache pkg-config
    libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev libspdlog-dev
    libhwy-dev libsqlite3-dev nlohmann-json3-dev libcli11-dev libssl-dev libgtest-dev libgmock-dev"
  [run]="libgrpc++1.51 libprotobuf32 libabsl20220623 libspdlog1.10 libhwy1 libsqlite3-0 libssl3"
  [demo]="python3 python3-numpy python3-pil"
  [python]="python3 python3-numpy python3-grpcio python3-protobuf"
  [test]="openssl clang-14 clang-format-14 clang-tidy-14 libclang-rt-14-dev
    python3 python3-numpy python3-grpcio python3-protobuf python3-torch python3-sklearn python3-onnx python3-yaml"
  [bench]="libdnnl-dev liblmdb-dev python3 python3-numpy python3-torch python3-grpcio python3-protobuf python3-matplotlib"
  [image]="debootstrap buildah"
)

packages=()
for purpose in "${@:-build}"; do
  if [[ -z ${PACKAGES[$purpose]:-} ]]; then
    echo "usage: $0 [build] [run] [demo] [python] [test] [bench] [image]" >&2
    exit 2
  fi
  read -r -d '' -a some <<<"${PACKAGES[$purpose]}" || true
  packages+=("${some[@]}")
done

missing=()
for package in "${packages[@]}"; do
  if [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) != installed ]]; then
    missing+=("$package")
  fi
done
if ((${#missing[@]} == 0)); then exit 0; fi

sudo=()
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "Run this as root, or install these packages first: ${missing[*]}" >&2
    exit 1
  fi
  sudo=(sudo)
fi
echo "Installing ${#missing[@]} packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" >/dev/null
