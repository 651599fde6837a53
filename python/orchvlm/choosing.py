"""How the steps of a run are planned: costs, limits, and whether the language phase is balanced or
run by groups of ranks."""
import logging
from dataclasses import replace

import numpy as np

from . import _core
from .cost import BatchCost, Cluster, SequenceCost
from .model_cost import from_model
from .sequence_phase import alone, groups_of
from .sequences import SequencePlan
from .shares import MEDIA
from .step import plan_step

LANGUAGE = ("balance", "sequence_parallel", "auto")
_SLACK = 0.002  # that balancing gives away for fewer bytes on their way
_WORK = 20_000  # search steps of each search: the same plan on every rank and in every run


def media_of(config):
    """Phases before the language's."""
    return [name for name in MEDIA if (config.audible if name == "audio" else bool(config.vision))]


def one_node(ranks):
    """A cluster of so many ranks, of which it matters only that all are alike."""
    return Cluster(1, ranks, 1.0, 1e11, 1e10, 1e10)


def counted_costs(config, cluster, language="balance"):
    """Costs of the phases, counted from a ModelConfig; that of the language phase is a SequenceCost
    where groups may run it."""
    counted = from_model(config.values, cluster).costs
    costs = {name: counted[name] for name in (*media_of(config), "llm")}
    if language != "balance":
        costs["llm"] = group_cost(costs["llm"], config, cluster)
    return costs


def group_cost(cost, config, cluster):
    """The SequenceCost of groups.

    Parameters
    ----------
    cost : BatchCost or SequenceCost
        A SequenceCost is the answer; of a BatchCost what a token, a square and a micro-batch take
        is kept, and exchanges are counted as :func:`from_model` does, for degrees that are powers
        of two, up to the query heads, and for all ranks together.
    config : ModelConfig
    cluster : Cluster

    Returns
    -------
    SequenceCost

    Raises
    ------
    ValueError
        A degree above the query heads.
    """
    if isinstance(cost, SequenceCost):
        heads, widest = config.text["num_attention_heads"], max(cost.comm)
        if widest > heads:
            raise ValueError(f"costs['llm'] names groups of {widest}; the model has {heads} query "
                             "heads, of which each rank of a group needs one: leave it out")
        return cost
    counted = from_model(config.values, cluster, llm="sequence_parallel").costs["llm"]
    comm, n = dict(counted.comm), cluster.n_gpus
    if n <= counted.heads and n not in comm:
        widest = max(comm)  # bytes of a token go to (d - 1) / d of the ranks
        scale = (n - 1) / n * widest / (widest - 1) if widest > 1 else 0.0
        comm[n] = comm[widest] * scale
    return SequenceCost(cost.quadratic, cost.linear, cost.fixed, comm, heads=counted.heads)


def batch_cost(cost):
    """The same cost for ranks that take whole samples."""
    if isinstance(cost, BatchCost):
        return cost
    return BatchCost(linear=cost.linear + cost.comm.get(1, 0.0), quadratic=cost.quadratic,
                     fixed=cost.fixed)


def warn(text):
    """Says so, wherever messages of ``orchvlm`` go."""
    logging.getLogger("orchvlm.choosing").warning("%s", text)


def planned(batch, cluster, costs, limits, language="balance", tokens=None, tell=warn):
    """The plan of a batch; of ``limits`` by phase (tokens, patches, frames) a micro-batch has at
    most so many, or as many as the longest item of the batch where that is longer.

    Parameters
    ----------
    batch : Batch
    cluster : Cluster
    costs : dict of str to BatchCost or SequenceCost
        By phase; a SequenceCost of the language phase where groups may run it.
    limits : dict of str to int
    language : {"balance", "sequence_parallel", "auto"}
        ``"auto"``: groups where they take less time by the cost, and where a sequence is longer
        than a rank's limit.
    tokens : int, optional
        Of a sequence that a rank holds at most by itself, for another reason than ``limits``.
    tell : callable
        Is told why there is no plan with groups.

    Returns
    -------
    StepPlan
        By limits of work: the same for the same input.  Where there is no plan with groups, that
        without, and a message says why.
    """
    groups = None
    if language != "balance":
        groups = _with_groups(batch, cluster, costs, limits, tokens, tell)
        longest = batch.language_lengths.max(initial=0)
        held = min([most for most in (limits.get("llm"), tokens) if most is not None],
                   default=costs["llm"].tokens_per_gpu)
        if groups is not None and (language == "sequence_parallel" or longest > held):
            return groups
    balanced = _without(batch, cluster, costs, limits)
    if groups is None:
        return balanced
    shared = any(degree > 1 for _, degree in groups.llm.communicators)
    most = language_s(balanced, costs["llm"]) * (1 if shared else 1 - _SLACK)
    return groups if groups.llm.time < most else balanced


def _memory(batch, cluster, limits):
    """What micro-batches take of a rank, so that there is one for the longest item."""
    lengths = {"llm": batch.language_lengths,
               **{name: items.length for name, items in batch.phases.items()}}
    return {name: (cluster.memory_bytes / max(most, lengths[name].max(initial=1)), 0.0)
            for name, most in limits.items()}


def _without(batch, cluster, costs, limits):
    return plan_step(batch, cluster, {**costs, "llm": batch_cost(costs["llm"])},
                     memory=_memory(batch, cluster, limits), work_limit=_WORK, time_limit=None)


def _with_groups(batch, cluster, costs, limits, tokens, tell):
    """The plan with groups; None, and a message, where there is none."""
    cost, most = costs["llm"], [n for n in (limits.get("llm"), tokens) if n is not None]
    if most:  # there is one for a sequence too long for the widest group
        widest = max(degree for degree in cost.comm if degree <= cluster.n_gpus)
        longest = -(-int(batch.language_lengths.max(initial=1)) // widest)
        cost = replace(cost, memory_per_token=1.0, memory_fixed=0.0,
                       memory_limit=float(max(min(most), longest)))
    media = {name: most for name, most in limits.items() if name != "llm"}
    try:
        return plan_step(batch, cluster, {**costs, "llm": cost}, llm="sequence_parallel",
                         memory=_memory(batch, cluster, media), work_limit=_WORK, time_limit=None)
    except (ValueError, _core.Error) as error:
        tell(f"whole samples on ranks: there is no plan with groups ({error})")
        return None


def language_s(plan, cost):
    """Seconds of a plan's language phase by a cost.

    Parameters
    ----------
    plan : StepPlan
    cost : BatchCost or SequenceCost

    Returns
    -------
    float
        The sum over micro-batches of the longest group's, or rank's.
    """
    if isinstance(plan.llm, SequencePlan) or isinstance(cost, BatchCost):
        return float(plan.llm.time)
    lengths, whole = plan.batch.language_lengths, alone(cost)
    return float(sum(max((whole(lengths[items], 1) for _, _, items in groups), default=0.0)
                     for groups in groups_of(plan)))
