"""One training step as a graph of tasks for the event engine, and where its time went."""
from dataclasses import dataclass

import numpy as np

from . import _core


class _Graph:
    """Tasks for the event engine, added in whole stages."""

    def __init__(self, n_resources):
        self.n_resources = n_resources
        self.n_tasks = 0
        self.duration, self.before, self.use = [], [], []

    def add(self, seconds, resources, after):
        """One task per element of ``seconds``; ``resources`` and ``after`` are lists of arrays of
        the same length, or of scalars for all."""
        ids = np.arange(self.n_tasks, self.n_tasks + len(seconds))
        self.n_tasks += len(seconds)
        self.duration.append(seconds)
        self.before += [(ids, np.broadcast_to(a, ids.shape)) for a in after]
        self.use += [(ids, r) for r in resources]
        return ids

    def join(self, after):
        """A task without duration behind all given tasks."""
        ids = self.add(np.zeros(1), [], [])
        for a in after:
            self.before.append((np.broadcast_to(ids, np.shape(a)), np.asarray(a)))
        return ids

    def _csr(self, pairs):
        if not pairs:
            return np.zeros(self.n_tasks + 1, np.int64), np.zeros(0, np.int64)
        task = np.concatenate([p[0] for p in pairs])
        other = np.concatenate([p[1] for p in pairs])
        start = np.concatenate([[0], np.cumsum(np.bincount(task, minlength=self.n_tasks))])
        return start, other[np.argsort(task, kind="stable")]

    def run(self):
        duration = np.concatenate(self.duration)
        return _core.simulate(duration, *self._csr(self.before), *self._csr(self.use),
                              self.n_resources)


@dataclass
class Traffic:
    """What one exchange moves: seconds per rank, and bytes inside and between nodes."""

    seconds: np.ndarray
    intra_bytes: float
    inter_bytes: float


def measure_traffic(exchange, cluster):
    """Time and bytes of one all-to-all.

    A rank's time is the larger of what it sends or receives over the slower of its two networks,
    which work side by side: max(inter / inter_bandwidth, intra / intra_bandwidth).  What stays on
    a rank is free.
    """
    n, per_node = cluster.n_gpus, cluster.gpus_per_node
    moved = exchange.source != exchange.target
    source, target, size = (a[moved] for a in (exchange.source, exchange.target, exchange.size))
    inter = source // per_node != target // per_node
    seconds, total = np.zeros(n), []
    with np.errstate(over="ignore"):  # refused below
        for far, bandwidth in ((False, cluster.intra_bandwidth), (True, cluster.inter_bandwidth)):
            chosen = inter == far
            for end in (source, target):
                load = np.bincount(end[chosen], weights=size[chosen], minlength=n)
                seconds = np.maximum(seconds, load / bandwidth)
            total.append(float(size[chosen].sum()))
    if not np.isfinite([seconds.max(initial=0.0), *total]).all():
        raise ValueError(f"{exchange.name}: its bytes over the cluster's bandwidths are more "
                         "seconds than a float holds; check intra_bandwidth, inter_bandwidth and "
                         "bytes per token")
    return Traffic(seconds, *total)


class _Step:
    """The task graph of one step.

    Each rank has two resources, its compute and its link, and the cluster one host.  An exposed
    exchange holds both of a rank's resources; parameter traffic and the exchange of the next
    step's raw data hold the link only, so that they hide behind compute as far as they fit.
    """

    def __init__(self, n_ranks, sharded, sync_seconds):
        self.n = n_ranks
        self.ranks = np.arange(n_ranks)
        self.links = self.ranks + n_ranks
        self.sharded, self.sync_seconds = sharded, sync_seconds
        self.graph = _Graph(2 * n_ranks + 1)
        self.cursor = []      # what the next stage follows
        self.background = []  # what only the end of the step follows
        self.stages = []      # (phase, kind, task ids), one task per rank

    def compute(self, phase, kind, seconds, sync_share):
        """A stage of compute.  With sharded parameters their traffic runs beside it (sync_share
        times a gather: 1 forward; 2 backward, which gathers again and scatters gradients), and as
        it is collective the stage ends for all ranks at once."""
        ids = self.graph.add(seconds, [self.ranks], self.cursor)
        self.stages.append((phase, kind, ids))
        if not self.sharded:
            self.cursor = [ids]
            return
        sync_s = self.sync_seconds.get(phase, 0.0) * sync_share
        ends = [ids]
        if sync_s > 0:
            ends.append(self.graph.add(np.full(self.n, sync_s), [self.links], self.cursor))
        self.cursor = [self.graph.join(ends)]

    def reduce(self, phase):
        """Without sharding, gradients are reduced once, behind the phase's last backward; it takes
        as long as a scatter and a gather."""
        sync_s = self.sync_seconds.get(phase, 0.0)
        if not self.sharded and sync_s > 0:
            together = self.graph.join(self.cursor)
            self.background.append(
                self.graph.add(np.full(self.n, 2 * sync_s), [self.links], [together]))

    def exchange(self, name, kind, traffic):
        """An all-to-all that everybody waits for: it begins when the last rank arrives."""
        together = self.graph.join(self.cursor)
        ids = self.graph.add(traffic.seconds, [self.ranks, self.links], [together])
        self.stages.append((name, kind, ids))
        self.cursor = [ids]

    def finish(self, ahead, planning_s):
        """Adds what runs beside the step; returns the engine's answer."""
        for traffic in ahead:
            self.background.append(self.graph.add(traffic.seconds, [self.links], []))
        host = np.array([2 * self.n])
        self.background.append(self.graph.add(np.array([float(planning_s)]), [host], []))
        self.graph.join([*self.cursor, *self.background])
        return self.graph.run()


@dataclass(frozen=True)
class Options:
    """How steps run; see :func:`orchvlm.simulate`.  ``sync_seconds`` is one gather per phase."""

    backward: float
    sharded: bool
    sync_seconds: dict
    planning_s: float


def build_step(placement, traffic, cluster, options):
    """Forward through the encoders and to the language ranks, all language micro-batches, and the
    same way back."""
    step = _Step(cluster.n_gpus, options.sharded, options.sync_seconds)
    forward = 1 / (1 + options.backward)
    encoders = [p for p in placement.seconds if p != "llm"]
    for phase in encoders:
        for exchange in placement.before.get(phase, ()):
            step.exchange(f"raw {phase}", "forward", traffic[id(exchange)])
        for seconds in placement.seconds[phase]:
            step.compute(phase, "forward", forward * seconds, 1)
        for exchange in placement.after[phase]:
            step.exchange(exchange.name, "forward", traffic[id(exchange)])
    for seconds in placement.seconds["llm"]:
        step.compute("llm", "forward", forward * seconds, 1)
        step.compute("llm", "backward", (1 - forward) * seconds, 2)
    step.reduce("llm")
    for phase in reversed(encoders):
        for exchange in reversed(placement.after[phase]):
            step.exchange(exchange.name, "backward", traffic[id(exchange)])
        for seconds in placement.seconds[phase]:
            step.compute(phase, "backward", (1 - forward) * seconds, 2)
        step.reduce(phase)
    return step


def account(step, answer, time_s):
    """Rank-seconds by phase: ({phase: busy}, {phase: idle}), whose sum is N * time."""
    start_s, end_s = answer[0], answer[1]
    busy, idle = {}, {}
    for i, (phase, _, ids) in enumerate(step.stages):
        last = i + 1 == len(step.stages)
        following = time_s if last else start_s[step.stages[i + 1][2]]
        busy[phase] = busy.get(phase, 0.0) + float((end_s[ids] - start_s[ids]).sum())
        idle[phase] = idle.get(phase, 0.0) + float((following - end_s[ids]).sum())
    return busy, idle


def parameter_seconds(parameters, cluster):
    """Seconds to gather a phase's bf16 parameters on every rank: each node takes them in once,
    over all of its adapters, and passes them on inside."""
    n = cluster.n_gpus
    seconds = {}
    for phase, count in (parameters or {}).items():
        size = 2.0 * count * (n - 1) / n
        across = size / (cluster.inter_bandwidth * cluster.gpus_per_node)
        seconds[phase] = max(size / cluster.intra_bandwidth, across if cluster.nodes > 1 else 0.0)
    return seconds
