"""Ways to place one global batch on the ranks, from sampling order to whole plans, side by side.

Each policy answers the same questions: where is every image and sound encoded, where does every
sample's language part run, and which bytes travel for that.  :mod:`orchvlm.simulator` turns the
answers into time.
"""
from dataclasses import dataclass, field

import numpy as np

from . import _core

TEXT_BYTES_PER_TOKEN = 16  # a token and its label, int64 each


@dataclass(frozen=True)
class Policy:
    """One way to place a batch.

    Parameters
    ----------
    title : str
        For tables.
    encoders : {"source", "longest_first", "grouped", "balanced", "home", "planned"}
        Who encodes an item: the rank that sampled it; longest first over all ranks by squared
        length, inside groups of 128 by cost, or over all ranks by cost; the least load that
        moves little; or :func:`orchvlm.plan_step`.
    language : str
        Where a sample's language part runs: "source", "balanced", "planned", "sp_run" (groups of
        one degree, the least that holds the longest sample of the run), or a policy of
        :func:`orchvlm.plan_sequences` behind "sp_".
    outputs : {"stay", "return", "detour", "direct"}
        How encoder outputs travel: not at all; back to the source; back and from there to the
        language rank, two exchanges; or straight there, one exchange.
    raw_exposed : bool
        Raw items are exchanged inside the step, not ahead of it.
    presorted : bool
        The sampler itself deals the samples out by language length.
    relabelled : bool
        Equal mini-batches are renamed so that bytes stay inside nodes.
    """

    title: str
    encoders: str
    language: str
    outputs: str
    raw_exposed: bool = False
    presorted: bool = False
    relabelled: bool = False


#: Every policy, the baseline first.
POLICIES = {
    "sampled": Policy("as sampled", "source", "source", "stay"),
    "prebalanced": Policy("pre-balanced by language length", "source", "source", "stay",
                          presorted=True),
    "veomni": Policy("encoders longest first, return (VeOmni)", "longest_first", "source",
                     "return", raw_exposed=True),
    "seed": Policy("longest first in groups of 128 (Seed1.5-VL)", "grouped", "source", "return"),
    "detour": Policy("post-balanced, not composed", "balanced", "balanced", "detour"),
    "orchmllm": Policy("post-balanced, composed, relabelled (OrchMLLM)", "balanced", "balanced",
                       "direct", relabelled=True),
    "orchvlm": Policy("planned (orchvlm)", "planned", "planned", "direct"),
    "sp_run": Policy("sequence parallel, one degree for the run", "home", "sp_run", "direct"),
    "sp_static": Policy("sequence parallel, static", "home", "sp_static", "direct"),
    "sp_homogeneous": Policy("sequence parallel, homogeneous", "home", "sp_homogeneous",
                             "direct"),
    "sp_chunked": Policy("sequence parallel, chunked (FlexSP)", "home", "sp_chunked", "direct"),
    "sp_flex": Policy("sequence parallel, flex (orchvlm)", "home", "sp_flex", "direct"),
}

GROUP_RANKS = 128  # Seed1.5-VL 5.1 balances inside groups of 128 to 256 GPUs
RELABEL_MINMAX = 2  # of ovlm_relabel_mode: least max(sent, received) between nodes of any rank
HOME_SLACK = 0.002  # of the largest load, given away to move few bytes; plan_step's default


@dataclass
class Exchange:
    """One all-to-all: piece i of ``size[i]`` bytes goes from ``source[i]`` to ``target[i]``."""

    name: str
    source: np.ndarray
    target: np.ndarray
    size: np.ndarray


@dataclass
class Placement:
    """Where a batch runs under one policy.

    ``seconds[phase]`` is float64[M, N], forward plus backward of each micro-batch on each rank;
    ``ahead`` are exchanges hidden behind the previous step; ``before[phase]`` come right before a
    phase's encoder, ``after[phase]`` behind it (and their gradients the other way).
    """

    seconds: dict
    ahead: list = field(default_factory=list)
    before: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)


def load_per_rank(cost, slot, length, squares, n_slots):
    """f(S) of :class:`BatchCost` for many sets at once: float64[n_slots]."""
    count = np.bincount(slot, minlength=n_slots).astype(float)
    tokens = np.bincount(slot, weights=length, minlength=n_slots)
    q = np.bincount(slot, weights=squares, minlength=n_slots)
    longest = np.zeros(n_slots)
    if cost.padded_linear or cost.padded_quadratic:
        np.maximum.at(longest, slot, length)
    load = (cost.fixed + cost.per_item * count + cost.linear * tokens + cost.quadratic * q
            + count * longest * (cost.padded_linear + cost.padded_quadratic * longest))
    return np.where(count > 0, load, 0.0)


def _deal(rank, length, bins, n_ranks):
    """Longest first into `bins` micro-batches on every rank at once: (bin per item, fill)."""
    order = np.lexsort((-length, rank))
    place = np.arange(len(rank)) - np.searchsorted(rank[order], rank[order])
    fill = np.zeros((n_ranks, bins), np.int64)
    chosen = np.empty(len(rank), np.int64)
    by_place = np.argsort(place, kind="stable")
    ends = np.cumsum(np.bincount(place))
    for group in np.split(order[by_place], ends[:-1]):
        best = fill[rank[group]].argmin(axis=1)
        fill[rank[group], best] += length[group]
        chosen[group] = best
    return chosen, fill


def split_into_micro_batches(rank, length, limit, n_ranks):
    """Micro-batch of each item, so that no rank holds more than ``limit`` tokens at a time.

    All ranks run equally many, as few as a longest-first split allows.  Returns (M, int64[n]).
    """
    if len(length) == 0 or limit is None:
        return 1, np.zeros(len(length), np.int64)
    if length.max() > limit:
        raise ValueError(f"an item of {int(length.max())} tokens is longer than the {int(limit)} "
                         "that fit in a GPU's memory; use a sequence-parallel policy for it")
    bins = int(np.ceil(np.bincount(rank, weights=length).max() / limit)) or 1
    while True:
        chosen, fill = _deal(rank, length, bins, n_ranks)
        if fill.max() <= limit:
            return bins, chosen
        bins += 1


def _phase_seconds(cost, rank, length, squares, limit, n_ranks):
    """float64[M, N]; every rank runs its heaviest micro-batch first, so that equals meet."""
    bins, micro = split_into_micro_batches(rank, length, limit, n_ranks)
    load = load_per_rank(cost, rank * bins + micro, length, squares, n_ranks * bins)
    return -np.sort(-load.reshape(n_ranks, bins), axis=1).T


def _planned_seconds(cost, phase_plan, length, squares, n_ranks):
    """float64[M, N] of a :class:`PhasePlan`, micro-batch by micro-batch as it was planned."""
    bins = phase_plan.micro_batches
    slot = phase_plan.micro_batch * n_ranks + phase_plan.rank
    return load_per_rank(cost, slot, length, squares, bins * n_ranks).reshape(bins, n_ranks)


def group_seconds(plan, n_gpus):
    """float64[M, N] of a :class:`SequencePlan`: what each GPU computes in each micro-batch."""
    seconds = np.zeros((len(plan.micro_batches), n_gpus))
    for m, micro in enumerate(plan.micro_batches):
        for group in micro.groups:
            seconds[m, group.first_gpu:group.first_gpu + group.degree] = group.time
    return seconds


def _shard_of_sample(plan, tokens):
    """Where each sample's tokens lie: first GPU, start in the packed order, shard length."""
    first, start, shard = (np.zeros(len(tokens), np.int64) for _ in range(3))
    for micro in plan.micro_batches:
        for group in micro.groups:
            items = np.asarray(group.items)
            ends = np.cumsum(tokens[items])
            first[items] = group.first_gpu
            start[items] = ends - tokens[items]
            shard[items] = -(-int(ends[-1]) // group.degree)
    return first, start, shard


def _shard_pieces(plan, tokens, items, source):
    """Encoder outputs cut at shard boundaries: (source, target, rows) per piece."""
    first, start, shard = (v[items.sample] for v in _shard_of_sample(plan, tokens))
    begin = start + items.position
    end = begin + items.out_tokens
    kept = np.flatnonzero(items.out_tokens > 0)
    low = begin[kept] // shard[kept]
    count = (end[kept] - 1) // shard[kept] - low + 1
    item = np.repeat(kept, count)
    index = np.repeat(low, count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count,
                                                                       count)
    rows = (np.minimum(end[item], (index + 1) * shard[item])
            - np.maximum(begin[item], index * shard[item]))
    return source[item], first[item] + index, rows


def squares_of(items):
    """Sum of squared segment lengths of each item; l^2 when none were given."""
    if items.squares is None:
        return np.asarray(items.length, float)**2
    return np.asarray(items.squares, float)


def _tokens_that_fit(phase, cluster, bytes_per_token, fixed_bytes):
    """Most tokens of a phase on one GPU at a time; None without a limit."""
    room = cluster.memory_bytes - fixed_bytes
    if room < bytes_per_token:
        raise ValueError(f"memory[{phase!r}]: {fixed_bytes:.3g} fixed bytes leave no room in "
                         f"{cluster.memory_bytes:.3g} bytes for a token")
    return int(min(room / bytes_per_token, 2.0**62)) if bytes_per_token > 0 else None


class Placer:
    """Places one batch under any policy; what policies share is computed once."""

    def __init__(self, batch, cluster, costs, memory, longest, seed, work_limit, time_limit):
        self.longest = longest  # tokens of the longest sample of the run
        self.batch, self.cluster, self.costs, self.memory = batch, cluster, costs, memory
        self.limits = {phase: _tokens_that_fit(phase, cluster, *pair)
                       for phase, pair in memory.items()}
        self.search = {"seed": seed, "work_limit": work_limit, "time_limit": time_limit}
        self.n_ranks = cluster.n_gpus
        self.source = np.asarray(batch.source_rank, np.int64)
        self.tokens = batch.language_lengths
        self._step = None

    def step_plan(self):
        """The plan of :func:`orchvlm.plan_step`, made when first asked for."""
        from .step import plan_step
        if self._step is None:
            self._step = plan_step(self.batch, self.cluster, self.costs, memory=self.memory,
                                   **self.search)
        return self._step

    def place(self, policy):
        """The :class:`Placement` of a :class:`Policy`."""
        source = self._deal_samples() if policy.presorted else self.source
        language, plan = self._place_language(policy, source)
        placement = Placement({})
        for phase, items in self.batch.phases.items():
            home = source[items.sample]
            rank = self._place_items(policy, phase, items, home)
            placement.seconds[phase] = self._seconds(policy.encoders, phase, rank, items.length,
                                                     squares_of(items), self.costs[phase])
            raw = Exchange(phase, home, rank, np.asarray(items.bytes, float))
            (placement.before.setdefault(phase, []) if policy.raw_exposed
             else placement.ahead).append(raw)
            placement.after[phase] = self._output_exchanges(
                policy, phase, items, home, rank, language, plan)
        if plan is not None:
            placement.seconds["llm"] = group_seconds(plan, self.n_ranks)
        else:
            placement.seconds["llm"] = self._seconds(
                policy.language, "llm", language, self.tokens,
                np.asarray(self.tokens, float)**2, self._language_cost())
            placement.ahead.append(Exchange(
                "text", source, language,
                TEXT_BYTES_PER_TOKEN * np.asarray(self.batch.text_tokens, float)))
        return placement

    def _language_cost(self):
        """What one rank needs for whole samples; group of degree 1 for a SequenceCost."""
        from .cost import BatchCost
        cost = self.costs["llm"]
        if isinstance(cost, BatchCost):
            return cost
        return BatchCost(linear=cost.linear + cost.comm.get(1, 0.0), quadratic=cost.quadratic,
                         fixed=cost.fixed)

    def _balance(self, length, cost, squares=None, **more):
        from .balancing import balance
        return np.asarray(balance(length, self.n_ranks, cost=cost, squares=squares,
                                  **more).rank)

    def _deal_samples(self):
        return self._balance(self.tokens, self._language_cost(), work_limit=0)

    def _place_language(self, policy, source):
        """(rank of each sample, None) or (None, SequencePlan)."""
        if policy.language.startswith("sp_"):
            from .sequences import plan_sequences
            kind, degrees = policy.language[3:], None
            if kind == "run":
                kind, degrees = "static", [self._degree_of_the_run()]
            return None, plan_sequences(
                self.tokens, self.n_ranks, self.costs["llm"], policy=kind, degrees=degrees,
                gpus_per_node=self.cluster.gpus_per_node, **self.search)
        if policy.language == "source":
            return source, None
        if policy.language == "planned":
            return np.asarray(self.step_plan().llm.rank), None
        rank = self._balance(self.tokens, self._language_cost(), work_limit=0)
        return self._relabel(policy, rank, self.source, TEXT_BYTES_PER_TOKEN * self.tokens), None

    def _degree_of_the_run(self):
        """The least degree at which the run's longest sample fits: a trainer's fixed choice."""
        cost = self.costs["llm"]
        room = cost.memory_limit - cost.memory_fixed
        fitting = [d for d in cost.comm if cost.memory_per_token * self.longest <= room * d]
        if not fitting:
            raise ValueError(f"a sequence of {self.longest} tokens fits no degree of "
                             f"{sorted(cost.comm)}")
        return min(fitting)

    def _place_items(self, policy, phase, items, home):
        cost, squares = self.costs[phase], squares_of(items)
        if policy.encoders == "source":
            return home
        if policy.encoders == "planned":
            return np.asarray(self.step_plan().phases[phase].rank)
        if policy.encoders == "longest_first":  # VeOmni's key is the squared length
            from .cost import BatchCost
            return self._balance(items.length, BatchCost(quadratic=1.0), work_limit=0)
        if policy.encoders == "grouped":
            group = GROUP_RANKS if self.n_ranks % GROUP_RANKS == 0 else self.n_ranks
            return self._balance(items.length, cost, squares, home=home, group_size=group,
                                 node_size=self.cluster.gpus_per_node, work_limit=0)
        if policy.encoders == "home":
            return self._balance(items.length, cost, squares, home=home, size=items.bytes,
                                 node_size=self.cluster.gpus_per_node, slack=HOME_SLACK,
                                 **self.search)
        rank = self._balance(items.length, cost, squares, work_limit=0)
        return self._relabel(policy, rank, home, items.bytes)

    def _relabel(self, policy, rank, home, size):
        if not policy.relabelled:
            return rank
        nothing = np.zeros(0, np.int64)
        name, _ = _core.relabel_solve(
            self.n_ranks, self.cluster.gpus_per_node, rank, home, np.asarray(size, np.int64),
            nothing, nothing, nothing, RELABEL_MINMAX, self.search["work_limit"],
            self.search["time_limit"])
        return name[rank]

    def _output_exchanges(self, policy, phase, items, home, rank, language, plan):
        if policy.outputs == "stay":
            return []
        per_token = float(items.out_bytes_per_token)
        size = per_token * np.asarray(items.out_tokens, float)
        name = f"{phase}->llm"
        if plan is not None:
            source, target, rows = _shard_pieces(plan, self.tokens, items, rank)
            return [Exchange(name, source, target, per_token * rows)]
        if policy.outputs == "return":
            return [Exchange(name, rank, home, size)]
        if policy.outputs == "detour":
            return [Exchange(f"{phase}->source", rank, home, size),
                    Exchange(name, home, language[items.sample], size)]
        return [Exchange(name, rank, language[items.sample], size)]

    def _seconds(self, way, phase, rank, length, squares, cost):
        """float64[M, N] of a balanced phase: as planned, or split into as few as fit."""
        if way == "planned":
            step = self.step_plan()
            return _planned_seconds(cost, step.llm if phase == "llm" else step.phases[phase],
                                    length, squares, self.n_ranks)
        return _phase_seconds(cost, rank, length, squares, self.limits.get(phase), self.n_ranks)
