"""Sequence-parallel groups: which sequences run together, on how many GPUs, and when."""
import html
import math
import operator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from . import _bytes, _core
from .cost import SequenceCost
from .tables import format_count

_KIND = "orchvlm.sequence_plan"
_POLICIES = ("static", "homogeneous", "chunked", "flex")
_STATUS = ("feasible", "optimal")
_MOST_MICRO_BATCHES = 1 << 20
_LARGE_GAP = 0.1  # above what a search that is not cut short leaves at any size in the README
_ARRAYS = ("micro_start", "degree", "first_gpu", "group_start", "item")


def _restrict(cost, degrees, n_gpus):
    """The cost with only the permitted degrees, all at most n_gpus."""
    if not isinstance(cost, SequenceCost):
        raise TypeError(f"cost must be a SequenceCost; got {type(cost).__name__}")
    if degrees is None:
        chosen = sorted(cost.comm)
    else:
        if isinstance(degrees, (str, bytes, dict)) or not hasattr(degrees, "__iter__") or (
                np.ndim(degrees) != 1):
            raise TypeError(f"degrees must be a sequence of integers such as [8, 16]; got "
                            f"{degrees!r:.60}")
        chosen = sorted({_integer(degree, "degrees") for degree in degrees})
        missing = [degree for degree in chosen if degree not in cost.comm]
        if missing:
            raise ValueError(f"degrees: {missing[0]} has no entry in cost.comm, which has "
                             f"{sorted(cost.comm)}; measure it or leave it out")
    fitting = [degree for degree in chosen if degree <= n_gpus]
    if not fitting:
        raise ValueError(f"degrees: none of {chosen} is at most n_gpus = {n_gpus}")
    if fitting == list(cost.comm):
        return cost
    return replace(cost, comm={degree: cost.comm[degree] for degree in fitting})


def _integer(value, name, least=1, most=math.inf):
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got bool")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}") from None
    if value < least:
        raise ValueError(f"{name} must be >= {least}; got {value}")
    if value > most:
        raise ValueError(f"{name} must be <= {most}; got {value}")
    return value


class Group(NamedTuple):
    """Sequences that run together on one block of GPUs.

    Attributes
    ----------
    degree : int
        GPUs d in the group: ``first_gpu`` .. ``first_gpu + degree - 1``.
    first_gpu : int
    items : int64[k]
        Indices of its sequences in packed order: concatenated in this order, the tokens are cut
        into d equal shards.
    tokens : int
        Sum of their lengths.
    time : float
        T(S, d) in seconds.
    """

    degree: int
    first_gpu: int
    items: np.ndarray
    tokens: int
    time: float


class MicroBatch(NamedTuple):
    """Groups that run at the same time.

    Attributes
    ----------
    groups : tuple of Group
        Widest first; empty in an empty micro-batch.
    time : float
        The longest group's time in seconds; 0 when empty.
    """

    groups: tuple
    time: float


class SequencePlan:
    """What :func:`plan_sequences` answers: micro-batches of groups, with a certificate.

    Attributes
    ----------
    time : float
        Seconds of the step: sum over micro-batches of the longest group's T.
    bound : float
        Certified lower bound in seconds on the time of every plan over the permitted degrees.
    status : str
        ``"optimal"`` when time meets bound (to 1e-9), else ``"feasible"``.
    cut_short : bool
        The clock ended a search: another run may answer otherwise, if only with another optimum.
        Then one rank plans and sends ``to_bytes()`` to the others.
    work : int
        Search steps taken.
    policy : str
    lengths : int64[n]
        The sequences it was made for; ``n_gpus``, ``gpus_per_node``, ``cost`` (only the permitted
        degrees) and ``pad_to`` are the other inputs.

    Examples
    --------
    >>> import orchvlm
    >>> cost = orchvlm.SequenceCost(quadratic=0.0, linear=1e-3, comm={1: 0.0, 2: 2e-4},
    ...                             memory_per_token=1.0, memory_limit=1000)
    >>> plan = orchvlm.plan_sequences([1500, 900, 850], 4, cost)
    >>> [(g.degree, g.first_gpu, g.items.tolist()) for g in plan.micro_batches[0].groups]
    [(2, 0, [0]), (1, 2, [1]), (1, 3, [2])]
    >>> round(plan.time, 3)
    0.9
    """

    def __init__(self, problem, policy, fields):
        if not (isinstance(fields, (tuple, list)) and len(fields) == 11 and all(
                isinstance(array, np.ndarray) for array in fields[:6]) and fields[8] in (0, 1)):
            raise TypeError("a SequencePlan comes from plan_sequences or from_bytes")
        (self.lengths, self.n_gpus, self.gpus_per_node, self.cost, self.pad_to,
         self._asked_micro_batches) = problem
        self.policy = policy
        for name, array in zip(_ARRAYS, fields):
            array.flags.writeable = False
            setattr(self, f"_{name}", array)
        self._group_time = fields[5]
        self.time, self.bound, status, self.cut_short, self.work = fields[6:]
        self.status = _STATUS[status]

    @property
    def gap(self):
        """float : time / bound - 1, with ``fixed`` in both; 0 for an empty plan."""
        if self.time <= self.bound:
            return 0.0
        return self.time / self.bound - 1 if self.bound > 0 else float("inf")

    @cached_property
    def micro_batches(self):
        """tuple of MicroBatch : in the order in which they run, the longest first."""
        tokens = np.add.reduceat(np.append(self.lengths[self._item], 0), self._group_start[:-1]) \
            if len(self._degree) else np.zeros(0, np.int64)
        groups = [Group(int(self._degree[g]), int(self._first_gpu[g]),
                        self._item[self._group_start[g]:self._group_start[g + 1]], int(tokens[g]),
                        float(self._group_time[g])) for g in range(len(self._degree))]
        batches = [tuple(groups[a:b]) for a, b in zip(self._micro_start, self._micro_start[1:])]
        return tuple(MicroBatch(b, max((g.time for g in b), default=0.0)) for b in batches)

    @property
    def communicators(self):
        """list of (first_gpu, degree) : the distinct blocks, so that each is created once."""
        return sorted({(int(f), int(d)) for f, d in zip(self._first_gpu, self._degree)})

    def arrays(self):
        """The plan as flat arrays, for an executor.

        Returns
        -------
        dict of str to int64 ndarray
            With M micro-batches and P groups: ``micro_start`` [M+1] (groups of micro-batch m are
            ``micro_start[m]`` .. ``micro_start[m+1]-1``), ``degree`` and ``first_gpu`` [P],
            ``group_start`` [P+1], ``item`` [n] in packed order.  Read-only views.

        Examples
        --------
        >>> import orchvlm
        >>> cost = orchvlm.SequenceCost(quadratic=0.0, linear=1e-3)
        >>> orchvlm.plan_sequences([3, 2], 2, cost).arrays()["group_start"]
        array([0, 1, 2])
        """
        return {name: getattr(self, f"_{name}") for name in _ARRAYS}

    def _problem(self):
        return (self.lengths, self.n_gpus, self.gpus_per_node, self.cost._astuple(), self.pad_to,
                self._asked_micro_batches)

    def _fields(self):
        return (*self.arrays().values(), self._group_time, self.time, self.bound,
                _STATUS.index(self.status), self.cut_short, self.work)

    def check(self):
        """Re-verifies the plan from the inputs alone, sharing nothing with the solver.

        Every sequence is in exactly one group; each group fits its memory; blocks are aligned, lie
        inside a node where they fit, and do not overlap; every time, the sum and bound <= time
        hold.  The bound itself is not proved again: that is :func:`orchvlm.sequence_bound`.

        Raises
        ------
        ValueError
            The first thing that is wrong.

        Notes
        -----
        O(n + P log P).

        Examples
        --------
        >>> import orchvlm
        >>> orchvlm.plan_sequences([3, 2], 2, orchvlm.SequenceCost(0.0, 1e-3)).check()
        """
        _core.sp_check(*self._problem(), self._fields())

    def to_bytes(self):
        """The plan and its inputs as bytes, the same for equal plans.

        Returns
        -------
        bytes
            In the safetensors layout, with a checksum.

        Examples
        --------
        >>> import orchvlm
        >>> plan = orchvlm.plan_sequences([3, 2], 2, orchvlm.SequenceCost(0.0, 1e-3))
        >>> orchvlm.SequencePlan.from_bytes(plan.to_bytes()).digest == plan.digest
        True
        """
        cost = self.cost
        arrays = {**self.arrays(), "group_time": self._group_time, "lengths": self.lengths,
                  "time_bound": np.array([self.time, self.bound]),
                  "cost": np.array([getattr(cost, name) for name in _COST_FIELDS]),
                  "comm_degree": np.array(list(cost.comm), np.int64),
                  "comm": np.array(list(cost.comm.values()), np.float64)}
        header = {"n_gpus": self.n_gpus, "gpus_per_node": self.gpus_per_node,
                  "heads": cost.heads, "pad_to": self.pad_to,
                  "micro_batches": self._asked_micro_batches, "policy": self.policy,
                  "status": self.status, "cut_short": self.cut_short, "work": self.work}
        if cost.ring is not None:
            header["ring"] = cost.ring
        return _bytes.pack(_KIND, arrays, header)

    @classmethod
    def from_bytes(cls, data):
        """A plan from ``to_bytes``; untrusted input, so it is checked from scratch.

        Parameters
        ----------
        data : bytes-like

        Returns
        -------
        SequencePlan

        Raises
        ------
        TypeError
            ``data`` is not bytes-like.
        ValueError
            Not such bytes, cut or changed, or a plan that fails :meth:`check`.

        Examples
        --------
        >>> import orchvlm
        >>> orchvlm.SequencePlan.from_bytes(b"\\0" * 9)
        Traceback (most recent call last):
        ValueError: not valid plan bytes: the header is not JSON
        """
        arrays, header = _bytes.unpack(_KIND, data)
        try:
            plan = cls(*_from_fields(arrays, header))
            plan.check()
        except (KeyError, TypeError, IndexError, OverflowError) as error:
            raise ValueError(f"not valid plan bytes: {error}") from error
        return plan

    @property
    def digest(self):
        """str : SHA-256 of ``to_bytes()`` in hex: equal on two ranks when their plans are equal."""
        return _bytes.digest(self.to_bytes())

    def __eq__(self, other):
        return isinstance(other, SequencePlan) and self.to_bytes() == other.to_bytes()

    __hash__ = None

    def plot(self, path=None):
        """Timeline of the groups: GPUs upwards, micro-batches one after the other.

        Parameters
        ----------
        path : str or Path, optional
            PNG to write.

        Returns
        -------
        matplotlib.figure.Figure
            A notebook shows it.

        Raises
        ------
        ImportError
            matplotlib is not installed; the message says how to.
        """
        from .plots import plot_groups
        return plot_groups(self, self.n_gpus, path)

    def __repr__(self):
        count = len(self._micro_start) - 1
        state = "optimal" if self.status == "optimal" else (
            f"bound {self.bound:.4g} s, gap {100 * self.gap:.2f} %")
        return (f"<SequencePlan: {format_count(len(self.lengths), 'sequence')} on "
                f"{format_count(self.n_gpus, 'GPU')}, {format_count(count, 'micro-batch')}, "
                f"{self.time:.4g} s, {state}{', cut short' * self.cut_short}>")

    @property
    def advice(self):
        """str : what would make a plan with a large gap better; empty where there is nothing to
        say.

        Examples
        --------
        >>> import orchvlm
        >>> orchvlm.plan_sequences([3, 2], 2, orchvlm.SequenceCost(0.0, 1e-3)).advice
        ''
        """
        if not self.cut_short or self.gap <= _LARGE_GAP:
            return ""
        return (f"The time limit ended the search with a gap of {100 * self.gap:.0f} %: a larger "
                "time_limit (--time-limit) would find a better plan or bound.")

    def _repr_html_(self):
        rows = "".join(_html_row(m, batch, self) for m, batch in enumerate(self.micro_batches))
        return (f"<div><b>{html.escape(repr(self)[1:-1])}</b><table><tr><th>micro-batch</th>"
                "<th>time (s)</th><th>tokens</th><th>busy</th><th>groups (degree &times; count)"
                f"</th></tr>{rows}</table>{html.escape(self.advice)}</div>")


_COST_FIELDS = ("quadratic", "linear", "fixed", "memory_per_token", "memory_fixed", "memory_limit")


def _html_row(m, batch, plan):
    degrees, counts = np.unique([g.degree for g in batch.groups], return_counts=True)
    groups = ", ".join(f"{d}&times;{c}" for d, c in zip(degrees[::-1], counts[::-1]))
    work = sum(g.degree * (g.time - plan.cost.fixed) for g in batch.groups)
    span = plan.n_gpus * (batch.time - plan.cost.fixed)
    busy = 100 * work / span if span > 0 else 0.0
    bar = (f"<div style='width:8em;background:#ddd'><div style='width:{busy:.0f}%;"
           f"background:#4a7;white-space:nowrap'>{busy:.0f}&nbsp;%</div></div>")
    tokens = sum(g.tokens for g in batch.groups)
    return (f"<tr><td>{m + 1}</td><td>{batch.time:.4g}</td><td>{tokens:,}</td><td>{bar}</td>"
            f"<td>{groups}</td></tr>")


def _from_fields(arrays, header):
    """(problem, policy, fields) of unpacked bytes; anything missing or odd raises."""
    one = {name: array for name, array in arrays.items() if array.ndim == 1}
    floats = [float(value) for value in one["cost"]]
    comm = dict(zip(one["comm_degree"].tolist(), one["comm"].tolist(), strict=True))
    cost = SequenceCost(**dict(zip(_COST_FIELDS, floats, strict=True)), comm=comm,
                        heads=_integer(header["heads"], "heads", 0), ring=header.get("ring"))
    time, bound = one["time_bound"].tolist()
    if header["policy"] not in _POLICIES or type(header["cut_short"]) is not bool:
        raise ValueError("not valid plan bytes: unknown policy, or cut_short is no bool")
    problem = (one["lengths"], *(_integer(header[name], name) for name in
                                 ("n_gpus", "gpus_per_node")), cost,
               _integer(header["pad_to"], "pad_to"),
               _integer(header["micro_batches"], "micro_batches", 0))
    fields = (*(one[name] for name in (*_ARRAYS, "group_time")), time, bound,
              _STATUS.index(header["status"]), header["cut_short"],
              _integer(header["work"], "work", 0))
    return problem, header["policy"], fields


def plan_sequences(lengths, n_gpus, cost, *, gpus_per_node=8, degrees=None, pad_to=1,
                   micro_batches=None, policy="flex", work_limit=None, time_limit=0.2, seed=0,
                   threads=1, warm_start=None):
    """Plans one step: micro-batches of sequence-parallel groups, and a bound on any plan's time.

    Minimises over the number of micro-batches M, the groups (S, d) of each, and their placement::

        sum over micro-batches of  max over its groups of  T(S, d)
        T(S, d) = fixed + sum_{s in S} (quadratic s^2 + (linear + comm[d]) s) / d

    so that every sequence is in one group, each group fits the memory of its d GPUs, and the
    degrees of a micro-batch sum to at most N.  GPUs may stay idle; ``fixed`` is paid once per
    non-empty micro-batch.

    Parameters
    ----------
    lengths : int64[n]
        Tokens of each sequence, >= 1.  None at all is fine: an empty plan of time 0.
    n_gpus : int
        GPUs N.
    cost : SequenceCost
        Seconds and bytes of a group.
    gpus_per_node : int
        Groups up to this size stay inside a node; larger ones start at one.
    degrees : sequence of int, optional
        Permitted group sizes, any positive integers that ``cost.comm`` names; those above N are
        left out.  Default: all of ``cost.comm``.
    pad_to : int
        Each GPU's shard is padded to a multiple of this many tokens, which counts as memory.
    micro_batches : int, optional
        The plan has exactly this many, at most 2^20; no more of them than pay are used, and the
        last ones are empty.  Default: as many as pay.
    policy : {"flex", "chunked", "homogeneous", "static"}
        ``"static"``: one degree for the whole step, the best one with its best M.
        ``"homogeneous"``: the best degree per micro-batch of sorted chunks, longest first onto the
        least loaded group, for the first feasible M to M + 4 and the best M of each degree.
        ``"chunked"`` (FlexSP): sorted chunks, mixed groups in each, for the first feasible M to
        M + 4.  ``"flex"``: micro-batches and groups chosen together, after all that the others do:
        with the same ``work_limit`` never worse than they.
    work_limit : int, optional
        Search steps; 0: construction only.  The same limit gives the same plan on every machine.
    time_limit : float, optional
        Seconds for plan and bound together; None: none.  Only cuts the search short: the first
        plan is finished whatever it takes, 1.5 s for 50,000 sequences on 64 GPUs.
    seed : int
        Of the search, in [0, 2^64).
    threads : int
        Walks of ``"flex"`` run side by side; does not change the plan under a work limit.
    warm_start : SequencePlan, optional
        The plan of a similar batch: its degrees and times are one more start of ``"flex"``.

    Returns
    -------
    SequencePlan
        Already verified by :meth:`SequencePlan.check`.

    Raises
    ------
    TypeError
        An argument has the wrong type.
    ValueError
        A value is out of range; a degree has no ``comm``; a sequence fits no degree (which, how
        long, what would fit it); ``micro_batches`` is provably too few.
    orchvlm.Error
        Undecided: nothing found within the limit and nothing ruled out.
    KeyboardInterrupt
        Ctrl-C during the search.

    Notes
    -----
    ``"flex"`` starts from sorted chunks and walks over whole steps: it takes sequences out of the
    longest groups of some micro-batches and puts them where they lengthen no micro-batch, several
    walks from different M, the best ones longest.  A step of that costs about 1 us per 100 groups.
    A search is never worse than ``work_limit=0``; of two others, the longer one may by chance be.
    Unless ``cut_short`` is False everywhere, one rank plans and sends the bytes to the others.

    References
    ----------
    FlexSP, arXiv 2412.01523: equations 1 to 4 (cost), 5 to 10 (the problem within a micro-batch),
    23 to 24 (chunks), algorithm 1.

    Examples
    --------
    The longest sequence gets 32 GPUs, shorter ones run beside it on 8 each:

    >>> import orchvlm
    >>> cost = orchvlm.SequenceCost.flexsp_gpt7b(n_gpus=64)
    >>> plan = orchvlm.plan_sequences([100_000, 47_000, 47_000, 47_000, 47_000], 64, cost,
    ...                               degrees=[8, 32], work_limit=2000, time_limit=None)
    >>> [group.degree for group in plan.micro_batches[0].groups]
    [32, 8, 8, 8, 8]
    >>> plan.check()
    """
    n_gpus = _integer(n_gpus, "n_gpus")
    cost = _restrict(cost, degrees, n_gpus)
    if policy not in _POLICIES:
        raise ValueError(f"policy must be one of {', '.join(_POLICIES)}; got {policy!r}")
    if warm_start is not None and not isinstance(warm_start, SequencePlan):
        raise TypeError(f"warm_start must be a SequencePlan; got {type(warm_start).__name__}")
    asked = 0 if micro_batches is None else _integer(micro_batches, "micro_batches",
                                                     most=_MOST_MICRO_BATCHES)
    problem = (n_gpus, _integer(gpus_per_node, "gpus_per_node"))
    pad_to = _integer(pad_to, "pad_to")
    fields = _core.sp_solve(lengths, *problem, cost._astuple(), pad_to, asked,
                            _POLICIES.index(policy), threads, seed, work_limit, time_limit,
                            None if warm_start is None else warm_start._fields())
    kept = np.array(lengths, np.int64)
    kept.flags.writeable = False
    return SequencePlan((kept, *problem, cost, pad_to, asked), policy, fields)


def bucket_lengths(lengths, n_buckets=16):
    """FlexSP's sequence bucketing: few distinct lengths, least padding.

    Sorted ascending, the lengths are cut into consecutive buckets; each length counts as the
    longest of its bucket, and the tokens that this adds are minimal::

        err[k][q] = min over j < k of  err[j][q-1] + sum_{i=j+1..k} (s_k - s_i)

    Parameters
    ----------
    lengths : int64[n]
        Tokens, >= 0.
    n_buckets : int
        Q; with fewer sequences than buckets, every sequence has its own.

    Returns
    -------
    bucket : int64[n]
        Bucket of each sequence, 0 .. min(Q, n) - 1, shorter ones first.
    longest : int64[min(Q, n)]
        Longest length of each bucket.

    Raises
    ------
    TypeError
        Lengths that are no integers.
    ValueError
        A negative length, ``n_buckets`` < 1, or tokens that pass 2^62.

    Notes
    -----
    Exact in O(n Q log n) in place of O(n^2 Q): the best j never falls as k grows.

    References
    ----------
    FlexSP, arXiv 2412.01523, equations 15 and 16.

    Examples
    --------
    >>> import orchvlm
    >>> bucket, longest = orchvlm.bucket_lengths([1, 50, 2, 49, 3], 2)
    >>> bucket.tolist(), longest.tolist()
    ([0, 1, 0, 1, 0], [3, 50])
    """
    return _core.sp_bucket(lengths, _integer(n_buckets, "n_buckets"))


def blast_lengths(lengths, n_micro):
    """FlexSP's sequence blaster: micro-batches of similar lengths and nearly equal tokens.

    Sorted ascending, the lengths are cut into consecutive chunks whose largest sum is minimal::

        DP[k][i] = min over j of  max(DP[j][i-1], sum_{l=j+1..k} s_l)

    Parameters
    ----------
    lengths : int64[n]
        Tokens, >= 0.
    n_micro : int
        M; with fewer sequences than that, each has its own.

    Returns
    -------
    int64[n]
        Micro-batch of each sequence, 0 .. min(M, n) - 1, shorter ones first.

    Raises
    ------
    TypeError
        Lengths that are no integers.
    ValueError
        A negative length, ``n_micro`` < 1, or tokens that pass 2^62.

    Notes
    -----
    Exact in O(n M log n) in place of O(n^2 M): the two terms cross once in j.

    References
    ----------
    FlexSP, arXiv 2412.01523, equations 23 and 24.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.blast_lengths([5, 1, 1, 2, 1], 2).tolist()
    [1, 0, 0, 0, 0]
    """
    return _core.sp_blast(lengths, _integer(n_micro, "n_micro"))[0]
