"""What work costs: per rank (:class:`BatchCost`), per sequence-parallel group
(:class:`SequenceCost`), and the machine it runs on (:class:`Cluster`)."""
import math
from dataclasses import dataclass, field


def _coefficient(owner, name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) and not hasattr(
            value, "__float__"):
        raise TypeError(f"{owner}.{name} must be a number; got {type(value).__name__}")
    value = float(value)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{owner}.{name} must be finite and >= 0; got {value}")
    return value


@dataclass(frozen=True)
class BatchCost:
    """Cost of a set of items on one rank."""

    linear: float = 0.0
    quadratic: float = 0.0
    padded_linear: float = 0.0
    padded_quadratic: float = 0.0
    per_item: float = 0.0
    fixed: float = 0.0

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, _coefficient("BatchCost", name, getattr(self, name)))

    def _astuple(self):
        return (self.linear, self.quadratic, self.padded_linear, self.padded_quadratic,
                self.per_item, self.fixed)


# GPT sizes of FlexSP's published code: layers, hidden, ms/token^2, ms/token, ms, MiB/token.
_FLEXSP = {
    "7b": (32, 4096, 5.128e-6, 0.18396, 629.4, 4.480),
    "13b": (40, 5120, 9.2852e-6, 0.30602, 1132.6, 4.220),
    "30b": (60, 6656, 15.4262e-6, 0.80357, 2789.4, 3.417),
}
# GB/s of an all-to-all in a group of that degree, as their code divides MiB by it to get ms.
_FLEXSP_BANDWIDTH = {2: 119.5, 4: 104.1, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}


@dataclass(frozen=True)
class SequenceCost:
    """Cost of a set of sequences on a sequence-parallel group."""

    quadratic: float
    linear: float
    fixed: float = 0.0
    comm: dict = field(default_factory=lambda: {1: 0.0})
    memory_per_token: float = 0.0
    memory_fixed: float = 0.0
    memory_limit: float = math.inf
    heads: int = 0

    @classmethod
    def _flexsp(cls, size, n_gpus, positions=196608, vocabulary=50257):
        layers, hidden, quadratic, linear, fixed, memory = _FLEXSP[size]
        params = 12 * layers * hidden**2 + 2 * vocabulary * hidden + positions * hidden
        all_to_all_mib = 4 * 2 * layers * hidden * 2 / 2**20
        comm = {1: 0.0}
        comm |= {d: 1e-3 * all_to_all_mib / v for d, v in _FLEXSP_BANDWIDTH.items() if d <= n_gpus}
        return cls(quadratic=1e-3 * quadratic, linear=1e-3 * linear, fixed=1e-3 * fixed, comm=comm,
                   memory_per_token=memory * 2**20, memory_fixed=16 * params / n_gpus,
                   memory_limit=28 * 2**30, heads=64)

    @classmethod
    def flexsp_gpt7b(cls, n_gpus=64):
        return cls._flexsp("7b", n_gpus)

    @classmethod
    def flexsp_gpt13b(cls, n_gpus=64):
        return cls._flexsp("13b", n_gpus)

    @classmethod
    def flexsp_gpt30b(cls, n_gpus=64):
        return cls._flexsp("30b", n_gpus)
