"""Length files: CSV, JSON lines and NumPy arrays, gzipped or not, read into whole token counts."""
import csv
import gzip
import io
import json
import math
import zlib
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

LONGEST = 2**40  # tokens; above it a figure is a mistake, and sums could overflow


class FileError(ValueError):
    """A length file that cannot be used; the message is one line and names the file."""


class Lengths(NamedTuple):
    """What :func:`read_lengths` found.

    Attributes
    ----------
    tokens : int64[n]
        Lengths, >= 1.
    row : int64[n]
        Row of the file that each stands in, from 0: header and blank lines do not count; an index
        into the array of a ``.npy`` file.
    left_out : str
        What rows were passed over for having no length or 0, in words; empty when there are none.
    """

    tokens: np.ndarray
    row: np.ndarray
    left_out: str


def _kind(path):
    suffixes = [s.lower() for s in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    last = suffixes[-1 - zipped] if len(suffixes) > zipped else ""
    kinds = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".npy": "npy"}
    if last not in kinds:
        raise FileError(f"{path}: unknown kind of file {last or '(no suffix)'}; "
                        "known: .csv .tsv .jsonl .npy, each also with .gz")
    return kinds[last], zipped


def _number(text, where):
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        raise FileError(f"{where}: {_short(text)} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise FileError(f"{where}: lengths must be finite and >= 0; got {_short(text)}")
    return value


def _short(value):
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _choose(path, names, column):
    """Index of the wanted column."""
    if column is None:
        if len(names) == 1:
            return 0
        raise FileError(f"{path}: choose one with --column; columns: {', '.join(names)}")
    if column not in names:
        raise FileError(f"{path}: no column {column!r}; columns: {', '.join(names)}")
    return names.index(column)


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _lines(path, stream):
    """Lines of a stream; says behind which one a gzip file breaks off."""
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FileError(f"{path}: broken gzip file after line {number} ({error})") from None


def _read_csv(path, stream, column, delimiter):
    """Yields (where, value of one column) of every row; None for an empty cell."""
    rows = csv.reader(_lines(path, stream), delimiter=delimiter, strict=True)
    first = next(rows, None)
    if first is None:
        raise FileError(f"{path}: the file is empty")
    bare = all(_is_number(cell) for cell in first)  # no header: columns are named 1, 2, ...
    names = [str(i + 1) for i in range(len(first))] if bare else [c.strip() for c in first]
    try:
        index = _choose(path, names, column)
    except FileError:
        for _ in rows:  # a broken file is worse news than an open choice
            pass
        raise
    if bare:
        yield f"{path}, line 1", _number(first[index], f"{path}, line 1")
    blank = []  # of one column: an empty cell, unless nothing but such follows
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if not row:
            blank += [(where, None)] * (len(names) == 1)
            continue
        if len(row) != len(names):
            raise FileError(f"{where}: {len(row)} cells where the first line has {len(names)}")
        yield from blank
        blank.clear()
        yield where, _number(row[index], where) if row[index].strip() else None


def _parse(line, where):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(": line 1 ")[0]  # of the text given, not of the file
        raise FileError(f"{where}: not JSON ({reason[:60]})") from None


def _read_jsonl(path, stream, field):
    """Yields (where, number) of every line, or of one field of its object; None for a missing or
    null field.  The only field of the first object needs no name."""
    lines = ((f"{path}, line {n}", line) for n, line in enumerate(_lines(path, stream), 1)
             if line.strip())
    must_have = True  # the first object, and all when the field was not named
    for where, line in lines:
        value = _parse(line, where)
        if isinstance(value, dict):
            fields = f"fields: {', '.join(map(str, value))[:200]}"
            if field is None and len(value) != 1:
                for later, rest in lines:  # a broken file is worse news than an open choice
                    _parse(rest, later)
                raise FileError(f"{where}: choose a field with --field; {fields}")
            unnamed = field is None
            field = next(iter(value)) if unnamed else field
            if field not in value and must_have:
                raise FileError(f"{where}: no field {field!r}; {fields}")
            must_have = unnamed
            value = value.get(field)
            if value is None:
                yield where, None
                continue
        if isinstance(value, (bool, str, list, dict, type(None))):
            raise FileError(f"{where}: {_short(value)} is not a number")
        yield where, _number(value, where)


def _read_npy(path, stream):
    array = np.load(io.BytesIO(stream.read()), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iuf":
        shape = getattr(array, "shape", "?")
        raise FileError(f"{path}: must hold a one-dimensional array of numbers; got shape {shape}"
                        f", dtype {getattr(array, 'dtype', '?')}")
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if len(wrong):
        raise FileError(f"{path}, index {wrong[0]}: lengths must be finite and >= 0; got "
                        f"{array[wrong[0]]}")
    return array.astype(float)


def _taken(records, most):
    """(values above 0, their rows, {what was passed over: (how many, the first)})"""
    values, rows, left = array("d"), array("q"), {}
    for row, (where, value) in enumerate(records):
        if value:
            values.append(value)
            rows.append(row)
            if len(values) == most:
                break
        else:
            count, first = left.get(value, (0, where))
            left[value] = count + 1, first
    return np.array(values), np.array(rows), left


def _taken_of_array(path, values, most):
    rows = np.flatnonzero(values > 0)[:most]
    zeros = np.flatnonzero(values[:rows[-1] if len(rows) == most else None] == 0)
    left = {0.0: (len(zeros), f"{path}, index {zeros[0]}")} if len(zeros) else {}
    return values[rows], rows, left


def _left_out(path, left):
    """For example "left out 2 rows: 1 without a length (line 5) and 1 of length 0 (line 7)"."""
    if not left:
        return ""
    parts = [f"{count:,} {'without a length' if value is None else 'of length 0'} "
             f"({'the first: ' if count > 1 else ''}{where.removeprefix(f'{path}, ')})"
             for value, (count, where) in left.items()]
    total = sum(count for count, _ in left.values())
    return f"{path}: left out {total:,} row{'s' * (total > 1)}: {' and '.join(parts)}"


def _read_values(path, column, field, most):
    """As :func:`_taken`: the first ``most`` values above 0, or all."""
    kind, zipped = _kind(path)
    for option, value, suits in (("column", column, ("csv", "tsv")), ("field", field, ("jsonl",))):
        if value is not None and kind not in suits:
            raise FileError(f"{path}: --{option} is for {' and '.join('.' + s for s in suits)} "
                            f"files; leave it out with .{kind}")
    opener = gzip.open if zipped else open
    if kind == "npy":
        with opener(path, "rb") as stream:
            return _taken_of_array(path, _read_npy(path, stream), most)
    newline = None if kind == "jsonl" else ""
    with opener(path, "rt", encoding="utf-8-sig", newline=newline) as stream:
        if kind == "jsonl":
            values = _read_jsonl(path, stream, field)
        else:
            values = _read_csv(path, stream, column, "\t" if kind == "tsv" else ",")
        return _taken(values, most)


def read_lengths(path, column=None, field=None, per_unit=None, most=None):
    """Lengths from a file, as whole numbers of tokens.

    Parameters
    ----------
    path : str or Path
        ``.csv``, ``.tsv``, ``.jsonl`` or ``.npy``, each also gzipped (``.gz``).
    column : str, optional
        Column of a CSV or TSV file; needed when there are several.  Columns of a file without a
        header are named 1, 2, ...
    field : str, optional
        Field of the objects of a JSON lines file; needed when there are several.
    per_unit : float, optional
        Tokens per unit of the file, e.g. 0.25 for characters or 25 for seconds of sound; the
        product is rounded up.  Without it the file must hold whole numbers.
    most : int, optional
        Reading stops after this many lengths above 0; what follows is not looked at.

    Returns
    -------
    Lengths
        Tokens, the row of each, and what was left out: zeros and empty cells.

    Raises
    ------
    FileError
        Whatever is wrong with the file or its contents, in one line that says where.
    ValueError
        ``per_unit`` that is not positive and finite.

    Notes
    -----
    Never unpickles.  O(file), or O(what is read) with ``most``, but for ``.npy``.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from orchvlm.reading import read_lengths
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "sounds.csv"
    ...     _ = path.write_text("id,seconds\\n1,2.5\\n2,0.9\\n")
    ...     read_lengths(path, column="seconds", per_unit=25).tokens
    array([63, 23])
    """
    if per_unit is not None and not 0 < per_unit < math.inf:
        raise ValueError(f"per_unit must be positive and finite; got {per_unit}")
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path}: is a directory")
    try:
        values, row, left = _read_values(path, column, field, most)
    except FileError:
        raise
    except UnicodeDecodeError:
        raise FileError(f"{path}: not a text file in UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = "broken gzip file" if _kind(path)[1] else "cannot be read"
        raise FileError(f"{path}: {what} ({error})") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except (csv.Error, ValueError, MemoryError, SyntaxError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FileError(f"{path}: cannot be read ({reason[:120]})") from None
    return Lengths(_whole(path, values, per_unit), row, _left_out(path, left))


def _whole(path, values, per_unit):
    if per_unit is not None:
        values = np.ceil(values * per_unit)
    elif (values != np.floor(values)).any():
        raise FileError(f"{path}: lengths are not whole numbers of tokens; convert them with "
                        "--chars-per-token, --seconds-to-tokens or --pixels-per-token")
    if len(values) and values.max() > LONGEST:
        raise FileError(f"{path}: {values.max():.3g} tokens in one sequence; at most 2^40 make "
                        "sense")
    return values.astype(np.int64)
