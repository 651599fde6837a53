"""Items over ranks, one phase at a time: :func:`balance` and its answer, :class:`Partition`."""
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import _core
from ._numbers import refuse_masked
from .cost import BatchCost, _count

_STATUS = ("feasible", "optimal")
_MOST_RANKS = 2**29 - 1  # as ovlm_balance


def balance(lengths, n_ranks, cost=None, *, squares=None, size=None, capacity=None, min_items=0,
            max_items=None, keep_together=None, pinned=None, base_load=None, speed=None,
            group_size=None, home=None, node_size=8, slack=0.0, work_limit=None, time_limit=None,
            seed=0):
    """Assign items to ranks so that the most loaded rank has least to do.

    Solves, over all assignments ``rank: items -> ranks`` that satisfy the constraints,

    .. math:: \\min \\max_r \\; load_r, \\qquad load_r = base\\_load_r + f(S_r) / speed_r

    with ``S_r`` the items of rank r and f the cost of a set of items, and proves how far from the
    best possible the answer is.

    Parameters
    ----------
    lengths : array_like of int, shape (n,)
        Length of each item, >= 0 (tokens, patches, frames).
    n_ranks : int
        Number of ranks N, >= 1.
    cost : BatchCost or array_like of float, shape (n,), optional
        f, or one additive cost per item. Default ``BatchCost(linear=1.0)``.
    squares : array_like of float, shape (n,), optional
        Per item, the sum of its true segment lengths squared (token^2), for ``cost.quadratic``.
        Default ``lengths**2``.
    size : array_like of int, shape (n,), optional
        A second resource per item, limited by `capacity`; also the bytes that moving the item away
        from `home` costs (default there: `lengths`).
    capacity : int or array_like of int, shape (N,), optional
        Limit on the sum of `size` per rank; needs `size`.
    min_items, max_items : int, optional
        Least and most items per rank. Default: no limits.
    keep_together : array_like of int, shape (n,), optional
        Items with equal labels share a rank.
    pinned : array_like of int, shape (n,), optional
        Rank of the item, or -1 where it is free.
    base_load : array_like of float, shape (N,), optional
        Load that is there already.
    speed : array_like of float, shape (N,), optional
        Relative speed of each rank, > 0.
    group_size : int, optional
        Balance only inside consecutive groups of this many ranks: an item stays in the group that
        holds its `home`. Needs `home` and must divide N.
    home : array_like of int, shape (n,), optional
        Rank where the item is now. Among the plans whose largest load is at most ``(1 + slack)``
        times the best found, the one that moves least is looked for: first the bytes that leave
        their node, then the bytes that leave their rank.
    node_size : int, optional
        Ranks per node, for `home`.
    slack : float, optional
        See `home`; 0.005 permits half a percent.
    work_limit : int, optional
        Search steps, the same on every machine; fewer are taken when the bound is met. 0:
        longest-first alone. Default: 6 million, 24 million with `home`; see the notes for times.
    time_limit : float, optional
        Seconds by the clock after which the search stops early; the answer then says ``cut_short``.
        Preparing, longest-first and, with `home`, a last pass over the items are finished whatever
        they take; see the notes.
    seed : int, optional
        Of the search's random choices.

    Returns
    -------
    Partition
        The assignment, its loads, and the certificate.

    Raises
    ------
    TypeError
        An argument has the wrong type (an array of floats where integers are meant, ...).
    ValueError
        An argument has a wrong value or shape, or no assignment can satisfy the constraints.
    orchvlm.Error
        The limit ended the search before an assignment was found or proved impossible.
    KeyboardInterrupt
        Ctrl-C during the search.

    Notes
    -----
    Longest-first on a winner tree, O(n log N), then search until the bound is met: a few ranks at a
    time are taken apart and refilled exactly; differencing; for padded costs, bisection over cuts
    of the sorted list (an optimum when nothing else is charged) and trades with the fullest rank;
    branch and bound up to 16 units. Never worse than longest-first and, without `home`, more work
    is never worse; with it, the best largest load and what then moves may each go either way by a
    little. Deterministic for the same arguments unless ``cut_short``. The bound is the largest of
    the mean load, the largest item, pigeonhole sums, Martello and Toth's L2 and, for padded
    costs, the optimum over cuts and a Lagrangian of their sum; it is rounded down.

    Times on one core of a cloud machine (AMD EPYC, 2.6 GHz), when the default work is used up:
    0.11 s for 16,384 items on 256 ranks, 0.17 s for 163,840 on 2,560 and 0.9 s for a million on
    4,096; with `home` 0.2, 0.5 and 1.9 s (``python tests/bench/bench_balance.py default``). A
    `time_limit` of 50 ms was passed by 1 to 3 ms, by 35 with `home` and 163,840 items; one that is
    shorter than the first construction, by that. It counts the time by the clock: a call that waits
    for other programs' turns on a loaded core notices only at its own (there, 50 ms became 200 to
    800).

    References
    ----------
    .. [1] OrchMLLM, arXiv 2503.23830 (batch post-balancing).
    .. [2] Graham, "Bounds on multiprocessing timing anomalies", 1969 (longest-first).
    .. [3] Martello, Toth, "Lower bounds and reduction procedures for the bin packing problem",
       1990.

    Examples
    --------
    >>> import orchvlm
    >>> p = orchvlm.balance([8, 7, 6, 5, 4], 2)
    >>> p.loads
    array([15., 15.])
    >>> p.gap, p.status
    (0.0, 'optimal')
    >>> [p.order[a:b].tolist() for a, b in zip(p.splits[:-1], p.splits[1:])]
    [[0, 1], [2, 3, 4]]
    """
    if cost is None:
        cost = BatchCost(linear=1.0)
    item_cost = None
    if isinstance(cost, BatchCost):
        coefficients = cost._astuple()
    else:
        if isinstance(cost, (str, bytes)) or not hasattr(cost, "__len__"):
            raise TypeError("cost must be a BatchCost or an array of one cost per item; "
                            f"got {type(cost).__name__}")
        item_cost, coefficients = cost, (0.0,) * 6
    if item_cost is not None and squares is not None:
        raise ValueError("squares has no meaning with a cost per item; leave one of them out")
    if capacity is not None:
        if size is None:
            raise ValueError("capacity needs size: what each item takes of it")
        if np.ndim(capacity) == 0:
            capacity = _one_per_rank(capacity, n_ranks)
    answer = _core.balance(lengths, n_ranks, coefficients, item_cost, squares, size, capacity,
                           min_items, max_items, keep_together, pinned, base_load, speed,
                           group_size, home, node_size, slack, work_limit, time_limit, seed)
    given = dict(lengths=lengths, cost=cost, squares=squares, size=size, capacity=capacity,
                 min_items=min_items, max_items=max_items, keep_together=keep_together,
                 pinned=pinned, base_load=base_load, speed=speed, group_size=group_size, home=home)
    rank, loads, bound, status, cut_short, work = answer
    return Partition(rank, loads, bound, _STATUS[status], cut_short, work, given)


def _one_per_rank(capacity, n_ranks):
    array = np.asarray(refuse_masked(capacity, "capacity"))
    if array.dtype.kind not in "iu":
        raise TypeError(f"capacity must be an integer or one per rank; got {capacity!r}")
    return np.full(_count("balance", "n_ranks", n_ranks, most=_MOST_RANKS), array)


@dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """Which rank each item goes to, what that costs, and how good it is.

    Attributes
    ----------
    rank : ndarray of int64, shape (n,)
        Item -> rank.
    loads : ndarray of float64, shape (N,)
        ``base_load + f(items)/speed`` per rank, in the unit of the cost.
    bound : float
        Certified: no assignment has a largest load below it.
    status : str
        ``"optimal"`` when the largest load meets the bound (to 1e-9), else ``"feasible"``.
    cut_short : bool
        The time limit ended a search, so the answer depends on the machine: also one that is
        optimal, as another optimum could have been found.
    work : int
        Search steps taken.

    Examples
    --------
    >>> import orchvlm
    >>> p = orchvlm.balance([3, 3, 2, 2, 2], 2)
    >>> p
    Partition(n=5, n_ranks=2, max=6, bound=6, gap=0.00 %, imbalance=1.0000, optimal)
    >>> p.inverse[p.order].tolist()
    [0, 1, 2, 3, 4]
    """

    rank: np.ndarray
    loads: np.ndarray
    bound: float
    status: str
    cut_short: bool
    work: int
    _given: dict

    @cached_property
    def order(self):
        """int64[n]: items grouped by rank, in the order they came within a rank."""
        return np.argsort(self.rank, kind="stable")

    @cached_property
    def splits(self):
        """int64[N + 1]: rank r has ``order[splits[r]:splits[r + 1]]``."""
        return np.searchsorted(self.rank[self.order], np.arange(len(self.loads) + 1))

    @cached_property
    def inverse(self):
        """int64[n]: where each item stands in `order`; ``inverse[order] == arange(n)``."""
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(len(self.order))
        return inverse

    @property
    def gap(self):
        """float: ``max(loads)/bound - 1``; 0 when all loads are 0."""
        most = float(self.loads.max())
        return most / self.bound - 1 if self.bound > 0 else 0.0 if most == 0 else float("inf")

    @property
    def imbalance(self):
        """float: ``max(loads)/mean(loads)``; 1 when all loads are 0."""
        mean = float(self.loads.mean())
        return float(self.loads.max()) / mean if mean > 0 else 1.0

    def check(self):
        """Verify the assignment against the arguments of the call, from scratch, in NumPy.

        Returns
        -------
        Partition
            Itself.

        Raises
        ------
        ValueError
            The first thing that does not hold, as from every ``check()``.

        Examples
        --------
        >>> import orchvlm
        >>> orchvlm.balance([1, 2, 3], 2).check().status
        'optimal'
        """
        _check(self, **self._given)
        return self

    def _before(self):
        """Loads as the items came: at home, or in equal consecutive shares."""
        n, n_ranks, home = len(self.rank), len(self.loads), self._given["home"]
        rank = np.arange(n) * n_ranks // max(n, 1) if home is None else np.asarray(home)
        return _loads(rank, n_ranks, **{k: self._given[k] for k in _LOAD_ARGUMENTS})

    def plot(self, path=None):
        """Load of every rank, as the items came and as planned, with the proven bound.

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
        from .plots import plot_loads
        return plot_loads({"items": self._before()}, {"items": self.loads}, path,
                          {"items": self.bound})

    def __repr__(self):
        return (f"Partition(n={len(self.rank)}, n_ranks={len(self.loads)}, "
                f"max={self.loads.max():.6g}, bound={self.bound:.6g}, gap={self.gap:.2%}, "
                f"imbalance={self.imbalance:.4f}, {self.status}"
                f"{', cut short' if self.cut_short else ''})").replace("%", " %")

    def _repr_html_(self, most_rows=16):
        before, after = self._before(), self.loads
        scale = max(before.max(), after.max(), 1e-300)
        counts = np.bincount(self.rank, minlength=len(after))

        def bar(value, colour):
            return (f'<td style="text-align:left"><div style="width:{160 * value / scale:.0f}px;'
                    f'height:0.8em;background:{colour}" title="{value:.6g}"></div></td>')

        shown = np.argsort(-before, kind="stable")[:most_rows]
        rows = "".join(
            f"<tr><td>{r}</td><td>{counts[r]}</td>{bar(before[r], '#bbb')}<td>{before[r]:.6g}</td>"
            f"{bar(after[r], '#4a7')}<td>{after[r]:.6g}</td></tr>" for r in np.sort(shown))
        more = (f"<tr><td colspan=6>and {len(after) - most_rows} ranks more</td></tr>"
                if len(after) > most_rows else "")
        return (f"<table><caption>{len(self.rank)} items on {len(after)} ranks: max "
                f"{before.max():.6g} &rarr; {after.max():.6g}, bound {self.bound:.6g}, gap "
                f"{self.gap:.2%}, {self.status}</caption><tr><th>rank</th><th>items</th>"
                f"<th colspan=2>load before</th><th colspan=2>load after</th></tr>"
                f"{rows}{more}</table>")


_LOAD_ARGUMENTS = ("lengths", "cost", "squares", "base_load", "speed")


def _loads(rank, n_ranks, lengths, cost, squares, base_load, speed):
    """The formula, in NumPy."""
    length = np.asarray(lengths, np.float64)
    if isinstance(cost, BatchCost):
        square = length**2 if squares is None else np.asarray(squares, np.float64)
        count = np.bincount(rank, minlength=n_ranks)
        longest = np.zeros(n_ranks)
        np.maximum.at(longest, rank, length)
        total = (cost.fixed * (count > 0) + cost.per_item * count
                 + cost.linear * np.bincount(rank, length, n_ranks)
                 + cost.quadratic * np.bincount(rank, square, n_ranks)
                 + cost.padded_linear * count * longest
                 + cost.padded_quadratic * count * longest**2)
    else:
        total = np.bincount(rank, np.asarray(cost, np.float64), n_ranks)
    if speed is not None:
        total = total / np.asarray(speed)
    return total if base_load is None else total + np.asarray(base_load)


def _check(p, min_items, max_items, size, capacity, keep_together, pinned, group_size, home,
           **load_arguments):
    def hold(condition, message):
        if not condition:
            raise ValueError(f"this partition fails its own check: {message}")

    n, n_ranks = len(np.asarray(load_arguments["lengths"])), len(p.loads)
    hold(p.rank.shape == (n,) and np.all((p.rank >= 0) & (p.rank < n_ranks)), "a rank is missing")
    loads = _loads(p.rank, n_ranks, **load_arguments)
    hold(np.allclose(loads, p.loads, rtol=1e-9, atol=0), "loads do not follow from ranks")
    hold(p.bound <= p.loads.max() * (1 + 1e-12), "the bound is above the plan")
    counts = np.bincount(p.rank, minlength=n_ranks)
    hold(counts.min() >= min_items, "min_items")
    hold(max_items is None or counts.max() <= max_items, "max_items")
    if capacity is not None:
        used = np.zeros(n_ranks, np.int64)
        np.add.at(used, p.rank, np.asarray(size, np.int64))
        hold(np.all(used <= capacity), "capacity")
    if keep_together is not None:
        _, label = np.unique(np.asarray(keep_together), return_inverse=True)
        first = np.zeros(n, np.int64)
        first[label] = p.rank
        hold(np.all(first[label] == p.rank), "keep_together")
    if pinned is not None:
        pinned = np.asarray(pinned)
        hold(np.all((pinned < 0) | (pinned == p.rank)), "pinned")
    if group_size is not None:
        hold(np.all(np.asarray(home) // group_size == p.rank // group_size), "group_size")
    hold(np.array_equal(p.inverse[p.order], np.arange(n)), "inverse")
    hold(p.splits[0] == 0 and p.splits[-1] == n, "splits")
