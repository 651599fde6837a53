"""Cost models from measurements."""
from typing import NamedTuple

import numpy as np

from . import _core
from ._numbers import real, refuse_masked
from .cost import _MAX_DEGREES, BatchCost, SequenceCost, _count

_TERMS = tuple(BatchCost.__dataclass_fields__)
_FORMS = ("tuples (lengths, seconds), (lengths, seconds, squares) or (lengths, degree, seconds, "
          "bytes)")


class Fit(NamedTuple):
    """What :func:`fit` returns; unpacks as ``cost, seconds_error, bytes_error``.

    Attributes
    ----------
    cost : BatchCost or SequenceCost
        The fitted cost.
    seconds_error : float64[rows]
        Predicted over measured seconds, minus 1.
    bytes_error : float64[rows] or None
        Predicted over measured bytes, minus 1; None when no bytes were measured.
    """

    cost: object
    seconds_error: np.ndarray
    bytes_error: object


def fit(measurements, *, terms=("linear", "quadratic", "per_item", "fixed"), heads=0, rings=False):
    """Fit a cost model to measured times, by non-negative least squares on relative errors.

    ::

        minimise  sum over rows of (f(row)/seconds - 1)^2   over coefficients >= 0

    Each row counts alike, however long it took, and what is minimised is the error that is
    reported.  Rows (lengths, seconds) or (lengths, seconds, squares) give a :class:`BatchCost`;
    rows (lengths, degree, seconds, bytes) give a :class:`SequenceCost` over the measured degrees,
    its memory fitted in the same way to bytes per GPU.

    Parameters
    ----------
    measurements : sequence of tuples
        One row per measured micro-batch: ``(lengths, seconds)``, ``(lengths, seconds, squares)``,
        or ``(lengths, degree, seconds, bytes)`` with bytes None in all rows when memory was not
        measured.  lengths are int64[n] with n >= 1; squares float64[n] in [0, 1e38], as in
        :meth:`BatchCost.__call__`, by default the squared lengths; seconds lie in [1e-12, 1e12],
        bytes in [1, 1e18].
    terms : sequence of str
        Names of the BatchCost coefficients that may differ from 0.  Where the rows cannot tell two
        of them apart (one item per row: per_item and fixed), one gets the whole.
    heads : int
        As in :class:`SequenceCost`; 0 for the other rows.
    rings : bool
        Degrees above ``heads`` may be among the rows: all that their exchanges cost is in their
        ``comm``, and ``ring`` of the fitted cost is 0.

    Returns
    -------
    Fit
        ``(cost, seconds_error, bytes_error)``.  ``memory_limit`` stays infinite: set it with
        ``dataclasses.replace``.

    Raises
    ------
    TypeError
        Rows of neither form, lengths or a degree that are not integers, other values that are not
        numbers.
    ValueError
        No row, rows of both forms, bytes in some rows only, an empty row, a value out of range,
        an unknown term, a degree above ``heads`` without ``rings``, more than 64 degrees.

    Notes
    -----
    comm of the smallest measured degree is 0 and the rest of its cost per token is in ``linear``:
    times alone cannot tell them apart.  Measure degree 1, where there is no communication.
    Deterministic; O(rows * coefficients^2) after one pass over the lengths.

    References
    ----------
    Lawson and Hanson, "Solving Least Squares Problems", 1974, algorithm 23.10.

    Examples
    --------
    >>> import orchvlm
    >>> rows = [([100] * n, 1e-3 + 2e-5 * 100 * n) for n in (1, 2, 5, 10)]
    >>> cost, error, _ = orchvlm.fit(rows, terms=("linear", "fixed"))
    >>> f"{cost.linear:.2e} {cost.fixed:.2e} {abs(error).max() < 1e-9}"
    '2.00e-05 1.00e-03 True'
    """
    rows = _rows(measurements)
    lengths = [_lengths(row[0], i) for i, row in enumerate(rows)]
    start = np.concatenate([[0], np.cumsum([len(x) for x in lengths])]).astype(np.int64)
    flat = np.concatenate(lengths).astype(np.int64, copy=False)
    if len(rows[0]) < 4:
        if _count("fit", "heads", heads, least=0) != 0:
            raise ValueError("heads is for rows (lengths, degree, seconds, bytes)")
        seconds = _column(rows, 1, "seconds")
        squares = _squares(rows, lengths) if len(rows[0]) == 3 else None
        coefficients, error = _core.batch_cost_fit(start, flat, seconds, squares,
                                                   _term_bits(terms))
        return Fit(BatchCost(*coefficients), error, None)
    degree = np.array([_count("measurements", "degree", row[1]) for row in rows], np.int64)
    if any(row[3] is None for row in rows):
        if not all(row[3] is None for row in rows):
            raise ValueError("measurements: bytes must be given in all rows or be None in all")
        measured_bytes = None
    else:
        measured_bytes = _column(rows, 3, "bytes")
    degrees = np.unique(degree)
    if len(degrees) > _MAX_DEGREES:
        raise ValueError(f"measurements hold {len(degrees)} different degrees; a SequenceCost has "
                         f"at most {_MAX_DEGREES}")
    heads = _count("fit", "heads", heads, least=0)
    (quadratic, linear, fixed, per_token, memory_fixed), comm, error, bytes_error = (
        _core.sequence_cost_fit(start, flat, _column(rows, 2, "seconds"), degree, measured_bytes,
                                heads, degrees, bool(rings)))
    cost = SequenceCost(quadratic, linear, fixed, dict(zip(degrees.tolist(), comm.tolist())),
                        memory_per_token=per_token, memory_fixed=memory_fixed, heads=heads,
                        ring=0.0 if rings else None)
    return Fit(cost, error, bytes_error)


def _rows(measurements):
    try:
        rows = [tuple(row) for row in measurements]
    except TypeError:
        raise TypeError(f"measurements must be a sequence of {_FORMS}") from None
    if not rows:
        raise ValueError("measurements must hold at least one row")
    sizes = {len(row) for row in rows}
    if not sizes <= {2, 3, 4}:
        raise TypeError(f"measurements must hold {_FORMS}; got {max(sizes - {2, 3, 4})} values")
    if len(sizes) > 1:
        raise ValueError(f"measurements must not mix {_FORMS}")
    return rows


def _lengths(value, row):
    refuse_masked(value, f"measurements[{row}]: lengths")
    try:
        array = np.asarray(value)
    except ValueError:
        raise TypeError(f"measurements[{row}]: lengths must be an array of integers") from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"measurements[{row}]: lengths must be one-dimensional and not empty")
    if array.dtype.kind not in "iu":
        raise TypeError(f"measurements[{row}]: lengths must be integers; got {array.dtype}")
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"measurements[{row}]: a length is above 2^63-1")
    return array


def _squares(rows, lengths):
    """Those of all rows, one behind the other."""
    found = []
    for i, (row, own) in enumerate(zip(rows, lengths)):
        refuse_masked(row[2], f"measurements[{i}]: squares")
        try:
            array = np.asarray(row[2], np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"measurements[{i}]: squares must be an array of numbers") from None
        if array.shape != own.shape:
            raise ValueError(f"measurements[{i}]: squares must be one per length, {len(own)}; got "
                             f"shape {array.shape}")
        found.append(array)
    return np.concatenate(found)


def _column(rows, index, name):
    return np.array([real(row[index], f"measurements[{i}]: {name}")
                     for i, row in enumerate(rows)])


def _term_bits(terms):
    if isinstance(terms, str):
        raise TypeError("terms must be a sequence of names, not one string")
    bits = 0
    for term in terms:
        if term not in _TERMS:
            raise ValueError(f"unknown term {term!r}; known: {', '.join(_TERMS)}")
        bits |= 1 << _TERMS.index(term)
    if bits == 0:
        raise ValueError("terms must name at least one coefficient")
    return bits
