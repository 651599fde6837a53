"""Communicators: what the ranks of a run say to each other.

A :class:`Comm` is a group of ranks with the calls of a cluster: broadcast, gather, exchange,
reduce.  :func:`init` finds the one of this process from its environment; :func:`run_threads` and
:func:`run_processes` start ranks on this host, without a launcher.
"""
import logging
import traceback

import numpy as np

from . import _core
from ._comm_init import init
from ._comm_mpi import from_mpi4py
from ._comm_run import run_processes, run_threads
from ._comm_torch import from_torch
from .endings import of_all_ranks

__all__ = ["Comm", "Pending", "init", "run_threads", "run_processes", "from_torch", "from_mpi4py"]

_REDUCE = {"sum": 0, "max": 1, "min": 2}
# numbers of ovlm_dtype
_DTYPES = {"float32": 0, "bfloat16": 1, "float64": 3, "int32": 4, "int64": 5}


def _warn_slow(message):
    """Called by the core when a rank waits for long."""
    logging.getLogger("orchvlm.comm").warning("%s", message)


def _array(value, name):
    array = np.asarray(value)
    if array.dtype.kind not in "biufcV" or array.dtype.hasobject:
        raise TypeError(f"{name} must be an array of numbers; got dtype {array.dtype}")
    return array if array.flags.c_contiguous else array.copy("C")


def _rows(value, name):
    array = _array(value, name)
    if array.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension: its rows")
    return array


def _row_bytes(array):
    return array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))


def _reduction(array, op, dtype):
    name = str(dtype if dtype is not None else array.dtype)
    if op not in _REDUCE:
        raise ValueError(f"op must be 'sum', 'max' or 'min'; got {op!r}")
    if name not in _DTYPES:
        raise TypeError(f"{name} cannot be reduced; use one of {', '.join(_DTYPES)}")
    if str(array.dtype) != name and not (name == "bfloat16" and array.dtype == np.uint16):
        raise TypeError(f"the array holds {array.dtype}, not {name}; bfloat16 comes as uint16")
    return _DTYPES[name], _REDUCE[op]


class Pending:
    """A call that was started: :meth:`wait` gives its result.

    Made by the ``_start`` methods of :class:`Comm`.

    Parameters
    ----------
    core : orchvlm._core.Comm
        Whose call it is.
    ticket : int
        Which one.
    result : ndarray
        What it fills.
    """

    def __init__(self, core, ticket, result):
        self._core, self._ticket, self._result = core, ticket, result

    def wait(self):
        """Wait until the call is done.

        Returns
        -------
        ndarray
            The result, as the blocking call returns it.

        Raises
        ------
        CommError
            A rank failed.
        """
        if self._ticket is not None:
            self._core.wait(self._ticket)
            self._ticket = None
        return self._result


class Comm:
    """A group of ranks that communicate.

    Every rank of the group makes the same calls in the same order; only counts may differ.  One
    thread at a time uses a communicator; another one, or work that overlaps, uses a :meth:`dup`.
    Arrays are NumPy's; "rows" are along their first axis.  Sums are made in the order of the ranks,
    so that all ranks get the same bits and a run repeats.

    A rank that fails makes all others fail with :class:`orchvlm.CommError`, which names it; after
    that the communicator is of no use any more.  As a context manager it is closed at the end, and
    an exception is told to the other ranks, unless all end with it behind the same step, as
    :meth:`Trainer.run` does after a signal.

    Made by :func:`init`, :func:`run_threads`, :func:`run_processes` and the adapters.

    Parameters
    ----------
    core : orchvlm._core.Comm
        What the core opened.

    Attributes
    ----------
    rank, size : int
        This rank's number, and how many there are.
    engine : str
        What carries the data: ``"self"``, ``"local"``, ``"mpi"`` or ``"python"``.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> def work(comm):
    ...     return comm.all_reduce(np.array([comm.rank + 1.0]))
    >>> orchvlm.comm.run_threads(3, work)
    [array([6.]), array([6.]), array([6.])]
    """

    def __init__(self, core):
        if not isinstance(core, _core.Comm):
            raise TypeError(f"core must be an orchvlm._core.Comm; got {type(core).__name__}; init, "
                            "run_threads and run_processes make a Comm")
        self._core = core
        self.rank, self.size, self.engine, self._any_thread = core.describe()

    def __repr__(self):
        return f"<rank {self.rank} of {self.size} over {self.engine}>"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and not of_all_ranks(error):
            if self.engine == "mpi":  # its abort ends this process before Python says why
                traceback.print_exception(kind, error, trace)
            self.abort(f"{kind.__name__}: {error}")
        self.close()

    # ------------------------------------------------------------ groups

    def split(self, color, key=0):
        """Make smaller groups: ranks of one color find themselves together.

        Parameters
        ----------
        color : int or None
            Which group; None or a negative number: none.
        key : int
            Orders the ranks of the group; equal keys keep their order.

        Returns
        -------
        Comm or None
            The group of this rank.
        """
        core = self._core.split(-1 if color is None else color, key)
        return None if core is None else Comm(core)

    def dup(self):
        """Make the same group again, for another thread or for work that overlaps.

        Returns
        -------
        Comm
            Calls on it and on this one do not wait for each other.
        """
        return Comm(self._core.split(0, self.rank))

    def abort(self, message):
        """Make every rank of the job fail with this message.

        Parameters
        ----------
        message : str
            Why; the others see it with this rank's number.  Also while another thread is in a call.
        """
        self._core.abort(str(message))

    def close(self):
        """Free this rank's end.  A rank that still calls afterwards fails."""
        self._core.close()

    def set_debug(self, debug=True):
        """Compare every call over the ranks before it is made, and name the first difference.

        The local engine always does; for others it costs two small exchanges per call.

        Parameters
        ----------
        debug : bool
            The same on all ranks.
        """
        self._core.set_debug(debug)

    # ------------------------------------------------------------ calls

    def barrier(self):
        """Wait until all ranks have come here."""
        self._core.barrier()

    def broadcast(self, array, root=0):
        """Copy the array of one rank to all others, in place.

        Parameters
        ----------
        array : ndarray
            C-contiguous and writeable, of the same size on all ranks.
        root : int
            Whose array it is.

        Returns
        -------
        ndarray
            The same array.
        """
        self._core.broadcast(array, root)
        return array

    def all_gather(self, array, counts=None):
        """Join the rows of all ranks, in their order.

        Parameters
        ----------
        array : array_like
            Rows of this rank, shape ``(counts[rank], ...)``.
        counts : array_like of int, optional
            Rows of each rank; left out, the ranks tell each other first.

        Returns
        -------
        ndarray
            Shape ``(sum(counts), ...)``.

        Raises
        ------
        ValueError
            Rows of different sizes, or counts that do not fit.
        """
        return self._all_gather(array, counts, False)

    def all_gather_start(self, array, counts=None):
        """Start an :meth:`all_gather`; with counts it waits for nobody.

        Parameters
        ----------
        array : array_like
            As for all_gather; not to be changed before the wait.
        counts : array_like of int, optional
            As for all_gather.

        Returns
        -------
        Pending
            Its wait gives the rows.
        """
        return self._all_gather(array, counts, True)

    def all_to_all(self, array, send_counts, recv_counts=None):
        """Send some rows to each rank, and receive what each sends to this one.

        Parameters
        ----------
        array : array_like
            The rows for rank 0, then those for rank 1, ...
        send_counts : array_like of int, shape (N,)
            Rows for each rank.
        recv_counts : array_like of int, shape (N,), optional
            Rows from each rank; left out, the ranks tell each other first.

        Returns
        -------
        ndarray
            The rows from rank 0, then those from rank 1, ...

        Raises
        ------
        ValueError
            Counts that do not fit.
        CommError
            A rank sends other counts than expected: it is named.

        Examples
        --------
        >>> import numpy as np, orchvlm
        >>> def work(comm):
        ...     rows = np.array([10, 11, 12]) + 100 * comm.rank
        ...     return comm.all_to_all(rows, [1, 2]).tolist()
        >>> orchvlm.comm.run_threads(2, work)
        [[10, 110], [11, 12, 111, 112]]
        """
        return self._all_to_all(array, send_counts, recv_counts, False)

    def all_to_all_start(self, array, send_counts, recv_counts=None):
        """Start an :meth:`all_to_all`; with recv_counts it waits for nobody.

        Parameters
        ----------
        array : array_like
            As for all_to_all; not to be changed before the wait.
        send_counts, recv_counts : array_like of int
            As for all_to_all.

        Returns
        -------
        Pending
            Its wait gives the rows.
        """
        return self._all_to_all(array, send_counts, recv_counts, True)

    def all_reduce(self, array, op="sum", dtype=None, out=None):
        """Sum the arrays of all ranks, or take the largest or least of each element.

        Parameters
        ----------
        array : array_like of float32, float64, int32, int64 or bfloat16
            The same shape on all ranks.
        op : {"sum", "max", "min"}
            A NaN comes through each.
        dtype : str, optional
            ``"bfloat16"`` for an array of uint16 that holds such numbers; they are added in float32
            and rounded once.
        out : ndarray, optional
            Where the result goes; may be `array`.

        Returns
        -------
        ndarray
            The same bits on all ranks.
        """
        return self._all_reduce(array, op, dtype, out, False)

    def all_reduce_start(self, array, op="sum", dtype=None, out=None):
        """Start an :meth:`all_reduce`.

        Parameters
        ----------
        array : array_like
            As for all_reduce; not to be changed before the wait.
        op, dtype : str
            As for all_reduce.
        out : ndarray, optional
            As for all_reduce.

        Returns
        -------
        Pending
            Its wait gives the result.
        """
        return self._all_reduce(array, op, dtype, out, True)

    def reduce_scatter(self, array, counts=None, op="sum", dtype=None):
        """Sum the arrays of all ranks, and keep this rank's rows of the result.

        Parameters
        ----------
        array : array_like
            Shape ``(sum(counts), ...)``, types as for :meth:`all_reduce`.
        counts : array_like of int, shape (N,), optional
            Rows of each rank, the same on all; left out: equal parts.
        op, dtype : str
            As for all_reduce.

        Returns
        -------
        ndarray
            Shape ``(counts[rank], ...)``.

        Raises
        ------
        ValueError
            Counts that do not fit, or rows that do not divide.
        """
        return self._reduce_scatter(array, counts, op, dtype, False)

    def reduce_scatter_start(self, array, counts=None, op="sum", dtype=None):
        """Start a :meth:`reduce_scatter`.

        Parameters
        ----------
        array : array_like
            As for reduce_scatter; not to be changed before the wait.
        counts : array_like of int, optional
            As for reduce_scatter.
        op, dtype : str
            As for reduce_scatter.

        Returns
        -------
        Pending
            Its wait gives the rows.
        """
        return self._reduce_scatter(array, counts, op, dtype, True)

    # ------------------------------------------------------------ inside

    def _finish(self, ticket, result):
        return result if ticket is None else Pending(self._core, ticket, result)

    def _counts(self, counts, name, unit):
        """Counts of rows in units."""
        counts = np.asarray(counts)
        if counts.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers; got dtype {counts.dtype}")
        if counts.shape != (self.size,):
            raise ValueError(f"{name} must have one entry for each of {self.size} ranks; got shape "
                             f"{counts.shape}")
        if counts.size and (counts.min() < 0 or int(counts.max()) > 2**62 // max(unit, 1)):
            raise ValueError(f"{name} must be >= 0, and bytes below 2^62")
        return counts.astype(np.int64) * unit

    def _all_gather(self, array, counts, start):
        array = _rows(array, "array")
        row = _row_bytes(array)
        if counts is None:
            told = np.empty((self.size, 2), np.int64)
            self._core.all_gather(np.array([len(array), row]), told,
                                  np.full(self.size, 16), False)
            if (told[:, 1] != row).any():
                other = int(np.flatnonzero(told[:, 1] != row)[0])
                raise ValueError(f"rank {other} has rows of {told[other, 1]} bytes, this rank of "
                                 f"{row}")
            counts = told[:, 0]
        sizes = self._counts(counts, "counts", row)
        out = np.empty((int(np.sum(counts)), *array.shape[1:]), array.dtype)
        return self._finish(self._core.all_gather(array, out, sizes, start), out)

    def _all_to_all(self, array, send_counts, recv_counts, start):
        array = _rows(array, "array")
        row = _row_bytes(array)
        send = self._counts(send_counts, "send_counts", row)
        if int(np.sum(send_counts)) != len(array):
            raise ValueError(f"send_counts add up to {int(np.sum(send_counts))} rows; the array "
                             f"has {len(array)}")
        if recv_counts is None:
            eights = np.full(self.size, 8)
            recv_counts = np.empty(self.size, np.int64)
            self._core.all_to_all(np.asarray(send_counts).astype(np.int64), eights, recv_counts,
                                  eights, False)
        recv = self._counts(recv_counts, "recv_counts", row)
        out = np.empty((int(np.sum(recv_counts)), *array.shape[1:]), array.dtype)
        return self._finish(self._core.all_to_all(array, send, out, recv, start), out)

    def _all_reduce(self, array, op, dtype, out, start):
        array = _array(array, "array")
        kind, reduce = _reduction(array, op, dtype)
        if out is None:
            out = np.empty_like(array)
        elif out.shape != array.shape or out.dtype != array.dtype:
            raise ValueError(f"out must be {array.dtype}{list(array.shape)}; got "
                             f"{out.dtype}{list(out.shape)}")
        return self._finish(self._core.all_reduce(array, out, kind, reduce, start), out)

    def _reduce_scatter(self, array, counts, op, dtype, start):
        array = _rows(array, "array")
        kind, reduce = _reduction(array, op, dtype)
        if counts is None:
            if len(array) % self.size:
                raise ValueError(f"{len(array)} rows do not divide among {self.size} ranks; pass "
                                 "counts")
            counts = np.full(self.size, len(array) // self.size)
        sizes = self._counts(counts, "counts", _row_bytes(array) // array.itemsize)
        if int(np.sum(counts)) != len(array):
            raise ValueError(f"counts add up to {int(np.sum(counts))} rows; the array has "
                             f"{len(array)}")
        out = np.empty((int(np.asarray(counts)[self.rank]), *array.shape[1:]), array.dtype)
        return self._finish(self._core.reduce_scatter(array, out, sizes, kind, reduce, start), out)
