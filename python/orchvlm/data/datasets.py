"""JSON lines: one sample per line, read where it stands and never held as a whole."""
import json
import os
from pathlib import Path

import numpy as np

from .assets import Asset, DataError, from_address, inside, is_address

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
    dict
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
    return sample


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
        place, number = self._starts[index].tolist()
        with open(self.path, "rb") as stream:
            stream.seek(place, os.SEEK_SET)
            line = stream.readline(MOST_LINE)
        where = f"{self.path}, line {number}"
        return resolved(parse_record(line.removeprefix(b"\xef\xbb\xbf"), where), self._find, where)

    def _find(self, name, where):
        return inside(self.root, name, where)

    def __repr__(self):
        return f"<JsonLines: {len(self)} samples of {self.path}>"


def held(name, content):
    """Bytes that are in memory already, as an :class:`Asset`."""
    return Asset(name, lambda: content)
