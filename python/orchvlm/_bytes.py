"""The one container of plans as bytes: named arrays and a small header, deterministic, checked.

Layout (safetensors, so that any tool which reads those reads a plan)::

    uint64 little-endian   length of the JSON text
    JSON text              {"__metadata__": {kind, version, header, sha256}, name: {dtype, shape,
                           data_offsets}, ...}, padded with spaces to a multiple of 8
    raw little-endian data in order of the names

Equal content gives equal bytes, so a plan's digest is the SHA-256 of its bytes.  Reading trusts
nothing: text that this module would not have written itself is refused.
"""
import hashlib
import json
import math

import numpy as np

_VERSION = "1"
_DTYPES = {"I64": np.dtype("<i8"), "F64": np.dtype("<f8")}
_CODES = {np.dtype(np.int64): "I64", np.dtype(np.float64): "F64"}
_MAX_TEXT = 1 << 24
_MAX_NDIM = 4


def _dump(value):
    return json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))


def _text(kind, header, entries, body):
    """The padded JSON text of a container; its checksum covers everything else."""
    metadata = {"kind": kind, "version": _VERSION, "header": header}
    checksum = hashlib.sha256(_dump([metadata, entries]).encode("ascii"))
    checksum.update(body)
    metadata["sha256"] = checksum.hexdigest()
    text = _dump({"__metadata__": metadata, **entries}).encode("ascii")
    return text + b" " * (-len(text) % 8)


def pack(kind, arrays, header=None):
    """Bytes of named arrays and a header.

    Parameters
    ----------
    kind : str
        What the bytes are, e.g. ``"orchvlm.sequence_plan"``; ``unpack`` asks for it.
    arrays : dict of str to ndarray
        int64 or float64, of up to four dimensions.
    header : dict, optional
        JSON values (no NaN, no infinity: put such floats into an array).

    Returns
    -------
    bytes
        The same for equal content, whatever the order of the dictionaries.

    Raises
    ------
    TypeError
        An array is neither int64 nor float64.
    ValueError
        A name is reserved, or the header is not JSON.

    Examples
    --------
    >>> import numpy as np
    >>> data = pack("example", {"x": np.arange(3)}, {"a": 1})
    >>> arrays, header = unpack("example", data)
    >>> arrays["x"].tolist(), header
    ([0, 1, 2], {'a': 1})
    """
    entries, parts, offset = {}, [], 0
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        code = _CODES.get(array.dtype)
        if code is None:
            raise TypeError(f"array {name!r} must be int64 or float64; got {array.dtype}")
        if name == "__metadata__" or array.ndim > _MAX_NDIM:
            raise ValueError(f"array {name!r}: reserved name, or more than {_MAX_NDIM} dimensions")
        part = array.astype(_DTYPES[code], copy=False).tobytes()
        entries[name] = {"dtype": code, "shape": list(array.shape),
                         "data_offsets": [offset, offset + len(part)]}
        offset += len(part)
        parts.append(part)
    body = b"".join(parts)
    # safetensors wants metadata values to be strings, so the header is JSON inside JSON.
    canonical = json.dumps(header or {}, allow_nan=False, sort_keys=True, separators=(",", ":"))
    text = _text(kind, canonical, entries, body)
    return len(text).to_bytes(8, "little") + text + body


def _refuse(reason):
    raise ValueError(f"not valid plan bytes: {reason}")


def _parse(text):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("not valid plan bytes: the header is not JSON") from error
    return value if isinstance(value, dict) else _refuse("the header is not an object")


def _split(kind, data):
    """(kind's header text, entries, body), with every field's type checked."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"plan bytes must be bytes-like; got {type(data).__name__}")
    data = bytes(data)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_TEXT, len(data) - 8):
        _refuse(f"{len(data)} bytes cannot hold a header of {length}")
    entries, body = _parse(data[8:8 + length]), data[8 + length:]
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("header"), str):
        _refuse("no metadata")
    if metadata.get("kind") != kind:
        _refuse(f"they hold {str(metadata.get('kind'))[:80]!r}; expected {kind!r}")
    if metadata.get("version") != _VERSION:
        _refuse(f"version {str(metadata.get('version'))[:20]!r}; this is {_VERSION!r}")
    try:
        text = _text(kind, metadata["header"], entries, body)
    except (ValueError, RecursionError):
        _refuse("the header cannot be written back")
    if text != data[8:8 + length]:
        _refuse("checksum or layout differs: they were changed or cut")
    return metadata["header"], entries, body


def _array(name, entry, body, begin):
    """The array of one entry whose data must begin at `begin`, and where it ends."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"bad entry {name[:80]!r}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None or not isinstance(shape, list) or len(shape) > _MAX_NDIM or not all(
            type(size) is int and 0 <= size <= len(body) for size in shape):
        _refuse(f"bad dtype or shape of {name[:80]!r}")
    end = begin + math.prod(shape) * dtype.itemsize
    if offsets != [begin, end] or end > len(body):
        _refuse(f"bad offsets of {name[:80]!r}")
    flat = np.frombuffer(body, dtype, math.prod(shape), begin)
    return flat.astype(dtype.newbyteorder("=")).reshape(shape), end


def unpack(kind, data):
    """Arrays and header of bytes that ``pack`` made; refuses everything else.

    Parameters
    ----------
    kind : str
        What the bytes must be.
    data : bytes-like
        Untrusted.

    Returns
    -------
    arrays : dict of str to ndarray
        Owned copies, int64 or float64.
    header : dict

    Raises
    ------
    TypeError
        ``data`` is not bytes-like.
    ValueError
        Cut, changed, of another kind or version, or not in this layout.

    Notes
    -----
    The checksum finds accidents, not attackers: the caller still checks what the arrays say.
    """
    header, entries, body = _split(kind, data)
    arrays, offset = {}, 0
    for name, entry in entries.items():
        arrays[name], offset = _array(name, entry, body, offset)
    if offset != len(body) or list(entries) != sorted(entries):
        _refuse("data left over, or names out of order")
    return arrays, _parse(header)


def digest(data):
    """SHA-256 of plan bytes, in hex."""
    return hashlib.sha256(data).hexdigest()
