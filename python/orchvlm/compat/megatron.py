"""Megatron-Core's scheduler of hybrid context parallelism, with this library's planner inside."""
from dataclasses import replace

from ..batch import amount, integers
from ..cost import SequenceCost
from ..sequences import _integer, plan_sequences

_LARGEST_MEASURED = 64


def _default_cost(n_gpus, tokens_per_gpu):
    """FlexSP's published GPT-7B, communication included: with length^2 / degree alone nothing would
    speak against all GPUs for every sample."""
    measured = SequenceCost.flexsp_gpt7b(n_gpus=min(n_gpus, _LARGEST_MEASURED))
    powers = [1 << k for k in range(n_gpus.bit_length())]
    last = measured.comm[max(measured.comm)]
    comm = {degree: measured.comm.get(degree, last) for degree in sorted({*powers, n_gpus})}
    return replace(measured, comm=comm, fixed=0.0, heads=0, memory_per_token=1.0,
                   memory_fixed=0.0, memory_limit=tokens_per_gpu)


def _widened(groups, n_gpus):
    """Degrees, largest time first served, that occupy every GPU: (degree, items), widest first.

    Each doubling goes to the slowest group that the free GPUs allow; the powers of two that remain
    always leave room for one, except for a lone group, which gets all GPUs.
    """
    groups = [[group.degree, group.time, group.items.tolist()] for group in groups]
    while (free := n_gpus - sum(degree for degree, _, _ in groups)) > 0:
        fitting = [group for group in groups if group[0] <= free]
        if not fitting:
            return [(n_gpus, [item for _, _, items in groups for item in items])]
        slowest = max(fitting, key=lambda group: group[1])
        slowest[0] *= 2
        slowest[1] /= 2
    return [(degree, items) for degree, _, items in sorted(groups, key=lambda g: -g[0])]


def _ids_and_lengths(sample_id_seqlens):
    try:
        pairs = [(sample_id, length) for sample_id, length in sample_id_seqlens]
        hash(tuple(sample_id for sample_id, _ in pairs))
    except (TypeError, ValueError):
        raise TypeError("sample_id_seqlens must be a list of (sample id, length) pairs; got "
                        f"{sample_id_seqlens!r:.60}") from None
    lengths = integers([length for _, length in pairs], "sample_id_seqlens: lengths").tolist()
    for sample_id, length in pairs:
        if length < 1:
            raise ValueError(f"sample_id_seqlens: sample {sample_id} has length {length}; must be "
                             ">= 1")
    return [sample_id for sample_id, _ in pairs], lengths


def get_groups_and_subsamples(scheduler, sample_id_seqlens, config=None, *, cost=None,
                              time_limit=0.2, work_limit=None):
    """Replaces ``BalancedCPScheduler.get_groups_and_subsamples``, which keeps each sequence at the
    least degree that fits.

    Chooses micro-batches, and in each the samples and the degree of every group, so that the sum
    over micro-batches of the slowest group is least; degrees above the minimum where that pays.
    One assignment installs it::

        BalancedCPScheduler.get_groups_and_subsamples = orchvlm.compat.get_groups_and_subsamples

    Parameters
    ----------
    scheduler : object
        The scheduler, ``self`` there: its ``total_hdp_gpus`` and ``max_seq_len_per_rank`` are read.
    sample_id_seqlens : list of (int, int)
        Sample id and length, >= 1.
    config : object, optional
        Not read, as in the original.
    cost : SequenceCost, optional
        Seconds of a group; its memory limit then holds in place of ``max_seq_len_per_rank``, and
        its degrees must be powers of two (or all GPUs). Default: FlexSP's published GPT-7B on
        A100, with 64 GPUs' communication beyond 64.
    time_limit, work_limit : float, int or None
        As for :func:`orchvlm.plan_sequences`. One rank schedules and the others are told, as in
        Megatron; where every rank schedules by itself, pass a ``work_limit`` and
        ``time_limit=None``.

    Returns
    -------
    groups : list of list of list of int
        ``groups[m][gpu]``: lengths that the GPU works on in micro-batch m.
    sample_id_groups : list of list of list of int
        The same with sample ids. A sample stands at all GPUs of its group, which are consecutive;
        no GPU is without samples.

    Raises
    ------
    TypeError
        Ids or lengths that are no integers, or a cost of another kind.
    ValueError
        A length below 1, an id that appears twice, a sample too long for all GPUs together, or a
        cost with another degree.
    orchvlm.Error
        Undecided within the limits.

    Notes
    -----
    The original limits each sample to ``max_seq_len_per_rank`` tokens per GPU; here that holds for
    all samples of a group together, so that a group may also pack them. GPUs that would stay idle
    widen the slowest groups.

    References
    ----------
    Megatron-Core, ``megatron/core/pipeline_parallel/hybrid_cp_schedule.py``.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from orchvlm.compat import get_groups_and_subsamples
    >>> scheduler = SimpleNamespace(total_hdp_gpus=2, max_seq_len_per_rank=32768)
    >>> get_groups_and_subsamples(scheduler, [(7, 30000), (8, 29000)])
    ([[[30000], [29000]]], [[[7], [8]]])
    >>> get_groups_and_subsamples(scheduler, [(7, 30000), (8, 10000)])[1]
    [[[7, 8], [7, 8]]]
    """
    for name in ("total_hdp_gpus", "max_seq_len_per_rank"):
        if not hasattr(scheduler, name):
            raise TypeError(f"scheduler must have {name}; got {type(scheduler).__name__}")
    n_gpus = _integer(scheduler.total_hdp_gpus, "total_hdp_gpus")
    limit = amount(scheduler.max_seq_len_per_rank, "max_seq_len_per_rank")
    ids, lengths = _ids_and_lengths(sample_id_seqlens)
    if len(set(ids)) < len(ids):
        raise ValueError("sample_id_seqlens: a sample id appears twice")
    if cost is None:
        if limit < 1:
            raise ValueError(f"max_seq_len_per_rank must be >= 1; got {limit}")
        cost = _default_cost(n_gpus, limit)
    if not isinstance(cost, SequenceCost):
        raise TypeError(f"cost must be a SequenceCost; got {type(cost).__name__}")
    for degree in cost.comm:
        if degree & (degree - 1) and degree != n_gpus:
            raise ValueError(f"cost.comm has degree {degree}; Megatron has groups of powers of two "
                             f"and of all {n_gpus} GPUs")
    try:
        plan = plan_sequences(lengths, n_gpus, cost, gpus_per_node=n_gpus, time_limit=time_limit,
                              work_limit=work_limit)
    except ValueError as error:  # of a sample that is too long
        raise ValueError(str(error).replace("lengths[", "sample_id_seqlens[")) from None
    groups, sample_id_groups = [], []
    for micro in plan.micro_batches:
        if not micro.groups:
            continue
        of_gpu = [items for degree, items in _widened(micro.groups, n_gpus)
                  for _ in range(degree)]
        groups.append([[lengths[item] for item in items] for items in of_gpu])
        sample_id_groups.append([[ids[item] for item in items] for items in of_gpu])
    return groups, sample_id_groups
