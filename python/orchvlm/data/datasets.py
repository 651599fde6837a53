"""JSON lines and arrays: samples are read where they stand, and never held as a whole."""
import json
import os
import re
from pathlib import Path

import numpy as np

from .assets import Asset, DataError, Record, from_address, inside, is_address

MOST_LINE = 64 << 20  # bytes of one line, pictures in base64 included
_SOURCES = {"image", "video", "audio", "images", "videos", "audios", "image_url", "video_url",
            "audio_url", "url", "path"}


def parse_record(text, where):
    """A JSON object from one line.

    Parameters
    ----------
    text : str or bytes
        The line.
    where : str
        What messages call it.

    Returns
    -------
    dict

    Raises
    ------
    DataError
        Not JSON, or no object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(": line 1 ")[0]
        raise DataError(f"{where}: not JSON ({reason[:60]})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a sample must be an object; got {type(value).__name__}")
    return value


def resolved(sample, find, where):
    """The sample with every medium's file name replaced by an :class:`Asset`.

    Parameters
    ----------
    sample : dict
        As :func:`orchvlm.data.read_messages` takes it, with strings for media.
    find : callable
        ``find(name, where)`` returns the Asset of a relative name, or raises DataError.
    where : str
        What messages call it.

    Returns
    -------
    Record
        A copy.
    """
    def source(value):
        if isinstance(value, str):
            return from_address(value, where) if is_address(value) else find(value, where)
        if isinstance(value, list):
            return [source(entry) for entry in value]
        if isinstance(value, dict):
            return {key: source(entry) if key in _SOURCES else entry
                    for key, entry in value.items()}
        return value

    def part(value):
        if not isinstance(value, dict):
            return value
        return {key: source(entry) if key in _SOURCES else entry for key, entry in value.items()}

    sample = part(sample)
    for field in ("messages", "conversations"):
        turns = sample.get(field)
        if isinstance(turns, list):
            sample[field] = [
                {**turn, "content": [part(entry) for entry in turn["content"]]}
                if isinstance(turn, dict) and isinstance(turn.get("content"), list) else turn
                for turn in turns]
    return Record(sample, where)


class JsonLines:
    """The samples of a ``.jsonl`` file.

    Parameters
    ----------
    path : path
        One JSON object per line; empty lines are passed over.
    root : path, optional
        The folder below which the files of its pictures, videos and sounds are; by default the
        file's own.  A name that leaves it is refused, links included.

    Raises
    ------
    DataError
        A file that cannot be read.

    Notes
    -----
    Lines are found once and read when they are asked for: 8 bytes of memory a line.

    Examples
    --------
    >>> import pathlib, tempfile, orchvlm
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "a.jsonl"
    >>> _ = path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\\n')
    >>> data = orchvlm.data.JsonLines(path)
    >>> len(data), data[0]
    (1, {'messages': [{'role': 'user', 'content': 'Hi'}]})
    """

    def __init__(self, path, root=None):
        try:
            self.path = Path(path)
            self.root = self.path.parent if root is None else Path(root)
        except TypeError:
            raise TypeError(f"path and root must be paths; got {type(path).__name__} and "
                            f"{type(root).__name__}") from None
        self._starts = self._scan()

    def _scan(self):
        starts, place, number = [], 0, 0
        try:
            with open(self.path, "rb") as stream:
                while line := stream.readline(MOST_LINE + 1):
                    number += 1
                    if len(line) > MOST_LINE:
                        raise DataError(f"{self.path}, line {number}: above {MOST_LINE} bytes")
                    if not line.isspace():
                        starts.append((place, number))
                    place += len(line)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path}: {getattr(error, 'strerror', None) or error}") from None
        return np.array(starts, np.int64).reshape(-1, 2)

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        text, where = self._read(*self._starts[index].tolist()), self.where_of(index)
        return resolved(parse_record(text.removeprefix(b"\xef\xbb\xbf"), where), self._find, where)

    def where_of(self, index):
        """What messages call a sample.

        Parameters
        ----------
        index : int

        Returns
        -------
        str
            File and line, the first being 1.
        """
        return f"{self.path}, line {self._starts[index][1]}"

    def _read(self, place, number):
        """The text of a sample."""
        with open(self.path, "rb") as stream:
            stream.seek(place, os.SEEK_SET)
            return stream.readline(MOST_LINE)

    def _find(self, name, where):
        return inside(self.root, name, where)

    def __repr__(self):
        return f"<{type(self).__name__}: {len(self)} samples of {self.path}>"


class JsonArray(JsonLines):
    """The samples of a ``.json`` file, which holds one array of objects, as LLaVA's do.

    Parameters
    ----------
    path : path
    root : path, optional
        As of :class:`JsonLines`.

    Raises
    ------
    DataError
        A file that cannot be read, or is no array; the entry at which it stops to be one.

    Notes
    -----
    The file is read once, whole, to find its entries; then 16 bytes of memory an entry.

    Examples
    --------
    >>> import pathlib, tempfile, orchvlm
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "a.json"
    >>> _ = path.write_text('[{"conversations": [{"from": "human", "value": "Hi"}]}]')
    >>> orchvlm.data.JsonArray(path)[0]
    {'conversations': [{'from': 'human', 'value': 'Hi'}]}
    """

    def _scan(self):
        try:
            text = self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{self.path}: not a text file in UTF-8") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise DataError(f"{self.path}: {getattr(error, 'strerror', None) or error}") from None
        return np.array(list(_entries(text, self.path)), np.int64).reshape(-1, 2)

    def where_of(self, index):
        """What messages call a sample.

        Parameters
        ----------
        index : int

        Returns
        -------
        str
            File and byte.
        """
        return f"{self.path}, byte {self._starts[index][0]}"

    def _read(self, place, size):
        with open(self.path, "rb") as stream:
            stream.seek(place, os.SEEK_SET)
            return stream.read(size)


_SPACE = re.compile(r"[ \t\n\r\ufeff]*")


def _entries(text, path):
    """(first byte, bytes) of each entry of an array."""
    decode, past = json.JSONDecoder().raw_decode, _SPACE.match
    at = past(text, 0).end()
    if text[at:at + 1] != "[":
        raise DataError(f"{path}: must hold an array of objects, [...]; for one object per line "
                        "name the file .jsonl")
    at = past(text, at + 1).end()
    place, number, more = len(text[:at].encode()), 0, text[at:at + 1] != "]"
    while more:
        try:
            end = decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise DataError(f"{path}, entry {number}: not JSON ({reason[:60]})") from None
        size = len(text[at:end].encode())
        yield place, size
        at, number = past(text, end).end(), number + 1
        more = text[at:at + 1] == ","
        if more:
            at = past(text, at + 1).end()
            place += size + len(text[end:at].encode())
        elif text[at:at + 1] != "]":
            raise DataError(f"{path}: a comma or the array's end is missing behind entry "
                            f"{number - 1}")
    if text[past(text, at + 1).end():]:
        raise DataError(f"{path}: text behind the array's end")


def held(name, content):
    """Bytes that are in memory already, as an :class:`Asset`."""
    return Asset(name, lambda: content)
