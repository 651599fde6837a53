"""The language phase of a step: who runs which tokens in which micro-batch, whole samples or shards
of a group's, and how they get there."""
from dataclasses import dataclass, replace

import numpy as np

from .inputs import IGNORED, Inputs
from .routes import Route
from .sequence_parallel import TokenShard
from .sequences import SequencePlan
from .shares import label_weights

_COLUMNS = 6  # of a token that travels: id, label, weight, three positions


@dataclass(frozen=True)
class Part:
    """What a rank runs of one micro-batch.

    Attributes
    ----------
    first, degree : int
        Its group: ranks ``first`` to ``first + degree - 1``; degree 0 where it has none.
    pack : Inputs or TokenShard
        Without images and sounds; of a shard that is not :meth:`bound` yet, the group is None.
    """

    first: int
    degree: int
    pack: object

    def bound(self, groups):
        """The same with the communicator of its group.

        Parameters
        ----------
        groups : SequenceGroups
            Where the group is open.

        Returns
        -------
        Part
        """
        if not isinstance(self.pack, TokenShard):
            return self
        return replace(self, pack=replace(self.pack, group=groups[self.first, self.degree]))


def groups_of(plan):
    """The groups of a step plan's language phase; a balanced rank is a group of one.

    Parameters
    ----------
    plan : StepPlan

    Returns
    -------
    list of list of (int, int, int64[k])
        By micro-batch: first rank, degree and samples in packed order, those with tokens.
    """
    if isinstance(plan.llm, SequencePlan):
        return [[(group.first_gpu, group.degree, group.items) for group in micro.groups]
                for micro in plan.llm.micro_batches]
    share, n_ranks = plan.llm, plan.cluster.n_gpus
    kept = np.flatnonzero(plan.batch.language_lengths > 0)
    key = share.micro_batch[kept] * n_ranks + share.rank[kept]
    order = np.argsort(key, kind="stable")
    ends = np.cumsum(np.bincount(key, minlength=share.micro_batches * n_ranks))
    samples = np.split(kept[order], ends[:-1])
    return [[(rank, 1, samples[m * n_ranks + rank]) for rank in range(n_ranks)
             if len(samples[m * n_ranks + rank])] for m in range(share.micro_batches)]


def blocks_of(plans):
    """First rank and degree of all groups of several ranks in some step plans."""
    return {block for plan in plans if isinstance(plan.llm, SequencePlan)
            for block in plan.llm.communicators if block[1] > 1}


@dataclass(frozen=True)
class _Cell:
    """Tokens ``begin`` to ``end`` - 1 of a group's packed axis, which one rank runs."""

    micro: int
    first: int
    degree: int
    items: np.ndarray
    ends: np.ndarray  # of the items on the axis, 0 before
    begin: int
    end: int

    @property
    def rows(self):
        """Tokens that it is told: its own, and the one behind, whose label it predicts."""
        return min(self.end + (self.degree > 1), int(self.ends[-1])) - self.begin

    def pieces(self):
        """(items, first row of each, rows of each) of these."""
        first, last = self.begin, self.begin + self.rows
        k = np.arange(np.searchsorted(self.ends, first, "right") - 1,
                      np.searchsorted(self.ends, last, "left"))
        begin = np.maximum(self.ends[k], first)
        return self.items[k], begin - self.ends[k], np.minimum(self.ends[k + 1], last) - begin


def _cells(plan):
    """By rank, the cells of its micro-batches, in their order."""
    lengths, cells = plan.batch.language_lengths, [[] for _ in range(plan.cluster.n_gpus)]
    for m, groups in enumerate(groups_of(plan)):
        for first, degree, items in groups:
            ends = np.cumsum([0, *lengths[items]])
            cuts = [int(ends[-1]) * r // degree for r in range(degree + 1)]
            for r in range(degree):
                cells[first + r].append(_Cell(m, first, degree, items, ends, *cuts[r:r + 2]))
    return cells


def _route(cells, batch, n_ranks):
    """The way of tokens from who read them to their cells."""
    held = np.flatnonzero(batch.language_lengths > 0)  # samples are in the order of their sources
    lengths, source = batch.language_lengths[held], batch.source_rank[held]
    before = np.cumsum(lengths) - lengths
    send_row = np.zeros(len(batch), np.int64)
    send_row[held] = before - before[np.searchsorted(source, source)] if len(held) else before
    rows = [[np.zeros(0, np.int64)] * 3 + [0]]
    rows += [[*cell.pieces(), rank] for rank, some in enumerate(cells) for cell in some]
    items, first, n = (np.concatenate([row[i] for row in rows]) for i in range(3))
    destination = np.repeat([row[3] for row in rows], [len(row[0]) for row in rows])
    start = np.cumsum(n) - n
    receive = start - start[np.searchsorted(destination, destination)] if len(n) else start
    return Route(items, first, n, batch.source_rank[items], destination, send_row[items] + first,
                 receive, n_ranks, np.bincount(source, lengths, n_ranks).astype(np.int64))


def micro_batches(inputs, plan, ways):
    """This rank's part of the language phase, in micro-batches; other ranks call it, too.

    Parameters
    ----------
    inputs : Inputs
        The samples of the plan's batch that this rank read.
    plan : StepPlan
    ways : Dispatcher

    Returns
    -------
    list of Part
        As many on every rank.

    Notes
    -----
    Labels, weights and positions are those of whole samples: they are there before tokens are cut
    into shards, and each shard is told of the token behind its last one.
    """
    cells = _cells(plan)
    table = np.empty((inputs.n_tokens, _COLUMNS), np.int32)
    table[:, 0], table[:, 1] = inputs.input_ids, inputs.labels
    table[:, 2] = label_weights(inputs).view(np.int32)
    table[:, 3:] = inputs.position_ids.T.view(np.int32)
    arrived = ways.prepare(_route(cells, plan.batch, ways.comm.size)).apply(table)
    none = Part(0, 0, Inputs(input_ids=np.zeros(0, np.int32), cu_seqlens=[0]))
    parts = [none] * len(groups_of(plan))
    first = 0
    for cell in cells[ways.comm.rank]:
        parts[cell.micro] = _part(cell, arrived[first:first + cell.rows])
        first += cell.rows
    return parts


def _part(cell, rows):
    """The Part of a cell, from the rows of its tokens."""
    own = rows[:cell.end - cell.begin]
    ids, places = np.ascontiguousarray(own[:, 0]), np.ascontiguousarray(own[:, 3:].T)
    fields = {"input_ids": ids, "position_ids": places.view(np.float32),
              "cu_seqlens": cell.ends.astype(np.int32)}
    labels, weights = rows[:, 1], np.ascontiguousarray(rows[:, 2]).view(np.float32)
    if cell.degree == 1:
        return Part(cell.first, 1, Inputs(labels=labels, weights=weights, **fields))
    if len(rows) == len(own):  # nothing is behind the group's last token
        labels, weights = np.append(labels, np.int32(IGNORED)), np.append(weights, np.float32(0))
    return Part(cell.first, cell.degree, TokenShard(
        None, labels=np.ascontiguousarray(labels), weights=weights, **fields))


def features_of(config, parts, given):
    """The features of each micro-batch, which come in the order of its tokens.

    Parameters
    ----------
    config : ModelConfig
    parts : list of Part
    given : dict of str to (array, array or None)
        By medium, features and those of DeepStack of all of them.

    Returns
    -------
    list of dict
        As :meth:`Model.forward` takes them.
    """
    tokens = {"vision": config.visual_tokens, "audio": config.sound_tokens}
    first, found = dict.fromkeys(given, 0), []
    for part in parts:
        mine = {}
        for name, (features, extra) in given.items():
            start = first[name]
            first[name] = end = start + int(np.isin(part.pack.input_ids, tokens[name]).sum())
            mine["features" if name == "vision" else "sounds"] = features[start:end]
            if extra is not None:
                mine["extra"] = extra[:, start:end]
        found.append(mine)
    return found


def alone(cost):
    """A SequenceCost with groups of one rank, which it may not name."""
    return replace(cost, comm={1: cost.comm.get(1, 0.0)}, heads=0)


def loads_of(plan):
    """Seconds of each rank in a language phase with groups: those of its groups.

    Parameters
    ----------
    plan : StepPlan

    Returns
    -------
    sampled, planned : float64[N]
        With every sample where it was read, and as planned.
    """
    n_ranks, lengths, cost = plan.cluster.n_gpus, plan.batch.language_lengths, alone(plan.llm.cost)
    sampled = [cost(lengths[plan.batch.source_rank == rank], 1) for rank in range(n_ranks)]
    loads = np.zeros(n_ranks)
    for micro in plan.llm.micro_batches:
        for group in micro.groups:
            loads[group.first_gpu:group.first_gpu + group.degree] += group.time
    return np.array(sampled), loads
