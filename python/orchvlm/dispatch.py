"""Routes on arrays: rows from the ranks that hold them to the ranks that use them, and back."""
import numpy as np

from . import _core
from ._numbers import refuse_masked
from .batch import integers
from .comm import Comm, _rows
from .cost import _count
from .routes import Route

_BFLOAT16 = 1  # number of ovlm_dtype


class Dispatcher:
    """What moves rows between ranks: threads that copy, and memory that transfers share.

    One per rank and thread; it lives as long as training, while every step has its own routes.

    Parameters
    ----------
    comm : Comm
        The ranks. Borrowed: whoever opened it closes it.
    threads : int
        Threads that pack and unpack, this one included; 0: one per core. More than one helps above
        a few megabytes.

    Raises
    ------
    TypeError
        ``comm`` is no :class:`~orchvlm.comm.Comm`.
    ValueError
        ``threads`` is out of range.

    Examples
    --------
    Two ranks exchange a row each, and gradients go back:

    >>> import numpy as np, orchvlm
    >>> swap = orchvlm.Route([1, 0], [0, 0], [1, 1], [1, 0], [0, 1], [0, 0], [0, 0], 2)
    >>> def work(comm):
    ...     way = orchvlm.Dispatcher(comm).prepare(swap)
    ...     features = way.apply(np.array([[comm.rank, 10.0 * comm.rank]]))
    ...     return features.tolist(), way.reverse(-features).tolist()
    >>> orchvlm.comm.run_threads(2, work)
    [([[1.0, 10.0]], [[-0.0, -0.0]]), ([[0.0, 0.0]], [[-1.0, -10.0]])]
    """

    def __init__(self, comm, threads=1):
        if not isinstance(comm, Comm):
            raise TypeError(f"comm must be an orchvlm.comm.Comm; got {type(comm).__name__}")
        self.comm = comm
        self._core = _core.dispatcher(_count("Dispatcher", "threads", threads, least=0, most=1024))

    def __repr__(self):
        return f"<Dispatcher of {self.comm!r}>"

    def prepare(self, route, places=None, destination_rows=None):
        """Find which of this rank's rows go where.

        Parameters
        ----------
        route : Route
            Over the ranks of ``comm``; the same on all of them.
        places : int64[k], optional
            Where the first row of each piece stands after, in place of ``receive_row``:
            :attr:`StepPlan.places <orchvlm.StepPlan>`, so that text and features arrive on one
            token axis.
        destination_rows : int, optional
            Rows of this rank's array after, padding included. Left out: as far as pieces reach.

        Returns
        -------
        Dispatch

        Raises
        ------
        TypeError
            ``route`` is no Route, or ``places`` does not hold integers.
        ValueError
            The route has another number of ranks; places that overlap or reach beyond the array.

        Notes
        -----
        O(k + N) for k pieces and N ranks.

        Examples
        --------
        Features and text of one sample arrive on its rank's token axis:

        >>> import numpy as np, orchvlm
        >>> text = orchvlm.Route([0], [0], [2], [0], [0], [0], [0], 1)
        >>> vision = orchvlm.Route([0], [0], [1], [0], [0], [0], [0], 1)
        >>> def work(comm):
        ...     dispatcher = orchvlm.Dispatcher(comm)
        ...     tokens = np.zeros(4, np.int64)
        ...     dispatcher.prepare(text, [0], 4).apply(np.array([5, 6]), out=tokens)
        ...     dispatcher.prepare(vision, [2], 4).apply(np.array([99]), out=tokens)
        ...     return tokens.tolist()
        >>> orchvlm.comm.run_threads(1, work)
        [[5, 6, 99, 0]]
        """
        if not isinstance(route, Route):
            raise TypeError(f"route must be a Route; got {type(route).__name__}")
        if route.n_ranks != self.comm.size:
            raise ValueError(f"route has {route.n_ranks} ranks; comm has {self.comm.size}")
        if places is not None:
            places = integers(places, "places", len(route))
        rows = -1 if destination_rows is None else _count(
            "prepare", "destination_rows", destination_rows, least=0)
        core = self._core.prepare(route._fields(), self.comm.rank, places,
                                  int(route.source_rows[self.comm.rank]), rows)
        return Dispatch(self.comm, core)


class Dispatch:
    """One route at one rank; made by :meth:`Dispatcher.prepare`.

    All ranks make the same calls in the same order. What is moved is rows: the first axis of one
    array, or of several that travel together (features and the DeepStack features with them, as
    ``[features, *deepstack]``). Any dtype of plain numbers and any shape of row, the same on all
    ranks; ranks without rows take part. What arrives depends on the route alone: a composed route
    gives the bits that its two steps give, one after the other.

    Attributes
    ----------
    source_rows, destination_rows : int
        Rows of this rank's arrays before and after.
    sent, received, stay : int
        Rows that leave for other ranks, that come from them, and that do neither.
    sums : bool
        Whether some row goes to several places, so that the way back adds.

    Examples
    --------
    One picture that two samples share, and work while its features travel:

    >>> import numpy as np, orchvlm
    >>> shared = orchvlm.Route([0, 0], [0, 0], [1, 1], [0, 0], [0, 1], [0, 0], [0, 0], 2,
    ...                        source_rows=[1, 0])
    >>> def work(comm):
    ...     way = orchvlm.Dispatcher(comm).prepare(shared)
    ...     trip = way.start(np.full((1 - comm.rank, 2), 0.5))
    ...     features = trip.wait()
    ...     return features.tolist(), way.reverse(features).tolist()
    >>> orchvlm.comm.run_threads(2, work)
    [([[0.5, 0.5]], [[1.0, 1.0]]), ([[0.5, 0.5]], [])]
    """

    def __init__(self, comm, core):
        if not isinstance(core, _core.Dispatch):
            raise TypeError("a Dispatch comes from Dispatcher.prepare")
        self._comm, self._core = comm, core
        (self.source_rows, self.destination_rows, self.sent, self.received, self.stay,
         self.sums) = core.rows()

    def __repr__(self):
        return (f"<Dispatch of rank {self._comm.rank}: {self.source_rows} rows to "
                f"{self.destination_rows}, {self.sent} sent, {self.received} received, "
                f"{self.stay} stay>")

    def apply(self, arrays, out=None):
        """Move rows along the route.

        Parameters
        ----------
        arrays : ndarray or sequence of ndarrays
            Shape ``(source_rows, ...)``.
        out : ndarray or sequence of ndarrays, optional
            Shape ``(destination_rows, ...)``, C-contiguous; rows where nothing arrives keep what
            they hold. Left out: new arrays, 0 there.

        Returns
        -------
        ndarray or list of ndarrays
            The rows after, as `arrays` came.

        Raises
        ------
        TypeError
            What is no array of numbers; another dtype in `out`.
        ValueError
            Another number of rows, or other rows in `out`.
        CommError
            A rank failed, or prepared another route.
        """
        return self._move(arrays, out, None, False, False)

    def reverse(self, gradients, out=None, dtype=None):
        """Bring gradients of what arrived to where it came from.

        Parameters
        ----------
        gradients : ndarray or sequence of ndarrays
            Shape ``(destination_rows, ...)``; rows where nothing arrived are not looked at.
        out : ndarray or sequence of ndarrays, optional
            Shape ``(source_rows, ...)``, C-contiguous. Left out: new arrays.
        dtype : {"bfloat16"}, optional
            Arrays of uint16 hold such numbers.

        Returns
        -------
        ndarray or list of ndarrays
            The gradients of the rows before. A row that went to several places gets the sum over
            them in the order of (destination, receive_row); one that went nowhere gets 0. Sums are
            made in the arrays' own float32 or float64; bfloat16 is added in float32 and rounded
            once.

        Raises
        ------
        TypeError, ValueError, CommError
            As :meth:`apply`; ValueError also for sums of what is no such number.
        """
        return self._move(gradients, out, dtype, True, False)

    def start(self, arrays, out=None):
        """Start an :meth:`apply`, and work while rows travel.

        Parameters
        ----------
        arrays, out : ndarray or sequence of ndarrays
            As for apply; not to be touched before the wait.

        Returns
        -------
        Trip
            Its wait gives the rows.
        """
        return self._move(arrays, out, None, False, True)

    def start_reverse(self, gradients, out=None, dtype=None):
        """Start a :meth:`reverse`, and work while gradients travel.

        Parameters
        ----------
        gradients, out : ndarray or sequence of ndarrays
            As for reverse; not to be touched before the wait.
        dtype : {"bfloat16"}, optional
            As for reverse.

        Returns
        -------
        Trip
            Its wait gives the gradients.
        """
        return self._move(gradients, out, dtype, True, True)

    def _move(self, arrays, out, dtype, back, start):
        if dtype not in (None, "bfloat16"):
            raise ValueError(f"dtype must be 'bfloat16' or left out; got {dtype!r}")
        several = isinstance(arrays, (list, tuple))
        before = self.destination_rows if back else self.source_rows
        after = self.source_rows if back else self.destination_rows
        name = "gradients" if back else "arrays"
        sources = [_checked(array, f"{name}[{t}]" if several else name, before)
                   for t, array in enumerate(arrays if several else [arrays])]
        if out is None:
            # rows that arrive are written once; only padding needs its zeros
            covered = back or self.stay + self.received == after
            targets = [(np.empty if covered else np.zeros)((after, *a.shape[1:]), a.dtype)
                       for a in sources]
        else:
            targets = _targets(out, sources, after, several)
        capsule = self._core.move(self._comm._core, tuple(sources), tuple(targets),
                                  -1 if dtype is None else _BFLOAT16, back, start)
        result = targets if several else targets[0]
        return Trip(self, capsule, result) if start else result


class Trip:
    """A transfer under way, made by the ``start`` methods of :class:`Dispatch`."""

    def __init__(self, dispatch, capsule, result):
        self._dispatch, self._capsule, self._result = dispatch, capsule, result

    def wait(self):
        """Wait until the rows are there.

        Returns
        -------
        ndarray or list of ndarrays
            As the blocking call returns them.

        Raises
        ------
        CommError
            A rank failed.
        """
        self._dispatch._core.wait(self._dispatch._comm._core, self._capsule)
        return self._result


def _checked(array, name, rows):
    array = _rows(refuse_masked(array, name), name)
    if len(array) != rows:
        raise ValueError(f"{name} must have {rows} rows; got shape {array.shape}")
    return array


def _targets(out, sources, rows, several):
    """The caller's arrays, which rows are written into."""
    targets = list(out) if several and isinstance(out, (list, tuple)) else [out]
    if len(targets) != len(sources):
        raise ValueError(f"out must be {len(sources)} arrays; got {len(targets)}")
    for t, (target, source) in enumerate(zip(targets, sources)):
        name = f"out[{t}]" if several else "out"
        shape = (rows, *source.shape[1:])
        if not isinstance(target, np.ndarray) or target.dtype != source.dtype:
            raise TypeError(f"{name} must be an array of {source.dtype}; got "
                            f"{getattr(target, 'dtype', type(target).__name__)}")
        if target.shape != shape or not target.flags.c_contiguous or not target.flags.writeable:
            raise ValueError(f"{name} must be a writeable C-contiguous array of shape {shape}; got "
                             f"{target.shape}")
        if any(np.may_share_memory(target, other) for other in sources):
            raise ValueError(f"{name} overlaps an array that is sent")
    return targets
