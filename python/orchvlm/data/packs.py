"""Zip files with a ``records.jsonl``: one record per sample, its files beside it in the zip."""
import threading
import zipfile
import zlib
from pathlib import Path

from .assets import MOST_BYTES, Asset, DataError, NoRecordsError, check_name
from .datasets import parse_record, resolved


class ZipPack:
    """The records of a zip file, as samples.

    Parameters
    ----------
    path : path
        The zip file.
    records : str
        The member that holds one JSON object per line; files are named relative to its folder.
    convert : callable, optional
        Makes a sample of a record whose media are :class:`Asset`; by default the record is one.
    split : str, optional
        Only records whose ``split`` is this.
    keep : callable, optional
        Only records, as they are written, of which this is true.

    Raises
    ------
    TypeError
        Arguments of the wrong kind.
    DataError
        A file that is no zip, a member or line that is broken, a name that leaves its folder.

    Notes
    -----
    Members are unpacked one by one, in memory; one above 2^30 bytes, as its header or its
    contents have it, is refused.  Safe to read from several threads.

    Examples
    --------
    >>> import pathlib, tempfile, zipfile, orchvlm
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "a.zip"
    >>> with zipfile.ZipFile(path, "w") as pack:
    ...     pack.writestr("records.jsonl", '{"image": "a.png", "caption": "cat"}')
    ...     pack.writestr("a.png", b"...")
    >>> data = orchvlm.data.ZipPack(path)
    >>> len(data), data[0]
    (1, {'image': Asset(name='a.png', path=None), 'caption': 'cat'})
    """

    def __init__(self, path, records="records.jsonl", convert=None, split=None, keep=None):
        if not isinstance(path, (str, Path)) or not isinstance(records, str):
            raise TypeError(f"path and records must be a path and a name; got "
                            f"{type(path).__name__} and {type(records).__name__}")
        for name, value in (("convert", convert), ("keep", keep)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable; got {type(value).__name__}")
        self.path, self.split, self._convert = Path(path), split, convert
        self._lock = threading.Lock()
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise DataError(f"{str(path)[:200]}: no readable zip file ({str(error)[:80]})"
                            ) from None
        self._folder = records.rpartition("/")[0]
        self._records = []
        for number, line in enumerate(self._read(records, records).splitlines(), 1):
            if line.strip():
                record = parse_record(line, f"{self.path}, {records}, line {number}")
                if (split is None or record.get("split") == split) and (
                        keep is None or keep(record)):
                    self._records.append((number, record))

    def _read(self, name, where):
        """The bytes of a member, no more than it claims and no more than is sensible."""
        name = check_name(name, str(where))
        try:
            with self._lock:
                info = self._zip.getinfo(name)
                if info.file_size > MOST_BYTES or info.flag_bits & 1:
                    raise DataError(f"{self.path}: member {name[:80]!r} is encrypted or above "
                                    f"{MOST_BYTES} bytes")
                with self._zip.open(info) as stream:
                    content = stream.read(info.file_size + 1)
        except KeyError:
            raise DataError(f"{where}: no member {name[:80]!r} in {self.path}") from None
        except (OSError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError,
                RuntimeError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: member {name[:80]!r} is broken ({str(error)[:60]})"
                            ) from None
        if len(content) > info.file_size:
            raise DataError(f"{self.path}: member {name[:80]!r} holds more than it claims")
        return content

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        record = resolved(self._records[index][1], self._find, self.where_of(index))
        return record if self._convert is None else self._convert(record)

    def where_of(self, index):
        """What messages call a sample.

        Parameters
        ----------
        index : int

        Returns
        -------
        str
            File and line of its records, the first being 1.
        """
        return f"{self.path}, record {self._records[index][0]}"

    def record(self, index):
        """A record as it is written.

        Parameters
        ----------
        index : int
            Which.

        Returns
        -------
        dict
        """
        return dict(self._records[index][1])

    def _find(self, name, where):
        full = f"{self._folder}/{check_name(name, where)}" if self._folder else name
        return Asset(name, lambda: self._read(full, where))

    def __repr__(self):
        words = f", split {self.split}" if self.split is not None else ""
        return f"<ZipPack: {len(self)} records of {self.path}{words}>"


def _asked(medium, source, question, answer, **more):
    parts = [{"type": medium, medium: source}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts},
                         {"role": "assistant", "content": answer}],
            "answer": answer, "check": "exact", **more}


def _is_screen(record):
    return record.get("category") == "screenshot"


def _caption(record):
    screen = _is_screen(record)
    question = "Describe the screen." if screen else "What is this?"
    return _asked("image", record["image"], question, record["caption"],
                  kind="screenshot" if screen else "emoji")


def _nlvr(record):
    question = f"{record['sentence'].strip().rstrip('.')}. True or false?"
    return _asked("image", record["image"], question, "true" if record["label"] else "false",
                  kind="nlvr")


def _nlvr_caption(record):
    return _asked("image", record["image"], "What is in each box?", record["caption"],
                  kind="nlvr_caption")


def _digit(record):
    return _asked("audio", record["audio"], "Which digit?", record["text"], kind="digit")


# Member, what makes a sample of a record, which records.
KINDS = {"captions": ("records.jsonl", _caption, None),
         "emoji": ("records.jsonl", _caption, lambda record: not _is_screen(record)),
         "screens": ("records.jsonl", _caption, _is_screen),
         "nlvr": ("nlvr/records.jsonl", _nlvr, None),
         "nlvr_captions": ("nlvr/records.jsonl", _nlvr_caption, None),
         "digits": ("fsdd/records.jsonl", _digit, None)}


def load_pack(path, kind, split=None):
    """One of the known packs, as questions with answers.

    Parameters
    ----------
    path : path
        The zip file.
    kind : str
        ``captions`` (a picture and its name or description), of these ``emoji`` or ``screens``
        alone, ``nlvr`` (is a sentence true of a picture?), ``nlvr_captions`` (what is in each of
        its boxes?) or ``digits`` (a spoken digit).
    split : str, optional
        ``train``, ``val`` or ``test``, where the pack has it.

    Returns
    -------
    ZipPack

    Raises
    ------
    ValueError
        An unknown kind.
    DataError
        A broken file; as a NoRecordsError, nothing of this split in it.

    Examples
    --------
    >>> import orchvlm
    >>> digits = orchvlm.data.load_pack("digits.zip", "digits", "train")     # doctest: +SKIP
    >>> digits[0]["answer"]                                                  # doctest: +SKIP
    'zero'
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r:.40}")
    records, convert, keep = KINDS[kind]

    def checked(record):
        try:
            return convert(record)
        except KeyError as error:
            raise DataError(f"{path}: a record without {error}") from None
    pack = ZipPack(path, records, checked, split, keep)
    if not len(pack):
        raise NoRecordsError(f"{path}: no record of split {split!r}")
    return pack
