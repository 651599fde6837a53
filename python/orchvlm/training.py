"""Training on one rank: packs of samples, AdamW, a schedule, metrics, runs that go on."""
import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ._files import write_whole
from ._numbers import finite_number
from .ahead import Ahead
from .averaging import EMA
from .model import Model
from .optim import AdamW, schedule
from .passes import OneRank
from .peak import gemm_peak
from .routing import MODES, Balance
from .watch import Watch, read_metrics, tell, write_row

_STATE = "training_state.npz"


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
    rank_tokens, rank_patches : int, optional
        With several ranks: tokens, and patches of images, that a rank takes at a time; more than
        that is done in several micro-batches.
    shard : {"ddp", "zero1", "fsdp", "hybrid"} or dict
        With several ranks: who keeps what, as ``mode`` of :class:`Shard`.
    node_size : int, optional
        Of ``hybrid``, as there.
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
    rank_tokens: int = None
    rank_patches: int = None
    shard: object = "ddp"
    node_size: int = None
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
    comm : Comm, optional
        Of the ranks that train together, each with the same model and a loader of its own samples
        (:class:`orchvlm.data.RankLoader`).  Rank 0 writes.
    watch : Watch, optional
        Looks at held-out samples; all ranks have one, with the same samples.  A checkpoint is
        written of what is best, and stays.
    callbacks : list of callable
        ``f(row)`` after every step, on rank 0 alone, with a copy of what :meth:`run` yields.

    Attributes
    ----------
    told : RunConfig or None
        What :meth:`from_config` made it from, which is then in the folder as ``config.toml``.
    processor : orchvlm.data.Processor or None
        The loader's, from there.

    Raises
    ------
    ValueError
        A rate, schedule or group that :class:`AdamW` or :func:`schedule` refuses; ``aux="bias"``
        with a model whose routers have no corrections.

    Notes
    -----
    Packs are made in a thread of its own while the step computes; with several ranks that thread
    also plans the next step and moves its data (:class:`orchvlm.Orchestrator`).  A run that was
    saved and resumed computes the very numbers of one that was not interrupted, on another number
    of ranks the same to rounding; unless ``minutes`` end it: the rate then follows the time that
    has passed.

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

    told = processor = None

    def __init__(self, model, loader, config, folder, comm=None, *, watch=None, callbacks=()):
        if not isinstance(model, Model) or not isinstance(config, TrainingConfig):
            raise TypeError("Trainer takes a Model, a loader and a TrainingConfig; got "
                            f"{type(model).__name__} and {type(config).__name__}")
        for name in ("__next__", "state_dict", "load_state_dict"):
            if not hasattr(loader, name):
                raise TypeError(f"loader must have {name}; got {type(loader).__name__}")
        if not isinstance(watch, (Watch, type(None))):
            raise TypeError(f"watch must be a Watch; got {type(watch).__name__}")
        if not all(map(callable, callbacks)):
            raise TypeError(f"callbacks must be callable; got {list(callbacks)!r:.60}")
        self.watch, self.callbacks = watch, tuple(callbacks)
        self.model, self.loader, self.config = model, loader, config
        self.folder = Path(folder)
        patterns = [p for p in config.freeze
                    if any(fnmatchcase(name, p) for name in model.parameters)]
        if patterns:
            model.freeze(*patterns)
        self.passes = _passes(model, config, comm)
        if watch is not None and watch.figure != "loss" and model.shard and model.shard.holds:
            raise ValueError(f"watch looks at {watch.figure}, but a model whose weights are in "
                             "shards gives no answers: let it look at 'loss', or shard by 'ddp' "
                             "or 'zero1'")
        self.optimizer = AdamW(model, config.lr, config.betas, weight_decay=config.weight_decay,
                               max_grad_norm=config.max_grad_norm, groups=config.groups)
        self.ema = None if config.ema is None else EMA(model, config.ema)
        self._balance = Balance(model, config.aux, config.bias_rate, self.passes.total)
        self._warmup = min(config.warmup, config.steps)
        self._rate = schedule(config.schedule, config.lr, config.steps, self._warmup,
                              config.min_lr)
        self.step = 0
        self.elapsed_s = 0.0  # time in steps, over all parts of the run
        self._loader_state = None
        self._left = []       # packs that were made and not used
        self._saved = None    # step of the last checkpoint written or read

    @classmethod
    def from_config(cls, config, comm=None, callbacks=()):
        """Makes model, loader and trainer of what a file says.

        Parameters
        ----------
        config : RunConfig, dict or path-like
            As in :class:`RunConfig`; a path is one of a TOML file.
        comm : Comm, optional
            Of the ranks; ``ranks.n`` starts none.
        callbacks : list of callable
            As of the class.

        Returns
        -------
        Trainer

        Raises
        ------
        TypeError, ValueError
            As of :class:`RunConfig` and :class:`Trainer`.
        """
        from .building import pieces
        told, processor, model, loader, watch = pieces(config, comm)
        trainer = cls(model, loader, told.training(), told["output.folder"], comm, watch=watch,
                      callbacks=callbacks)
        trainer.told, trainer.processor = told, processor
        return trainer

    def fit(self):
        """Takes all the steps that are left.

        Returns
        -------
        list of dict
            The rows of :meth:`run`, and what it raises.
        """
        return list(self.run())

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
        step.  The run ends early where the data end, and where the watch is over.

        Yields
        ------
        dict
            For every step: step, loss, lr, grad_norm, skipped, tokens, targets, tokens_per_s,
            tflops, mfu (their share of what a matrix product reaches on the device, see
            :func:`orchvlm.peak.gemm_peak`), seconds, elapsed_s, and of models with experts aux_loss
            (without its coefficient), expert_load (fullest over mean) and routing_seconds; also a
            line of ``metrics.jsonl``.  A loss that is no number is None there.  With several ranks
            on all of them, and besides what :meth:`orchvlm.Orchestrator.metrics` says; where the
            watch looked, what :meth:`Watch.look` says.

        Raises
        ------
        Error
            A callback failed; the other ranks get a CommError that says so.
        CommError
            Another rank failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        passes, log, broken = self.passes, None, False
        self._peak = gemm_peak(self.model.device, self.model.dtype, self.model.threads)
        ahead = Ahead(self.loader, passes.make, passes.ahead, self._left)
        try:
            if passes.rank == 0 and self.told is not None:
                self.told.write(self.folder)
            if passes.rank == 0:
                log = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
            if self.watch is not None:
                self.watch.recall(self.folder / "metrics.jsonl", self.step, passes)
            while self.done < 1 and not (self.watch and self.watch.over):
                start = time.perf_counter()
                try:
                    batch, state = ahead.next()
                except StopIteration:
                    break
                place = log and log.tell()
                row = self._one(batch, state, start, log)
                if self.watch is not None and self.step % self.watch.every == 0:
                    self._look(row, log, place)
                if passes.rank == 0:
                    tell(self.callbacks, row)
                yield row
                if self.config.save_every and self.step % self.config.save_every == 0:
                    self.save()
            passes.total(np.zeros(1))  # no rank ends well where the last callback failed
        except GeneratorExit:
            raise
        except BaseException as error:
            broken = self._together()  # ranks that write together do so after whole steps only
            if isinstance(error, Exception):
                passes.abort(f"{type(error).__name__}: {error}")
            raise
        finally:
            try:
                if self.step and self._saved != self.step and not broken:
                    self.save()
            finally:
                self._left = ahead.close()
                if log is not None:
                    log.close()

    def _one(self, batch, state, start, log):
        """One step; ``state`` is the loader's behind its batch."""
        self.model.zero_grad()
        ran = self.passes.run(batch, self._balance, self.config.checkpoint)
        self.passes.reduce_gradients()
        # The warm-up is counted in steps, what follows in whatever ends the run.
        place = self.step if self.step < self._warmup else max(
            self._warmup, self.done * self.config.steps)
        rate = self._rate(place if self.config.minutes else self.step)
        with _held_back():
            done = self.optimizer.step(rate)
            experts = self._balance.end(done["skipped"])
            if self.ema is not None and not done["skipped"]:
                self.ema.update()
            # One clock for all ranks: that of rank 0 says when a run by minutes is over.
            seconds = time.perf_counter() - start if self.passes.rank == 0 else 0.0
            loss, targets, tokens, flops, seconds = self.passes.total(np.array(
                [ran.loss, ran.targets, ran.tokens, ran.flops, seconds])).tolist()
            self.step += 1
            self.elapsed_s += seconds
            self._loader_state = state
            row = {"step": self.step, "loss": loss, "lr": rate, "grad_norm": done["grad_norm"],
                   "skipped": done["skipped"], "tokens": int(tokens), "targets": int(targets),
                   "tokens_per_s": tokens / seconds, "tflops": flops / seconds / 1e12,
                   "mfu": flops / seconds / (self._peak * self.passes.size), "seconds": seconds,
                   "elapsed_s": self.elapsed_s, **experts, **self.passes.metrics(ran)}
            if log is not None:
                write_row(log, row)
        return row

    def _look(self, row, log, place):
        """Adds held-out figures to a row that begins at a place of the log; the best look leaves a
        checkpoint."""
        row |= self.watch.look(self.model, self.passes, self.step)
        if log is not None:
            with _held_back():
                log.seek(place)
                log.truncate()
                write_row(log, row)
        if self.watch.best_step == self.step and self._saved != self.step:
            self.save()

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
        target, together = self.folder / f"checkpoint-{self.step}", self._together()
        if self.passes.rank and not together:  # all ranks hold the same
            self._saved = self.step
            return target
        temporary = self._temporary(together)
        try:
            self._write(temporary, together)
            if together:
                self.model.shard.comm.barrier()
            with _held_back():
                if self.passes.rank == 0:
                    os.chmod(temporary, 0o755)
                    if target.exists():  # of an earlier run: out of the way first, gone last
                        os.replace(target, temporary / "before")
                    os.replace(temporary, target)
                self._saved = self.step
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.passes.rank == 0:
            shutil.rmtree(target / "before", ignore_errors=True)
            if self.config.keep:
                for step, old in checkpoints(self.folder)[:-self.config.keep]:
                    if self.watch is None or step != self.watch.best_step:
                        shutil.rmtree(old, ignore_errors=True)
        return target

    def _together(self):
        """Whether a checkpoint takes all ranks."""
        return self.model.shard is not None and self.model.shard.holds_state

    def _temporary(self, together):
        """A new folder, on all ranks the same."""
        name = np.zeros(256, np.uint8)
        if self.passes.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=self.folder, prefix=".checkpoint-"))
            name[:len(made.name)] = np.frombuffer(made.name.encode(), np.uint8)
        if together:
            self.model.shard.comm.broadcast(name)
        return self.folder / name.tobytes().rstrip(b"\0").decode()

    def _write(self, folder, together):
        """A checkpoint's files; together with the others this rank's part of them."""
        rank, size = self.passes.rank, self.passes.size
        if rank == 0 or self.model.shard.holds:
            self.model.save_pretrained(folder)
            if self.model.lora is not None:
                self.model.save_adapter(folder)
        state, averages = self.optimizer.state_dict(), {}
        if together:
            write_whole(folder / f"optimizer-{rank + 1}-of-{size}.npz",
                        lambda stream: np.savez(stream, **state))
            state = {}
        if rank:
            return
        if self.ema is not None:
            averages = self.ema.state_dict()
        facts = {"step": self.step, "elapsed_s": self.elapsed_s, "loader": self._loader_state,
                 "routing": self._balance.state_dict()}
        write_whole(folder / _STATE, lambda stream: np.savez(
            stream, __facts__=np.array(json.dumps(facts)), **state, **averages))

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
            with ExitStack() as files:
                parts = [files.enter_context(np.load(path, allow_pickle=False))
                         for path in sorted(checkpoint.glob("optimizer-*.npz"))]
                self.optimizer.load_state_dict(parts or {k: state[k] for k in state.files
                                                         if k != "__facts__" and k not in average})
        self.step, self.elapsed_s = facts["step"], facts["elapsed_s"]
        self._loader_state, self._left, self._saved = facts["loader"], [], self.step
        if self.passes.rank == 0:
            _cut(self.folder / "metrics.jsonl", self.step)
        return self.step


def _passes(model, config, comm):
    """Who runs the passes of a step."""
    if comm is None or comm.size == 1:
        return OneRank(model, config.micro_batches)
    from .orchestrator import Orchestrator
    from .sharding import Shard
    Shard(model, comm, config.shard, config.node_size)
    return Orchestrator(model, comm, max_tokens=config.rank_tokens,
                        max_patches=config.rank_patches, micro_batches=config.micro_batches)


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
