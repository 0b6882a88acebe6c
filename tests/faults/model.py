"""What a BatchNorm2d instance must be: plain numpy, float64, state rounded as it is kept."""

import dataclasses

import numpy

CHANNELS = 4
TENSORS = ("weight", "bias", "running_mean", "running_var")


def batch(seed):
    """A batch of 8 values a channel."""
    return numpy.random.default_rng(seed).integers(-8, 8, (2, CHANNELS, 2, 2)).astype("<f4")


def new_state(seed):
    """A state_dict to set."""
    rng = numpy.random.default_rng(seed)
    state = {name: rng.standard_normal(CHANNELS).astype("<f4") for name in TENSORS}
    state["running_var"] = abs(state["running_var"])
    return state | {"num_batches_tracked": int(rng.integers(1000))}


@dataclasses.dataclass
class Model:
    """An instance at one version. momentum None: the cumulative average."""

    momentum: float | None = 0.1
    eps: float = 1e-5
    version: int = 1
    state: dict = dataclasses.field(default_factory=lambda: Model.initial())

    @staticmethod
    def initial():
        one, zero = numpy.ones(CHANNELS, "<f4"), numpy.zeros(CHANNELS, "<f4")
        return {"weight": one, "bias": zero, "running_mean": zero, "running_var": one,
                "num_batches_tracked": 0}

    def copy(self):
        # States are replaced, never written to.
        return dataclasses.replace(self, state=dict(self.state))

    def apply(self, kind, seed):
        """The change that a call makes, and what it answers beside the version."""
        self.version += 1
        if kind == "forward":
            return self._forward(batch(seed))
        if kind == "set_state":
            self.state = new_state(seed)
        elif kind == "reset_running_stats":
            self.state |= {name: Model.initial()[name]
                           for name in ("running_mean", "running_var", "num_batches_tracked")}
        elif kind == "reset_parameters":
            self.state = Model.initial()
        else:
            raise ValueError(kind)
        return {}

    def read(self, kind, seed):
        """What a call that changes nothing answers."""
        if kind == "get_state":
            return dict(self.state)
        if kind == "eval":
            return {"output": self._normalize(batch(seed), self.state["running_mean"],
                                              self.state["running_var"])}
        raise ValueError(kind)

    def _normalize(self, x, mean, var):
        def along(values):
            return numpy.asarray(values, "f8").reshape(1, -1, 1, 1)
        return ((x.astype("f8") - along(mean)) / numpy.sqrt(along(var) + self.eps)
                * along(self.state["weight"]) + along(self.state["bias"]))

    def _forward(self, x):
        values = x.astype("f8")
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3))
        count = x.size // CHANNELS
        output = self._normalize(x, mean, var)
        tracked = self.state["num_batches_tracked"] + 1
        momentum = 1 / tracked if self.momentum is None else self.momentum

        def fold(old, value):
            return ((1 - momentum) * old.astype("f8") + momentum * value).astype("<f4")
        self.state |= {"running_mean": fold(self.state["running_mean"], mean),
                       "running_var": fold(self.state["running_var"], var * count / (count - 1)),
                       "num_batches_tracked": tracked}
        return {"output": output, "num_batches_tracked": tracked}


def difference(answer, due):
    """What of an answer is not as due: a name and values, or None.

    An output and the running statistics are due within a few float32 roundings; whether
    states of one version are the same bit for bit is for history.py. What the answer does not
    tell (that of a repeated call tells the version alone) is not compared.
    """
    for name, want in due.items():
        if name not in answer:
            continue
        got = answer[name]
        if name in ("output", "running_mean", "running_var"):
            scale = max(1.0, float(abs(want).max()))
            off = float(abs(numpy.asarray(got, "f8") - want).max())
            if not off <= 1e-5 * scale:
                return f"{name} is off by {off:.3g}"
        elif not numpy.array_equal(got, want):
            return f"{name} is {got}, due {want}"
    return None
