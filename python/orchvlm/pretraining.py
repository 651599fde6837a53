"""Pre-training of a vision tower on pictures with captions, before a decoder reads its features.

Classification over captions (Seed1.5-VL Technical Report, section 3.1; Huang et al., SuperClass,
2024): a picture's features, pooled into a grid of places, are to tell its caption and the words in
it.  A decoder that begins with such features looks at them at once, where one that begins with
random features learns the captions as text.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ._numbers import whole_number
from .inputs import Inputs
from .losses import inverse_frequency, superclass
from .passes import OneRank, Ran
from .training import Trainer, TrainingConfig

_FASTER = 2.0        # rate of the classifier over that of the tower
_EPS_MOMENTS, _EPS_NORM = 1e-8, 1e-5
_FIRST_STD = 0.03    # of the classifier's weights: all classes alike at first


@dataclass
class PretrainingConfig(TrainingConfig):
    """What a pre-training run does: a :class:`TrainingConfig` with these besides.

    Parameters
    ----------
    batch : int
        Pictures of a step.
    places : int
        Features are pooled into a grid of so many rows and columns, so that the classifier sees
        where in a picture something is, whatever the picture's size.
    seed : int
        Of the order of pictures, how they are varied, and the classifier's first weights.
    frame : int, optional
        As of :class:`orchvlm.data.Varied`.

    Attributes
    ----------
    batch, places, seed, frame : int
        As above; all others as in :class:`TrainingConfig`, of which those about packs, ranks and
        experts have no effect.

    Raises
    ------
    ValueError
        A figure out of range.

    Examples
    --------
    >>> import orchvlm
    >>> config = orchvlm.PretrainingConfig(steps=100, batch=32)
    >>> config.steps, config.batch, config.places
    (100, 32, 2)
    """

    weight_decay: float = 0.05
    betas: tuple = (0.9, 0.99)
    batch: int = 128
    places: int = 2
    seed: int = 0
    frame: int = None

    def __post_init__(self):
        super().__post_init__()
        whole_number(self.batch, "batch", 1, 2**20)
        whole_number(self.places, "places", 1, 64)
        whole_number(self.seed, "seed", 0)
        if self.frame is not None:
            whole_number(self.frame, "frame", 1, 2**12)


class Classes:
    """What captions are told by: each whole caption is a class, and so is each word.

    Few captions are alike, but most share words with others; which class says how much follows
    from how seldom it is (:func:`orchvlm.losses.inverse_frequency`).

    Parameters
    ----------
    captions : iterable of str

    Raises
    ------
    ValueError
        No caption.
    """

    def __init__(self, captions):
        captions = list(captions)
        if not captions:
            raise ValueError("there is no caption to learn from")
        self.captions = sorted(set(captions))
        words = sorted({word for caption in self.captions for word in caption.split()})
        self._whole = {caption: i for i, caption in enumerate(self.captions)}
        self._words = {word: i for i, word in enumerate(words, len(self.captions))}
        self.frequency = inverse_frequency(map(self.of, captions), len(self))

    def __len__(self):
        return len(self._whole) + len(self._words)

    def of(self, caption):
        """Numbers of a caption's classes; none for what was never met."""
        found = [self._whole.get(caption), *map(self._words.get, caption.split())]
        return [i for i in found if i is not None]


@lru_cache(maxsize=256)
def _bins(rows, columns, places):
    """float32[places * places, rows * columns]: means over bins that cover the grid evenly.

    Bin i of n has the cells from floor(i * size / n) to ceil((i + 1) * size / n); bins of a grid
    smaller than they overlap.
    """
    def one(size):
        share = np.zeros((places, size), np.float32)
        for i in range(places):
            first, end = i * size // places, -(-(i + 1) * size // places)
            share[i, first:end] = 1 / (end - first)
        return share
    return np.kron(one(rows), one(columns))


def _pieces(grid, merge):
    """(first feature, end, frames, rows, columns) of each picture, in merged tokens."""
    end = 0
    for frames, rows, columns in np.asarray(grid).tolist():
        first, end = end, end + frames * rows * columns // merge ** 2
        yield first, end, frames, rows // merge, columns // merge


class PlacesHead:
    """A classifier over a picture's features: pooled into places, scaled to mean 0 and deviation 1
    over all of them, then linear; trained by Adam with decoupled decay.

    Parameters
    ----------
    classes, width, places, merge : int
        Of captions; of a feature; rows and columns of the grid; patches along a token's side.
    seed : int
    """

    def __init__(self, classes, width, places, merge, seed=0):
        self.places, self.merge = places, merge
        shape = classes, places * places * width
        first = np.random.default_rng(seed).standard_normal(shape, np.float32)
        self.weight = first * np.float32(_FIRST_STD)
        self._first, self._second = np.zeros_like(self.weight), np.zeros_like(self.weight)
        self.grad, self.steps = None, 0

    def pooled(self, features, grid):
        """float[n, places * places * C]: a row for each picture."""
        rows = []
        for first, end, frames, *size in _pieces(grid, self.merge):
            frame = features[first:end].reshape(frames, -1, features.shape[1]).mean(0)
            rows.append((_bins(*size, self.places).astype(frame.dtype) @ frame).ravel())
        return np.stack(rows)

    def spread(self, dpooled, grid, width):
        """The gradient of features from that of :meth:`pooled`."""
        parts = []
        for row, (_, _, frames, *size) in zip(dpooled, _pieces(grid, self.merge)):
            one = _bins(*size, self.places).astype(row.dtype).T @ row.reshape(-1, width)
            parts.append(np.tile(one / frames, (frames, 1)))
        return np.concatenate(parts)

    def loss(self, features, grid, targets, frequency=None, threads=None):
        """Loss and gradient of features; keeps that of the weights for :meth:`step`.

        Parameters
        ----------
        features : float32[rows, C] or float64[rows, C]
            As :meth:`orchvlm.Model.encode` gives them.
        grid : int32[n, 3]
            Frames, rows and columns of each picture, in patches.
        targets : list of n lists of int
            Classes of each picture's caption.
        frequency : float64[V], optional
            Weights of classes.
        threads : int, optional

        Returns
        -------
        loss : float
        dfeatures : array like features
        """
        normed, deviation = _norm(self.pooled(features, grid))
        loss, dnormed, self.grad = superclass(normed, self.weight.astype(normed.dtype, copy=False),
                                              targets, frequency, threads=threads)
        dpooled = _norm_back(dnormed, normed, deviation)
        return loss, self.spread(dpooled, grid, features.shape[1])

    def scores(self, features, grid):
        """float[n, V]: logits of pictures."""
        return _norm(self.pooled(features, grid))[0] @ self.weight.T

    def step(self, rate, betas, decay):
        """Adam from the gradient of the last :meth:`loss`, in place: the matrix is large."""
        self.steps += 1
        grad, one = self.grad, np.float32(1)
        for moment, beta, power in ((self._first, betas[0], 1), (self._second, betas[1], 2)):
            moment *= np.float32(beta)
            moment += (one - np.float32(beta)) * (grad if power == 1 else grad * grad)
        first, second = (1 - beta ** self.steps for beta in betas)
        change = np.sqrt(self._second)
        change /= np.float32(math.sqrt(second))
        change += np.float32(_EPS_MOMENTS)
        np.divide(self._first, change, out=change)
        self.weight *= np.float32(1 - rate * decay)
        self.weight -= np.float32(rate / first) * change

    def state_dict(self):
        """All that later steps depend on."""
        return {"head/steps": np.int64(self.steps), "head/weight": self.weight,
                "head/exp_avg": self._first, "head/exp_avg_sq": self._second}

    def load_state_dict(self, state):
        """Sets what :meth:`state_dict` gave; ValueError where it is another classifier's."""
        arrays = [state.get(f"head/{name}") for name in ("weight", "exp_avg", "exp_avg_sq")]
        if "head/steps" not in state or any(
                a is None or a.size != self.weight.size for a in arrays):
            raise ValueError("this state holds no classifier of these captions and places")
        self.weight, self._first, self._second = (
            np.array(a, np.float32).reshape(self.weight.shape) for a in arrays)
        self.steps = int(np.ravel(state["head/steps"])[0])


def _norm(rows):
    mean, deviation = rows.mean(1, keepdims=True), rows.std(1, keepdims=True) + _EPS_NORM
    return (rows - mean) / deviation, deviation


def _norm_back(dnormed, normed, deviation):
    """Of :func:`_norm`; exact but for the epsilon, which is small beside the deviation."""
    return (dnormed - dnormed.mean(1, keepdims=True)
            - normed * (dnormed * normed).mean(1, keepdims=True)) / deviation


class _Pictures:
    """Batches of pictures and the classes of their captions, without end; what cannot be read is
    passed over and counted."""

    def __init__(self, samples, classes, processor, config):
        from .data import Mixture, Varied
        varied = Varied(samples, config.seed, pixels=processor.images.max_pixels,
                        frame=config.frame)
        self._source = Mixture([varied], seed=config.seed)
        self._classes, self.processor, self._batch = classes, processor, config.batch
        self._most = len(samples)
        self.skipped = 0

    def __next__(self):
        from .data import DataError
        pixels, grids, targets, failed = [], [], [], 0
        while len(grids) < self._batch:
            try:
                sample = next(self._source)
                grid, values = picture(self.processor, sample)
            except DataError:
                self.skipped, failed = self.skipped + 1, failed + 1
                if failed > self._most:
                    raise
                continue
            pixels.append(values)
            grids.append(grid)
            targets.append(self._classes.of(sample["answer"]))
        return pictures(pixels, grids), targets

    def state_dict(self):
        return {"source": self._source.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state):
        self._source.load_state_dict(state.get("source"))
        self.skipped = state.get("skipped", 0)


def picture(processor, sample):
    """(grid, patches) of a sample's only picture, or DataError."""
    from .data import DataError, load_image
    from .data.chat import read_messages
    seen = [part for message in read_messages(sample) for part in message.parts
            if part[0] != "text"]
    if [part[0] for part in seen] != ["image"]:
        raise DataError("a sample to pre-train on has one picture, and no film nor sound")
    pixels, grid = processor.images(load_image(seen[0][1]))
    return grid, pixels


def pictures(pixels, grids):
    """Inputs of pictures alone."""
    return Inputs(input_ids=np.zeros(0, np.int32), pixels=np.concatenate(pixels),
                  grid_thw=np.stack(grids))


class _Classified(OneRank):
    """A step's passes: encoder, classifier and back."""

    def __init__(self, model, head, classes):
        super().__init__(model, 1)
        self._head, self._classes = head, classes

    def make(self, loader):
        return next(loader)

    @staticmethod
    def inputs(batch):
        return batch[0]

    def run(self, batch, balance, checkpoint):
        inputs, targets = batch
        ran = Ran([inputs], self._model)
        features, _ = self._model.encode("vision", inputs, checkpoint=checkpoint)
        ran.loss, dfeatures = self._head.loss(features, inputs.grid_thw, targets,
                                              self._classes.frequency, self._model.threads)
        self._model.encode_backward(dfeatures)
        ran.tokens, ran.targets = len(features), len(targets)
        return ran


class _WithHead:
    """The tower's AdamW and the classifier's, as one optimizer."""

    def __init__(self, optimizer, head):
        self._tower, self._head = optimizer, head

    def step(self, rate):
        done = self._tower.step(rate)
        if not done["skipped"]:
            self._head.step(_FASTER * rate, self._tower.betas, self._tower.weight_decay)
        return done

    def state_dict(self):
        return {**self._tower.state_dict(), **self._head.state_dict()}

    def load_state_dict(self, states):
        (state,) = [states] if isinstance(states, dict) else states
        self._head.load_state_dict({k: state[k] for k in state if k.startswith("head/")})
        self._tower.load_state_dict({k: state[k] for k in state if not k.startswith("head/")})


class Pretraining(Trainer):
    """Trains a model's vision tower to tell the captions of pictures; all else stays as it is.

    Steps, metrics, checkpoints and :meth:`resume` are those of :class:`Trainer`; a checkpoint is a
    model's folder, from which a :class:`Trainer` goes on.  The classifier is in the checkpoint,
    for :meth:`resume`, and no part of the model.

    Parameters
    ----------
    model : Model
        Is changed; all but its vision tower stays frozen afterwards, see :meth:`Model.unfreeze`.
    samples : sequence of dict
        With messages, one picture among them, and ``answer``, its caption; as
        :func:`orchvlm.data.load_pack` gives them.  Pictures are varied anew each time
        (:class:`orchvlm.data.Varied`).
    processor : Processor
        Of the model's configuration.
    config : PretrainingConfig
        What to do.
    folder : path-like
        Checkpoints and ``metrics.jsonl`` go there.

    Raises
    ------
    TypeError
        A configuration of another kind.
    ValueError
        No samples, a sample without a caption.

    References
    ----------
    Huang et al., "Classification Done Right for Vision-Language Pre-Training", 2024, section 3.

    Examples
    --------
    >>> import tempfile, numpy as np, orchvlm
    >>> def sample(shade, caption):
    ...     picture = np.full((56, 56, 3), shade, np.uint8)
    ...     return {"messages": [{"role": "user", "content": [{"type": "image", "image": picture}]},
    ...                          {"role": "assistant", "content": caption}], "answer": caption}
    >>> samples = [sample(0, "black"), sample(255, "white")]
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> processor = orchvlm.data.Processor.from_config(model.config.values)
    >>> config = orchvlm.PretrainingConfig(steps=2, batch=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = orchvlm.Pretraining(model, samples, processor, config, folder)
    ...     steps = [row["step"] for row in run.run()]
    >>> steps, run.accuracy(samples) in (0.0, 0.5, 1.0)
    ([1, 2], True)
    """

    def __init__(self, model, samples, processor, config, folder):
        if not isinstance(config, PretrainingConfig):
            raise TypeError(f"config must be a PretrainingConfig; got {type(config).__name__}")
        captions = [sample.get("answer") for sample in samples]
        if not all(isinstance(caption, str) for caption in captions):
            raise ValueError("every sample needs its caption, a string, as 'answer'")
        self.classes = Classes(captions)
        loader = _Pictures(samples, self.classes, processor, config)
        # What gets no gradient here must not decay either.
        model.freeze(*(name for name in model.parameters
                       if not name.startswith("model.visual.") or "deepstack" in name))
        super().__init__(model, loader, config, folder)
        self.head = PlacesHead(len(self.classes), model.config.text["hidden_size"],
                               config.places, model.config.vision["spatial_merge_size"],
                               config.seed)
        self.passes = _Classified(model, self.head, self.classes)
        self.optimizer = _WithHead(self.optimizer, self.head)

    def accuracy(self, samples, batch=64):
        """How many pictures' captions the classifier tells exactly, of those it was trained on.

        Parameters
        ----------
        samples : sequence of dict
            As those that are trained on, but framed where these are.
        batch : int
            Pictures at a time.

        Returns
        -------
        float
            Share of them, NaN without any.
        """
        right, whole = 0, self.classes.captions
        for first in range(0, len(samples), batch):
            part = [samples[i] for i in range(first, min(len(samples), first + batch))]
            grids, pixels = zip(*(picture(self.processor, sample) for sample in part))
            inputs = pictures(pixels, grids)
            features, _ = self.model.encode("vision", inputs, training=False)
            scores = self.head.scores(features, inputs.grid_thw)[:, :len(whole)]
            right += sum(whole[best] == sample["answer"]
                         for best, sample in zip(scores.argmax(1), part))
        return right / len(samples) if len(samples) else math.nan
