"""Weights in Hugging Face folders: ``model.safetensors``, whole or in shards.

Reading is by memory map and refuses what does not add up before any number is used; writing goes
to a temporary file that is renamed when it is complete.
"""
import json
import math
import mmap
import struct
from pathlib import Path

import numpy as np

from ._files import read_object, short, write_whole

_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
           "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4"),
           "U8": np.dtype("u1")}
_HEADER_MOST_BYTES = 100 << 20  # what the format's own reader accepts
_SHARD_BYTES = 5 << 30
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A file that is no safetensors file, or a tensor that does not fit the model."""


class SafeTensors:
    """One memory-mapped file.

    Parameters
    ----------
    path : path-like

    Attributes
    ----------
    tensors : dict of str to (first byte, last byte, dtype, shape)
    metadata : dict of str to str
        What the file says besides.

    Raises
    ------
    ValueError
        The file is cut off, its header is no JSON, or offsets overlap, leave holes or do not
        agree with shapes.

    Notes
    -----
    The format: eight bytes with the header's length, a JSON header ``{name: {dtype, shape,
    data_offsets}}``, then the tensors without gaps.
    """

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as stream:
            size = self.path.stat().st_size
            if size < 8:
                raise CheckpointError(f"{self.path}: {size} bytes are no safetensors file")
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", self._map[:8])
        if length > min(size - 8, _HEADER_MOST_BYTES):
            raise CheckpointError(f"{self.path}: a header of {length} bytes in a file of {size}; "
                                  "the file is cut off or no safetensors file")
        self._start = 8 + length
        self.tensors = self._checked(self._parse(self._map[8:self._start]), size - self._start)

    def _parse(self, raw):
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=self._unique)
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: the header is no JSON: "
                                  f"{str(error)[:80]}") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the header is no object")
        self.metadata = header.pop("__metadata__", None) or {}
        return header

    def _unique(self, pairs):
        table = dict(pairs)
        if len(table) != len(pairs):
            raise CheckpointError(f"{self.path}: a name stands twice in the header")
        return table

    def _entry(self, name, entry):
        try:
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            first, last = entry["data_offsets"]
            numbers = [first, last, *shape]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{self.path}: {name}: dtype, shape or data_offsets missing or "
                                  f"not understood: {short(entry)}") from None
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise CheckpointError(f"{self.path}: {name}: sizes must be whole numbers >= 0")
        count = 1
        for n in shape:
            count *= n
        if last - first != count * dtype.itemsize:
            raise CheckpointError(f"{self.path}: {name}: {last - first} bytes for shape {shape} "
                                  f"of {entry['dtype']}")
        return first, last, entry["dtype"], tuple(shape)

    def _checked(self, header, data_bytes):
        tensors = {name: self._entry(name, entry) for name, entry in header.items()}
        end = 0
        for name, (first, last, _, _) in sorted(tensors.items(), key=lambda t: t[1][:2]):
            if first != end:
                raise CheckpointError(f"{self.path}: {name} begins at {first}, not at {end}")
            end = last
        if end != data_bytes:
            raise CheckpointError(f"{self.path}: tensors take {end} bytes, the file has "
                                  f"{data_bytes}; it is cut off or has a tail")
        return tensors

    def read(self, name):
        """The tensor as float32 (or its own dtype when that is float32 or an integer)."""
        first, last, kind, shape = self.tensors[name]
        raw = np.frombuffer(self._map, dtype=_DTYPES[kind], offset=self._start + first,
                            count=(last - first) // _DTYPES[kind].itemsize).reshape(shape)
        if kind == "BF16":
            return widened(raw)
        # After tensors of smaller numbers a tensor may stand at any address.
        return raw.astype(np.float32) if kind in ("F16", "F64") else np.require(raw, None, "A")


def widened(bits):
    """bfloat16 as uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values):
    """float32 -> bfloat16 as uint16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def open_folder(folder):
    """{tensor name: SafeTensors that holds it} of a folder.

    Raises
    ------
    FileNotFoundError
        Neither ``model.safetensors`` nor ``model.safetensors.index.json`` is there.
    ValueError
        A broken index or file; an index that names a file outside the folder.
    """
    folder = Path(folder)
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.exists() and not index.exists():
        file = SafeTensors(single)
        return dict.fromkeys(file.tensors, file)
    if not index.exists():
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor its index; is it a "
                                "model's folder?")
    try:
        names = read_object(index, CheckpointError)["weight_map"]
        files = set(names.values())
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index}: no weight_map of names and files") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is no file name in this folder")
    opened = {file: _shard(index, file) for file in sorted(files)}
    for name, file in names.items():
        if name not in opened[file].tensors:
            raise CheckpointError(f"{index}: {file} has no tensor {name}")
    return {name: opened[file] for name, file in names.items()}


def _shard(index, file):
    try:
        return SafeTensors(index.parent / file)
    except FileNotFoundError:
        raise
    except OSError as error:  # no name, or no file, that can be read
        raise CheckpointError(f"{index}: {file:.80}: {error.strerror}") from None


def _narrow(name, dtype):
    """Whether a tensor is stored in bfloat16: the routers' corrections never are, as they decide
    between scores that differ by less."""
    return dtype == "bfloat16" and not name.endswith("e_score_correction_bias")


def _tensor_bytes(name, shape, dtype):
    return math.prod(shape) * (2 if _narrow(name, dtype) else 4)


def stored(name, values, dtype):
    """A tensor's numbers as a file of this dtype holds them."""
    if not _narrow(name, dtype):
        return np.ascontiguousarray(values, "<f4")
    return values if values.dtype == np.uint16 else narrowed(values)


def write_file(path, tensors, dtype, metadata=None):
    """Writes one file; tensors: [(name, shape, function that gives float32, or what
    :func:`stored` made of it)], in order."""
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, shape, _ in tensors:
        end = offset + _tensor_bytes(name, shape, dtype)
        header[name] = {"dtype": "BF16" if _narrow(name, dtype) else "F32", "shape": list(shape),
                        "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(stream):
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, _, get in tensors:
            stream.write(stored(name, get(), dtype).tobytes())
    write_whole(path, write)


def in_files(tensors, dtype, shard_bytes=_SHARD_BYTES):
    """How a model's tensors are spread over files.

    Parameters
    ----------
    tensors : list of (name, shape, get)
    dtype : {"float32", "bfloat16"}
    shard_bytes : int
        A file of more tensors than one has no more.

    Returns
    -------
    files : list of (str, list)
        Name and tensors of each.
    index : bytes or None
        Of ``model.safetensors.index.json``, where there are several.
    """
    shards, used = [[]], 0
    for entry in tensors:
        count = _tensor_bytes(*entry[:2], dtype)
        if shards[-1] and used + count > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += count
    if len(shards) == 1:
        return [("model.safetensors", shards[0])], None
    files = [(f"model-{i:05}-of-{len(shards):05}.safetensors", shard)
             for i, shard in enumerate(shards, 1)]
    total = sum(_tensor_bytes(*entry[:2], dtype) for entry in tensors)
    index = {"metadata": {"total_size": total},
             "weight_map": {entry[0]: file for file, shard in files for entry in shard}}
    return files, json.dumps(index, indent=2).encode()


def write_folder(folder, tensors, dtype="float32", shard_bytes=_SHARD_BYTES):
    """Writes tensors ``[(name, shape, get)]`` as one file, or as shards with an index."""
    folder = Path(folder)
    files, index = in_files(tensors, dtype, shard_bytes)
    for file, some in files:
        write_file(folder / file, some, dtype)
    place = folder / INDEX
    if index is None:
        place.unlink(missing_ok=True)
        return
    write_whole(place, lambda stream: stream.write(index))
    (folder / "model.safetensors").unlink(missing_ok=True)
