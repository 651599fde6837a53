"""Training on one rank or many: packs of samples, AdamW, a schedule, metrics, runs that go on."""
import math
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ._numbers import finite_number
from .ahead import Ahead
from .averaging import EMA, averaged
from .choosing import LANGUAGE
from .endings import Endings, held_back
from .model import Model
from .nonfinite import LOG, NonFiniteError, Skipped, step_files
from .optim import AdamW, schedule
from .passes import passes_of
from .peak import gemm_peak
from .routing import MODES, Balance
from .run_folder import checkpoints, latest_checkpoint, note_figure
from .saving import Saver, SaveError, chosen, read_checkpoint
from .watch import FIGURES, Watch, cut_rows, read_metrics, tell, write_row

__all__ = ["Trainer", "TrainingConfig", "checkpoints", "latest_checkpoint", "read_metrics"]


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
        With several ranks: tokens, and patches of images, that a rank takes at a time; more tokens
        are done in several micro-batches, more patches in several rounds.
    rank_memory_bytes : int, optional
        With several ranks: bytes that the model of a rank holds at most, moving average included;
        the samples of a step are taken in as many rounds as that needs (:class:`Orchestrator`).
    rank_refit : int
        With several ranks: ``refit`` of :class:`Orchestrator`.
    rank_language : {"balance", "sequence_parallel", "auto"}
        With several ranks: ``language`` of :class:`Orchestrator`.
    shard : {"ddp", "zero1", "fsdp", "hybrid"} or dict
        With several ranks: who keeps what, as ``mode`` of :class:`Shard`.
    node_size : int, optional
        Of ``hybrid``, as there.
    rank_experts : int
        With several ranks: how many of them share the experts, as ``experts`` of :class:`Shard`.
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
        Decay of a moving average of the weights, the trainer's ``ema``; checkpoints hold it
        besides the weights, and held-out samples are looked at with it.
    save_every : int
        Steps between checkpoints; 0: at the end only.
    keep : int
        Checkpoints of this run that stay, the latest ones, and the best besides, see
        :meth:`Trainer.judge`; 0: all.  Behind a step that was skipped none goes, and none is
        written but at the run's end.
    most_skipped : int
        Steps in a row whose loss or gradient is no number; so many end the run.

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
    rank_memory_bytes: int = None
    rank_refit: int = 0
    rank_language: str = "balance"
    shard: object = "ddp"
    node_size: int = None
    rank_experts: int = 1
    checkpoint: str = "none"
    aux: str = "exact"
    bias_rate: float = 1e-3
    ema: float = None
    save_every: int = 0
    keep: int = 0
    most_skipped: int = 5

    def __post_init__(self):
        for name, least in (("steps", 1), ("micro_batches", 1), ("warmup", 0), ("save_every", 0),
                            ("keep", 0), ("most_skipped", 1), ("rank_refit", 0),
                            ("rank_experts", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or \
                    value < least:
                raise ValueError(f"{name} must be a whole number >= {least}; got {value!r}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes must be positive and finite; got {self.minutes!r}")
        if self.rank_language not in LANGUAGE:
            raise ValueError(f"rank_language must be one of {', '.join(LANGUAGE)}; got "
                             f"{self.rank_language!r}")
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
        The loader's, where it is one: what makes it is in each checkpoint.

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

    told = None

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
        processor = getattr(loader, "processor", None)
        self.processor = processor if hasattr(processor, "files") else None
        self.folder = Path(folder)
        patterns = [p for p in config.freeze
                    if any(fnmatchcase(name, p) for name in model.parameters)]
        if patterns:
            model.freeze(*patterns)
        self.passes = passes_of(model, config, comm)
        if watch is not None and watch.figure != "loss" and model.shard and model.shard.holds:
            raise ValueError(f"watch looks at {watch.figure}, but a model whose weights are in "
                             "shards gives no answers: let it look at 'loss', or shard by 'ddp' "
                             "or 'zero1', all experts on every rank")
        self.optimizer = AdamW(model, config.lr, config.betas, weight_decay=config.weight_decay,
                               max_grad_norm=config.max_grad_norm, groups=config.groups)
        self.ema = None if config.ema is None else EMA(model, config.ema)
        self._balance = Balance(model, config.aux, config.bias_rate, self.passes.total)
        self._warmup = min(config.warmup, config.steps)
        self._rate = schedule(config.schedule, config.lr, config.steps, self._warmup,
                              config.min_lr)
        self.step = 0
        self.elapsed_s = 0.0  # time in steps, over all parts of the run
        self._rest_s = 0.0    # of the last step, behind its clock
        self._torn = False    # weights and step are not of the same step
        self._loader_state = None
        self._left = []       # packs that were made and not used
        shard = model.shard
        self._skipped = Skipped(self.folder, config.most_skipped)
        self._saver = Saver(self.folder, config.keep, None if shard is None else shard.comm,
                            shard is not None and shard.holds_state, self._skipped)

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
        told, _, model, loader, watch = pieces(config, comm)
        trainer = cls(model, loader, told.training(), told["output.folder"], comm, watch=watch,
                      callbacks=callbacks)
        trainer.told = told
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

        Checkpoints are copied between two steps and written while the next ones run.  Ctrl-C, an
        error and a loop that is left early all leave one of the last whole step; so does SIGTERM,
        which ends the run behind the step, with several ranks behind the same one on all (Ctrl-C
        likewise).  All ranks leave their loops behind the same step, or none does.  The run ends
        early where the data end, and where the watch is over.

        Yields
        ------
        dict
            For every step: step, loss, lr, grad_norm, skipped, skipped_steps (so far), tokens,
            targets, tokens_per_s, tflops, mfu (their share of what a matrix product reaches on the
            device, see :func:`orchvlm.peak.gemm_peak`), seconds, elapsed_s, of models that see
            patches_per_s, and of models with experts aux_loss (without its coefficient),
            expert_load (fullest over mean) and routing_seconds, with experts over ranks
            expert_rank_load (:meth:`Balance.end`); also a line of ``metrics.jsonl``.
            A loss that is no number is None there.  With several ranks on all of them, and besides
            what :meth:`orchvlm.Orchestrator.metrics` says and exposed_comm_share, its part of the
            step; where the watch looked, what :meth:`Watch.look` says.

        Raises
        ------
        Error
            A callback failed; the other ranks get a CommError that says so.
        CommError
            Another rank failed, or left its loop while this one did not.
        OSError
            On all ranks: a checkpoint cannot be written; those from before are whole.
        NonFiniteError
            On all ranks: ``most_skipped`` steps in a row had no number.  ``nonfinite-N`` in the
            run's folder is for :func:`orchvlm.replay`.
        SystemExit
            With status 143, after SIGTERM.
        """
        passes, log, how = self.passes, None, "all"
        self._peak = gemm_peak(self.model.device, self.model.dtype, self.model.threads)
        self._endings = Endings(passes.size)
        if passes.rank == 0:
            self._saver.begin()
            for name in ("metrics.jsonl", LOG):
                cut_rows(self.folder / name, self.step)
        if self._loader_state is None:
            self._loader_state = self.loader.state_dict()
        ahead = Ahead(self.loader, passes.make, passes.ahead, self._left)
        self._endings.begin()
        try:
            if passes.rank == 0 and self.told is not None:
                self.told.write(self.folder)
            if passes.rank == 0:
                log = open(self.folder / "metrics.jsonl", "ab", buffering=0)
            if self.watch is not None:
                self.watch.recall(self.folder / "metrics.jsonl", self.step, passes)
            while self.done < 1 and not (self.watch and self.watch.over):
                start = time.perf_counter()
                try:
                    batch, state = ahead.next()
                except StopIteration:
                    break
                place = log and log.tell()
                row, signs = self._one(batch, state, start, log)
                if self.watch is not None and self.step % self.watch.every == 0:
                    self._look(row, log, place)
                if passes.rank == 0:
                    tell(self.callbacks, row)
                with self._endings.agreed(passes, self.step):
                    yield row
                self._between(batch, signs)
        except BaseException as error:
            how = self._how(error)
            told = isinstance(error, SaveError) or self._endings.apart
            if isinstance(error, Exception) and not told and how != "all":
                passes.abort(f"{type(error).__name__}: {error}")
            raise
        finally:
            try:
                self._last(how)
            finally:
                self._endings.end()
                self._left = ahead.close()
                if log is not None:
                    log.close()

    def _how(self, error):
        """Who writes the last checkpoint of a run that ends with this: all ranks, which know of it,
        rank 0, which has all that there is, or nobody."""
        if isinstance(error, SaveError) or self._torn:
            return "none"
        left = isinstance(error, GeneratorExit) and not self._endings.apart
        if left or isinstance(error, NonFiniteError) or self._endings.obeyed:
            return "all"
        return "none" if self._saver.together else "rank 0"

    def _last(self, how):
        """The checkpoint at a run's end."""
        if how == "all" or how == "rank 0" and self.passes.rank == 0:
            if self.step:
                self._save(alone=how != "all")
            self._saver.complain(alone=how != "all")
            return
        self._saver.drop()
        if how == "rank 0":
            self._saver.saved = self.step

    def _one(self, batch, state, start, log):
        """(row of metrics, signs of all ranks) of one step; ``state`` is the loader's behind its
        batch."""
        self.model.zero_grad()
        ran = self.passes.run(batch, self._balance, self.config.checkpoint)
        self.passes.reduce_gradients()
        # The warm-up is counted in steps, what follows in whatever ends the run.
        place = self.step if self.step < self._warmup else max(
            self._warmup, self.done * self.config.steps)
        rate = self._rate(place if self.config.minutes else self.step)
        with held_back():
            # One clock for all ranks: that of rank 0 says when a run by minutes is over.
            now = time.perf_counter()
            seconds = now - start + self._rest_s if self.passes.rank == 0 else 0.0
            loss, targets, tokens, patches, flops, seconds, *signs = self.passes.total(np.array(
                [ran.loss, ran.targets, ran.tokens, ran.patches, ran.flops, seconds,
                 *self._saver.signs(), *self._endings.signs()])).tolist()
            self._torn = True
            done = self.optimizer.step(rate) if math.isfinite(loss) else {
                "grad_norm": math.nan, "skipped": True}
            experts = self._balance.end(done["skipped"])
            if self.ema is not None and not done["skipped"]:
                self.ema.update()
            self.step += 1
            self._torn = False
            self.elapsed_s += seconds
            self._before, self._loader_state = self._loader_state, state
            self._skipped.note(done)
            row = {"step": self.step, "loss": loss, "lr": rate, "grad_norm": done["grad_norm"],
                   "skipped": done["skipped"], "skipped_steps": self._skipped.count,
                   "tokens": int(tokens), "targets": int(targets),
                   "tokens_per_s": tokens / seconds, "tflops": flops / seconds / 1e12,
                   "mfu": flops / seconds / (self._peak * self.passes.size), "seconds": seconds,
                   "elapsed_s": self.elapsed_s, **experts}
            if self.model.config.vision:
                row["patches_per_s"] = patches / seconds
            try:
                row |= self.passes.metrics(ran)
                if "exposed_comm_ms" in row:
                    row["exposed_comm_share"] = row["exposed_comm_ms"] / 1e3 / seconds
            finally:  # a step that was taken is written down, also where other ranks are gone
                if log is not None:
                    self._wrote("metrics.jsonl", write_row, log, row)
            if log is not None and done["skipped"]:
                self._wrote(LOG, self._skipped.tell, self.step, loss, self._samples())
            self._rest_s = time.perf_counter() - now  # goes to the next step's time
        return row, signs

    def _wrote(self, name, write, *arguments):
        """Writes to a file of the run; of one that cannot be written all ranks hear behind the
        next step."""
        try:
            write(*arguments)
        except OSError as error:
            self._saver.note(self.folder / name, error)

    def _between(self, batch, signs):
        """What is done behind a step, on all ranks alike: ``signs`` are the same on all."""
        self._saver.settle(*signs[:2])
        if self._skipped.too_many:
            raise NonFiniteError(self._dump(batch))
        best = self.watch is not None and self.watch.best_step == self.step
        due = self.config.save_every and self.step % self.config.save_every == 0
        if best or due and not self._skipped.in_a_row:  # weights that are ruined are not worth it
            self._saver.finish()
            self._saver.start(self)
        self._endings.obey(*signs[2:])

    def _samples(self):
        """Names of the last step's samples, where the loader has them."""
        names = getattr(self.loader, "names", None)
        return [] if names is None else names(self._before, self._loader_state)

    def _dump(self, batch):
        """Writes the last step for :func:`orchvlm.replay`; what to say."""
        name, size = f"nonfinite-{self.step}", self.passes.size
        facts = {"step": self.step, "dtype": self.model.dtype, "ranks": size,
                 "checkpoint": self.config.checkpoint, "samples": self._samples(),
                 "drawn": self._before.get("source", {}).get("drawn", 0)}
        self._saver.finish()
        self._saver.start(self, name, step_files(self.passes.inputs(batch), self.passes.rank, size,
                                                 facts))
        self._saver.finish()
        return (f"{self._skipped.in_a_row} steps in a row whose loss or gradient is no number; "
                f"orchvlm.replay({str(self.folder / name)!r}) takes the last one again")

    def _look(self, row, log, place):
        """Adds held-out figures to a row that begins at a place of the log."""
        with averaged(self.ema):
            row |= self.watch.look(self.model, self.passes, self.step)
        if log is None:
            return
        with held_back():
            self._wrote("metrics.jsonl", log.truncate, place)
            self._wrote("metrics.jsonl", write_row, log, row)
            if self.watch.best_step == self.step:
                self._wrote("figures.json", self.judge,
                            FIGURES[self.watch.figure] * self.watch.best)

    def save(self):
        """Writes a checkpoint of the present step; whole or not at all.  All ranks call it.  Where
        this run has written that, or gone on from it, it stays as it is.

        It holds the model as :meth:`Model.from_pretrained` reads it, the optimizer's state by rank
        (``optimizer-R-of-N.safetensors``: flat, with offset and full shape in the file's metadata),
        the place in the data, and ``manifest.json`` with sizes and checksums.

        Returns
        -------
        pathlib.Path
            ``checkpoint-N`` in the run's folder, N being the step.

        Raises
        ------
        OSError
            On all ranks: it cannot be written; checkpoints from before are untouched.
        """
        self._saver.finish()
        if not self._saver.has(self.step):
            self._saver.start(self)
            self._saver.finish()
        return self.folder / f"checkpoint-{self.step}"

    def _save(self, alone):
        self._saver.finish(alone)
        if self._saver.saved != self.step:
            self._saver.start(self)
            self._saver.finish(alone)

    def judge(self, figure):
        """Says how good the present weights are; the best checkpoint stays, see ``keep``.

        Parameters
        ----------
        figure : float
            The greater, the better: a score, minus a loss.
        """
        if self.passes.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            note_figure(self.folder, self.step, float(figure))

    def facts(self):
        """What a checkpoint says besides weights and the optimizer's state.

        Returns
        -------
        dict
            As JSON takes it.  There is no state of random numbers: all that is drawn follows from
            the seeds and counts in the loader's.
        """
        return {"step": self.step, "elapsed_s": self.elapsed_s, "loader": self._loader_state,
                "routing": self._balance.state_dict(), "skipped": self._skipped.state_dict()}

    def resume(self, checkpoint=None):
        """Goes on from a checkpoint, on any number of ranks; metrics of later steps are dropped,
        their checkpoints set aside when the run begins, and gone when the next one is written.
        All ranks call it.

        Parameters
        ----------
        checkpoint : path-like, optional
            By default the run's latest that is as it was written, with weights that are finite; of
            later ones a warning says what is wrong.

        Returns
        -------
        int
            The step it was at.

        Raises
        ------
        FileNotFoundError
            There is none.
        ValueError
            A file of it is missing, cut off or altered; it belongs to another model, optimizer or
            data set.
        """
        checkpoint = chosen(checkpoint, self.folder, self.passes)
        facts, states, averages = read_checkpoint(checkpoint)
        self._balance.load_state_dict(facts.get("routing"))
        self.loader.load_state_dict(facts["loader"])
        self.model._restore(checkpoint)
        if self.ema is not None:
            self.ema.load_state_dict(averages)
        self.optimizer.load_state_dict(states)
        self._skipped.load_state_dict(facts["skipped"])
        self.step, self.elapsed_s = facts["step"], facts["elapsed_s"]
        self._loader_state, self._left = facts["loader"], []
        if checkpoint.resolve().parent == self.folder.resolve():
            self._saver.go_on(self.step)
        return self.step
