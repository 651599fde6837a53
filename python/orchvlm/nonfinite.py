"""Steps whose loss or gradient is no number: skipped, counted, named, and taken again alone."""
import json
import math
import warnings
from pathlib import Path

import numpy as np

from ._files import read_object, write_whole
from .checkpoint import CheckpointError
from .inputs import Inputs
from .model import Model
from .run_folder import verify
from .shares import label_weights

LOG = "skipped.jsonl"
_STEP = "nonfinite.json"
_SHOWN = 8  # samples that a message names


class NonFiniteError(ArithmeticError):
    """Too many steps in a row without a number; raised on every rank, and what :func:`replay`
    takes is in the run's folder."""


class Skipped:
    """Counts the steps that changed nothing, and names their samples.

    Parameters
    ----------
    folder : pathlib.Path
        Of the run.
    most : int
        In a row, with which the run ends.
    """

    def __init__(self, folder, most):
        self._path, self._most = Path(folder) / LOG, most
        self.count, self.in_a_row = 0, 0

    def note(self, done):
        """After a step.

        Parameters
        ----------
        done : dict
            What :meth:`AdamW.step` gave.
        """
        self.count += done["skipped"]
        self.in_a_row = self.in_a_row + 1 if done["skipped"] else 0

    def tell(self, step, loss, names):
        """Writes down a skipped step, and warns; for one rank.

        Parameters
        ----------
        step : int
        loss : float
        names : list of str
            Of its samples.
        """
        what = "gradient" if math.isfinite(loss) else "loss"
        with open(self._path, "a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, "reason": what, "samples": names}) + "\n")
        shown = ", ".join(names[:_SHOWN]) or "samples that the loader has no names for"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        warnings.warn(f"step {step} changes nothing: its {what} is no number; it was of {shown}"
                      f"{more}", RuntimeWarning, stacklevel=2)

    @property
    def too_many(self):
        """bool : the run ends here."""
        return self.in_a_row >= self._most

    def state_dict(self):
        """dict : both counts."""
        return {"count": self.count, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        """Sets what :meth:`state_dict` gave."""
        self.count, self.in_a_row = int(state["count"]), int(state["in_a_row"])


# ---------------------------------------------------------------- a step, to be taken again


def step_files(inputs, rank, size, facts):
    """What a rank writes about a step, besides a checkpoint of the weights that it was taken with.

    Parameters
    ----------
    inputs : Inputs
        That this rank read.
    rank, size : int
    facts : dict
        Of the step.

    Returns
    -------
    dict of str to callable
        By file, a function that takes the path.
    """
    arrays = {name: value for name, value in vars(inputs).items() if value is not None}
    jobs = {f"inputs-{rank + 1}-of-{size}.npz": lambda path: write_whole(
        path, lambda stream: np.savez(stream, **arrays))}
    if rank == 0:
        text = json.dumps(facts, indent=1).encode()
        jobs[_STEP] = lambda path: write_whole(path, lambda stream: stream.write(text))
    return jobs


def _read_inputs(folder, size):
    parts = []
    for rank in range(size):
        with np.load(folder / f"inputs-{rank + 1}-of-{size}.npz", allow_pickle=False) as arrays:
            parts.append(Inputs(**{name: arrays[name] for name in arrays.files}))
    full = [part for part in parts if part.n_tokens]
    return Inputs.concatenate(full) if full else parts[0]


def _names(facts, n):
    """The samples' names, in the order of ranks that read in turns; None where some were left
    out, so that nobody can say which."""
    names, size, first = facts["samples"], facts["ranks"], facts["drawn"]
    if len(names) != n:
        return [None] * n
    order = sorted(range(n), key=lambda k: ((first + k) % size, k))
    return [names[k] for k in order]


class _Dumped(Model):
    """Takes weights as they are: those that are not finite may be why the step has no number."""

    odd = ()

    def _check_finite(self, name, values, where):
        if not np.isfinite(values).all():
            self.odd = (*self.odd, name)


def _taken(model, inputs, checkpoint, normalizer):
    """(loss, names of parameters whose gradient is no number)"""
    model.zero_grad()
    out = model.forward(inputs, normalizer=normalizer, checkpoint=checkpoint)
    model.backward()
    odd = [name for name in model.grads if not np.isfinite(np.asarray(model.grads[name])).all()]
    return out.loss, odd


def replay(folder, *, device="cpu", threads=None):
    """Takes a step again that had no number, on one rank, as a whole and each sample alone.

    Parameters
    ----------
    folder : path-like
        ``nonfinite-N`` of a run that ended with :class:`NonFiniteError`.
    device : str
        As of :meth:`Model.from_pretrained`.
    threads : int, optional

    Returns
    -------
    dict
        ``step``; ``weights``: names of parameters that are not finite themselves, for which no
        sample is to blame; ``loss`` of the whole batch and ``gradients``: names of parameters whose
        gradient is no number; ``samples``: for each sample that alone gives no number, a dict of
        ``place`` in the batch, ``name``, ``loss`` and ``gradients``.

    Raises
    ------
    FileNotFoundError
        No such folder.
    ValueError
        A file that is missing or not as it was written.

    Examples
    --------
    >>> import tempfile, orchvlm
    >>> try:
    ...     orchvlm.replay(tempfile.mkdtemp())
    ... except ValueError as error:
    ...     print("manifest.json" in str(error))
    True
    """
    from .building import open_model
    folder = Path(folder)
    verify(folder)
    facts = read_object(folder / _STEP, CheckpointError)
    model = open_model(folder, kind=_Dumped, device=device, dtype=facts["dtype"],
                       threads=threads)
    inputs, checkpoint = _read_inputs(folder, facts["ranks"]), facts["checkpoint"]
    normalizer = float(label_weights(inputs).sum(dtype=np.float64))
    loss, odd = _taken(model, inputs, checkpoint, normalizer)
    found = {"step": facts["step"], "weights": list(model.odd), "loss": loss, "gradients": odd,
             "samples": []}
    for place, name in enumerate(_names(facts, len(inputs))):
        alone, odd = _taken(model, inputs[place], checkpoint, normalizer)
        if odd or not math.isfinite(alone):
            found["samples"].append({"place": place, "name": name, "loss": alone,
                                     "gradients": odd})
    return found
