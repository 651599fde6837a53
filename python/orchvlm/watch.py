"""Held-out samples, looked at while a model trains: what is best, and when to stop."""
import errno
import json
import math
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from ._core import Error
from ._files import write_whole
from ._numbers import whole_number
from .evaluation import evaluate
from .inputs import Inputs
from .shares import MEDIA, label_weights, medium
from .sources import answered

FIGURES = {"loss": -1, "exact": 1, "score": 1}  # and which way is better
_AT_ONCE = 8  # samples of a forward: ranks run equally many
_COLUMNS = {"vision": ("pixels", "grid_thw", (0, 3)), "audio": ("mel", "mel_lengths", 0)}


class Watch:
    """Looks at held-out samples every so many steps, remembers the best look, says when to stop.

    Parameters
    ----------
    samples : sequence of dict
        As :class:`Processor` takes them; answers are asked for of those with ``answer`` and
        ``check``.
    processor : Processor
        Of the model's configuration.
    every : int
        Steps from one look to the next.
    figure : {"loss", "exact", "score"}
        Which one must get better.  The loss is looked at always, answers only for the others: a
        model whose weights are in shards gives none.
    patience : int
        The run ends after so many looks in a row that are no better than the best; 0: never.

    Attributes
    ----------
    best, best_step : float and int, or None
        The best look so far.
    since : int
        Looks since then.

    Raises
    ------
    TypeError
        Something else than a Processor.
    ValueError
        No samples, none with answers where the figure needs some, a figure that is unknown, a
        count out of range.

    Notes
    -----
    Over ranks each looks at every N-th sample; sums are taken over all, so that all ranks know the
    same and stop behind the same step.

    Examples
    --------
    >>> import tempfile, orchvlm
    >>> from orchvlm import data
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> processor = data.Processor.from_config(model.config.values)
    >>> loader = data.Loader(data.Mixture([data.Tasks(seed=0)]), processor, max_tokens=128)
    >>> tasks = data.Tasks(seed=1, split="val")
    >>> watch = orchvlm.Watch([tasks[i] for i in range(2)], processor, every=1)
    >>> config = orchvlm.TrainingConfig(steps=2, warmup=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = orchvlm.Trainer(model, loader, config, folder, watch=watch).fit()
    >>> rows[-1]["eval_loss"] < rows[0]["eval_loss"], rows[-1]["eval_best_step"]
    (True, 2)
    """

    def __init__(self, samples, processor, every, figure="loss", patience=0):
        from .data import Processor
        if not isinstance(processor, Processor):
            raise TypeError(f"processor must be a Processor; got {type(processor).__name__}")
        if figure not in FIGURES:
            raise ValueError(f"figure must be one of {', '.join(FIGURES)}; got {figure!r:.60}")
        self.samples, self.processor = list(samples), processor
        if not self.samples:
            raise ValueError("samples are empty: there is nothing to look at")
        if figure != "loss" and not answered(self.samples):
            raise ValueError(f"figure = {figure!r} needs samples with answer and check; of these "
                             f"{len(self.samples)} none has both")
        self.every, self.figure = whole_number(every, "every", 1), figure
        self.patience = whole_number(patience, "patience", 0)
        self.best = self.best_step = None
        self.since = 0

    @property
    def over(self):
        """bool : the figure has not got better for long."""
        return 0 < self.patience <= self.since

    def look(self, model, passes, step):
        """Loss of the held-out samples, and answers.

        Parameters
        ----------
        model : Model
        passes : OneRank or Orchestrator
            All ranks look.
        step : int

        Returns
        -------
        dict of str to float
            For the step's row: ``eval_loss``, ``eval_exact`` and ``eval_score`` where they are
            asked for, ``eval_best``, ``eval_best_step`` and ``eval_seconds``.
        """
        start, sums = time.perf_counter(), np.zeros(5)
        rank, size = passes.rank, passes.size
        mine = self.samples[rank::size]
        for first in range(0, -(-len(self.samples) // size), _AT_ONCE):
            pack = self._pack(mine[first:first + _AT_ONCE], model.config)
            logp, _ = model.logprobs(pack, training=False)
            weights = label_weights(pack).astype(np.float64)
            sums[:2] += -(weights * logp).sum(), weights.sum()
        if self.figure != "loss":
            scores = [score for _, _, score in evaluate(
                model, answered(mine), self.processor).rows]
            sums[2:] = sum(score >= 1 for score in scores), sum(scores), len(scores)
        loss, weight, exact, score, asked = passes.total(sums).tolist()
        row = {"eval_loss": loss / weight if weight else math.nan}
        if asked:
            row |= {"eval_exact": exact / asked, "eval_score": score / asked}
        self._note(step, row[f"eval_{self.figure}"])
        if self.best is not None:
            row |= {"eval_best": self.best, "eval_best_step": self.best_step}
        return {**row, "eval_seconds": time.perf_counter() - start}

    def _pack(self, samples, config):
        """Empty ones too: a rank without samples goes along, and one without images or sounds runs
        their encoders on none, for the others gather weights of it that are in shards."""
        pack = Inputs.concatenate([self.processor.one(sample) for sample in samples]) if samples \
            else Inputs(input_ids=np.zeros(0, np.int32), cu_seqlens=[0])
        for name in MEDIA:
            rows, sizes, none = _COLUMNS[name]
            if getattr(pack, sizes) is None and (config.audible if name == "audio"
                                                 else config.vision):
                pack = replace(pack, **{rows: medium(config, pack, name).rows,
                                        sizes: np.zeros(none, np.int32)})
        return pack

    def _note(self, step, value):
        sign = FIGURES[self.figure]
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self.best_step, self.since = value, step, 0
        else:
            self.since += 1

    def recall(self, path, step, passes):
        """Goes on where a run was.

        Parameters
        ----------
        path : pathlib.Path
            Of its metrics, which may not be there; rank 0 reads them.
        step : int
            It was at.
        passes : OneRank or Orchestrator
        """
        self.best, self.best_step, self.since = None, None, 0
        for row in read_metrics(path) if passes.rank == 0 and path.exists() else ():
            if row["step"] <= step and f"eval_{self.figure}" in row:
                value = row[f"eval_{self.figure}"]
                self._note(row["step"], math.nan if value is None else value)
        best, step, since = passes.total(np.array(
            [self.best or 0.0, self.best_step or 0, self.since])).tolist()
        if step:
            self.best, self.best_step = best, int(step)
        self.since = int(since)


def tell(callbacks, row):
    """Calls all with a copy of a step's row; orchvlm.Error that names the one that fails."""
    for callback in callbacks:
        try:
            callback(dict(row))
        except Exception as error:
            name = getattr(callback, "__name__", type(callback).__name__)
            raise Error(f"callback {name} failed behind step {row['step']}: "
                        f"{type(error).__name__}: {error}") from error


def write_row(log, row):
    """A line of metrics, to a file of bytes without a buffer; what is no number is null.

    Parameters
    ----------
    log : io.RawIOBase
        May take fewer bytes than it is given.
    row : dict

    Raises
    ------
    OSError
        The line does not fit; nothing of it is there.
    """
    line = (json.dumps({key: value if isinstance(value, str) or math.isfinite(value) else None
                        for key, value in row.items()}) + "\n").encode()
    place, left = log.tell(), line
    try:
        while left:
            count = log.write(left)
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left = left[count:]
    except OSError:
        with suppress(OSError):  # half a line would spoil the next one, too
            log.truncate(place)
            log.seek(place)
        raise


def read_metrics(path):
    """Rows of a ``metrics.jsonl``; lines that were cut off or damaged are left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def cut_rows(path, step):
    """Leaves the rows of a file of metrics up to a step: those behind it are taken again."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_whole(path, lambda stream: stream.write(
            "".join(json.dumps(row) + "\n" for row in kept).encode()))
