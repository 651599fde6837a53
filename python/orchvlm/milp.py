"""FlexSP's published integer program for one micro-batch, stated exactly and handed to HiGHS."""
import math
from typing import NamedTuple

import numpy as np

from .batch import integers
from .cost import _coefficient
from .sequence_parallel import row_ranks
from .sequences import _integer, _restrict, bucket_lengths

_MOST_VARIABLES = 1 << 22  # gigabytes, and beyond what HiGHS ends with


class MilpPlan(NamedTuple):
    """What :func:`plan_sequences_milp` answers.

    Attributes
    ----------
    degrees : int64[P]
        Degree d of every group used; empty when no plan was found.
    items : tuple of int64[k]
        Indices of the sequences of each group.
    objective : float
        Seconds of HiGHS's incumbent, of the bucketed lengths, with ``fixed``; inf without one.
    bound : float
        HiGHS's dual bound on the objective.  With buckets it bounds the bucketed problem only.
    time : float
        Seconds of the plan with the true lengths: the largest T(S, d).
    status : str
        ``"optimal"``, ``"feasible"``, ``"infeasible"`` or ``"undecided"``.

    Examples
    --------
    >>> from orchvlm.milp import MilpPlan
    >>> MilpPlan._fields
    ('degrees', 'items', 'objective', 'bound', 'time', 'status')
    """

    degrees: np.ndarray
    items: tuple
    objective: float
    bound: float
    time: float
    status: str


def plan_sequences_milp(lengths, n_gpus, cost, *, degrees=None, n_buckets=None, symmetry=False,
                        time_limit=60.0):
    """Groups for one micro-batch by the published mixed-integer program.

    Virtual groups p with fixed degrees d_p: floor(N/d) copies of every permitted degree d. With
    buckets q of b_q sequences of (rounded-up) length s_q::

        min C   over  m_p in {0, 1},  A_qp in {0, 1, ...},  C >= 0
        fixed + sum_q A_qp (quadratic s_q^2 + (linear + comm[d_p]) s_q) / d_p <= C   for all p
        memory_fixed + memory_per_token sum_q A_qp s_q / d_p <= memory_limit         for all p
        sum_p d_p m_p <= N,    sum_q A_qp <= K m_p for all p,    sum_p A_qp = b_q for all q

    Parameters
    ----------
    lengths : int64[n]
        Tokens, >= 1.
    n_gpus : int
        N.
    cost : SequenceCost
    degrees : sequence of int, optional
        Permitted degrees; default: every degree of ``cost.comm``.
    n_buckets : int, optional
        Q of FlexSP's bucketing; default: every sequence by itself (equations 5 to 10).
    symmetry : bool
        Add rows m_p >= m_{p+1} within a degree; they change no optimum.
    time_limit : float
        Seconds for HiGHS.

    Returns
    -------
    MilpPlan

    Raises
    ------
    ImportError
        SciPy is not installed: ``pip install scipy``.
    TypeError, ValueError
        An argument of the wrong type or out of range; a degree without ``comm``.

    Notes
    -----
    N (1 + 1/2 + 1/4 + ...) virtual groups times Q integer variables. Meant for comparison: it is
    thousands of times slower than :func:`orchvlm.plan_sequences`, and stops at `time_limit`.

    References
    ----------
    FlexSP, arXiv 2412.01523, equations 5 to 10 (sequences) and 17 to 22 (buckets).

    Examples
    --------
    >>> import orchvlm
    >>> cost = orchvlm.SequenceCost(quadratic=0.0, linear=1e-3, comm={1: 0.0, 2: 0.0},
    ...                             memory_per_token=1.0, memory_limit=1000)
    >>> plan = orchvlm.plan_sequences_milp([1500, 900, 850], 4, cost)
    >>> round(plan.time, 3), plan.status
    (0.875, 'optimal')
    """
    try:
        from scipy.optimize import milp
    except ImportError:
        raise ImportError("plan_sequences_milp needs SciPy: pip install scipy") from None
    n_gpus = _integer(n_gpus, "n_gpus")
    cost = _restrict(cost, degrees, n_gpus)
    time_limit = _coefficient("plan_sequences_milp", "time_limit", time_limit, infinite=True)
    lengths = integers(lengths, "lengths")
    if len(lengths) == 0 or lengths.min() < 1:
        raise ValueError("lengths must hold at least one sequence, each of at least 1 token")
    bucket, size, count = _buckets(lengths, n_buckets)
    n_groups = sum(n_gpus // d for d in cost.comm)
    if n_groups * len(size) > _MOST_VARIABLES:
        raise ValueError(f"{n_groups} virtual groups on n_gpus = {n_gpus} times {len(size)} lengths"
                         f" are more than {_MOST_VARIABLES} variables; give n_buckets or degrees")
    degree = np.array([d for d in sorted(cost.comm) for _ in range(n_gpus // d)], np.int64)
    objective, constraints, integrality, bounds = _program(size, count, degree, n_gpus, cost,
                                                           symmetry)
    answer = milp(objective, constraints=constraints, integrality=integrality, bounds=bounds,
                  options={"time_limit": time_limit})
    bound = getattr(answer, "mip_dual_bound", None)
    bound = -math.inf if bound is None else float(bound)
    if answer.x is None:
        status = "infeasible" if answer.status == 2 else "undecided"
        return MilpPlan(np.zeros(0, np.int64), (), math.inf, bound, math.inf, status)
    share = np.rint(answer.x[:len(size) * len(degree)]).astype(np.int64)
    items = _deal(bucket, share.reshape(len(size), len(degree)))
    used = [p for p in range(len(degree)) if len(items[p])]
    time = max(_seconds(cost, lengths[items[p]], int(degree[p])) for p in used)
    return MilpPlan(degree[used], tuple(items[p] for p in used), float(answer.fun), bound, time,
                    "optimal" if answer.status == 0 else "feasible")


def _buckets(lengths, n_buckets):
    """Bucket of each sequence, and each bucket's length and count."""
    if n_buckets is None:
        return np.arange(len(lengths)), lengths, np.ones(len(lengths), np.int64)
    bucket, longest = bucket_lengths(lengths, n_buckets)
    return bucket, longest, np.bincount(bucket, minlength=len(longest))


def _share(cost, degree):
    """What a group of that degree leaves of the attention term (heads are whole)."""
    if cost.heads == 0:
        return 1 / degree
    across = row_ranks(degree, cost.heads)
    rows = degree // across
    return math.ceil(cost.heads / across) / cost.heads * (2 * rows - 1) / rows ** 2


def _per_token(cost, degree):
    """Seconds of a token of such a group, times its GPUs."""
    rows = degree // row_ranks(degree, cost.heads or degree)
    return cost.linear + cost.comm[degree] + (cost.ring or 0.0) * (rows - 1)


def _seconds(cost, lengths, degree):
    s = lengths.astype(float)
    return float(cost.fixed + cost.quadratic * _share(cost, degree) * (s * s).sum()
                 + _per_token(cost, degree) / degree * s.sum())


def _program(size, count, degree, n_gpus, cost, symmetry):
    """Variables A_qp (row-major in q), m_p, C."""
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.sparse import coo_array, csr_array, eye_array, hstack, kron

    n_buckets, n_groups = len(size), len(degree)
    s = size.astype(float)
    every_group = eye_array(n_groups)
    zero_m, zero_c = csr_array((n_groups, n_groups)), csr_array((n_groups, 1))
    share = np.array([_share(cost, int(d)) for d in degree])
    linear = np.array([_per_token(cost, int(d)) / d for d in degree])
    time = np.outer(s * s, cost.quadratic * share) + np.outer(s, linear)
    p = np.tile(np.arange(n_groups), n_buckets)
    columns = np.arange(n_buckets * n_groups)
    time = coo_array((time.ravel(), (p, columns)), (n_groups, n_buckets * n_groups))
    memory = coo_array((cost.memory_per_token * np.outer(s, 1 / degree).ravel(), (p, columns)),
                       (n_groups, n_buckets * n_groups))
    total = count.sum()
    rows = [
        (hstack([time, zero_m, -np.ones((n_groups, 1))]), -np.inf, -cost.fixed),       # eqs 6, 18
        (hstack([kron(np.ones((1, n_buckets)), every_group), -total * every_group, zero_c]),
         -np.inf, 0),                                                                  # eqs 9, 21
        (hstack([csr_array((1, n_buckets * n_groups)), degree[None, :], csr_array((1, 1))]),
         -np.inf, n_gpus),                                                             # eqs 8, 20
        (hstack([kron(eye_array(n_buckets), np.ones((1, n_groups))),
                 csr_array((n_buckets, n_groups + 1))]), count, count)]                # eqs 10, 22
    if math.isfinite(cost.memory_limit):
        rows.append((hstack([memory, zero_m, zero_c]), -np.inf,
                     cost.memory_limit - cost.memory_fixed))                           # eqs 7, 19
    if symmetry and n_groups > 1:
        same = np.flatnonzero(degree[:-1] == degree[1:])
        step = coo_array((np.r_[np.ones(len(same)), -np.ones(len(same))],
                          (np.r_[:len(same), :len(same)], np.r_[same, same + 1])),
                         (len(same), n_groups))
        rows.append((hstack([csr_array((len(same), n_buckets * n_groups)), step,
                             csr_array((len(same), 1))]), 0, np.inf))
    upper = np.r_[np.repeat(count, n_groups), np.ones(n_groups), np.inf]
    return (np.r_[np.zeros(n_buckets * n_groups + n_groups), 1.0],
            [LinearConstraint(csr_array(a), low, high) for a, low, high in rows],
            np.r_[np.ones(n_buckets * n_groups + n_groups), 0], Bounds(0, upper))


def _deal(bucket, share):
    """Hands each bucket's sequences to the groups in order."""
    items = [[] for _ in range(share.shape[1])]
    for q, row in enumerate(share):
        members = np.flatnonzero(bucket == q)
        for p, part in enumerate(np.split(members, np.cumsum(row)[:-1])):
            items[p].append(part)
    return [np.concatenate(parts) for parts in items]
