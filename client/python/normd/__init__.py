"""normd from Python: named normalization layers with PyTorch's semantics.

    import numpy as np
    import normd

    client = normd.Client("127.0.0.1:50051")
    client.create("bn1", num_features=64)
    y = client.forward("bn1", np.random.randn(8, 64, 56, 56).astype(np.float32)).output

Needs grpcio and numpy, and the stubs that client/python/generate.sh writes.
normd.torch holds torch.nn modules whose forward and backward run on the server.
"""

import pathlib
import pkgutil

# The stubs are normd.v1, in another folder: one on PYTHONPATH, or the default
# folder of generate.sh.
__path__ = pkgutil.extend_path(__path__, __name__)
_default_stubs = pathlib.Path(__file__).resolve().parents[1] / "normd_stubs" / "normd"
if _default_stubs.is_dir():
    __path__.append(str(_default_stubs))

try:
    from normd.v1 import norm_service_pb2 as _  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("normd.v1", "normd.v1.norm_service_pb2"):
        raise
    raise ModuleNotFoundError(
        "normd's Python stubs have not been generated: run client/python/generate.sh, "
        "or put build/<preset>/python on PYTHONPATH",
        name=error.name,
    ) from None

from normd.client import Client
from normd.errors import NormdError
from normd.optim import SGD, Adam, AdamW
from normd.results import BackwardResult, BatchStatistics, ForwardResult, State

__all__ = [
    "Adam",
    "AdamW",
    "BackwardResult",
    "BatchStatistics",
    "Client",
    "ForwardResult",
    "NormdError",
    "SGD",
    "State",
]
