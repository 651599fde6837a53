"""What a training step costs in time under each policy, by discrete-event simulation."""
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .batch import ITEM_COLUMNS, amount, checked_memory
from .cost import BatchCost, Cluster, SequenceCost
from .policies import POLICIES, Placer, squares_of
from .sequences import _integer
from .step_graph import Options, account, build_step, measure_traffic, parameter_seconds
from .tables import (format_bytes, format_count, format_percent, format_seconds, html_table,
                     text_table)


@dataclass
class PolicyResult:
    """What one policy makes of the batches.

    Attributes
    ----------
    name, title : str
        Key in :data:`orchvlm.policies.POLICIES`, and words for tables.
    step_s : float64[b]
        Simulated seconds of each batch's step.
    mfu : float or None
        Useful FLOPs / (N * peak * time); None without ``flops``.
    idle : dict
        Phase or exchange -> share of all rank-seconds spent waiting behind it: for other ranks,
        for parameters, or, behind the last one, for what runs beside the step.
    busy : dict
        Phase or exchange -> share of all rank-seconds spent in it.  busy and idle sum to 1.
    inter_bytes, intra_bytes : float
        Bytes per step between and inside nodes: raw data, encoder outputs, and their gradients.
    timeline : list of (phase, kind, start float64[N], end float64[N])
        Stages of the first batch, seconds, for plots.
    """

    name: str
    title: str
    step_s: np.ndarray
    mfu: float
    idle: dict
    busy: dict
    inter_bytes: float
    intra_bytes: float
    timeline: list

    @property
    def exposed(self):
        """float : share of rank-seconds in exposed exchanges, waiting for them included."""
        return sum(v for k, v in [*self.busy.items(), *self.idle.items()] if _is_exchange(k))


def _is_exchange(name):
    return "->" in name or name.startswith("raw ")


class Simulation:
    """Policies side by side on the same batches; made by :func:`simulate`.

    Attributes
    ----------
    results : dict
        Policy name -> :class:`PolicyResult`, in the order asked for.
    cluster : Cluster
        The machine.
    phases : list of str
        Compute phases, "llm" last.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> orchvlm.simulate(np.array([5, 1, 1, 1]), orchvlm.Cluster.preset("h100", nodes=1,
    ...     gpus_per_node=2), {"llm": orchvlm.BatchCost(linear=1.0)},
    ...     policies=("sampled", "detour"))
    1 step on 2 GPUs in 1 node, simulated
    policy                       step  throughput  idle llm  exposed  between nodes
    ---------------------------  ----  ----------  --------  -------  -------------
    as sampled                    6 s       1.00x    33.3 %    0.0 %            0 B
    post-balanced, not composed   5 s       1.20x    20.0 %    0.0 %            0 B
    """

    def __init__(self, cluster, phases, results):
        self.cluster, self.phases, self.results = cluster, phases, results

    def __getitem__(self, name):
        """The :class:`PolicyResult` of one policy."""
        if name not in self.results:
            raise KeyError(f"{name!r} was not simulated; there are: {', '.join(self.results)}")
        return self.results[name]

    def speedup(self, name, over=None):
        """Throughput of a policy relative to another one on the same batches.

        Parameters
        ----------
        name : str
            The policy.
        over : str, optional
            The other one; the first that was simulated by default.

        Returns
        -------
        float
            Total time of ``over`` / total time of ``name``; 1 when there was nothing to do.

        Raises
        ------
        KeyError
            A policy that was not simulated.

        Examples
        --------
        >>> import numpy as np, orchvlm
        >>> s = orchvlm.simulate(np.array([5, 1, 1, 1]), orchvlm.Cluster.preset("h100", nodes=1,
        ...     gpus_per_node=2), {"llm": orchvlm.BatchCost(linear=1.0)},
        ...     policies=("sampled", "detour"))
        >>> s.speedup("detour")
        1.2
        """
        over = next(iter(self.results)) if over is None else over
        time_s = self[name].step_s.sum()
        return float(self[over].step_s.sum() / time_s) if time_s > 0 else 1.0

    def _table(self):
        phases = [p for p in self.phases if any(p in r.idle for r in self.results.values())]
        header = ["policy", "step", "MFU", "throughput", *(f"idle {p}" for p in phases),
                  "exposed", "between nodes"]
        rows = [[r.title, format_seconds(r.step_s.mean()), format_percent(r.mfu),
                 f"{self.speedup(name):.2f}x",
                 *(format_percent(r.idle.get(p, 0.0)) for p in phases),
                 format_percent(r.exposed), format_bytes(r.inter_bytes)]
                for name, r in self.results.items()]
        if all(r.mfu is None for r in self.results.values()):
            header.pop(2)
            rows = [row[:2] + row[3:] for row in rows]
        batches = len(next(iter(self.results.values())).step_s)
        title = (f"{format_count(batches, 'step')} on "
                 f"{format_count(self.cluster.n_gpus, 'GPU')} in "
                 f"{format_count(self.cluster.nodes, 'node')}, simulated")
        return header, rows, title

    def __repr__(self):
        return text_table(*self._table())

    def _repr_html_(self):
        return html_table(*self._table())

    def as_dict(self):
        """Everything but the timelines, as plain numbers, strings and lists (for JSON).

        Returns
        -------
        dict
            ``{"n_gpus", "nodes", "policies": {name: {...}}}``; times in seconds.

        Examples
        --------
        >>> import numpy as np, orchvlm
        >>> s = orchvlm.simulate(np.array([2, 1]), orchvlm.Cluster.preset("h100", nodes=1,
        ...     gpus_per_node=2), {"llm": orchvlm.BatchCost(linear=1.0)}, policies=("sampled",))
        >>> s.as_dict()["policies"]["sampled"]["step_s"]
        [2.0]
        """
        return {"n_gpus": self.cluster.n_gpus, "nodes": self.cluster.nodes, "policies": {
            name: {"title": r.title, "step_s": r.step_s.tolist(), "mfu": r.mfu,
                   "speedup": self.speedup(name), "idle": r.idle, "busy": r.busy,
                   "inter_bytes": r.inter_bytes, "intra_bytes": r.intra_bytes}
            for name, r in self.results.items()}}

    def plot(self, path=None):
        """Where the time goes under each policy, as stacked bars.

        Parameters
        ----------
        path : str or Path, optional
            PNG to write; without it the figure is returned for a notebook.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            matplotlib is not installed; the message says how to.

        Examples
        --------
        >>> import numpy as np, orchvlm
        >>> s = orchvlm.simulate(np.array([2, 1]), orchvlm.Cluster.preset("h100", nodes=1,
        ...     gpus_per_node=2), {"llm": orchvlm.BatchCost(linear=1.0)}, policies=("sampled",))
        >>> s.plot().axes[0].get_xlabel()
        'seconds per step'
        """
        from .plots import plot_simulation
        return plot_simulation(self, path)


def _useful_flops(batch, flops):
    """FLOPs of a batch, whatever the policy: per patch, frame and token, true lengths."""
    total = 0.0
    tokens = batch.language_lengths.astype(float)
    for phase, cost in flops.items():
        if phase == "llm":
            length, squares = tokens, tokens**2
        else:
            items = batch.phases[phase]
            length, squares = np.asarray(items.length, float), squares_of(items)
        total += (cost.linear * length.sum() + cost.quadratic * squares.sum()
                  + cost.per_item * len(length))
    return total


def _simulate_policy(name, placers, cluster, options, flops, report):
    """One policy on all batches."""
    times, busy, idle = [], {}, {}
    intra = inter = useful = 0.0
    timeline = None
    for placer in placers:
        report(POLICIES[name].title)
        placement = placer.place(POLICIES[name])
        exposed = [e for side in (placement.before, placement.after)
                   for group in side.values() for e in group]
        traffic = {id(e): measure_traffic(e, cluster) for e in (*placement.ahead, *exposed)}
        step = build_step(placement, traffic, cluster, options)
        answer = step.finish([traffic[id(e)] for e in placement.ahead], options.planning_s)
        times.append(answer[4])
        for total, part in zip((busy, idle), account(step, answer, answer[4])):
            for phase, value in part.items():
                total[phase] = total.get(phase, 0.0) + value
        back = [e for group in placement.after.values() for e in group]
        for e in (*placement.ahead, *exposed, *back):  # outputs return as gradients
            intra += traffic[id(e)].intra_bytes
            inter += traffic[id(e)].inter_bytes
        useful += _useful_flops(placer.batch, flops) if flops else 0.0
        if timeline is None:
            timeline = [(p, k, answer[0][ids], answer[1][ids]) for p, k, ids in step.stages]
    total = cluster.n_gpus * sum(times)
    return PolicyResult(
        name, POLICIES[name].title, np.array(times),
        useful / (cluster.peak_flops * total) if flops and total > 0 else None,
        *({k: v / total if total > 0 else 0.0 for k, v in part.items()} for part in (idle, busy)),
        inter / len(times), intra / len(times), timeline)


def _as_batches(batches, n_ranks):
    """A list of batches; plain lengths become text samples dealt out in turn."""
    from ._numbers import refuse_masked
    from .batch import Batch
    if not isinstance(batches, (list, tuple)):
        batches = [batches]
    if len(batches) == 0:
        raise ValueError("batches must hold at least one batch")
    made = []
    for i, batch in enumerate(batches):
        if not isinstance(batch, Batch):
            lengths = np.asarray(refuse_masked(batch, f"batches[{i}]"))
            if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
                raise TypeError(f"batches[{i}] must be a Batch or a one-dimensional array of "
                                f"integers; got {type(batch).__name__} of dtype {lengths.dtype}")
            batch = Batch(text_tokens=lengths, target_tokens=lengths,
                          source_rank=np.arange(len(lengths)) % n_ranks, phases={})
        made.append(batch)
    return made


def _check_range(name, values, high):
    """Every value lies in [0, high), and sums are exact in doubles."""
    if len(values) and not 0 <= values.min() <= values.max() < high:
        raise ValueError(f"{name} must be in [0, {high}); got {int(values.min())} to "
                         f"{int(values.max())}")
    if values.sum(dtype=float) >= 2.0**53:
        raise ValueError(f"{name} must sum to less than 2^53")


def _check_batch(name, batch, n_ranks):
    """What the policies rely on that a :class:`Batch` alone does not promise."""
    _check_range(f"{name}.source_rank", batch.source_rank, n_ranks)
    _check_range(f"{name}.text_tokens", batch.text_tokens, 2**53)
    for phase, items in batch.phases.items():
        for column in ITEM_COLUMNS:
            _check_range(f"{name}.phases[{phase!r}].{column}", getattr(items, column),
                         len(batch) if column == "sample" else 2**53)


def _check_figures(phases, parameters, flops):
    """The parameters of each phase as floats."""
    for name, given in (("parameters", parameters), ("flops", flops)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"{name} must map phases to figures; got {type(given).__name__}")
        unknown = sorted(set(given or ()) - set(phases), key=str)
        if unknown:
            raise ValueError(f"{name} names unknown phases {unknown}; there are {phases}")
    for phase, cost in (flops or {}).items():
        if not isinstance(cost, BatchCost):
            raise TypeError(f"flops[{phase!r}] must be a BatchCost; got {type(cost).__name__}")
    return {phase: amount(count, f"parameters[{phase!r}]")
            for phase, count in (parameters or {}).items()}


def _check_costs(batches, costs, policies):
    phases = [*batches[0].phases, "llm"]
    for i, batch in enumerate(batches):
        if [*batch.phases, "llm"] != phases:
            raise ValueError(f"batches[{i}] has phases {list(batch.phases)}; the first batch has "
                             f"{phases[:-1]}")
    for phase in phases:
        if phase not in costs:
            raise ValueError(f"costs has no entry for phase {phase!r}")
    unknown = sorted(set(costs) - set(phases), key=str)
    if unknown:
        raise ValueError(f"costs names unknown phases {unknown}; there are {phases}")
    if not policies:
        raise ValueError("policies must name at least one")
    for name in policies:
        if name not in POLICIES:
            raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
        kinds = SequenceCost if name.startswith("sp_") else (BatchCost, SequenceCost)
        if not isinstance(costs["llm"], kinds):
            raise TypeError(f"policy {name!r} needs costs['llm'] to be a SequenceCost"
                            f"{' or BatchCost' * (kinds is not SequenceCost)}; got "
                            f"{type(costs['llm']).__name__}")
    for phase in phases[:-1]:
        if not isinstance(costs[phase], BatchCost):
            raise TypeError(f"costs[{phase!r}] must be a BatchCost; got "
                            f"{type(costs[phase]).__name__}")
    return phases


def default_policies(phases, llm_cost):
    """Names of the policies that make sense for these phases and this language cost.

    Parameters
    ----------
    phases : list of str
        Phases, "llm" included.
    llm_cost : BatchCost or SequenceCost
        What the language phase costs.

    Returns
    -------
    tuple of str
        The sequence-parallel policies for a :class:`SequenceCost`, else the others; those that
        only differ in the encoders are left out when there is none.

    Examples
    --------
    >>> import orchvlm
    >>> from orchvlm.simulator import default_policies
    >>> default_policies(["llm"], orchvlm.SequenceCost(0.0, 1.0))
    ('sp_run', 'sp_static', 'sp_homogeneous', 'sp_chunked', 'sp_flex')
    """
    if not isinstance(llm_cost, BatchCost):
        return tuple(name for name in POLICIES if name.startswith("sp_"))
    per_rank = tuple(name for name in POLICIES if not name.startswith("sp_"))
    if phases == ["llm"]:
        return tuple(name for name in per_rank if name in ("sampled", "prebalanced", "orchvlm"))
    return per_rank


def simulate(batches, cluster, costs, *, policies=None, flops=None, memory=None, parameters=None,
             context=None, backward=2.0, sharded=True, planning_s=0.0, work_limit=200_000,
             time_limit=None, seed=0, progress=None):
    """Simulates training steps under several policies on the same batches.

    A step encodes every phase's items, exchanges what must move, runs the language micro-batches
    forward and backward, and goes back through the encoders; the engine answers when each rank
    starts and ends each of these tasks.  With C(r, p) the cost of phase p's work on rank r,

        step time  >=  sum over phases and micro-batches of max over r of C(r, p)   (sharded),

    with equality when nothing is exposed between phases.

    Parameters
    ----------
    batches : Batch, int64[n], or a list of them
        Global batches; plain lengths are text samples, dealt out to the ranks in turn.
    cluster : Cluster
        The machine; N = cluster.n_gpus ranks.
    costs : dict
        Phase -> :class:`BatchCost` in seconds, forward plus backward; "llm" may be a
        :class:`SequenceCost` and must be for the policies "sp_...".
    policies : sequence of str, optional
        Keys of :data:`orchvlm.policies.POLICIES`, the baseline first; by default all that suit
        the costs.
    flops : dict, optional
        Phase -> :class:`BatchCost` in FLOPs: useful work, for model FLOPs utilisation.
        Recomputation does not belong there.
    memory : dict, optional
        Phase -> (bytes per token, fixed bytes), as for :func:`orchvlm.plan_step`; what does not fit
        into a GPU at a time is split into micro-batches, equally many on all ranks.
    parameters : dict, optional
        Phase -> parameter count; adds gathering and reduction in bf16, beside the compute.
    context : int, optional
        Longest sample, in tokens, that the run may bring: decides the degree of "sp_run".  By
        default the longest of the batches.
    backward : float
        Backward time / forward time; 3 with full recomputation.
    sharded : bool
        Parameters are sharded over all ranks (FSDP, ZeRO-3): every phase and micro-batch ends
        for all ranks at once.  False: replicated, ranks meet only in exchanges and at the end.
    planning_s : float
        Host seconds to plan the next step, hidden behind this one as far as they fit.
    work_limit : int, optional
        Search steps of each planner that a policy calls.
    time_limit : float, optional
        Seconds for each of these planners; makes results depend on the machine.
    seed : int
        Of their searches.
    progress : callable, optional
        Called with a line of text before each policy and batch.

    Returns
    -------
    Simulation

    Raises
    ------
    TypeError
        A batch, cost or policy of the wrong kind.
    ValueError
        An unknown phase or policy, a missing cost, a negative figure, a rank outside of the
        cluster, a sample outside of the batch, a column that sums to 2^53 or more, or an item that
        no GPU can hold.

    Notes
    -----
    Planning and the exchange of raw data belong to the next step and are hidden (1.5 of the
    reference's orchestrator), except under "veomni", whose released code exchanges pixels inside
    the step.  Encoder outputs and their gradients are exposed.  Compute is taken to run at the
    cost's speed whatever the shapes; parameter traffic overlaps the stage it belongs to perfectly.
    O(stages * N log) time; deterministic without ``time_limit``.

    References
    ----------
    OrchMLLM (arXiv 2503.23830), sections 4 and 6; FlexSP (arXiv 2412.01523), section 6;
    Seed1.5-VL (arXiv 2505.07062), section 5.1.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> cluster = orchvlm.Cluster.preset("h100", nodes=1, gpus_per_node=2)
    >>> s = orchvlm.simulate(np.array([5, 1, 1, 1]), cluster,
    ...                      {"llm": orchvlm.BatchCost(linear=1.0)},
    ...                      policies=("sampled", "detour"))
    >>> s["sampled"].step_s, s["detour"].step_s
    (array([6.]), array([5.]))
    """
    if not isinstance(cluster, Cluster):
        raise TypeError(f"cluster must be a Cluster; got {type(cluster).__name__}")
    if not isinstance(costs, Mapping):
        raise TypeError(f"costs must map phases to costs; got {type(costs).__name__}")
    batches = _as_batches(batches, cluster.n_gpus)
    policies = tuple(default_policies([*batches[0].phases, "llm"], costs.get("llm"))
                     if policies is None else policies)
    phases = _check_costs(batches, costs, policies)
    parameters = _check_figures(phases, parameters, flops)
    backward, planning_s = amount(backward, "backward"), amount(planning_s, "planning_s")
    for i, batch in enumerate(batches):
        _check_batch(f"batches[{i}]", batch, cluster.n_gpus)
    options = Options(backward, bool(sharded), parameter_seconds(parameters, cluster), planning_s)
    longest = max(int(batch.language_lengths.max(initial=1)) for batch in batches)
    if context is not None:
        context = _integer(context, "context")
        if context < longest:
            raise ValueError(f"context = {context} is shorter than the longest sample, {longest} "
                             "tokens")
        longest = context
    memory = checked_memory(memory, phases)
    placers = [Placer(batch, cluster, costs, memory, longest, seed, work_limit, time_limit)
               for batch in batches]
    report = progress if progress is not None else (lambda line: None)
    return Simulation(cluster, phases, {
        name: _simulate_policy(name, placers, cluster, options, flops, report)
        for name in policies})
