"""Training on one rank: packs of samples, AdamW, a schedule, metrics, runs that go on."""
import json
import os
import queue
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ._files import write_whole
from .flops import model_flops
from .model import Model
from .optim import AdamW, schedule

_STATE = "training_state.npz"


class _Ahead:
    """Makes packs in a thread of its own, a few ahead; the state that it tells is that of the pack
    it gave out last."""

    def __init__(self, loader, depth=3):
        self._loader, self._queue = loader, queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _put(self, item):
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _work(self):
        try:
            while not self._stop.is_set():
                pack = next(self._loader)
                self._put((pack, self._loader.state_dict()))
        except BaseException as error:  # handed on to whoever asks for the next pack
            self._put((error, None))

    def next(self):
        """(pack, loader state after it)"""
        item, state = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item, state

    def close(self):
        self._stop.set()
        self._thread.join()


@dataclass
class TrainingConfig:
    """What a run does.

    Parameters
    ----------
    steps : int
    lr, min_lr : float
        Peak and last rate.
    warmup : int
        Steps.
    schedule : {"cosine", "linear", "constant"}
    weight_decay, max_grad_norm : float
    betas : (float, float)
    groups : list of dict
        As in :class:`AdamW`.
    freeze : list of str
        Patterns of parameters that are not trained.
    micro_batches : int
        Packs per step; the loss is divided by the step's weight sum, so the gradient is that of
        one larger pack.
    checkpoint : {"none", "selective", "full"}
        Activations that are computed again.
    save_every : int
        Steps between checkpoints; 0: at the end only.
    """

    steps: int = 1000
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
    save_every: int = 0

    def __post_init__(self):
        for name in ("steps", "micro_batches"):
            if isinstance(getattr(self, name), bool) or int(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)!r}")


def recipe(stage):
    """The training stages of Seed1.5-VL.

    Parameters
    ----------
    stage : {"stage0", "stage1", "stage2", "sft"}
        Adapter alignment, pre-training on 32,768 tokens, on 131,072, supervised fine-tuning.

    Returns
    -------
    TrainingConfig
        Steps follow from the report's tokens and batches.

    References
    ----------
    Seed1.5-VL Technical Report, tables 4 and section 4.1.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.recipe("stage0").lr
    0.000252
    """
    frozen = ("model.visual.patch_embed.*", "model.visual.blocks.*", "model.visual.ln.*",
              "model.language_model.*", "lm_head.*")
    stages = {
        "stage0": dict(steps=1907, lr=2.52e-4, min_lr=4.50e-5, warmup=100, freeze=frozen),
        "stage1": dict(steps=42074, lr=5.22e-5, min_lr=5.22e-6, warmup=500),
        "stage2": dict(steps=3366, lr=5.22e-6, min_lr=5.22e-6, warmup=0, schedule="constant"),
        "sft": dict(steps=6250, lr=2e-5, min_lr=2e-6, warmup=625, freeze=frozen[:3])}
    if stage not in stages:
        raise ValueError(f"stage must be one of {', '.join(stages)}; got {stage!r}")
    return TrainingConfig(**stages[stage])


class Trainer:
    """Trains a model on packs.

    Parameters
    ----------
    model : Model
    loader : iterator of Inputs
        With ``state_dict`` and ``load_state_dict``, as :class:`orchvlm.data.Loader`.
    config : TrainingConfig
    folder : path-like
        Checkpoints and ``metrics.jsonl`` go there.

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
        self.model, self.loader, self.config = model, loader, config
        self.folder = Path(folder)
        if config.freeze:
            model.freeze(*[p for p in config.freeze if _matches(model, p)])
        self.optimizer = AdamW(model, config.lr, config.betas, weight_decay=config.weight_decay,
                               max_grad_norm=config.max_grad_norm, groups=config.groups)
        self._rate = schedule(config.schedule, config.lr, config.steps,
                              min(config.warmup, config.steps), config.min_lr)
        self.step = 0
        self._loader_state = None

    def run(self):
        """Yields a dict per step: step, loss, lr, grad_norm, tokens, tokens_per_s, tflops,
        seconds.  Each is also a line of ``metrics.jsonl``.  Ctrl-C leaves a checkpoint of the last
        whole step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ahead = _Ahead(self.loader)
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
                while self.step < self.config.steps:
                    row = self._one(ahead)
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    yield row
                    every = self.config.save_every
                    if every and self.step % every == 0 and self.step < self.config.steps:
                        self.save()
        finally:
            ahead.close()
            if self.step:
                self.save()

    def _one(self, ahead):
        start = time.perf_counter()
        packs = []
        for _ in range(self.config.micro_batches):
            pack, state = ahead.next()
            packs.append(pack)
        total = sum(_weight_sum(pack) for pack in packs)
        self.model.zero_grad()
        loss = 0.0
        for pack in packs:
            loss += self.model.forward(pack, normalizer=total,
                                       checkpoint=self.config.checkpoint).loss
            self.model.backward()
        rate = self._rate(self.step)
        done = self.optimizer.step(rate)
        self.step += 1
        self._loader_state = state
        seconds = time.perf_counter() - start
        tokens = sum(pack.n_tokens for pack in packs)
        flops = sum(model_flops(self.model.config, pack) for pack in packs)
        return {"step": self.step, "loss": loss, "lr": rate, "grad_norm": done["grad_norm"],
                "skipped": done["skipped"], "tokens": tokens,
                "tokens_per_s": tokens / seconds, "tflops": flops / seconds / 1e12,
                "seconds": seconds}

    def save(self):
        """Writes the model, the optimizer and the place in the data; whole or not at all."""
        target = self.folder / f"checkpoint-{self.step}"
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=".checkpoint-"))
        try:
            self.model.save_pretrained(temporary)
            state = self.optimizer.state_dict()
            facts = {"step": self.step, "loader": self._loader_state}
            write_whole(temporary / _STATE, lambda stream: np.savez(
                stream, __facts__=np.array(json.dumps(facts)), **state))
            if target.exists():
                shutil.rmtree(target)
            os.chmod(temporary, 0o755)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return target

    def resume(self, checkpoint=None):
        """Goes on from a checkpoint folder, by default the latest; the step it was at."""
        checkpoint = Path(checkpoint or latest_checkpoint(self.folder))
        stored = Model.from_pretrained(checkpoint, threads=1)
        self.model.load_state_dict(stored.state_dict())
        with np.load(checkpoint / _STATE, allow_pickle=False) as state:
            facts = json.loads(str(state["__facts__"]))
            self.optimizer.load_state_dict({k: state[k] for k in state.files
                                            if k != "__facts__"})
        self.step, self._loader_state = facts["step"], facts["loader"]
        self.loader.load_state_dict(self._loader_state)
        return self.step


def _matches(model, pattern):
    from fnmatch import fnmatchcase
    return any(fnmatchcase(name, pattern) for name in model._index)


def _weight_sum(pack):
    """Sum of the weights that count: not of labels at the start of a sample, which nothing
    predicts."""
    counted = pack.labels >= 0
    starts = pack.cu_seqlens[:-1]
    counted[starts[starts < len(counted)]] = False
    return float(counted.sum() if pack.weights is None else pack.weights[counted].sum())


def latest_checkpoint(folder):
    """The checkpoint folder with the greatest step; FileNotFoundError without any."""
    found = [(int(p.name.rpartition("-")[2]), p) for p in Path(folder).glob("checkpoint-*")
             if p.name.rpartition("-")[2].isdigit()]
    if not found:
        raise FileNotFoundError(f"{folder} has no checkpoint to resume from")
    return max(found)[1]
