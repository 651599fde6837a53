"""Which rank encodes which item, and the routes that follow: pure NumPy, equal on all ranks."""
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .. import _core
from ..balancing import _loads, balance
from ..routes import Route
from ..tables import format_bytes, format_count, html_table, text_table
from .agreement import digest
from .exchange import Way

_RELABEL_MINMAX = 2  # of ovlm_relabel_mode: least max(sent, received) between nodes of any rank
KINDS = ("in", "out", "item")  # of rows: raw data, outputs, one row per item


class Moved(NamedTuple):
    """Bytes of one exchange over all ranks, in one direction.

    Attributes
    ----------
    name : str
        The call and its kind of rows.
    stay_bytes, node_bytes, cross_bytes : int
        Bytes that stay on their rank, move inside their node, and move between nodes.
    worst_bytes : int
        Max over ranks of max(sent, received) between nodes.
    """

    name: str
    stay_bytes: int
    node_bytes: int
    cross_bytes: int
    worst_bytes: int

    @classmethod
    def along(cls, name, route, row_bytes, node_size):
        """The bytes of a route.

        Parameters
        ----------
        name : str
        route : Route
        row_bytes : int
        node_size : int
            Ranks per node.

        Returns
        -------
        Moved
        """
        size = route.n_rows * row_bytes
        cross = route.source // node_size != route.destination // node_size
        stay = int(size[route.source == route.destination].sum())
        ends = [np.bincount(end[cross], weights=size[cross], minlength=route.n_ranks)
                for end in (route.source, route.destination)]
        crossing = int(size[cross].sum())
        return cls(name, stay, int(size.sum()) - stay - crossing, crossing,
                   int(np.max(ends, initial=0)))


@dataclass(frozen=True)
class BalanceReport:
    """What balancing one module did.

    Attributes
    ----------
    items : int
        n, over all ranks.
    n_ranks : int
    imbalance_before, imbalance_after : float
        Largest load over mean load, with every item at its source and as planned.
    load_before, load_after : float
        The largest load, in the unit of the cost.
    bound : float
        Certified: no assignment of whole items has a largest load below it.
    gap : float
        ``load_after / bound - 1``.
    status : str
        ``"optimal"`` or ``"feasible"``.
    moved : tuple of Moved
        Every exchange so far, in order; gradients move as many bytes back.
    """

    items: int
    n_ranks: int
    imbalance_before: float
    imbalance_after: float
    load_before: float
    load_after: float
    bound: float
    gap: float
    status: str
    moved: tuple

    _HEAD = ("exchange", "on its rank", "in its node", "between nodes", "worst rank")

    def _rows(self):
        return [(move.name, *map(format_bytes, move[1:])) for move in self.moved]

    @property
    def summary(self):
        """str : one line."""
        return (f"{format_count(self.items, 'item')} on {format_count(self.n_ranks, 'rank')}: "
                f"max/mean {self.imbalance_before:.4f} -> {self.imbalance_after:.4f}, largest load "
                f"{self.load_before:.6g} -> {self.load_after:.6g}, bound {self.bound:.6g}, gap "
                f"{100 * self.gap:.2f} %, {self.status}")

    def __str__(self):
        return text_table(self._HEAD, self._rows(), self.summary) if self.moved else self.summary

    def _repr_html_(self):
        return html_table(self._HEAD, self._rows(), self.summary)


def _starts(rows, rank):
    """First row of each item in its rank's array, items of a rank in the order of the batch."""
    order = np.argsort(rank, kind="stable")
    before = np.cumsum(rows[order]) - rows[order]
    first = np.searchsorted(rank[order], rank[order])  # place of the rank's first item
    start = np.empty_like(rows)
    start[order] = before - before[first]
    return start


def whole_items(rows, before, after, n_ranks):
    """The route of whole items from one layout to another.

    Parameters
    ----------
    rows : int64[n]
        Rows of each item.
    before, after : int64[n]
        Rank of each item; a rank holds its items in the order of the batch.
    n_ranks : int

    Returns
    -------
    Route
    """
    leave, arrive = _starts(rows, before), _starts(rows, after)
    some = np.flatnonzero(rows)
    some = some[np.lexsort((arrive[some], after[some]))]
    return Route(some, np.zeros_like(some), rows[some], before[some], after[some], leave[some],
                 arrive[some], n_ranks)


class BalancePlan:
    """Who encodes which of the items of one :meth:`Balancer.plan`.

    Items are numbered over all ranks: those of rank 0 first, each rank's in its order.

    Attributes
    ----------
    source, rank, to : int64[n]
        Rank that holds the item, that encodes it, and that gets its outputs (the source, unless
        the call said otherwise).
    lengths, out_lengths : int64[n]
        Rows of each item before and after the module.
    mine, here, arriving : int64[k]
        The items that this rank holds, that it encodes, and whose outputs `to` brings to it; in
        the order in which their rows stand.
    loads_before, loads : float64[N]
        Load of each rank with every item at its source, and as planned.
    bound : float
        Certified lower bound on the largest load.
    status : str
        ``"optimal"`` or ``"feasible"``.
    blank : bool
        This rank had nothing to encode and was given a blank: its outputs are dropped.
    """

    def __init__(self, me, source, columns, to, solved):
        self._me = me
        self.source, self.to = source, source if to is None else to
        self.lengths, self.out_lengths = columns
        self.rank, self.loads, self.loads_before, self.bound, self.status, self._node = solved
        self.n_ranks = len(self.loads)
        self.mine = np.flatnonzero(source == me)
        self.here = np.flatnonzero(self.rank == me)
        self.arriving = np.flatnonzero(self.to == me)
        self.blank = False
        self._moved, self._kept = [], {}

    @property
    def gap(self):
        """float : largest load over `bound`, minus 1; 0 without work."""
        most = float(self.loads.max())
        return most / self.bound - 1 if self.bound > 0 else 0.0 if most == 0 else float("inf")

    @cached_property
    def digest(self):
        """int : equal for equal plans, in 0 .. 2^62-1."""
        return digest(self.source, self.rank, self.to, self.lengths, self.out_lengths)

    def rows(self, kind):
        """Rows of each item.

        Parameters
        ----------
        kind : {"in", "out", "item"}

        Returns
        -------
        int64[n]
        """
        return {"in": self.lengths, "out": self.out_lengths,
                "item": np.ones_like(self.lengths)}[kind]

    def route(self, leg, kind, layout=None):
        """The way of the rows in one call.

        Parameters
        ----------
        leg : {"apply", "restore", "forward_to"}
        kind : {"in", "out", "item"}
        layout : int64[n], optional
            Where "forward_to" goes; default: `to`.

        Returns
        -------
        Route
            Of all ranks.
        """
        rows = self.rows(kind)
        if leg == "apply":
            return whole_items(rows, self.source, self.rank, self.n_ranks)
        back = self._keep(("apply", kind), self.route, "apply", kind).invert()
        if leg == "restore":
            return back
        layout = self.to if layout is None else layout
        return back.compose(whole_items(rows, self.source, layout, self.n_ranks))

    def _keep(self, key, make, *arguments):
        """The same object each time: several tensors share a route, and its indices."""
        if key not in self._kept:
            self._kept[key] = make(*arguments)
        return self._kept[key]

    def way(self, leg, kind, layout=None):
        """This rank's part of :meth:`route`.

        Parameters
        ----------
        leg, kind, layout : as there

        Returns
        -------
        route : Route
        way : Way
        """
        if layout is not None:  # another one each time
            route = self.route(leg, kind, layout)
            return route, Way.of(route, self._me)
        route = self._keep((leg, kind), self.route, leg, kind)
        return route, self._keep((leg, kind, "way"), Way.of, route, self._me)

    def note(self, name, route, row_bytes):
        """Counts the bytes of an exchange.

        Parameters
        ----------
        name : str
        route : Route
        row_bytes : int
        """
        self._moved.append(Moved.along(name, route, row_bytes, self._node))

    def report(self):
        """Imbalance before and after, the gap, and the bytes moved so far.

        Returns
        -------
        BalanceReport
            Prints as a table; HTML in a notebook. The same on all ranks.
        """
        def imbalance(loads):
            return float(loads.max() / loads.mean()) if loads.any() else 1.0

        return BalanceReport(
            len(self.rank), self.n_ranks, imbalance(self.loads_before), imbalance(self.loads),
            float(self.loads_before.max()), float(self.loads.max()), self.bound, self.gap,
            self.status, tuple(self._moved))

    def __repr__(self):
        return f"<BalancePlan: {self.report().summary}>"

    def _repr_html_(self):
        return self.report()._repr_html_()


def place(me, n_ranks, source, columns, cost, squares, to, *, gpus_per_node, slack, work_limit,
          seed):
    """Solves one phase; a function of its arguments alone, but for whose plan it is.

    Parameters
    ----------
    me : int
        This rank.
    n_ranks : int
    source : int64[n]
        Rank of each item.
    columns : (int64[n], int64[n])
        Rows in and out.
    cost : BatchCost or float64[n]
    squares : float64[n] or None
    to : int64[n] or None
    gpus_per_node, slack, work_limit, seed : as for :class:`Balancer`

    Returns
    -------
    BalancePlan

    Raises
    ------
    ValueError
        Loads or rows that are too large to count.
    """
    lengths, out_lengths = columns
    home = source if to is None else to  # outputs travel on the critical path: they count
    near = {} if slack is None else dict(home=home, size=out_lengths, node_size=gpus_per_node,
                                         slack=slack)
    solved = balance(lengths, n_ranks, cost, squares=squares, work_limit=work_limit, seed=seed,
                     **near)
    rank, loads = solved.rank, solved.loads
    if n_ranks > gpus_per_node:
        # Mini-batches are interchangeable: names that keep bytes inside nodes (OrchMLLM 1.4).
        name, (unnamed, named, *_) = _core.relabel_solve(
            n_ranks, gpus_per_node, rank, home, out_lengths, rank, source, lengths,
            _RELABEL_MINMAX, work_limit, None)
        if named < unnamed:
            rank, loads = name[rank], loads[np.argsort(name)]
    before = _loads(source, n_ranks, lengths, cost, squares, None, None)
    return BalancePlan(me, source, columns, to,
                       (rank, loads, before, solved.bound, solved.status, gpus_per_node))
