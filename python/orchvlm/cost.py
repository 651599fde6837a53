"""What work costs: per rank (:class:`BatchCost`), per sequence-parallel group
(:class:`SequenceCost`), and the machine it runs on (:class:`Cluster`)."""
import math
import operator
from dataclasses import dataclass, field

import numpy as np

from . import _core
from ._numbers import real

#: Degrees that one SequenceCost can hold, as in csrc/plan/sp_model.h.
_MAX_DEGREES = 64


def _coefficient(owner, name, value, least=0.0, infinite=False):
    value = real(value, f"{owner}.{name}")
    if math.isnan(value) or value < least or math.isinf(value) and not infinite:
        kind = ">= 0" if infinite else "finite and >= 0"
        raise ValueError(f"{owner}.{name} must be {kind}; got {value}")
    return value


def _count(owner, name, value, least=1, most=2**31 - 1):
    if isinstance(value, bool):
        raise TypeError(f"{owner}.{name} must be an integer; got bool")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{owner}.{name} must be an integer; got {type(value).__name__}") from None
    if not least <= value <= most:
        raise ValueError(f"{owner}.{name} must be in [{least}, {most}]; got {value}")
    return value


@dataclass(frozen=True)
class BatchCost:
    """Cost of a set of items S with lengths l on one rank.

    ::

        f(S) = fixed + per_item*n + linear*sum(l) + quadratic*sum(q)
             + padded_linear*n*max(l) + padded_quadratic*n*max(l)^2,        f(nothing) = 0

    q is l^2, or each item's sum of true segment lengths squared where ``squares`` is given to the
    call that uses the cost (a video attends per frame).  The unit is the caller's: seconds, FLOPs,
    tokens.  Which coefficients to set:

    ==========================================  =================================================
    the phase                                   coefficients
    ==========================================  =================================================
    packed, attention negligible                linear
    packed, with attention                      linear, quadratic
    padded to the longest of the batch          padded_linear, padded_quadratic
    convolution on padded input frames, then    padded_linear = conv, linear = r*mlp,
    a packed transformer; l in input frames,    quadratic = r^2*attention
    r = output length / input length
    fixed windows (30 s of audio each)          per_item
    ==========================================  =================================================

    Parameters
    ----------
    linear : float
        Per token of the items.
    quadratic : float
        Per squared token of each item (or segment).
    padded_linear : float
        Per token after padding each item to the longest.
    padded_quadratic : float
        Per squared token after padding each item to the longest.
    per_item : float
        Per item.
    fixed : float
        Per non-empty set.

    Raises
    ------
    TypeError
        A coefficient that is not a number.
    ValueError
        A coefficient that is negative, NaN or infinite.

    References
    ----------
    OrchMLLM, arXiv 2503.23830, section 5: the cost forms of packed, padded and convolutional
    phases.

    Examples
    --------
    >>> import orchvlm
    >>> cost = orchvlm.BatchCost(linear=2.0, quadratic=0.5, fixed=1.0)
    >>> cost([3, 4])                                # 1 + 2*7 + 0.5*(9 + 16)
    27.5
    >>> cost([3, 4], squares=[5.0, 8.0])            # segments 1 + 2 and 2 + 2
    21.5
    >>> cost([])
    0.0
    """

    linear: float = 0.0
    quadratic: float = 0.0
    padded_linear: float = 0.0
    padded_quadratic: float = 0.0
    per_item: float = 0.0
    fixed: float = 0.0

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, _coefficient("BatchCost", name, getattr(self, name)))

    def __call__(self, lengths, squares=None):
        """f of one set of items.

        Parameters
        ----------
        lengths : int64[n]
            Lengths of the items, >= 0.
        squares : float64[n], optional
            Each item's sum of true segment lengths squared; by default ``lengths**2``.

        Returns
        -------
        float
            f(S), in the unit of the coefficients.

        Raises
        ------
        TypeError
            ``lengths`` that are not integers, ``squares`` that are not numbers.
        ValueError
            A negative length, a negative or non-finite square, or arrays of different sizes.

        Examples
        --------
        >>> import orchvlm
        >>> orchvlm.BatchCost(padded_linear=1.0)([10, 2])
        20.0
        """
        return _core.batch_cost_load(self._astuple(), lengths, squares)

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


_FLEXSP_DOC = """FlexSP's published constants of GPT-{name} on A100-40GB.

        {layers} layers of width {hidden:,} with 64 heads, 192K positions; nodes of 8 GPUs;
        activations partly recomputed, as in the paper.  Model states (16 bytes per parameter) are
        spread over all GPUs and 28 GiB of each GPU are usable.

        Parameters
        ----------
        n_gpus : int
            GPUs N in all; degrees above N are left out.

        Returns
        -------
        SequenceCost
            Degrees 1, 2, 4, ..., min(64, N).

        Raises
        ------
        TypeError
            ``n_gpus`` that is not an integer.
        ValueError
            ``n_gpus`` below 1.

        References
        ----------
        FlexSP, arXiv 2412.01523, and the constants of its released code (64 A100, 8 per node).

        Examples
        --------
        >>> import orchvlm
        >>> list(orchvlm.SequenceCost.flexsp_gpt{size}(n_gpus=8).comm)
        [1, 2, 4, 8]
        """


def _flexsp_constructor(size):
    """A class method of SequenceCost for a size that FlexSP measured."""
    def constructor(cls, n_gpus=64):
        return cls._flexsp(size, n_gpus)

    layers, hidden = _FLEXSP[size][:2]
    constructor.__name__ = f"flexsp_gpt{size}"
    constructor.__qualname__ = f"SequenceCost.{constructor.__name__}"
    constructor.__doc__ = _FLEXSP_DOC.format(name=size.upper(), size=size, layers=layers,
                                             hidden=hidden)
    return classmethod(constructor)


@dataclass(frozen=True)
class SequenceCost:
    """Cost of a set of sequences S on a sequence-parallel group of d GPUs, in seconds.

    ::

        T(S, d) = fixed + sum over s in S of (quadratic*s^2 + (linear + comm[d])*s)/d

    forward plus backward, and per GPU, in bytes,

    ::

        memory_fixed + memory_per_token*sum(s)/d <= memory_limit

    With ``heads`` = H the attention term is divided by H/ceil(H/d) in place of d: a GPU works on
    whole heads.  With ``ring``, degrees above H are c = d/h rows of h GPUs, h the largest divisor
    of d up to H, which pass keys and values around; of a sequence that lies across all rows the
    last row has the most, and sets the time::

        quadratic*s^2 * ceil(H/h)/H * (2c - 1)/c^2 + (linear + comm[d] + ring*(c - 1))*s/d

    Where rows hold whole sequences it is less.

    Parameters
    ----------
    quadratic : float
        GPU-seconds per squared token (attention).
    linear : float
        GPU-seconds per token (everything else that is computed).
    fixed : float
        Seconds per non-empty micro-batch (launches, gathering of weights).
    comm : dict of int to float
        GPU-seconds per token that the all-to-alls cost at each permitted degree.  Only the degrees
        named here are used; at most 64.
    memory_per_token : float
        Bytes of activations per token.
    memory_fixed : float
        Bytes per GPU of weights, gradients and optimizer state.
    memory_limit : float
        Bytes per GPU that may be used; infinite for no limit.
    heads : int
        Attention heads H; degrees above H are refused without ``ring``.  0: attention divides
        evenly.
    ring : float, optional
        GPU-seconds per token that its keys and values cost to one more row, forward and backward.

    Raises
    ------
    TypeError
        A coefficient that is not a number, a degree that is not an integer, a ``comm`` that is no
        mapping.
    ValueError
        A coefficient that is negative, NaN or infinite; no degree, more than 64 of them, one below
        1 or, without ``ring``, above ``heads``; more than 2^20 heads with ``ring``.

    References
    ----------
    FlexSP, arXiv 2412.01523, section 4.1: cost model of memory, computation and communication.
    Ring Attention, arXiv 2310.01889.

    Examples
    --------
    >>> import orchvlm
    >>> cost = orchvlm.SequenceCost(quadratic=1e-9, linear=1e-4, comm={1: 0.0, 8: 2e-5})
    >>> round(cost([1000, 3000], degree=8), 6)
    0.06125
    >>> rings = orchvlm.SequenceCost(1e-9, 1e-4, comm={8: 2e-5}, heads=4, ring=1e-6)
    >>> round(rings([1000, 3000], degree=8), 6)  # two rows of four
    0.062375
    """

    quadratic: float
    linear: float
    fixed: float = 0.0
    comm: dict = field(default_factory=lambda: {1: 0.0})
    memory_per_token: float = 0.0
    memory_fixed: float = 0.0
    memory_limit: float = math.inf
    heads: int = 0
    ring: float = None

    def __post_init__(self):
        if self.ring is not None:
            self._set("ring", _coefficient("SequenceCost", "ring", self.ring))
        for name in ("quadratic", "linear", "fixed", "memory_per_token", "memory_fixed"):
            self._set(name, _coefficient("SequenceCost", name, getattr(self, name)))
        self._set("memory_limit", _coefficient("SequenceCost", "memory_limit", self.memory_limit,
                                               infinite=True))
        self._set("heads", _count("SequenceCost", "heads", self.heads, least=0))
        if self.ring is not None and self.heads > 2**20:
            raise ValueError(f"SequenceCost.heads must be at most 2^20 with ring; got {self.heads}")
        if not hasattr(self.comm, "items"):
            raise TypeError("SequenceCost.comm must map degrees to GPU-seconds per token; got "
                            + type(self.comm).__name__)
        comm = {}
        for degree, value in self.comm.items():
            degree = _count("SequenceCost", "comm degree", degree)
            if self.heads and degree > self.heads and self.ring is None:
                raise ValueError(f"SequenceCost.comm names degree {degree}, above heads = "
                                 f"{self.heads}: a head cannot be split; leave it out, or give "
                                 "ring")
            comm[degree] = _coefficient("SequenceCost", f"comm[{degree}]", value)
        if not 1 <= len(comm) <= _MAX_DEGREES:
            raise ValueError(f"SequenceCost.comm must name 1 to {_MAX_DEGREES} degrees; got "
                             f"{len(comm)}")
        self._set("comm", dict(sorted(comm.items())))

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def __hash__(self):
        return hash((self.quadratic, self.linear, self.fixed, tuple(self.comm.items())))

    def __call__(self, lengths, degree):
        """T of one group, whatever its memory.

        Parameters
        ----------
        lengths : int64[n]
            Lengths of the sequences, >= 0.
        degree : int
            GPUs in the group; one of ``comm``.

        Returns
        -------
        float
            Seconds; 0 for no sequences.

        Raises
        ------
        TypeError
            ``lengths`` or ``degree`` that are not integers.
        ValueError
            A negative length, or a degree that ``comm`` does not name.

        Examples
        --------
        >>> import orchvlm
        >>> orchvlm.SequenceCost(quadratic=0.0, linear=1.0, comm={1: 0.0, 2: 0.5})([6, 4], 2)
        7.5
        """
        return _core.sequence_cost_time(self._astuple(), lengths, degree)

    def _astuple(self):
        """What ``ovlm_arg_sequence_cost`` reads."""
        return (self.quadratic, self.linear, self.fixed, self.memory_per_token, self.memory_fixed,
                self.memory_limit, self.heads, self.ring is not None, self.ring or 0.0,
                np.array(list(self.comm), np.int64),
                np.array(list(self.comm.values()), np.float64))

    @property
    def tokens_per_gpu(self):
        """float : tokens that fit one GPU at degree 1; infinite without a limit, 0 when the model
        alone does not fit.

        Examples
        --------
        >>> import orchvlm
        >>> int(orchvlm.SequenceCost.flexsp_gpt7b(n_gpus=64).tokens_per_gpu)
        5992
        """
        room = self.memory_limit - self.memory_fixed
        if room <= 0:
            return 0.0
        return room / self.memory_per_token if self.memory_per_token > 0 else math.inf

    @classmethod
    def _flexsp(cls, size, n_gpus, positions=196608, vocabulary=50257):
        n_gpus = _count("SequenceCost", "n_gpus", n_gpus)
        layers, hidden, quadratic, linear, fixed, memory = _FLEXSP[size]
        params = 12 * layers * hidden**2 + 2 * vocabulary * hidden + positions * hidden
        all_to_all_mib = 4 * 2 * layers * hidden * 2 / 2**20
        comm = {1: 0.0}
        comm |= {d: 1e-3 * all_to_all_mib / v for d, v in _FLEXSP_BANDWIDTH.items() if d <= n_gpus}
        return cls(quadratic=1e-3 * quadratic, linear=1e-3 * linear, fixed=1e-3 * fixed, comm=comm,
                   memory_per_token=memory * 2**20, memory_fixed=16 * params / n_gpus,
                   memory_limit=28 * 2**30, heads=64)

    flexsp_gpt7b = _flexsp_constructor("7b")
    flexsp_gpt13b = _flexsp_constructor("13b")
    flexsp_gpt30b = _flexsp_constructor("30b")


# name: memory bytes, dense bf16 FLOP/s, bytes/s per GPU and direction inside a node, between nodes.
# All are nominal figures of the manufacturer, none was measured; per GPU, "GB" as 1e9 bytes, which
# errs on the safe side for memory.  Sources:
#   h100       NVIDIA H100 datasheet (SXM: 80 GB, 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both
#              directions together); DGX H100 datasheet (8 x 400 Gb/s ConnectX-7 for 8 GPUs)
#   h200       NVIDIA H200 datasheet (SXM: 141 GB, otherwise as h100)
#   a100_40g   NVIDIA A100 datasheet (SXM: 40 or 80 GB, 312 TFLOP/s dense, NVLink 600 GB/s);
#   a100_80g   DGX A100 datasheet (8 x 200 Gb/s ConnectX-6 for 8 GPUs)
#   h800       no public datasheet: an h100 with NVLink cut to 400 GB/s, as DeepSeek's "Insights
#              into DeepSeek-V3" (arXiv 2505.09343) describes it
#   b200       DGX B200 datasheet (8 GPUs: 1,440 GB, 36 PFLOP/s bf16 with sparsity, NVLink
#              14.4 TB/s; 8 x 400 Gb/s ConnectX-7)
_PRESETS = {
    "h100": (80e9, 989.5e12, 450e9, 50e9),    # 80 GB; 1,979 / 2 TF; 900 / 2 GB/s; 400 Gb/s
    "h200": (141e9, 989.5e12, 450e9, 50e9),   # 141 GB; 1,979 / 2 TF; 900 / 2 GB/s; 400 Gb/s
    "a100_40g": (40e9, 312e12, 300e9, 25e9),  # 40 GB; 312 TF; 600 / 2 GB/s; 200 Gb/s
    "a100_80g": (80e9, 312e12, 300e9, 25e9),  # 80 GB; 312 TF; 600 / 2 GB/s; 200 Gb/s
    "h800": (80e9, 989.5e12, 200e9, 50e9),    # as h100; 400 / 2 GB/s
    "b200": (180e9, 2250e12, 900e9, 50e9),    # 1,440 / 8 GB; 36,000 / 16 TF; 14,400 / 16 GB/s
}


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
        """A cluster of a known GPU, with the nominal figures of its manufacturer's datasheet.

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
        both directions together, and one network adapter per GPU. They are nominal: what a
        program reaches is less, for which :func:`from_model` has ``efficiency``, and :func:`fit`
        measurements.

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
        DGX B200; for the H800, which has none, arXiv 2505.09343.

        Examples
        --------
        >>> import orchvlm
        >>> orchvlm.Cluster.preset("h100", nodes=320).n_gpus
        2560
        """
        if not isinstance(name, str) or name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(_PRESETS)}")
        return cls(nodes, gpus_per_node, *_PRESETS[name])
