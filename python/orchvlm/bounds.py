"""Certified lower bounds on the step time of sequence-parallel plans."""
from . import _core
from .sequences import _integer, _restrict


def sequence_bound(lengths, n_gpus, cost, *, gpus_per_node=8, degrees=None, pad_to=1,
                   micro_batches=None, work_limit=None, time_limit=0.2):
    """Lower bound on the step time of every sequence-parallel plan, whatever its policy.

    The step time of a plan with M non-empty micro-batches of groups (S, d) is::

        sum over micro-batches of  max over its groups of  T(S, d)
        T(S, d) = fixed + sum_{s in S} (quadratic s^2 + (linear + comm[d]) s) / d

    subject to the memory of each group and to degrees that sum to at most N in each micro-batch.
    The bound holds for any placement of the groups and over all permitted degrees.

    Parameters
    ----------
    lengths : array_like of int64, shape (n,)
        Sequence lengths in tokens, at least 1.
    n_gpus : int
        N, ranks of the cluster.
    cost : SequenceCost
        Seconds and bytes of a group.
    gpus_per_node : int
        Ranks of a node; the bound does not depend on it.
    degrees : sequence of int, optional
        Permitted group sizes; default: every degree of ``cost.comm``.
    pad_to : int
        Every shard holds a multiple of this many tokens.
    micro_batches : int, optional
        M, at most this many non-empty micro-batches; default: the least over their number.
    work_limit : int, optional
        Search steps; 0 gives the quick bound. The result is then the same on every machine.
    time_limit : float, optional
        Seconds after which the search for a stronger bound stops.

    Returns
    -------
    float
        Seconds, rounded down. ``inf`` when `micro_batches` is proved to be too few.

    Raises
    ------
    TypeError
        When an argument has the wrong type, such as lengths that are no integers.
    ValueError
        When a value is out of range, a degree has no ``comm``, or a sequence fits no degree.

    Notes
    -----
    One micro-batch: the linear relaxation of items on degrees, then column generation over groups
    with certified pricing. Several: the sum of work, then whole micro-batches priced with the
    longest sequences placed exactly. More work never gives a weaker bound, and with `work_limit`
    and no `time_limit` the result is reproducible. O(n log n) at ``work_limit=0``.

    References
    ----------
    FlexSP (arXiv 2412.01523), equations 5 to 10, for the problem.

    Examples
    --------
    >>> import orchvlm
    >>> cost = orchvlm.SequenceCost(quadratic=0.0, linear=1e-3, fixed=0.5, comm={1: 0.0, 2: 0.0},
    ...                             memory_per_token=1.0, memory_limit=1000)
    >>> round(orchvlm.sequence_bound([1500, 400, 400], 2, cost), 3)
    2.15
    """
    n_gpus = _integer(n_gpus, "n_gpus")
    cost = _restrict(cost, degrees, n_gpus)
    asked = 0 if micro_batches is None else _integer(micro_batches, "micro_batches")
    return _core.sp_bound(lengths, n_gpus, _integer(gpus_per_node, "gpus_per_node"),
                          cost._astuple(), _integer(pad_to, "pad_to"), asked, work_limit,
                          time_limit)
