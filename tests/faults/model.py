"""What a BatchNorm2d instance must be: plain numpy, float64, state rounded as it is kept.

A batch's statistics, summed in another order, differ in the last bit of a double, and now and then
that turns a rounding to float32. So the client's record of a forward holds the statistics that the
server answered; they are held to be right, and from them the state is known bit for bit. A batch
has 8 values a channel: a power of two, so that var * count is the sum it was made from.
"""

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

    def apply(self, kind, seed, statistics=None):
        """The change that a call makes, and what it answers beside the version.

        statistics   mean and biased variance that a forward answered; None: those of numpy
        """
        self.version += 1
        if kind == "forward":
            return self._forward(batch(seed), statistics)
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

    def _forward(self, x, statistics):
        values = x.astype("f8")
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3))
        count = x.size // CHANNELS
        output = self._normalize(x, mean, var)
        due = {"mean": mean, "var": var}
        if statistics is not None:
            mean, var = statistics["mean"], statistics["var"]
        tracked = self.state["num_batches_tracked"] + 1
        momentum = 1 / tracked if self.momentum is None else self.momentum

        def fold(old, value):
            return ((1 - momentum) * old.astype("f8") + momentum * value).astype("<f4")
        self.state |= {"running_mean": fold(self.state["running_mean"], mean),
                       "running_var": fold(self.state["running_var"], var * count / (count - 1)),
                       "num_batches_tracked": tracked}
        return {"output": output, "num_batches_tracked": tracked, "statistics": due}


def difference(answer, due):
    """What of an answer is not as due: names and values, or nothing.

    State is due bit for bit, an output (computed in float32) and a batch's statistics within their
    roundings. What the answer does not tell is not compared.
    """
    wrong = []
    for name in due.keys() & answer.keys():
        got, want = answer[name], due[name]
        if name == "statistics":
            wrong += [f"{key} of the batch is {got[key]}, due {want[key]}" for key in want
                      if not numpy.allclose(got[key], want[key], rtol=1e-12, atol=1e-12)]
        elif name == "output":
            off = float(abs(got.astype("f8") - want).max())
            if not off <= 1e-5 * max(1.0, float(abs(want).max())):
                wrong.append(f"output is off by {off:.3g}")
        elif numpy.asarray(got).tobytes() != numpy.asarray(want).tobytes():
            wrong.append(f"{name} is {got}, due {want}")
    return "; ".join(sorted(wrong))
