"""Checkpoints of a run: copied between two steps, written while the next ones run."""
import json
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np

from ._files import read_object, write_whole
from .adapters import ADAPTER, ADAPTER_CONFIG
from .averaging import AVERAGES
from .checkpoint import INDEX, CheckpointError, SafeTensors, in_files, stored, write_file
from .endings import held_back
from .run_folder import (clean, forget_later, go_back, hidden, last_good, prune, publish, sealed,
                         verify)
from .shares import gathered

TRAINER = "trainer.json"
_PIECES = "pieces"
_TOLD = 1000  # bytes of a message


class SaveError(OSError):
    """A run's files cannot be written; raised on every rank, and earlier checkpoints are whole."""


# ---------------------------------------------------------------- what is copied


def snapshot(trainer, rank, writers):
    """Copies what a checkpoint holds; of a sharded model all ranks call it.

    Parameters
    ----------
    trainer : Trainer
    rank, writers : int
        Ranks below ``writers`` write.

    Returns
    -------
    dict of str to callable
        What this rank writes: by file, a function that takes the path.
    """
    model, jobs = trainer.model, {}
    tensors, config = model._files(model.dtype)
    files, index = in_files(tensors, model.dtype)
    for k, (file, some) in enumerate(files):  # shards in turn, so that no rank holds all
        _copied(jobs, file, some, model, k % writers == rank)
    if model.lora is not None:
        tensors, text = model._adapter_files()
        _copied(jobs, ADAPTER, tensors, model, rank == 0, "float32")
        _bytes(jobs, ADAPTER_CONFIG, text)
    if rank < writers:
        _optimizer(jobs, trainer.optimizer.state_dict(), f"optimizer-{rank + 1}-of-{writers}")
    if rank:
        jobs.pop(ADAPTER_CONFIG, None)
        return jobs
    _bytes(jobs, "config.json", (json.dumps(config.values, indent=2, sort_keys=True)
                                 + "\n").encode())
    if index is not None:
        _bytes(jobs, INDEX, index)
    if trainer.processor is not None:
        for name, content in trainer.processor.files().items():
            _bytes(jobs, name, content)
    if trainer.ema is not None:
        averages = {key.removesuffix("/average"): values
                    for key, values in trainer.ema.state_dict().items()}
        _arrays(jobs, AVERAGES, averages)
    _bytes(jobs, TRAINER, json.dumps(trainer.facts(), indent=1).encode())
    return jobs


def _copied(jobs, file, tensors, model, mine, dtype=None):
    """A file of weights, which all ranks gather and one keeps."""
    dtype, copies, sharded = dtype or model.dtype, [], model.shard is not None and model.shard.holds
    for name, shape, get in tensors:
        if mine:
            copies.append((name, shape, np.array(stored(name, get(), dtype))))
        elif sharded:
            get()
    if mine:
        jobs[file] = lambda path: write_file(
            path, [(name, shape, lambda a=a: a) for name, shape, a in copies], dtype)


def _bytes(jobs, file, text):
    jobs[file] = lambda path: write_whole(path, lambda stream: stream.write(text))


def _arrays(jobs, file, arrays, metadata=None):
    """A file of float32 arrays by name."""
    jobs[file] = lambda path: write_file(
        path, [(name, a.shape, lambda a=a: a) for name, a in arrays.items()], "float32", metadata)


def _optimizer(jobs, state, name):
    """Its arrays, flat, and in the file's metadata where each begins in which shape."""
    arrays, pieces = {}, {}
    for key, values in state.items():
        parameter, _, label = key.rpartition("/")
        if label in ("piece", "step"):
            continue
        first, _, *shape = state.get(f"{parameter}/piece", (0, values.size, *values.shape))
        arrays[f"{parameter}.{label}"] = values.reshape(-1)
        pieces[parameter] = {"offset": int(first), "shape": [int(n) for n in shape]}
    _arrays(jobs, f"{name}.safetensors", arrays,
            {"step": str(int(state["step"])), _PIECES: json.dumps(pieces)})


# ---------------------------------------------------------------- what is read


class _Saved(dict):
    """One rank's file of optimizer state, as :meth:`AdamW.load_state_dict` takes it; arrays are
    looked at where they are needed."""

    def __init__(self, path):
        super().__init__()
        self._file = SafeTensors(path)
        try:
            self["step"] = int(self._file.metadata["step"])
            pieces = json.loads(self._file.metadata[_PIECES])
            for name in self._file.tensors:
                parameter, _, label = name.rpartition(".")
                place = pieces[parameter]
                self[f"{parameter}/{label}"] = name
                count = self._file.tensors[name][3][0]
                self[f"{parameter}/piece"] = np.array([place["offset"], count, *place["shape"]],
                                                      np.int64)
        except (KeyError, IndexError, TypeError, ValueError, RecursionError, OverflowError):
            raise CheckpointError(f"{path}: no optimizer state that is understood") from None

    def __getitem__(self, key):
        value = super().__getitem__(key)
        return self._file.read(value) if isinstance(value, str) else value


def chosen(checkpoint, folder, passes):
    """The checkpoint to go on from, on all ranks the same: rank 0 looks whether it is good.

    Parameters
    ----------
    checkpoint : path-like or None
        None: the run's last good one; of later ones a warning says what is wrong.
    folder : pathlib.Path
        Of the run.
    passes : OneRank or Orchestrator

    Returns
    -------
    pathlib.Path

    Raises
    ------
    FileNotFoundError
        There is none.
    ValueError
        It is not as it was written.
    """
    error, step, passed = None, 0, []
    if passes.rank == 0:
        try:
            if checkpoint is None:
                checkpoint, passed = last_good(folder)
            else:
                verify(checkpoint)
            step = verify(checkpoint, check=False)["step"] + 1
        except (OSError, ValueError) as reason:
            error = reason
        for why in passed if error is None else ():
            warnings.warn(f"{why}; going on from {checkpoint}", RuntimeWarning, stacklevel=3)
    text = np.frombuffer(str(error or "").encode()[:_TOLD], np.uint8).astype(np.float64)
    step, length = passes.total(np.array([step, len(text)], np.float64)).astype(int).tolist()
    if length:
        text = passes.total(text if passes.rank == 0 else np.zeros(length))
        raise error or CheckpointError(
            f"rank 0: {text.astype(np.uint8).tobytes().decode(errors='replace')}")
    return Path(checkpoint or folder / f"checkpoint-{step - 1}")


def read_checkpoint(checkpoint):
    """All but the weights of a checkpoint that was found good.

    Parameters
    ----------
    checkpoint : pathlib.Path

    Returns
    -------
    facts : dict
        As :meth:`Trainer.facts` gave them.
    states : list of mapping
        As :meth:`AdamW.load_state_dict` takes them.
    averages : dict of str to ndarray
        As :meth:`EMA.load_state_dict` takes them.

    Raises
    ------
    ValueError
        A file that is not understood.
    """
    files, averages = verify(checkpoint, check=False)["files"], {}
    states = [_Saved(checkpoint / file) for file in sorted(files) if file.startswith("optimizer-")]
    if AVERAGES in files:
        file = SafeTensors(checkpoint / AVERAGES)
        averages = {f"{name}/average": file.read(name) for name in file.tensors}
    return read_object(checkpoint / TRAINER, CheckpointError), states, averages


# ---------------------------------------------------------------- the thread


def _said(error, path):
    """What went wrong with which file."""
    return f"{path}: {getattr(error, 'strerror', None) or error}"


class _Writing:
    """This rank's files of one checkpoint, on their way to the disk."""

    def __init__(self, folder, step, name, jobs):
        self.step, self.name, self.files, self.error = step, name, {}, None
        self._folder, self._jobs = hidden(folder, step), jobs
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def _work(self):
        path = self._folder
        try:
            if self._jobs:
                self._folder.mkdir(parents=True, exist_ok=True)
            for name, write in self._jobs.items():
                path = self._folder / name
                write(path)
                self.files[name] = sealed(path)
        except Exception as error:  # handed on to all ranks
            self.error = _said(error, path)
        self._jobs = None

    @property
    def done(self):
        return not self._thread.is_alive()

    def join(self):
        self._thread.join()


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread beside the steps.

    Ranks agree on nothing in that thread: each writes its files and puts them on the disk.  That
    all have done so the ranks learn at the end of a step; then rank 0 writes the manifest and gives
    the folder its name.

    Parameters
    ----------
    folder : pathlib.Path
        Of the run.
    keep : int
        As in :class:`orchvlm.TrainingConfig`.
    comm : Comm or None
        Of the ranks of the run.
    together : bool
        All ranks write; else rank 0 has all that there is.
    skipped : Skipped
        Behind a step that was skipped no checkpoint goes: a later one may be of ruined weights.

    Attributes
    ----------
    saved : int or None
        Step of the last checkpoint that is whole.
    """

    def __init__(self, folder, keep, comm, together, skipped):
        self._folder, self._keep, self._comm, self._skipped = Path(folder), keep, comm, skipped
        self.together = together
        self._rank = 0 if comm is None else comm.rank
        self.writers = comm.size if together else 1
        self._pending, self._error, self._back = None, None, None
        self.saved = None

    def go_on(self, step):
        """The run goes on from this step's checkpoint: later ones, whose steps are taken again, are
        set aside when it begins, and go when the next one is there.

        Parameters
        ----------
        step : int
        """
        self.saved = self._back = step

    def begin(self):
        """Makes the folder of the run what it is to go on from; for rank 0."""
        self._folder.mkdir(parents=True, exist_ok=True)
        clean(self._folder)
        if self._back is not None:
            go_back(self._folder, self._back)
        self._back = None

    def has(self, step):
        """Whether the checkpoint of a step is this run's, and whole; all ranks ask.

        Parameters
        ----------
        step : int

        Returns
        -------
        bool
        """
        if self.saved != step:
            return False
        good = True
        if self._rank == 0:
            try:
                verify(self._folder / f"checkpoint-{step}")
            except (OSError, ValueError):
                good = False
        return good if self._comm is None else self._tell(good)[0]

    def start(self, trainer, name=None, extra=None):
        """Copies the present state and begins to write it; nothing else is being written.

        Parameters
        ----------
        trainer : Trainer
        name : str, optional
            Of the folder, by default ``checkpoint-STEP``.
        extra : dict of str to callable, optional
            More that this rank writes.
        """
        jobs = {**snapshot(trainer, self._rank, self.writers), **(extra or {})}
        with held_back():
            self._pending = _Writing(self._folder, trainer.step,
                                     name or f"checkpoint-{trainer.step}", jobs)

    def signs(self):
        """(1 if this rank's files are on the disk, 1 if it failed), for :meth:`settle`."""
        writing = self._pending
        done = writing is not None and writing.done and self._rank < self.writers
        failed = self._error is not None or done and writing.error is not None
        return float(done and not failed), float(failed)

    def note(self, path, error):
        """Another file of the run cannot be written: all ranks hear of it behind the next step.

        Parameters
        ----------
        path : pathlib.Path
        error : OSError
        """
        self._error = _said(error, path)

    def settle(self, written, failed):
        """Ends what all ranks have written, or one has failed to; all ranks call it.

        Parameters
        ----------
        written, failed : float
            Sums over the ranks of what :meth:`signs` gave.

        Raises
        ------
        SaveError
            As :meth:`finish`.
        """
        if failed or written == self.writers:
            with held_back():
                self._finish(False, failed)

    def finish(self, alone=False):
        """Waits until what was begun is a checkpoint.

        Parameters
        ----------
        alone : bool
            Rank 0 has it all and asks nobody: others may be gone.

        Raises
        ------
        SaveError
            On all ranks: the first rank's message that could not write.
        """
        with held_back():  # it is there in the end, or it is not
            self._finish(alone, False)

    def _finish(self, alone, failed):
        writing, self._pending = self._pending, None
        error = None if writing is None else self._end(writing, alone)
        if failed:  # another file: what was begun may be a checkpoint all the same
            error, self._error = error or self._first(self._error, alone), None
        if error is not None:
            raise self._failure(error)

    def _end(self, writing, alone):
        """Makes a checkpoint of what was written; the first error, the same on all ranks."""
        writing.join()
        files, error = self._told(writing, alone)
        if self._rank == 0 and error is None:
            try:
                publish(self._folder, writing.name, writing.step, self.writers, files)
            except OSError as reason:
                error = f"rank 0: {_said(reason, self._folder)}"
        if self._comm is not None and not alone:
            error = self._tell(error)[0]
        if error is not None:
            if self._rank == 0:
                shutil.rmtree(hidden(self._folder, writing.step), ignore_errors=True)
        elif writing.name == f"checkpoint-{writing.step}":
            self.saved = writing.step
            if self._rank == 0:
                forget_later(self._folder)
                if not self._skipped.in_a_row:
                    prune(self._folder, self._keep)
        return error

    def _failure(self, error):
        return SaveError(f"{error}; " + (
            "no checkpoint was written before" if self.saved is None else
            f"the checkpoint of step {self.saved} is whole"))

    def complain(self, alone=False):
        """Raises what was noted and nobody has heard of: at the end of a run.

        Parameters
        ----------
        alone : bool
            As of :meth:`finish`.

        Raises
        ------
        SaveError
            As :meth:`finish`.
        """
        error, self._error = self._first(self._error, alone), None
        if error is not None:
            raise self._failure(error)

    def drop(self):
        """Gives up what is not whole yet, for the ranks can agree on nothing any more."""
        writing, self._pending = self._pending, None
        if writing is not None:
            writing.join()
            if self._rank == 0:
                shutil.rmtree(hidden(self._folder, writing.step), ignore_errors=True)

    def _told(self, writing, alone):
        """(files of all ranks, the first error)"""
        files = {}
        for rank, (some, error) in self._heard([writing.files, writing.error], alone):
            if error is not None:
                return {}, f"rank {rank}: {error}"
            files |= some
        return files, None

    def _first(self, error, alone):
        """The first rank's error, with its number; None where no rank has one."""
        return next((f"rank {rank}: {told}" for rank, told in self._heard(error, alone) if told),
                    None)

    def _heard(self, value, alone):
        """[(rank, what it says)]"""
        if self._comm is None or alone:
            return [(self._rank, value)]
        return list(enumerate(self._tell(value)))

    def _tell(self, value):
        """What every rank says."""
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        rows, ranks = gathered(self._comm, text)
        return [json.loads(rows[ranks == rank].tobytes()) for rank in range(self._comm.size)]
