#!/usr/bin/env bash
# Writes the Python stubs of the contract: OUT_DIR/normd/v1/*_pb2.py and
# *_pb2_grpc.py. The package in this folder finds them in the default OUT_DIR by
# itself, and anywhere else through PYTHONPATH.
#   client/python/generate.sh [OUT_DIR]     (default: client/python/normd_stubs)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
protos=$here/../../proto
out=${1:-$here/normd_stubs}
plugin=$(command -v grpc_python_plugin) || {
  echo "generate.sh: grpc_python_plugin is missing; install protobuf-compiler-grpc" >&2
  exit 1
}

mkdir -p "$out"
protoc --proto_path="$protos" --python_out="$out" --grpc_python_out="$out" \
  --plugin=protoc-gen-grpc_python="$plugin" "$protos"/normd/v1/*.proto
