"""WebDataset shards: tar files whose members with one stem are one sample, read as a stream."""
import glob
import tarfile
import zlib
from pathlib import Path

from .assets import MOST_BYTES, DataError, Record, check_name
from .datasets import held, parse_record, resolved

PICTURES = {"png", "jpg", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"}
SOUNDS = {"wav"}
VIDEOS = {"mp4", "webm", "mkv", "avi", "mov"}
TEXTS = {"txt", "text", "caption"}
_BROKEN = (OSError, tarfile.TarError, EOFError, ValueError, zlib.error, KeyError)


class TarShards:
    """The samples of one or more tar files, in order.

    Members that stand side by side and share the part of their name before the first dot are one
    sample: ``0001.png`` and ``0001.json``, say.  A ``.json`` with ``messages`` or
    ``conversations`` is the sample, and its media are named as the members are, whole or by
    suffix (``png``).  Otherwise the pictures and sounds are shown in order and ``.txt`` is what
    the assistant says of them.

    Parameters
    ----------
    paths : path or list of path
        A pattern such as ``data/*.tar`` is expanded and sorted.
    question : str
        What the user says where a sample has only a caption.

    Raises
    ------
    DataError
        No such shard; while reading: broken archives, members that leave their folder, links and
        devices, members above 2^30 bytes.

    Notes
    -----
    Nothing is written to disk.  The shards are read front to back; :meth:`stream` skips what was
    seen before, so that a run can go on where it stopped.  Behind a sample that cannot be used, or
    a shard that breaks off, iteration goes on.  What macOS adds to archives (``._1.png``) is passed
    over.

    Examples
    --------
    >>> import io, pathlib, tarfile, tempfile, orchvlm
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "a.tar"
    >>> with tarfile.open(path, "w") as tar:
    ...     for name, content in (("7.png", b"..."), ("7.txt", b"A cat")):
    ...         member = tarfile.TarInfo(name)
    ...         member.size = len(content)
    ...         tar.addfile(member, io.BytesIO(content))
    >>> [sample["id"] for sample in orchvlm.data.TarShards(path)]
    ['7']
    """

    def __init__(self, paths, question="Describe this."):
        if isinstance(paths, (str, Path)):
            paths = sorted(glob.glob(str(paths))) or [paths]
        try:
            self.paths = [Path(path) for path in paths]
        except TypeError:
            raise TypeError(f"paths must be a path or a list of paths; got "
                            f"{type(paths).__name__}") from None
        if not isinstance(question, str):
            raise TypeError(f"question must be a string; got {type(question).__name__}")
        self.question, self._count = question, None
        for path in self.paths:
            if "\0" in str(path) or not path.is_file():
                raise DataError(f"{str(path)[:200]!r}: no such shard")

    def __iter__(self):
        return self.stream()

    def stream(self, skip=0):
        """Samples, from a place on.

        Parameters
        ----------
        skip : int
            Samples to pass over; their headers are read and their contents are not.

        Returns
        -------
        iterator of dict
            Samples with ``id``.  DataError comes out of it in the place of one that cannot be used;
            the next one stands behind that.
        """
        return _Samples(self, skip)

    def n_samples(self):
        """How many samples a pass gives, those that cannot be used among them.

        Returns
        -------
        int
            Headers are read for it, once.
        """
        if self._count is None:
            self._count = sum(1 for path in self.paths for _ in self._groups(path))
        return self._count

    def _groups(self, path):
        """(key, {suffix: reader}) of neighbours, or (key, DataError); a reader works until the next
        group is asked."""
        key, members = None, {}
        try:
            with tarfile.open(path, "r:*") as tar:
                for member in tar:
                    try:
                        this, suffix = self._named(member, path)
                    except DataError as error:  # of this member alone
                        if members:
                            yield key, members
                        yield member.name, error
                        key, members = None, {}
                        continue
                    if suffix is None:
                        continue
                    if this != key and members:
                        yield key, members
                        members = {}
                    key = this
                    members[suffix.lower()] = _Reader(tar, member, path)
                if members:
                    yield key, members
        except _BROKEN as error:
            yield key, _broken(path, error)

    def _named(self, member, path):
        """(what neighbours share, suffix or None) of a member that is read, or passed over."""
        if member.isdir():
            return None, None
        name = self._checked(member, path)
        folder, _, base = name.rpartition("/")
        if base.startswith("._"):
            return None, None
        stem, dot, suffix = base.partition(".")
        if not dot or not stem:
            raise DataError(f"{path}: member {name[:80]!r} has no stem and suffix")
        return f"{folder}/{stem}" if folder else stem, suffix

    @staticmethod
    def _checked(member, path):
        name = check_name(member.name, str(path))
        if not member.isreg():
            raise DataError(f"{path}: member {name[:80]!r} is a link or device; only files are "
                            "read")
        if member.size > MOST_BYTES:
            raise DataError(f"{path}: member {name[:80]!r} has {member.size} bytes; at most "
                            f"{MOST_BYTES} are read")
        return name

    def _sample(self, key, files, where):
        if "json" in files:
            record = parse_record(files["json"], where)
            if "messages" in record or "conversations" in record:
                def find(name, where):
                    suffix = check_name(name, where).rpartition("/")[2]
                    suffix = suffix.partition(".")[2] if "." in suffix else suffix
                    if suffix.lower() not in files:
                        raise DataError(f"{where}: no member {name[:80]!r} beside it")
                    return held(name, files[suffix.lower()])
                return Record({"id": key, **resolved(record, find, where)}, where)
        caption = next((files[name] for name in files if name in TEXTS), None)
        parts = []
        for suffix, content in files.items():
            kind = suffix.rpartition(".")[2]
            for medium, kinds in (("image", PICTURES), ("audio", SOUNDS), ("video", VIDEOS)):
                if kind in kinds:
                    parts.append({"type": medium, medium: held(f"{key}.{suffix}", content)})
        if caption is None:
            raise DataError(f"{where}: neither a .json with messages nor a .txt; members: "
                            f"{', '.join(files)[:80]}")
        text = caption.decode("utf-8", "replace").strip()
        if parts:
            parts.append({"type": "text", "text": self.question})
            return {"id": key, "messages": [{"role": "user", "content": parts},
                                            {"role": "assistant", "content": text}]}
        return {"id": key, "messages": [{"role": "assistant", "content": text}]}

    def __repr__(self):
        return f"<TarShards: {len(self.paths)} shards>"


def _broken(path, error):
    reason = str(error).partition("\n")[0].rstrip(":")
    return DataError(f"{path}: broken archive ({reason[:80]})")


class _Samples:
    """What is left of some shards; an error ends none but its own sample."""

    def __init__(self, shards, skip):
        self._shards, self._skip = shards, skip
        self.where = None  # the last one stands
        self._groups = ((path, *group) for path in shards.paths for group in shards._groups(path))

    def __iter__(self):
        return self

    def __next__(self):
        for path, key, members in self._groups:
            if self._skip > 0:
                self._skip -= 1
                continue
            self.where = f"{path}, {key}" if key else str(path)
            if isinstance(members, DataError):
                raise members
            try:
                files = {name: content() for name, content in members.items()}
            except DataError:
                raise
            except _BROKEN as error:
                raise _broken(path, error) from None
            return self._shards._sample(key, files, self.where)
        raise StopIteration


class _Reader:
    """Reads a member when called."""

    def __init__(self, tar, member, path):
        self._tar, self._member, self._path = tar, member, path

    def __call__(self):
        stream = self._tar.extractfile(self._member)
        content = stream.read(MOST_BYTES)
        if len(content) != self._member.size:
            raise DataError(f"{self._path}: member {self._member.name[:80]!r} breaks off")
        return content
