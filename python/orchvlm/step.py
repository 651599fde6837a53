"""The step plan: who encodes which item, who runs which tokens, and what goes where."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import _bytes, _core
from .batch import Batch, amount, checked_memory
from .cost import BatchCost, Cluster, SequenceCost
from .reports import StepReport, phases_html
from .routes import Route
from .sequences import SequencePlan, _integer, _restrict

_KIND = "orchvlm.step_plan"
_STATUS = ("feasible", "optimal")
_RELABEL = (None, "sum", "minmax")
_LLM = ("balance", "sequence_parallel")


@dataclass(frozen=True, eq=False, repr=False)
class PhasePlan:
    """One balanced phase of a step.

    Attributes
    ----------
    rank : int64[k]
        Rank of each item (of each sample, in the language phase).
    micro_batch : int64[k]
        Its micro-batch, 0 .. ``micro_batches`` - 1.
    micro_batches : int
        M, the same on all ranks; some may be empty on some ranks.
    loads : float64[N]
        Seconds of each rank, summed over its micro-batches.
    time : float
        Sum over micro-batches of the largest load in it.
    bound : float
        Certified lower bound on ``time`` for any assignment into at most ``micro_batches``; without
        padded costs, into any number.
    sampled_time, sampled_imbalance : float
        The largest load, and that over the mean, with every item at its source.
    status : str
        ``"optimal"`` or ``"feasible"``.
    """

    name: str
    rank: np.ndarray
    micro_batch: np.ndarray
    micro_batches: int
    loads: np.ndarray
    time: float
    bound: float
    sampled_time: float
    sampled_imbalance: float
    status: str

    @property
    def gap(self):
        """float : time / bound - 1; 0 for a phase without work."""
        return _gap(self.time, self.bound)

    @property
    def imbalance(self):
        """float : largest load over mean load; 1 for a phase without work."""
        mean = self.loads.mean()
        return float(self.loads.max() / mean) if mean > 0 else 1.0

    def _repr_html_(self):
        return phases_html([(self.name, self)])

    def __repr__(self):
        return (f"<PhasePlan {self.name}: {len(self.rank)} item{'s' * (len(self.rank) != 1)} on "
                f"{len(self.loads)} rank{'s' * (len(self.loads) != 1)}, "
                f"{self.micro_batches} micro-batch{'es' * (self.micro_batches > 1)}, "
                f"{self.time:.4g} s, gap {100 * self.gap:.2g} %>")


def _gap(time, bound):
    if time <= bound:
        return 0.0
    return time / bound - 1 if bound > 0 else math.inf


class Traffic(NamedTuple):
    """What one route costs.

    Attributes
    ----------
    stay_bytes, node_bytes, cross_bytes : float
        Bytes that stay on their rank, move inside their node, and move between nodes.
    worst_bytes : float
        Max over ranks of max(sent, received) between nodes.
    seconds : float
        Of the all-to-all: over ranks, what it sends or receives inside its node at
        ``intra_bandwidth``, or between nodes at ``inter_bandwidth``, whichever takes longest.
    """

    stay_bytes: float
    node_bytes: float
    cross_bytes: float
    worst_bytes: float
    seconds: float


@dataclass(frozen=True)
class Relabelling:
    """How well a phase's mini-batches were named, in bytes between nodes.

    Attributes
    ----------
    before, value : float
        The objective with every mini-batch where balancing left it, and as named.
    bound : float
        Certified lower bound on the objective for any names.
    status : str
        ``"optimal"`` or ``"feasible"``.
    cut_short : bool
    work : int
        Search steps taken.
    """

    before: float
    value: float
    bound: float
    status: str
    cut_short: bool
    work: int

    @property
    def gap(self):
        """float : value / bound - 1."""
        return _gap(self.value, self.bound)


class StepPlan:
    """What :func:`plan_step` answers.

    Attributes
    ----------
    phases : dict of str to PhasePlan
        One per encoder.
    llm : PhasePlan or SequencePlan
        The language phase.
    routes : dict of str to Route
        ``"text"`` and every encoder's name: raw data, from the source rank to where it is used.
        ``"vision->llm"``: encoder outputs to the rank, or shard, of their tokens. With
        ``compose=False`` that starts at the source rank, and ``"vision->source"`` comes before.
    places : dict of str to int64[k]
        For ``"text"`` and ``"vision->llm"``: where each piece's first row stands among all tokens
        of its rank, micro-batch after micro-batch, padding included.
    traffic : dict of str to (Traffic, Traffic)
        Of every route, before and after relabelling.
    relabelling : dict of str to Relabelling
        Of every phase that was named.
    exposed : float
        Seconds of transfers that nothing hides: encoder outputs, and their gradients back.
    time, bound : float
        Seconds: sum of the phases' times, and ``exposed``; sum of the phases' bounds.
    cut_short : bool
        The clock ended a search, so another run may answer otherwise: `time_limit` is shared out,
        and one search may use up its part although the others leave theirs. Unless this is
        False on all ranks, one rank plans and sends ``to_bytes()`` to the others.
    batch, cluster, costs, memory : the inputs

    Examples
    --------
    >>> import orchvlm
    >>> cluster = orchvlm.Cluster(1, 2, 80e9, 1e15, 300e9, 25e9)
    >>> batch = orchvlm.Batch([20, 30, 10], [20, 30, 10], [0, 0, 0])
    >>> step = orchvlm.plan_step(batch, cluster, {"llm": orchvlm.BatchCost(linear=1e-3)})
    >>> step.llm.loads.tolist(), step.check(), list(step.routes)
    ([0.03, 0.03], None, ['text'])
    >>> orchvlm.StepPlan.from_bytes(step.to_bytes()).digest == step.digest
    True
    """

    def __init__(self, problem, options, fields):
        if not (isinstance(problem, tuple) and len(problem) == 4 and isinstance(problem[0], Batch)
                and isinstance(fields, tuple) and len(fields) == 8):
            raise TypeError("a StepPlan comes from plan_step or from_bytes")
        self.batch, self.cluster, self.costs, self.memory = problem
        self._options = options
        shares, sequences, routes, relabelled, self.exposed, self.time, self.bound, \
            self.cut_short = fields
        names = [*self.batch.phases, "llm"]
        plans = {name: PhasePlan(name, *share[:-1], _STATUS[share[-1]])
                 for name, share in zip(names, shares)}
        self._sequence_fields = sequences
        self.llm = plans.pop("llm")
        self.phases = plans
        if sequences is not None:
            cost, pad_to = self.costs["llm"], options["pad_to"]
            self.llm = SequencePlan(
                (self.batch.language_lengths, self.cluster.n_gpus, self.cluster.gpus_per_node,
                 cost, pad_to, 0), "flex", sequences)
        self._set_routes(routes)
        named = names if sequences is None else names[:-1]
        self.relabelling = {} if options["relabel"] is None else {
            name: Relabelling(*one[:3], _STATUS[one[3]], *one[4:])
            for name, one in zip(named, relabelled)}

    def _set_routes(self, parts):
        self.routes, self.places, self.traffic = {}, {}, {}
        names = ["text"]
        for name in self.batch.phases:
            names += [name, f"{name}->source", f"{name}->llm"]
        for name, (fields, place, before, after) in zip(names, parts):
            if name.endswith("->source") and self._options["compose"]:
                continue
            self.routes[name] = Route._of(fields)
            self.traffic[name] = (Traffic(*before), Traffic(*after))
            if place is not None:
                self.places[name] = place

    @property
    def gap(self):
        """float : time / bound - 1; the transfers are in the time only."""
        return _gap(self.time, self.bound)

    def __repr__(self):
        return (f"<StepPlan: {len(self.batch)} samples on {self.cluster.n_gpus} ranks, "
                f"{self.time:.4g} s, of which {self.exposed:.3g} s transfers, gap "
                f"{100 * self.gap:.2g} %{', cut short' * self.cut_short}>")

    def _repr_html_(self):
        return self.report()._repr_html_()

    def plot(self, path=None):
        """Load of every rank and phase, as sampled and as planned; with groups, their timeline.

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
        from .plots import plot_loads, plot_plans
        before, after, bounds = self._loads()
        if isinstance(self.llm, SequencePlan):
            return plot_plans(before, after, bounds, self.llm, self.cluster.n_gpus, path)
        return plot_loads(before, after, path, bounds, "seconds")

    def _loads(self):
        """Seconds by phase and rank: (every item at its source, as planned, bounds)."""
        from .policies import load_per_rank, squares_of
        source = self.batch.source_rank
        work = {name: (items.length, squares_of(items), source[items.sample])
                for name, items in self.batch.phases.items()}
        plans = dict(self.phases)
        if isinstance(self.llm, PhasePlan):
            tokens = self.batch.language_lengths
            work["llm"], plans["llm"] = (tokens, tokens.astype(float)**2, source), self.llm
        before = {name: load_per_rank(self.costs[name], home, length, squares,
                                      self.cluster.n_gpus)
                  for name, (length, squares, home) in work.items()}
        return (before, {name: plan.loads for name, plan in plans.items()},
                {name: plan.bound for name, plan in plans.items()})

    def report(self):
        """Every phase and route, before and after.

        Returns
        -------
        StepReport
            Prints as a table; HTML in a notebook.
        """
        return StepReport.of(self)

    def check(self):
        """Re-verifies everything from the inputs: memory, loads, times, bounds, each row's way.

        Raises
        ------
        ValueError
            The first thing that is wrong.

        Notes
        -----
        Routes, places, traffic and times are built again from the ranks, micro-batches and groups
        and compared with what the plan says; then each piece is checked against the definition of
        its place. O(n + items + k).
        """
        named = [(r.before, r.value, r.bound, r.status == "optimal", r.cut_short, r.work)
                 for r in self.relabelling.values()]
        again = StepPlan._restore(*self._problem(), self._decisions(), self._sequence_fields,
                                  [before for before, _ in self.traffic.values()], named,
                                  self.cut_short)
        for name, route in self.routes.items():
            if route != again.routes[name] or not np.array_equal(
                    self.places.get(name, 0), again.places.get(name, 0)):
                raise ValueError(f"plan: route {name!r} differs from what its ranks imply")
        if not np.allclose(self._seconds(), again._seconds(), rtol=1e-9, atol=0):
            raise ValueError(f"plan: seconds {self._seconds()} differ from what its ranks imply, "
                             f"{again._seconds()}")

    def _seconds(self):
        """Every time and bound, and the traffic."""
        values = [self.time, self.bound, self.exposed, self.llm.time, self.llm.bound]
        for phase in self.phases.values():
            values += [phase.time, phase.bound, phase.sampled_time, *phase.loads]
        for _, after in self.traffic.values():
            values += [after.stay_bytes, after.cross_bytes, after.worst_bytes, after.seconds]
        return values

    def _problem(self):
        return (self.batch, self.cluster, self.costs, self.memory), self._options

    def _decisions(self):
        plans = [*self.phases.values()]
        if self._sequence_fields is None:
            plans.append(self.llm)
            decisions = []
        else:
            empty = np.zeros(0, np.int64)
            decisions = [(empty, empty, 1, 0.0)]
        return (*((p.rank, p.micro_batch, p.micro_batches, p.bound) for p in plans), *decisions)

    @classmethod
    def _restore(cls, problem, options, decisions, groups, before, named, cut_short):
        """The plan that follows from decisions, verified; `before` and `named` are believed."""
        shares, _, routes, _, *sums = _core.step_rebuild(
            _core_problem(problem, options, None), decisions, groups)
        parts, before = [], iter(before)
        for index, (fields, place, _, after) in enumerate(routes):
            is_back = index > 0 and index % 3 == 2
            said = after if is_back and options["compose"] else next(before)
            parts.append((fields, place, said, after))
        return cls(problem, options, (shares, groups, parts, named, *sums[:3], cut_short))

    @property
    def digest(self):
        """str : SHA-256 of :meth:`to_bytes`; equal plans of equal inputs have equal digests."""
        return _bytes.digest(self.to_bytes())

    def __eq__(self, other):
        return isinstance(other, StepPlan) and self.to_bytes() == other.to_bytes()

    __hash__ = None

    def to_bytes(self):
        """The plan and its inputs as bytes, to broadcast or to keep.

        Returns
        -------
        bytes
            In the safetensors layout. Routes are not in it: they follow from the rest.

        Examples
        --------
        >>> import orchvlm
        >>> batch = orchvlm.Batch([20, 30], [20, 30], [0, 0])
        >>> cluster = orchvlm.Cluster(1, 2, 80e9, 1e15, 300e9, 25e9)
        >>> step = orchvlm.plan_step(batch, cluster, {"llm": orchvlm.BatchCost(linear=1e-3)})
        >>> same = orchvlm.StepPlan.from_bytes(step.to_bytes())
        >>> same == step, same.llm.rank.tolist() == step.llm.rank.tolist()
        (True, True)
        """
        from .step_bytes import dump
        return dump(self)

    @classmethod
    def from_bytes(cls, data):
        """The plan that :meth:`to_bytes` wrote, re-verified.

        Parameters
        ----------
        data : bytes-like
            Untrusted.

        Returns
        -------
        StepPlan

        Raises
        ------
        TypeError
            ``data`` is not bytes-like.
        ValueError
            The bytes are damaged, or the plan in them is wrong.
        """
        from .step_bytes import load
        return load(cls, data)


def _checked_costs(costs, batch, llm):
    kind = SequenceCost if llm == "sequence_parallel" else BatchCost
    wanted = {**{name: BatchCost for name in batch.phases}, "llm": kind}
    if not isinstance(costs, dict):
        raise TypeError(f"costs must be a dict; got {type(costs).__name__}")
    for name in costs:
        if name not in wanted:
            raise ValueError(f"costs: there is no phase {name!r}; there are {list(wanted)}")
    for name, kind in wanted.items():
        if name not in costs:
            raise ValueError(f"costs: phase {name!r} has no cost")
        if not isinstance(costs[name], kind):
            raise TypeError(f"costs[{name!r}] must be a {kind.__name__} with llm={llm!r}; got "
                            f"{type(costs[name]).__name__}")
    return {name: costs[name] for name in wanted}


def _checked_memory(memory, batch, llm):
    if isinstance(memory, dict) and "llm" in memory and llm != "balance":
        raise ValueError("memory['llm']: the SequenceCost has the memory of groups; leave it out")
    return checked_memory(memory, [*batch.phases, *["llm"] * (llm == "balance")])


def _core_problem(problem, options, warm_start):
    """The inputs as the tuple that _core takes."""
    batch, cluster, costs, memory = problem
    phases = tuple(items._fields(name, costs[name], memory.get(name, (0.0, 0.0)))
                   for name, items in batch.phases.items())
    if isinstance(costs["llm"], SequenceCost):
        llm = (costs["llm"]._astuple(), options["pad_to"], warm_start)
    else:
        llm = (costs["llm"]._astuple(), memory.get("llm", (0.0, 0.0)))
    slack = -1.0 if options["slack"] is None else options["slack"]
    return (cluster.n_gpus, cluster.gpus_per_node, float(cluster.memory_bytes),
            float(cluster.intra_bandwidth), float(cluster.inter_bandwidth), batch.text_tokens,
            batch.source_rank, batch.text_bytes_per_token, phases, llm,
            _RELABEL.index(options["relabel"]), slack, options["compose"], options["seed"])


def check_choices(llm="balance", relabel="minmax"):
    """Refuses what is no choice of :func:`plan_step`."""
    if llm not in _LLM:
        raise ValueError(f"llm must be one of {', '.join(map(repr, _LLM))}; got {llm!r}")
    if relabel not in _RELABEL:
        raise ValueError(f"relabel must be 'minmax', 'sum' or None; got {relabel!r}")


def plan_step(batch, cluster, costs, *, memory=None, llm="balance", relabel="minmax", slack=0.002,
              compose=True, pad_to=1, work_limit=None, time_limit=0.2, seed=0, warm_start=None):
    """Plans one training step of a multimodal model, and proves how good the plan is.

    Every phase is balanced by itself, after sampling: with f the phase's cost and S_rm the items of
    rank r in micro-batch m, it minimises over all assignments that fit the memory::

        sum over micro-batches m of  max over ranks r of  f(S_rm)

    and among plans within ``slack`` of the best moves few bytes. The mini-batches of a phase are
    then given ranks so that few bytes cross nodes, and everything gets its route.

    Parameters
    ----------
    batch : Batch
        n samples with their items, and the rank that holds each.
    cluster : Cluster
        N ranks, their memory and bandwidths.
    costs : dict of str to BatchCost
        One per phase and one for ``"llm"``, in seconds, forward and backward; a
        :class:`SequenceCost` for ``"llm"`` with ``llm="sequence_parallel"``.
    memory : dict of str to (float, float), optional
        Per phase, and for ``"llm"`` with ``llm="balance"``: (bytes per row of length, fixed bytes)
        that a micro-batch takes of ``cluster.memory_bytes``. A phase without an entry is not
        limited: one micro-batch. Others split into the fewest micro-batches found that fit, the
        same number on all ranks.
    llm : {"balance", "sequence_parallel"}
        Whole samples on ranks, or groups of ranks per micro-batch (:func:`plan_sequences`), which
        splits samples over the shards of a group: d nearly equal parts of the packed axis, cut as
        :meth:`SequenceGroup.cut` says.
    relabel : {"minmax", "sum", None}
        What naming the mini-batches minimises: the largest of any rank's bytes between nodes
        (sent, or received), or all bytes between nodes.
    slack : float or None
        Loads may grow by this share for fewer bytes moved. None: homes are ignored, as in the
        published scheme, and names alone keep bytes inside nodes.
    compose : bool
        Encoder outputs go straight to their tokens' ranks, in one all-to-all per encoder. False:
        by way of their source ranks, in two.
    pad_to : int
        With groups: each shard is padded to a multiple of this many tokens.
    work_limit : int, optional
        Search steps of each search; 0: constructions only. The same limit gives the same plan on
        every machine.
    time_limit : float, optional
        Seconds for the whole call; None: none. Every phase and every naming gets an equal part of
        what is left when its turn comes (groups nine parts). Only cuts searches short:
        constructions, bounds, routes and the step of a search under way are finished whatever they
        take.
    seed : int
        Of the searches.
    warm_start : StepPlan, optional
        The plan of an earlier batch: with groups, its degrees and times are one more start. Never
        more than a start, so any plan will do; a balanced language phase has no use for it.

    Returns
    -------
    StepPlan

    Raises
    ------
    TypeError
        An argument of the wrong type, or a cost of the wrong kind.
    ValueError
        A value out of range; an unknown phase; items that overlap or end outside their sample; an
        item, or with groups a sample, that does not fit (which, how long, what would fit).
    orchvlm.Error
        Undecided: the limit ended the search before anything that fits was found.
    KeyboardInterrupt
        Ctrl-C during the search.

    Notes
    -----
    Rows. At the source, rank r holds its items of a phase in the order of the batch, ``length``
    rows each, and its samples' text. An encoder's rank holds its items by (micro-batch, sample,
    position; items without tokens first), ``length`` rows in and ``out_tokens`` rows out. A rank
    of the language phase receives rows by (micro-batch, packed order of the samples, position);
    ``places`` says where they stand among its tokens. With groups, one image may arrive in pieces
    on several shards.

    Time. ``time`` adds the phases, which follow each other: encoders, then the language phase,
    each with its backward pass; within a phase ranks meet at the end of each micro-batch. To that
    come the exposed transfers: encoder outputs forward, their gradients back. Raw data and text
    travel ahead of time. ``bound`` adds the phases' bounds. It holds for any number of
    micro-batches, but for padded costs in a single one, as more of them would save padding; with
    several, padded costs count as unpadded in it.

    Names. The language phase is named first, with the encoders where balancing put them, then
    each encoder with the language phase fixed; exposed bytes count, raw data decides between
    equals. Only mini-batches of equal shape change places, so loads never change: whole ranks of
    a phase, and groups of one degree in one micro-batch, the latter always by the sum.

    References
    ----------
    OrchMLLM, arXiv 2503.23830: post-balancing per phase, node-wise rearrangement, composition.
    FlexSP, arXiv 2412.01523, for the groups.

    Examples
    --------
    Rank 0 drew a long image and rank 1 a short one and more text:

    >>> import orchvlm
    >>> vision = orchvlm.Items(sample=[0, 0, 1], position=[0, 90, 5], length=[320, 240, 80],
    ...                        out_tokens=[80, 60, 20], bytes=[32000, 24000, 8000],
    ...                        out_bytes_per_token=100)
    >>> batch = orchvlm.Batch(text_tokens=[10, 130], target_tokens=[10, 130], source_rank=[0, 1],
    ...                       phases={"vision": vision})
    >>> cluster = orchvlm.Cluster(1, 2, 80e9, 1e15, 300e9, 25e9)
    >>> step = orchvlm.plan_step(batch, cluster, {"vision": orchvlm.BatchCost(linear=1e-3),
    ...                                           "llm": orchvlm.BatchCost(linear=1e-2)})
    >>> step.phases["vision"].rank.tolist(), step.llm.rank.tolist()
    ([0, 1, 1], [0, 1])
    >>> step.routes["vision->llm"].counts.tolist()
    [[80, 0], [60, 20]]
    >>> step.check()
    """
    for value, kind, name in ((batch, Batch, "batch"), (cluster, Cluster, "cluster")):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
    check_choices(llm, relabel)
    if warm_start is not None and not isinstance(warm_start, StepPlan):
        raise TypeError(f"warm_start must be a StepPlan; got {type(warm_start).__name__}")
    costs = _checked_costs(costs, batch, llm)
    if llm == "sequence_parallel":
        costs["llm"] = _restrict(costs["llm"], None, cluster.n_gpus)
    problem = (batch, cluster, costs, _checked_memory(memory, batch, llm))
    options = {"relabel": relabel, "slack": None if slack is None else amount(slack, "slack"),
               "compose": bool(compose), "pad_to": _integer(pad_to, "pad_to"), "seed": seed}
    start = None if warm_start is None else warm_start._sequence_fields
    fields = _core.step_solve(_core_problem(problem, options, start), work_limit, time_limit)
    return StepPlan(problem, options, fields)
