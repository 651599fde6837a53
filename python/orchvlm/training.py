"""Training on one rank: packs of samples, AdamW, a schedule, metrics, runs that go on."""
import json
import math
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ._files import write_whole
from ._numbers import finite_number
from .averaging import EMA
from .model import Model
from .optim import AdamW, schedule
from .peak import gemm_peak
from .routing import MODES, Balance

_STATE = "training_state.npz"
_AHEAD = 3  # packs that are made before they are asked for


class _Ahead:
    """Makes packs in a thread of its own, a few ahead; with each goes the loader's state behind it.

    What was made and not used is given back by :meth:`close`, for whoever goes on.
    """

    def __init__(self, loader, left=()):
        self._loader, self._left = loader, list(left)
        self._queue = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self):
        try:
            while not self._stop.is_set():
                pack = next(self._loader)
                self._queue.put((pack, self._loader.state_dict()))
        except BaseException as error:  # handed on to whoever asks for the next pack
            self._queue.put((error, None))

    def next(self):
        """(pack, loader state behind it); the loader's own exception, every time, once it failed.
        """
        item, state = self._left.pop(0) if self._left else self._queue.get()
        if isinstance(item, BaseException):
            self._left.insert(0, (item, None))
            raise item
        return item, state

    def _drain(self):
        while True:
            try:
                self._left.append(self._queue.get_nowait())
            except queue.Empty:
                return

    def close(self):
        """Ends the thread behind the pack it is making; all packs that nobody took."""
        self._stop.set()
        self._drain()  # a thread that waits for room goes on, and sees that it shall stop
        self._thread.join()
        self._drain()
        return self._left


@contextmanager
def _held_back():
    """Ctrl-C waits until the block is done: a step is taken and written down, or it is not."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if here else None
    if before is None:  # only the main thread is interrupted
        yield
        return
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            signal.raise_signal(signal.SIGINT)


@dataclass
class TrainingConfig:
    """What a run does.

    Parameters
    ----------
    steps : int
        Steps of the whole run.
    minutes : float, optional
        Ends the run after so much time in steps, where steps are left by then; the rate falls with
        the share of steps or of time, whichever is greater.
    lr, min_lr : float
        Peak and last rate.
    warmup : int
        Steps.
    schedule : {"cosine", "linear", "constant"}
        How the rate falls, see :func:`schedule`.
    weight_decay, max_grad_norm : float
        As in :class:`AdamW`.
    betas : (float, float)
        As in :class:`AdamW`.
    groups : list of dict
        As in :class:`AdamW`.
    freeze : list of str
        Patterns of parameters that are not trained; those that match nothing in this model are
        passed over, so that a recipe serves models with and without a part.
    micro_batches : int
        Packs per step; the loss is divided by the step's weight sum, so the gradient is that of
        one larger pack.
    checkpoint : {"none", "selective", "full"}
        Activations that are computed again.
    aux : {"exact", "lagged", "bias"}
        How experts are kept evenly used, over a step's whole batch and added once: by the balance
        loss with the batch's own router counts (with several micro-batches a forward for the
        counts alone comes first; ``routing_seconds`` tells its cost), by that loss with the counts
        of the step before, or without a loss by moving the corrections of sigmoid routers.
    bias_rate : float
        By which ``aux="bias"`` moves a correction in a step, see :meth:`Model.correct_routers`.
    ema : float, optional
        Decay of a moving average of the weights, the trainer's ``ema``; checkpoints hold it.
    save_every : int
        Steps between checkpoints; 0: at the end only.
    keep : int
        Checkpoints of this run that stay, the latest ones; 0: all.

    Raises
    ------
    ValueError
        Steps or micro-batches below 1, minutes that are not positive, a negative count, an unknown
        ``aux``.

    Examples
    --------
    >>> import orchvlm
    >>> config = orchvlm.TrainingConfig(steps=200, lr=2e-3)
    >>> config.schedule, config.warmup
    ('cosine', 50)
    """

    steps: int = 1000
    minutes: float = None
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup: int = 50
    schedule: str = "cosine"
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    betas: tuple = (0.9, 0.95)
    groups: tuple = ()
    freeze: tuple = ()
    micro_batches: int = 1
    checkpoint: str = "none"
    aux: str = "exact"
    bias_rate: float = 1e-3
    ema: float = None
    save_every: int = 0
    keep: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("micro_batches", 1), ("warmup", 0), ("save_every", 0),
                            ("keep", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or \
                    value < least:
                raise ValueError(f"{name} must be a whole number >= {least}; got {value!r}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes must be positive and finite; got {self.minutes!r}")
        if self.aux not in MODES:
            raise ValueError(f"aux must be one of {', '.join(MODES)}; got {self.aux!r}")
        finite_number(self.bias_rate, "bias_rate", 0)
        if self.ema is not None:
            finite_number(self.ema, "ema", 0, 1 - 1e-12)


class Trainer:
    """Trains a model on packs.

    Parameters
    ----------
    model : Model
        Is changed.
    loader : iterator of Inputs
        With ``state_dict`` and ``load_state_dict``, as :class:`orchvlm.data.Loader`.
    config : TrainingConfig
        What to do.
    folder : path-like
        Checkpoints and ``metrics.jsonl`` go there.

    Raises
    ------
    ValueError
        A rate, schedule or group that :class:`AdamW` or :func:`schedule` refuses; ``aux="bias"``
        with a model whose routers have no corrections.

    Notes
    -----
    Packs are made in a thread of their own while the step computes.  A run that was saved and
    resumed computes the very numbers of one that was not interrupted, unless ``minutes`` end it:
    then the rate follows the time that has passed.

    Examples
    --------
    >>> import tempfile, orchvlm
    >>> from orchvlm import data
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> processor = data.Processor.from_config(model.config.values)
    >>> loader = data.Loader(data.Mixture([data.Tasks(seed=0)]), processor, max_tokens=128)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = orchvlm.Trainer(model, loader, orchvlm.TrainingConfig(steps=2), folder)
    ...     history = list(run.run())
    >>> [row["step"] for row in history]
    [1, 2]
    """

    def __init__(self, model, loader, config, folder):
        if not isinstance(model, Model) or not isinstance(config, TrainingConfig):
            raise TypeError("Trainer takes a Model, a loader and a TrainingConfig; got "
                            f"{type(model).__name__} and {type(config).__name__}")
        for name in ("__next__", "state_dict", "load_state_dict"):
            if not hasattr(loader, name):
                raise TypeError(f"loader must have {name}; got {type(loader).__name__}")
        self.model, self.loader, self.config = model, loader, config
        self.folder = Path(folder)
        patterns = [p for p in config.freeze
                    if any(fnmatchcase(name, p) for name in model.parameters)]
        if patterns:
            model.freeze(*patterns)
        self.optimizer = AdamW(model, config.lr, config.betas, weight_decay=config.weight_decay,
                               max_grad_norm=config.max_grad_norm, groups=config.groups)
        self.ema = None if config.ema is None else EMA(model, config.ema)
        self._balance = Balance(model, config.aux, config.bias_rate)
        self._warmup = min(config.warmup, config.steps)
        self._rate = schedule(config.schedule, config.lr, config.steps, self._warmup,
                              config.min_lr)
        self.step = 0
        self.elapsed_s = 0.0  # time in steps, over all parts of the run
        self._loader_state = None
        self._left = []       # packs that were made and not used
        self._saved = None    # step of the last checkpoint written or read

    @property
    def done(self):
        """Share of the run that is behind: 1 at its end."""
        share = self.step / self.config.steps
        if self.config.minutes is not None:
            share = max(share, self.elapsed_s / (60 * self.config.minutes))
        return min(1.0, share)

    def run(self):
        """Takes the steps that are left.

        Ctrl-C, an error and a loop that is left early all leave a checkpoint of the last whole
        step.  The run ends early where the data end.

        Yields
        ------
        dict
            For every step: step, loss, lr, grad_norm, skipped, tokens, targets, tokens_per_s,
            tflops, mfu (their share of what a matrix product reaches on the device, see
            :func:`orchvlm.peak.gemm_peak`), seconds, elapsed_s, and of models with experts aux_loss
            (without its coefficient), expert_load (fullest over mean) and routing_seconds; also a
            line of ``metrics.jsonl``.  A loss that is no number is None there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._peak = gemm_peak(self.model.device, self.model.dtype, self.model.threads)
        ahead = _Ahead(self.loader, self._left)
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
                while self.done < 1:
                    start = time.perf_counter()
                    try:
                        taken = [ahead.next() for _ in range(self.config.micro_batches)]
                    except StopIteration:
                        break
                    yield self._one([pack for pack, _ in taken], taken[-1][1], start, log)
                    if self.config.save_every and self.step % self.config.save_every == 0:
                        self.save()
        finally:
            try:
                if self.step and self._saved != self.step:
                    self.save()
            finally:
                self._left = ahead.close()

    def _one(self, packs, state, start, log):
        """One step; ``state`` is the loader's behind its packs."""
        total = sum(_weight_sum(pack) for pack in packs)
        self.model.zero_grad()
        loss, targets = 0.0, 0
        counts = self._balance.begin(packs)
        for pack in packs:
            out = self.model.forward(pack, normalizer=total, router_counts=counts,
                                     checkpoint=self.config.checkpoint)
            self._balance.note(out)
            loss, targets = loss + out.loss, targets + out.n_target_tokens
            self.model.backward()
        # The warm-up is counted in steps, what follows in whatever ends the run.
        place = self.step if self.step < self._warmup else max(
            self._warmup, self.done * self.config.steps)
        rate = self._rate(place if self.config.minutes else self.step)
        with _held_back():
            done = self.optimizer.step(rate)
            experts = self._balance.end(done["skipped"])
            if self.ema is not None and not done["skipped"]:
                self.ema.update()
            seconds = time.perf_counter() - start
            self.step += 1
            self.elapsed_s += seconds
            self._loader_state = state
            tokens = sum(pack.n_tokens for pack in packs)
            speed = sum(map(self.model.flops, packs)) / seconds
            row = {"step": self.step, "loss": loss, "lr": rate, "grad_norm": done["grad_norm"],
                   "skipped": done["skipped"], "tokens": tokens, "targets": targets,
                   "tokens_per_s": tokens / seconds, "tflops": speed / 1e12,
                   "mfu": speed / self._peak, "seconds": seconds, "elapsed_s": self.elapsed_s,
                   **experts}
            log.write(json.dumps({key: value if math.isfinite(value) else None
                                  for key, value in row.items()}) + "\n")
            log.flush()
        return row

    def save(self):
        """Writes the model, the optimizer and the place in the data; whole or not at all.

        Returns
        -------
        pathlib.Path
            ``checkpoint-N`` in the run's folder, N being the step.

        Raises
        ------
        OSError
            It cannot be written; checkpoints from before are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"checkpoint-{self.step}"
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=".checkpoint-"))
        try:
            self.model.save_pretrained(temporary)
            if self.model.lora is not None:
                self.model.save_adapter(temporary)
            state = self.optimizer.state_dict()
            if self.ema is not None:
                state |= self.ema.state_dict()
            facts = {"step": self.step, "elapsed_s": self.elapsed_s, "loader": self._loader_state,
                     "routing": self._balance.state_dict()}
            write_whole(temporary / _STATE, lambda stream: np.savez(
                stream, __facts__=np.array(json.dumps(facts)), **state))
            os.chmod(temporary, 0o755)
            with _held_back():
                if target.exists():  # of an earlier run: out of the way first, gone last
                    os.replace(target, temporary / "before")
                os.replace(temporary, target)
                self._saved = self.step
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(target / "before", ignore_errors=True)
        if self.config.keep:
            for _, old in checkpoints(self.folder)[:-self.config.keep]:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def resume(self, checkpoint=None):
        """Goes on from a checkpoint; metrics of later steps are dropped.

        Parameters
        ----------
        checkpoint : path-like, optional
            By default the run's latest.

        Returns
        -------
        int
            The step it was at.

        Raises
        ------
        FileNotFoundError
            There is none.
        ValueError
            It belongs to another model, optimizer or data set.
        """
        checkpoint = Path(checkpoint or latest_checkpoint(self.folder))
        stored = Model.from_pretrained(checkpoint, threads=1)
        if self.model.lora is not None:
            stored.load_adapter(checkpoint)
        with np.load(checkpoint / _STATE, allow_pickle=False) as state:
            facts = json.loads(str(state["__facts__"]))
            self._balance.load_state_dict(facts.get("routing"))
            self.loader.load_state_dict(facts["loader"])
            self.model.load_state_dict(stored.state_dict())
            average = {k for k in state.files if k.endswith("/average")}
            if self.ema is not None:
                self.ema.load_state_dict({k: state[k] for k in average})
            self.optimizer.load_state_dict({k: state[k] for k in state.files
                                            if k != "__facts__" and k not in average})
        self.step, self.elapsed_s = facts["step"], facts["elapsed_s"]
        self._loader_state, self._left, self._saved = facts["loader"], [], self.step
        _cut(self.folder / "metrics.jsonl", self.step)
        return self.step


def _weight_sum(pack):
    """Sum of the weights that count: not of labels at the start of a sample, which nothing
    predicts."""
    counted = pack.labels >= 0
    starts = pack.cu_seqlens[:-1]
    counted[starts[starts < len(counted)]] = False
    return float(counted.sum() if pack.weights is None else pack.weights[counted].sum())


def read_metrics(path):
    """Rows of a ``metrics.jsonl``; a last line that was cut off is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _cut(path, step):
    """Leaves the metrics up to a step: those behind it are taken again."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_whole(path, lambda stream: stream.write(
            "".join(json.dumps(row) + "\n" for row in kept).encode()))


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
