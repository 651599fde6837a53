"""What is decided once, on rank 0, for all ranks of a run."""
import hashlib
import pickle
from pathlib import Path

import numpy as np

from .shares import gathered

_NO_FILE = bytes(32)


def first_rank_says(comm, decide, given, path=None):
    """Rank 0 decides, and all ranks have what it says; all call it.

    Parameters
    ----------
    comm : Comm
    decide : callable
        Without arguments; is called on rank 0 alone.  What it gives can be pickled.
    given : object
        From which rank 0 decides; its ``repr`` is to be the same on all ranks.
    path : path-like, optional
        A file that belongs to it, and says the same on all ranks that have it.

    Returns
    -------
    said : object
        What ``decide`` gave; None where there is an error.
    error : Exception or None
        On all ranks: on rank 0 what ``decide`` raised, on others what tells of it.  It is not
        raised here, so that the communicator can be closed first: all ranks know.
    """
    if comm.size > 1 and (other := _other(comm, given, path)):
        return None, ValueError(other)
    said, own, message = None, None, b""
    if comm.rank == 0:
        try:
            said = decide()
        except Exception as error:  # the others wait to hear of it
            own = error
    if comm.size == 1:
        return said, own
    if comm.rank == 0:
        message = pickle.dumps((said, None if own is None else f"{type(own).__name__}: {own}"))
    told, _ = gathered(comm, np.frombuffer(message, np.uint8))
    if comm.rank == 0:
        return said, own
    said, reason = pickle.loads(told.tobytes())
    return said, None if reason is None else ValueError(f"rank 0 has refused: {reason}")


def _other(comm, given, path):
    """What is wrong where a rank was told other things than rank 0; else None."""
    content = _NO_FILE
    if path is not None and Path(path).is_file():
        content = hashlib.sha256(Path(path).read_bytes()).digest()
    mine = hashlib.sha256(repr(given).encode()).digest() + content
    all_ranks, _ = gathered(comm, np.frombuffer(mine, np.uint8)[None])
    options, files = all_ranks[:, :32], all_ranks[:, 32:]
    for rank in range(1, comm.size):
        if (options[rank] != options[0]).any():
            return f"rank {rank} was given other options than rank 0: give all ranks the same"
        if files[0].any() and files[rank].any() and (files[rank] != files[0]).any():
            return f"{path} on rank {rank} is not the file of rank 0: give all ranks the same"
    return None
