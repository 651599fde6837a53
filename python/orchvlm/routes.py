"""Rows on their way between ranks: :class:`Route`."""
from functools import cached_property

import numpy as np

from . import _core
from ._numbers import refuse_masked
from .batch import integers
from .cost import _count
from .tables import html_table

_COLUMNS = ("item", "first_row", "n_rows", "source", "destination", "send_row", "receive_row")


class Route:
    """Which rows go from which rank to which, and where they stand before and after.

    A route moves every row that any rank holds exactly once, unless `source_rows` is given. It is
    kept as k pieces; piece p moves ``n_rows[p]`` consecutive rows. Pieces are ordered by
    (destination, receive_row), which is also the order in which rows between one pair of ranks
    travel.

    Parameters
    ----------
    item : int64[k]
        Item that the rows belong to.
    first_row : int64[k]
        First of the piece's rows within the item.
    n_rows : int64[k]
        Rows, >= 1.
    source, destination : int64[k]
        Ranks, 0 .. N-1.
    send_row, receive_row : int64[k]
        First row within the array that the source holds, and that the destination will hold.
    n_ranks : int
        N.
    source_rows : int64[N], optional
        Rows that each rank holds before. Given, a row may leave several times, or never: features
        that two samples share, rows that nobody needs. Such a route has no inverse and does not
        compose; the way back of a :class:`Dispatch` adds up what went to several places.

    Raises
    ------
    TypeError
        A column does not hold integers.
    ValueError
        Columns of different lengths, a rank or row out of range, pieces out of order, a row that is
        received twice or not at all, or (without `source_rows`) sent twice or not at all.

    Notes
    -----
    All operations are O(k + N). Rank N = 2,560 with 64 pieces each takes milliseconds.

    References
    ----------
    OrchMLLM, arXiv 2503.23830, section on rearrangement composition: with P_E the route to the
    encoder and P_M that to the language model, outputs go by P_M after the inverse of P_E, at once.

    Examples
    --------
    Two ranks exchange one row each; a second route brings both to rank 1:

    >>> import numpy as np, orchvlm
    >>> swap = orchvlm.Route([1, 0], [0, 0], [1, 1], [1, 0], [0, 1], [0, 0], [0, 0], 2)
    >>> gather = orchvlm.Route([0, 1], [0, 0], [1, 1], [1, 0], [1, 1], [0, 0], [0, 1], 2)
    >>> [rows.tolist() for rows in swap.apply([np.array([10]), np.array([11])])]
    [[11], [10]]
    >>> both = swap.compose(gather)
    >>> [rows.tolist() for rows in both.apply([np.array([10]), np.array([11])])]
    [[], [10, 11]]
    >>> both.compose(both.invert()).counts.tolist()
    [[1, 0], [0, 1]]
    """

    def __init__(self, item, first_row, n_rows, source, destination, send_row, receive_row,
                 n_ranks, source_rows=None):
        columns = (item, first_row, n_rows, source, destination, send_row, receive_row)
        check = _core.route_check if source_rows is None else _core.route_check_arrivals
        check((*columns, n_ranks))
        self._set((*(np.array(column, np.int64) for column in columns), int(n_ranks)))
        if source_rows is not None:
            self._set_source_rows(source_rows)

    @classmethod
    def _of(cls, fields):
        """A route of fields that need no check."""
        route = cls.__new__(cls)
        route._set(fields)
        return route

    def _set(self, fields):
        for name, column in zip(_COLUMNS, fields):
            column.flags.writeable = False
            setattr(self, name, column)
        self.n_ranks = fields[-1]

    def _set_source_rows(self, rows):
        rows = integers(rows, "source_rows", self.n_ranks).copy()
        # one comparison per piece, which also holds where send_row + n_rows would overflow
        wrong = (self.send_row < 0) | (self.send_row > rows[self.source] - self.n_rows)
        if wrong.any():
            piece = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"route piece {piece} leaves from row {self.send_row[piece]}, with "
                             f"{self.n_rows[piece]} rows, of {rows[self.source[piece]]} that rank "
                             f"{self.source[piece]} has by source_rows")
        rows.flags.writeable = False
        self.source_rows = rows  # in place of the cached property
        self._spread = True

    def _once(self, what):
        """Refuses a route on which rows may leave several times, or never."""
        if self._spread:
            raise ValueError(f"a route with source_rows has no {what}: its rows may leave several "
                             "times, or never")

    def _fields(self):
        return (*(getattr(self, name) for name in _COLUMNS), self.n_ranks)

    def __len__(self):
        return len(self.item)

    def __eq__(self, other):
        if not isinstance(other, Route):
            return NotImplemented
        return self.n_ranks == other.n_ranks and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in (*_COLUMNS, "source_rows"))

    __hash__ = None
    _spread = False  # whether source_rows was given

    def _facing(self, rank, here, there):
        """int64[N] : rows that one rank exchanges with each, seen from its end."""
        mine = here == _count("Route", "rank", rank, least=0, most=self.n_ranks - 1)
        return np.bincount(there[mine], weights=self.n_rows[mine],
                           minlength=self.n_ranks).astype(np.int64)

    def _rows(self, rank):
        return np.bincount(rank, weights=self.n_rows, minlength=self.n_ranks).astype(np.int64)

    @cached_property
    def source_rows(self):
        """int64[N] : rows that each rank holds before."""
        return self._rows(self.source)

    @cached_property
    def destination_rows(self):
        """int64[N] : rows that each rank holds after."""
        return self._rows(self.destination)

    @cached_property
    def counts(self):
        """int64[N, N] : rows that rank i sends to rank j; built when asked for, 8 N^2 bytes."""
        pair = self.source * self.n_ranks + self.destination
        flat = np.bincount(pair, weights=self.n_rows, minlength=self.n_ranks**2)
        return flat.astype(np.int64).reshape(self.n_ranks, self.n_ranks)

    def send_counts(self, rank):
        """Rows that one rank sends to each rank.

        Parameters
        ----------
        rank : int

        Returns
        -------
        int64[N]

        Raises
        ------
        TypeError, ValueError
            ``rank`` is no integer in 0 .. N-1.
        """
        return self._facing(rank, self.source, self.destination)

    def receive_counts(self, rank):
        """Rows that one rank receives from each rank.

        Parameters
        ----------
        rank : int

        Returns
        -------
        int64[N]

        Raises
        ------
        TypeError, ValueError
            ``rank`` is no integer in 0 .. N-1.
        """
        return self._facing(rank, self.destination, self.source)

    def invert(self):
        """The way back: what gradients take, and outputs that return to their source.

        Returns
        -------
        Route
            Moves every row from where this route brings it to where it was.

        Raises
        ------
        ValueError
            The route was made with ``source_rows``.
        """
        self._once("inverse")
        return Route._of(_core.route_invert(self._fields()))

    def compose(self, then):
        """One route for this one followed by another.

        Parameters
        ----------
        then : Route
            What it sends must be what this one delivers, row for row.

        Returns
        -------
        Route
            ``a.compose(b).apply(x)`` equals ``b.apply(a.apply(x))``.

        Raises
        ------
        TypeError
            ``then`` is no Route.
        ValueError
            The routes do not meet: which rank, which item; or one was made with
            ``source_rows``.
        """
        if not isinstance(then, Route):
            raise TypeError(f"then must be a Route; got {type(then).__name__}")
        self._once("composition")
        then._once("composition")
        return Route._of(_core.route_compose(self._fields(), then._fields()))

    def in_bytes(self, item_bytes):
        """The same way for items whose rows differ in width: a route whose rows are bytes.

        Pixels of several sizes, compressed pictures, sounds: what every item takes is known on all
        ranks, as lengths are, so that nobody has to be told the sizes of what arrives.

        Parameters
        ----------
        item_bytes : int64[n]
            Size of every item in all, >= 0. Rows of one item are of one size; an item whose bytes
            do not divide by its rows must travel whole.

        Returns
        -------
        Route
            Moves the items' bytes, which stand where their rows stood, in the same order.

        Raises
        ------
        TypeError
            ``item_bytes`` does not hold integers.
        ValueError
            An item has no size, or one that does not divide; the route was made with
            ``source_rows``.

        Examples
        --------
        Two pictures, 2 and 1 rows of patches, of 5 and 3 bytes:

        >>> import numpy as np, orchvlm
        >>> swap = orchvlm.Route([1, 0], [0, 0], [1, 2], [1, 0], [0, 1], [0, 0], [0, 0], 2)
        >>> swap.in_bytes([5, 3]).counts.tolist()
        [[0, 5], [3, 0]]
        """
        self._once("bytes")
        return Route._of(_core.route_bytes(self._fields(), item_bytes))

    def apply(self, arrays):
        """Moves rows of NumPy arrays, all ranks at once: what an all-to-all would do.

        Parameters
        ----------
        arrays : sequence of N ndarrays
            Rank r's rows, shape ``(source_rows[r], ...)``; the other dimensions and the dtype are
            the same on all ranks.

        Returns
        -------
        list of N ndarrays
            Rank r's rows after, shape ``(destination_rows[r], ...)``.

        Raises
        ------
        TypeError
            A masked array.
        ValueError
            The number of arrays, of their rows, or their other dimensions or dtypes are wrong.
        """
        arrays = [np.asarray(refuse_masked(array, f"arrays[{rank}]"))
                  for rank, array in enumerate(arrays)]
        if len(arrays) != self.n_ranks:
            raise ValueError(f"arrays must be one per rank, {self.n_ranks}; got {len(arrays)}")
        for rank, (array, rows) in enumerate(zip(arrays, self.source_rows)):
            if array.ndim < 1 or len(array) != rows:
                raise ValueError(f"arrays[{rank}] must have {rows} rows; got shape {array.shape}")
            if array.shape[1:] != arrays[0].shape[1:] or array.dtype != arrays[0].dtype:
                raise ValueError(f"arrays[{rank}] has rows {array.shape[1:]} of {array.dtype}; "
                                 f"arrays[0] has {arrays[0].shape[1:]} of {arrays[0].dtype}")
        first = np.concatenate([[0], np.cumsum(self.source_rows)])[:-1]
        start = np.cumsum(self.n_rows) - self.n_rows
        index = np.repeat(first[self.source] + self.send_row - start, self.n_rows)
        index += np.arange(len(index))
        return np.split(np.concatenate(arrays)[index], np.cumsum(self.destination_rows)[:-1])

    def __repr__(self):
        stay = int(self.n_rows[self.source == self.destination].sum())
        return (f"<Route: {int(self.n_rows.sum())} rows in {len(self)} pieces over "
                f"{self.n_ranks} ranks, {stay} stay>")

    def _repr_html_(self):
        pieces = zip(*(getattr(self, name)[:20] for name in _COLUMNS))
        return html_table(_COLUMNS, pieces, f"{repr(self)[1:-1]}; the first 20 pieces")
