"""safetensors files, read and written from the published format alone
(https://github.com/huggingface/safetensors#format): shares nothing with normd."""

import json
import math

import torch
from harness.tensors import from_bytes, raw_bytes

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
          "I64": torch.int64}


def read_safetensors(path):
    """The tensors of a file and its metadata; every rule of the format is checked."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0 and data[8:9] == b"{", "the header is JSON, padded to 8 bytes"
    header = json.loads(data[8:8 + length])
    body = data[8 + length:]
    metadata = header.pop("__metadata__", {})
    assert all(isinstance(v, str) for v in metadata.values()), "metadata map strings to strings"
    tensors, end = {}, 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        assert first == end, f"a gap before {key}"
        tensors[key] = from_bytes(body[first:last], DTYPES[entry["dtype"]], entry["shape"])
        assert last - first == math.prod(entry["shape"]) * tensors[key].element_size()
        end = last
    assert end == len(body), "bytes after the last tensor"
    return tensors, metadata


def write_safetensors(path, tensors):
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, body = {}, b""
    for key, tensor in tensors.items():
        data = raw_bytes(tensor)
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                       "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
