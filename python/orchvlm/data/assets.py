"""Where pictures and sounds come from: files inside a root, members of archives, data addresses."""
import base64
import binascii
import io
import os
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath

MOST_BYTES = 1 << 30  # of one picture, sound or video: above it a file is a mistake or an attack


class Record(dict):
    """A sample that knows its place, for messages.

    Parameters
    ----------
    values : mapping
        Of the sample.
    where : str or None
        E.g. the file and line; :meth:`like` takes another sample's.
    """

    def __init__(self, values, where):
        super().__init__(values)
        self.where = where

    @classmethod
    def like(cls, sample, values):
        """What was made of a sample, at its place."""
        return cls(values, getattr(sample, "where", None))


class DataError(ValueError):
    """A sample, file or archive that cannot be used; the message is one line and says where."""


class NoRecordsError(DataError):
    """An archive that can be read has nothing of the split that was asked for."""


def need(module, package, extra="data"):
    """Imports an optional module, or says what to install.

    Parameters
    ----------
    module : str
        What to import.
    package : str
        The name that pip knows it by.
    extra : str
        The extra of orchvlm that brings it.

    Returns
    -------
    module

    Raises
    ------
    ImportError
        It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if error.name and not module.startswith(error.name.split(".")[0]):
            raise  # it is there, and broken in itself
        raise ImportError(f"this needs {package}: pip install {package}, or pip install "
                          f"'orchvlm[{extra}]'") from None


@dataclass(frozen=True)
class Asset:
    """A named source of bytes, read when it is needed and not before.

    Parameters
    ----------
    name : str
        For messages, and for the kind of file by its suffix.
    read : callable
        Returns the bytes.
    path : Path, optional
        The file or folder, where there is one.

    Raises
    ------
    TypeError
        ``read`` cannot be called.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.data.Asset("a.txt", lambda: b"hello").read()
    b'hello'
    """

    name: str
    read: object = field(repr=False)
    path: Path = None

    def __post_init__(self):
        if not callable(self.read):
            raise TypeError(f"Asset.read must be callable; got {type(self.read).__name__}")


def read_file(path):
    """The bytes of a file of reasonable size."""
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MOST_BYTES:
                raise DataError(f"{path}: {size} bytes; at most {MOST_BYTES} are read at once")
            return stream.read(MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def check_name(name, where):
    """A relative name with forward slashes that stays below its root, or a :class:`DataError`."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: a file name must be a string that is not empty; got {name!r}")
    pure = PurePosixPath(name)
    if (not pure.parts or "\\" in name or "\0" in name or pure.is_absolute()
            or ".." in pure.parts or ":" in pure.parts[0]):
        raise DataError(f"{where}: {name[:80]!r} leaves its folder; names must be relative, with "
                        "forward slashes and without '..'")
    return str(pure)


def inside(root, name, where):
    """The file ``name`` below ``root``, links followed, as an :class:`Asset`."""
    name = check_name(name, where)
    root = Path(root).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise DataError(f"{where}: {name[:80]!r} is a link out of {root}")
    if not path.exists():
        raise DataError(f"{where}: no file {name[:80]!r} in {root}")
    return Asset(name, lambda: read_file(path), path)


def from_address(text, where):
    """A ``data:`` address as an :class:`Asset`; nothing is ever fetched from a network."""
    scheme = text.split(":", 1)[0].lower()
    if scheme != "data":
        raise DataError(f"{where}: {text[:60]!r} would have to be fetched; give a file, bytes or "
                        "a data: address")
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(f"{where}: a data: address must be 'data:TYPE;base64,...'")
    return _decoded(body, "data:", f"{where}: the data: address")


def _decoded(text, name, what):
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{what} is not base64") from None
    return Asset(name, lambda: content)


def is_address(text):
    """Does the text name a scheme, as in ``http://`` or ``data:``?"""
    return text.startswith("data:") or "://" in text[:16]


def as_asset(source, what):
    """What a media part holds, if it is bytes in some form; None for arrays and objects."""
    if isinstance(source, Asset):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
        return Asset(what, lambda: content)
    if isinstance(source, dict):
        name = source.get("path")
        if source.get("array") is not None:  # a sound that is decoded already
            return None
        if isinstance(source.get("bytes"), bytes):  # as datasets keeps it
            return as_asset(source["bytes"], name if isinstance(name, str) else what)
        if isinstance(source.get("data"), str):  # as chats over the network carry sounds
            return _decoded(source["data"], what, f"{what}: 'data'")
        return None if name is None or isinstance(name, dict) else as_asset(name, what)
    if isinstance(source, str) and is_address(source):
        if source.startswith("file://"):
            return as_asset(Path(source[7:]), what)
        return from_address(source, what)
    if isinstance(source, (str, Path)):
        path = Path(source)
        return Asset(str(path), lambda: read_file(path), path)
    if isinstance(source, io.IOBase):
        return Asset(what, lambda: source.read(MOST_BYTES))
    return None
