"""The folder of a run: checkpoints that are whole or not there, and which of them are good.

A checkpoint is written into a hidden folder, file by file onto the disk, then its manifest, then
the folder gets its name: whoever finds ``checkpoint-N`` finds all of it, and the manifest tells
whether it is still what was written.
"""
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np

from ._files import read_object, write_whole
from .checkpoint import CheckpointError, SafeTensors

MANIFEST = "manifest.json"
_FORMAT = "orchvlm checkpoint 1"
_FIGURES = "figures.json"
_HIDDEN = ".checkpoint-"   # begins what is not whole yet, or about to go
_OLD = ".old-"             # begins what another takes the place of
_LATER = ".later-"         # begins what is behind the step that a run has gone back to
_CHUNK = 1 << 24


# ---------------------------------------------------------------- writing


def sealed(path):
    """[bytes, SHA-256] of a file whose bytes are on the disk from then on."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    return _summed(path)


def _summed(path):
    total, count = hashlib.sha256(), 0
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            total.update(chunk)
            count += len(chunk)
    return [count, total.hexdigest()]


def _sync_folder(folder):
    """The names in it are on the disk, too, where the system lets folders be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hidden(folder, step):
    """Where a step's files are written before they are a checkpoint."""
    return Path(folder) / f"{_HIDDEN}{step}"


def publish(folder, name, step, ranks, files):
    """Turns a step's hidden folder into ``name``, one that readers find.

    Parameters
    ----------
    folder : pathlib.Path
        Of the run.
    name : str
    step, ranks : int
    files : dict of str to [bytes, SHA-256]
        All that the ranks wrote, each file sealed.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    OSError
        A file is not in the folder as this rank sees it; what bears the name stays.
    """
    source, target = hidden(folder, step), folder / name
    for file, (count, _) in files.items():
        _see(source / file, count)
    table = {"format": _FORMAT, "step": step, "ranks": ranks, "files": {
        file: {"bytes": count, "sha256": total} for file, (count, total) in sorted(files.items())}}
    text = json.dumps(table, indent=1).encode()
    write_whole(source / MANIFEST, lambda stream: stream.write(text))
    sealed(source / MANIFEST)
    _sync_folder(source)
    old = folder / f"{_OLD}{name}"
    if target.exists():  # of an earlier run that got as far
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    try:
        os.replace(source, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    _sync_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _see(path, count):
    """OSError where a file that some rank wrote is not here.  It is opened: only that makes a
    network's file system ask its server."""
    try:
        with open(path, "rb") as stream:
            found = os.fstat(stream.fileno()).st_size
    except OSError as error:
        found = error.strerror
    if found != count:
        raise OSError(f"{path.name} was written with {count} bytes, and rank 0 finds "
                      f"{f'{found} bytes' if isinstance(found, int) else found!r}: all ranks must "
                      "write to one folder that they share")


def remove(path):
    """Takes a checkpoint away: at once for readers, then its bytes."""
    if path.exists():
        gone = path.with_name(f"{_HIDDEN}gone-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def clean(folder):
    """Takes away what a run that was killed left half done; what was about to be replaced, and was
    not, is there again."""
    for path in Path(folder).glob(f"{_OLD}*"):
        name = path.with_name(path.name.removeprefix(_OLD))
        if not name.exists():
            os.replace(path, name)
    for start in (_HIDDEN, _OLD):
        for path in Path(folder).glob(f"{start}*"):
            shutil.rmtree(path, ignore_errors=True)


def go_back(folder, step):
    """Sets checkpoints behind a step aside: who looks for the latest one finds that step's.

    Parameters
    ----------
    folder : pathlib.Path
    step : int
    """
    later = [path for at, path in checkpoints(folder) if at > step]
    for path in later:
        aside = path.with_name(f"{_LATER}{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    if later:
        _sync_folder(folder)


def forget_later(folder):
    """Takes away what :func:`go_back` set aside: the run has got on from there."""
    for path in folder.glob(f"{_LATER}checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def prune(folder, keep):
    """Leaves the last ``keep`` checkpoints (0: all) and the best one."""
    best = best_checkpoint(folder)
    for _, path in checkpoints(folder)[:-keep] if keep else []:
        if path != best:
            remove(path)


# ---------------------------------------------------------------- which there are


def checkpoints(folder):
    """[(step, folder)] of a run's checkpoints, the latest last."""
    return sorted((int(p.name.rpartition("-")[2]), p) for p in Path(folder).glob("checkpoint-*")
                  if p.name.rpartition("-")[2].isdigit())


def latest_checkpoint(folder):
    """The checkpoint folder with the greatest step; FileNotFoundError without any."""
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder} has no checkpoint to resume from")
    return found[-1][1]


def _figures(folder):
    """{step: figure} as noted."""
    path = Path(folder) / _FIGURES
    if not path.exists():
        return {}
    table = read_object(path, CheckpointError)
    return {int(step): float(figure) for step, figure in table.items()
            if step.isdigit() and isinstance(figure, (int, float))}


def note_figure(folder, step, figure):
    """Notes how good the weights of a step are; the greater, the better."""
    figures = {**_figures(folder), int(step): figure}
    text = json.dumps({str(k): v for k, v in sorted(figures.items())}, indent=1).encode()
    write_whole(Path(folder) / _FIGURES, lambda stream: stream.write(text))


def best_checkpoint(folder):
    """The checkpoint folder with the greatest figure, the latest of equals; None where none has
    one."""
    figures = _figures(folder)
    rated = [(figures[step], step, path) for step, path in checkpoints(folder)
             if math.isfinite(figures.get(step, math.nan))]
    return max(rated)[2] if rated else None


# ---------------------------------------------------------------- reading


def verify(checkpoint, check=True):
    """Reads a checkpoint's manifest and compares its files with it.

    Parameters
    ----------
    checkpoint : path-like
    check : bool
        Whether to read the files.

    Returns
    -------
    dict
        The manifest: ``step``, ``ranks``, ``files``.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        No manifest; a file that is missing, cut off or altered, by name.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no such folder")
    path = checkpoint / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is missing; it is no checkpoint, or was "
                              "not written to its end")
    table = read_object(path, CheckpointError)
    files, step = table.get("files"), table.get("step")
    if table.get("format") != _FORMAT or not isinstance(files, dict) or type(step) is not int:
        raise CheckpointError(f"{path}: no manifest of this program's checkpoints")
    for name, told in files.items():
        if Path(name).name != name or not isinstance(told, dict):
            raise CheckpointError(f"{path}: {name!r:.80} is no file name in this folder")
        if check:
            _compare(checkpoint / name, told.get("bytes"), told.get("sha256"))
    return table


def _compare(path, count, total):
    try:
        size = path.stat().st_size
        if size != count:
            raise CheckpointError(f"{path} has {size} bytes of {count}; it is "
                                  f"{'cut off' if size < (count or 0) else 'altered'}")
        if _summed(path)[1] != total:
            raise CheckpointError(f"{path} is altered: its checksum is not that of {MANIFEST}")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None


def _check_finite(checkpoint, files):
    """ValueError where a weight or an average is no number: nothing can be trained with it."""
    for file in sorted(files):
        if not file.endswith(".safetensors") or file.startswith("optimizer-"):
            continue
        tensors = SafeTensors(checkpoint / file)
        for name in tensors.tensors:
            if not np.isfinite(tensors.read(name)).all():
                raise CheckpointError(f"{checkpoint / file}: {name} is not finite")


def last_good(folder):
    """The latest checkpoint that is as it was written, with weights that are finite.

    Parameters
    ----------
    folder : path-like
        Of a run.

    Returns
    -------
    checkpoint : pathlib.Path
    passed : list of str
        What is wrong with later ones.

    Raises
    ------
    FileNotFoundError
        There is none; why not.
    """
    passed = []
    for _, path in reversed(checkpoints(folder)):
        try:
            _check_finite(path, verify(path)["files"])
            return path, passed
        except (ValueError, OSError) as error:
            passed.append(str(error))
    raise FileNotFoundError(f"{folder} has no checkpoint to resume from"
                            + "".join(f"; {why}" for why in passed))
