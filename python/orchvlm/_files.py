"""Files that are either whole or not there."""
import errno
import json
import os
import reprlib
import tempfile
from pathlib import Path


def check_place(path):
    """The path; OSError that names it where no file can be made."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder; make it first",
                                str(path.parent))
    return path


def check_png(path, name):
    """The path of a picture that can be written; ValueError for another kind than PNG."""
    path = check_place(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{name} writes PNG: the name must end in .png; got {str(path)!r}")
    return path


def write_whole(path, write):
    """Calls ``write(stream)`` on a temporary file beside ``path`` and renames it when complete."""
    path = check_place(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent or ".", prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_object(path, error):
    """The object in a JSON file; ``error`` (a class) with the reason for anything else that it
    may hold."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as reason:  # among the first: no UTF-8, endless numbers
        raise error(f"{path}: not JSON: {str(reason)[:80]}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: must hold an object; got {short(value)}")
    return value


def short(value):
    """A few letters of a value from a file, however deep it is."""
    return reprlib.repr(value)[:80]
