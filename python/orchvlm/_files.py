"""Files that are either whole or not there."""
import os
import tempfile
from pathlib import Path


def write_whole(path, write):
    """Calls ``write(stream)`` on a temporary file beside ``path`` and renames it when complete."""
    path = Path(path)
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
