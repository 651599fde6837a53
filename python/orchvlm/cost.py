"""What work costs: per rank (:class:`BatchCost`), per sequence-parallel group
(:class:`SequenceCost`), and the machine it runs on (:class:`Cluster`)."""
import math
import operator
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


# name: memory bytes, dense bf16 FLOP/s, bytes/s per GPU and direction inside a node, between nodes.
# Sources, all read as per GPU; "GB" as 1e9 bytes, which errs on the safe side for memory:
#   h100       NVIDIA H100 datasheet (SXM: 80 GB, 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both
#              directions together); DGX H100 datasheet (8 x 400 Gb/s ConnectX-7 for 8 GPUs)
#   h200       NVIDIA H200 datasheet (SXM: 141 GB, otherwise as h100)
#   a100_40g   NVIDIA A100 datasheet (SXM: 40 or 80 GB, 312 TFLOP/s dense, NVLink 600 GB/s);
#   a100_80g   DGX A100 datasheet (8 x 200 Gb/s ConnectX-6 for 8 GPUs)
#   h800       no public datasheet: an h100 with NVLink cut to 400 GB/s, as DeepSeek's "Insights into
#              DeepSeek-V3" (arXiv 2505.09343, section 2) describes it
#   b200       DGX B200 datasheet (8 GPUs: 1,440 GB, 36 PFLOP/s bf16 with sparsity, NVLink 14.4 TB/s;
#              8 x 400 Gb/s ConnectX-7)
_PRESETS = {
    "h100": (80e9, 989.5e12, 450e9, 50e9),
    "h200": (141e9, 989.5e12, 450e9, 50e9),
    "a100_40g": (40e9, 312e12, 300e9, 25e9),
    "a100_80g": (80e9, 312e12, 300e9, 25e9),
    "h800": (80e9, 989.5e12, 200e9, 50e9),
    "b200": (180e9, 2250e12, 900e9, 50e9),
}


def _count(owner, name, value, least=1):
    if isinstance(value, bool):
        raise TypeError(f"{owner}.{name} must be an integer; got bool")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{owner}.{name} must be an integer; got {type(value).__name__}") from None
    if not least <= value < 2**31:
        raise ValueError(f"{owner}.{name} must be in [{least}, 2^31); got {value}")
    return value


@dataclass(frozen=True)
class Cluster:
    """The machine: ``nodes`` times ``gpus_per_node`` equal GPUs and two levels of network.

    Parameters
    ----------
    nodes : int
        Number of nodes, >= 1.
    gpus_per_node : int
        GPUs in each node, >= 1.
    memory_bytes : float
        Memory of one GPU, bytes.
    peak_flops : float
        Dense peak of one GPU in the training precision, FLOP/s.
    intra_bandwidth : float
        Bytes/s that one GPU sends (and at the same time receives) inside its node.
    inter_bandwidth : float
        Bytes/s that one GPU sends (and at the same time receives) between nodes.

    Raises
    ------
    TypeError
        A count that is not an integer, or another figure that is not a number.
    ValueError
        A figure that is not positive and finite.

    See Also
    --------
    Cluster.preset : figures from datasheets.

    Examples
    --------
    >>> import orchvlm
    >>> c = orchvlm.Cluster(2, 4, 40e9, 312e12, 300e9, 25e9)
    >>> c.n_gpus
    8
    >>> c.node_of(5)
    1
    """

    nodes: int
    gpus_per_node: int
    memory_bytes: float
    peak_flops: float
    intra_bandwidth: float
    inter_bandwidth: float

    def __post_init__(self):
        for name in ("nodes", "gpus_per_node"):
            object.__setattr__(self, name, _count("Cluster", name, getattr(self, name)))
        for name in ("memory_bytes", "peak_flops", "intra_bandwidth", "inter_bandwidth"):
            value = _coefficient("Cluster", name, getattr(self, name))
            if value == 0:
                raise ValueError(f"Cluster.{name} must be positive; got 0")
            object.__setattr__(self, name, value)
        if self.nodes * self.gpus_per_node >= 2**31:
            raise ValueError(f"Cluster holds {self.nodes} x {self.gpus_per_node} GPUs; "
                             "at most 2^31 - 1 can be planned")

    @property
    def n_gpus(self):
        """int : GPUs in all, N = nodes * gpus_per_node."""
        return self.nodes * self.gpus_per_node

    def node_of(self, rank):
        """Node that holds a rank; ranks are numbered node by node.

        Parameters
        ----------
        rank : int or int64[n]
            Rank or ranks, 0 <= rank < N.

        Returns
        -------
        int or int64[n]
            ``rank // gpus_per_node``.

        Examples
        --------
        >>> import orchvlm
        >>> orchvlm.Cluster.preset("h100", nodes=2).node_of(8)
        1
        """
        return rank // self.gpus_per_node

    @classmethod
    def preset(cls, name, nodes=1, gpus_per_node=8):
        """A cluster of a known GPU, with figures from its vendor's datasheet.

        ========  ======  ============  ==============  ==============
        name      memory  bf16 (dense)  inside a node   between nodes
        ========  ======  ============  ==============  ==============
        h100       80 GB   989.5 TF/s   450 GB/s        50 GB/s
        h200      141 GB   989.5 TF/s   450 GB/s        50 GB/s
        a100_40g   40 GB     312 TF/s   300 GB/s        25 GB/s
        a100_80g   80 GB     312 TF/s   300 GB/s        25 GB/s
        h800       80 GB   989.5 TF/s   200 GB/s        50 GB/s
        b200      180 GB    2250 TF/s   900 GB/s        50 GB/s
        ========  ======  ============  ==============  ==============

        Bandwidths are per GPU and direction: half of the NVLink figure that a datasheet quotes for
        both directions together, and one network adapter per GPU.

        Parameters
        ----------
        name : str
            One of the names above.
        nodes : int
            Number of nodes.
        gpus_per_node : int
            GPUs in each node.

        Returns
        -------
        Cluster
            With those figures; change one with ``dataclasses.replace``.

        Raises
        ------
        ValueError
            An unknown name, or a count below 1.
        TypeError
            A count that is not an integer.

        References
        ----------
        NVIDIA datasheets of H100, H200 and A100 (SXM form) and of DGX H100, DGX A100 and
        DGX B200; for the H800, which has none, arXiv 2505.09343, section 2.

        Examples
        --------
        >>> import orchvlm
        >>> orchvlm.Cluster.preset("h100", nodes=320).n_gpus
        2560
        """
        if not isinstance(name, str) or name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(_PRESETS)}")
        return cls(nodes, gpus_per_node, *_PRESETS[name])
