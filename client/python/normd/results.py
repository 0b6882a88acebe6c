"""What the calls of Client answer. All are plain and immutable."""

import dataclasses
from typing import Any, Dict, Optional

import numpy as np


@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """Statistics of one batch: float64, one value a channel."""

    count: int  # values behind each mean and variance
    mean: np.ndarray
    var: np.ndarray  # biased


@dataclasses.dataclass(frozen=True)
class ForwardResult:
    output: np.ndarray  # dtype, shape and memory format of the input
    version: int
    mode: str  # "train" or "eval": the one that served
    num_batches_tracked: int
    context_id: str  # for backward; empty unless save_for_backward
    batch_statistics: Optional[BatchStatistics]
    replayed: bool

    def __array__(self, dtype=None):
        return self.output if dtype is None else self.output.astype(dtype)


@dataclasses.dataclass(frozen=True)
class BackwardResult:
    grad_input: Optional[np.ndarray]  # None with skip_grad_input
    grad_weight: Optional[np.ndarray]  # None without affine
    grad_bias: Optional[np.ndarray]
    version: int
    replayed: bool
    grad_residual: Optional[np.ndarray] = None  # where the forward had a residual


@dataclasses.dataclass(frozen=True)
class State:
    """An instance's tensors at one version."""

    version: int
    instance: Any  # normd.v1.Instance
    state_dict: Dict[str, np.ndarray]
    gradients: Dict[str, np.ndarray]  # when asked for
    optimizer_state: Dict[str, np.ndarray]  # when asked for
