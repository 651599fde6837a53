"""The vision-language model: weights, passes and generation, computed in C."""
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from . import _core
from .checkpoint import CheckpointError, narrowed, open_folder, widened, write_folder
from .configs import ModelConfig

_KIND_WEIGHT, _KIND_NORM, _KIND_BIAS, _KIND_BUFFER = range(4)
_WEIGHT, _GRAD, _MOMENT1, _MOMENT2, _MASTER = range(5)
_CHECKPOINTS = {"none": 0, "selective": 1, "full": 2}
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_DEVICES = ("cpu", "ref", "async", "check")


@dataclass(frozen=True)
class Output:
    """What a forward found.

    Parameters
    ----------
    loss : float
        Weighted sum of the tokens' cross-entropy over the normalizer, with the routers' balance
        loss times its coefficient.
    n_target_tokens : int
        Labels that count.
    aux_loss : float
        The balance loss without its coefficient; the number of experts per token when balanced.
    router_counts : int64[E] or None
        Routed slots per expert, over all layers and tokens.
    weight_sum : float
        Sum of this call's label weights.
    """

    loss: float
    n_target_tokens: int
    aux_loss: float
    router_counts: np.ndarray
    weight_sum: float


def _threads(threads):
    """OMP_NUM_THREADS, or one per core that this process may use."""
    if threads is None:
        text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        if text.isdigit() and int(text) > 0:
            return min(int(text), 1024)
        try:
            return max(1, len(os.sched_getaffinity(0)))
        except AttributeError:  # not on this system
            return os.cpu_count() or 1
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or \
            not 1 <= threads <= 1024:
        raise ValueError(f"threads must be a whole number in [1, 1024]; got {threads!r}")
    return int(threads)


def _backend(device):
    """(what the core opens, device number) of "cpu", "cuda", "cuda:1", ..."""
    if not isinstance(device, str):
        raise TypeError(f"device must be a string such as 'cpu'; got {device!r}")
    name, _, number = device.partition(":")
    if name in _DEVICES and not number:
        return name, 0
    if name == "cuda" and (number.isdigit() or not number):
        return str(Path(__file__).with_name("_cuda.so")), int(number or 0)
    raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {device!r}")


class _Arrays(Mapping):
    """Weights or gradients by name."""

    def __init__(self, model, which):
        self._model, self._which = model, which

    def __getitem__(self, name):
        return self._model._array(name, self._which, view=True)

    def __iter__(self):
        return (name for name in self._model._index if self._which == _WEIGHT
                or self._model.trainable(name))

    def __len__(self):
        return sum(1 for _ in self)

    def __repr__(self):
        return f"<{len(self)} arrays of {self._model!r}>"


class Model:
    """A native-resolution vision encoder and a (mixture-of-experts) decoder.

    Made by :meth:`from_config` or :meth:`from_pretrained`.

    Attributes
    ----------
    config : ModelConfig
    parameters, grads : mapping
        Arrays by their names on the hub.  On the CPU in float32 they are views: writing into them
        changes the model.  bfloat16 comes as a float32 copy.
    device, dtype : str

    Notes
    -----
    One call at a time: a second thread gets RuntimeError.  Ctrl-C stops between layers; weights
    and optimizer stay as they were, what the forward kept is gone.

    Examples
    --------
    >>> import orchvlm
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> inputs = orchvlm.Inputs(input_ids=[72, 105, 33], labels=[72, 105, 33])
    >>> out = model.forward(inputs)
    >>> out.n_target_tokens
    2
    >>> model.backward()
    >>> model.grads["model.language_model.norm.weight"].shape
    (192,)
    """

    def __init__(self, config, *, device="cpu", dtype="float32", threads=None):
        if isinstance(config, dict):
            config = ModelConfig(config)
        if not isinstance(config, ModelConfig):
            raise TypeError("config must be a ModelConfig, e.g. orchvlm.preset('tiny'); got "
                            f"{type(config).__name__}")
        backend, number = _backend(device)
        self.config, self.device, self.dtype = config, device, dtype
        self._core = _core.Model(*config.numbers(), backend, number, _threads(threads), dtype)
        self._list = self._core.parameters()
        self._index = {row[0]: i for i, row in enumerate(self._list)}
        self.parameters = _Arrays(self, _WEIGHT)
        self.grads = _Arrays(self, _GRAD)
        self._inputs = None
        self._counts = None

    # ------------------------------------------------------------ making

    @classmethod
    def from_config(cls, config, seed=0, *, device="cpu", dtype="float32", threads=None,
                    std=0.02):
        """A model with random weights.

        Weights are normal with deviation ``std``, norms 1, biases 0; each parameter draws from a
        stream of its own, so that a model does not depend on the order of its layers.

        Parameters
        ----------
        config : ModelConfig or dict
        seed : int
        device : str
            ``"cpu"``; ``"cuda"`` or ``"cuda:N"`` where that backend was built.
        dtype : {"float32", "bfloat16"}
            Of weights and activations; gradients and optimizer state are float32.
        threads : int, optional
            By default OMP_NUM_THREADS, or one per core of this process.
        std : float

        Returns
        -------
        Model

        Raises
        ------
        ValueError
            A configuration that makes no model, or an unknown device or dtype.
        orchvlm.BackendError
            The device is not there.
        """
        model = cls(config, device=device, dtype=dtype, threads=threads)
        for i, (name, kind, shape, _) in enumerate(model._list):
            if kind == _KIND_NORM:
                values = np.ones(shape, np.float32)
            elif kind == _KIND_WEIGHT:
                rng = np.random.Generator(np.random.Philox(key=[int(seed), i]))
                values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
            else:
                values = np.zeros(shape, np.float32)
            model._write(i, _WEIGHT, values)
        return model

    @classmethod
    def from_pretrained(cls, folder, *, device="cpu", dtype="float32", threads=None):
        """A model from a Hugging Face folder.

        Parameters
        ----------
        folder : path-like
            With ``config.json`` and ``model.safetensors`` or its sharded index; float32,
            bfloat16 or float16.
        device, dtype, threads
            As in :meth:`from_config`.

        Returns
        -------
        Model

        Raises
        ------
        FileNotFoundError
            A file is missing.
        ValueError
            A configuration or file that is not understood; a missing, surplus, mis-shaped or
            non-finite tensor, by name.
        """
        model = cls(ModelConfig.load(folder), device=device, dtype=dtype, threads=threads)
        files = open_folder(folder)
        recent = str(model.config.values.get("transformers_version", "")).startswith("5")
        model._load(files.keys(), lambda name: files[name].read(name), Path(folder),
                    flips="always" if recent and model._square_experts() else "by shape")
        return model

    def _square_experts(self):
        """Whether a file's shapes cannot tell the two layouts of experts apart: transformers 5
        writes [E, out, in], the hub's files hold [E, in, out]; either is read, by shape."""
        text = self.config.text
        width, hidden = text["hidden_size"], text.get("moe_intermediate_size")
        return self.config.sparse and hidden is not None and width in (hidden, 2 * hidden)

    def save_pretrained(self, folder, dtype=None):
        """Writes ``config.json`` and ``model.safetensors`` (in shards above 5 GiB).

        Parameters
        ----------
        folder : path-like
            Made when missing.
        dtype : {"float32", "bfloat16"}, optional
            Of the file; by default the model's.
        """
        dtype = dtype or self.dtype
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16'; got {dtype!r}")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        square = self._square_experts()

        def entry(name, shape):
            if square and name.endswith(_EXPERTS):
                return (name, (shape[0], shape[2], shape[1]),
                        lambda: self._array(name, _WEIGHT, view=True).transpose(0, 2, 1))
            return name, shape, lambda: self._array(name, _WEIGHT, view=True)
        write_folder(folder, [entry(name, shape) for name, _, shape, _ in self._list], dtype)
        config = ModelConfig({**self.config.values, "transformers_version": "5.0.0"}) \
            if square else self.config
        config.save(folder)

    def state_dict(self):
        """{name: float32 copy} of all weights."""
        return {name: np.array(self._array(name, _WEIGHT, view=True)) for name in self._index}

    def load_state_dict(self, state):
        """Sets all weights; ValueError names what is missing, surplus, mis-shaped, non-finite."""
        self._load(state.keys(), lambda name: np.asarray(state[name]), "state")

    def _load(self, names, get, where, flips=None):
        surplus = sorted(set(names) - set(self._index))
        missing = [name for name in self._index if name not in names]
        if self.config.tied and surplus == ["lm_head.weight"]:
            surplus = []  # some files keep the tied head as well
        if missing or surplus:
            raise CheckpointError(
                f"{where}: missing {', '.join(missing[:3]) or 'nothing'}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; surplus "
                f"{', '.join(surplus[:3]) or 'nothing'}"
                f"{f' and {len(surplus) - 3} more' if len(surplus) > 3 else ''}")
        for name, i in self._index.items():
            values = get(name)
            if flips and name.endswith(_EXPERTS) and (
                    values.shape != self._list[i][2] or flips == "always"):
                values = values.transpose(0, 2, 1)
            if values.shape != self._list[i][2]:
                raise CheckpointError(f"{where}: {name} has shape {values.shape}; the "
                                      f"configuration says {self._list[i][2]}")
            if not np.isfinite(values).all():
                raise CheckpointError(f"{where}: {name} is not finite")
            self._write(i, _WEIGHT, values)

    # ------------------------------------------------------------ arrays

    def _place(self, name):
        try:
            return self._index[name]
        except KeyError:
            raise KeyError(f"no parameter {name!r}") from None

    def _array(self, name, which, view):
        array = self._core.array(self._place(name), which, view)
        return widened(array) if array is not None and array.dtype == np.uint16 else array

    def _write(self, i, which, values):
        exact = which != _WEIGHT or self._list[i][1] == _KIND_BUFFER
        if self.dtype == "bfloat16" and not exact:
            values = narrowed(np.asarray(values, np.float32))
        kind = np.float64 if self.dtype == "float64" else np.float32
        if values.dtype != np.uint16:
            values = np.ascontiguousarray(values, kind)
        self._core.write(i, which, values)

    @property
    def n_parameters(self):
        """Number of weights."""
        return sum(int(np.prod(shape, dtype=np.int64)) for _, _, shape, _ in self._list)

    def trainable(self, name):
        """Whether a parameter is trained."""
        return self._core.parameters()[self._place(name)][3]

    def freeze(self, *patterns):
        """Stops training what matches; it holds no gradient or optimizer memory from then on.

        Parameters
        ----------
        *patterns : str
            As ``"model.visual.*"``; shell wildcards over the parameters' names.

        Raises
        ------
        ValueError
            A pattern that matches nothing, or a part of one product's weights (q, k and v; gate
            and up), which are trained together or not at all.
        RuntimeError
            Arrays of gradients are still in use.
        """
        self._train(patterns, False)

    def unfreeze(self, *patterns):
        """Trains what matches again; as :meth:`freeze`."""
        self._train(patterns, True)

    def _train(self, patterns, value):
        mask = np.array([row[3] for row in self._core.parameters()])
        for pattern in patterns:
            hits = [i for name, i in self._index.items() if fnmatchcase(name, pattern)]
            if not hits:
                raise ValueError(f"{pattern!r} matches no parameter")
            mask[hits] = value
        self._core.train_only(mask)

    # ------------------------------------------------------------ passes

    def _arguments(self, inputs):
        visual = self.config.visual_tokens
        feature_row = None
        if inputs.grid_thw is not None and len(inputs.grid_thw):
            merge = self.config.vision["spatial_merge_size"]
            spots = np.isin(inputs.input_ids, visual)
            rows = int(np.prod(inputs.grid_thw, axis=1, dtype=np.int64).sum()) // merge ** 2
            if spots.sum() != rows:
                raise ValueError(f"the images give {rows} features, but {spots.sum()} tokens wait "
                                 "for one (image_token_id, video_token_id)")
            feature_row = np.where(spots, np.cumsum(spots) - 1, -1).astype(np.int32)
        elif visual and np.isin(inputs.input_ids, visual).any():
            raise ValueError("there are image tokens but no images")
        if inputs.mel is not None and len(inputs.mel):
            raise ValueError(f"{self.config.family} has no audio encoder; got sounds")
        return [inputs.input_ids, inputs.cu_seqlens, inputs.position_ids, feature_row,
                inputs.labels, inputs.weights, inputs.grid_thw, inputs.pixels]

    def forward(self, inputs, normalizer=None, router_counts=None, *, training=True,
                checkpoint="none"):
        """Loss of a packed batch.

        The loss is sum(weight * cross-entropy) / normalizer, so that the gradients of several
        calls with one normalizer add up to those of the whole batch, however it was cut.

        Parameters
        ----------
        inputs : Inputs
        normalizer : float, optional
            What the sum is divided by: the weight sum of the global batch.  By default this
            call's own.
        router_counts : (int64[E], int), optional
            Routed slots of the whole global batch and the rows (layers x tokens) they were
            counted over, for a balance loss that does not depend on how the batch was cut.
        training : bool
            Whether a backward may follow.
        checkpoint : {"none", "selective", "full"}
            What is computed again in the backward to save memory; gradients are the same.

        Returns
        -------
        Output

        Raises
        ------
        ValueError
            Tokens outside the vocabulary, images that do not fit their tokens, ...
        RuntimeError
            The model is busy.
        """
        logp = self._forward(inputs, normalizer, router_counts, training, checkpoint, False)
        return self._output(inputs, *logp[:4])

    def _forward(self, inputs, normalizer, router_counts, training, checkpoint, entropy,
                 per_token=False):
        if checkpoint not in _CHECKPOINTS:
            raise ValueError(f"checkpoint must be one of {', '.join(_CHECKPOINTS)}; got "
                             f"{checkpoint!r}")
        if normalizer is not None and not (np.isfinite(normalizer) and normalizer >= 0):
            raise ValueError(f"normalizer must be a finite number >= 0; got {normalizer!r}")
        counts, rows = (None, 0.0) if router_counts is None else router_counts
        if counts is not None:
            counts = np.ascontiguousarray(counts, np.int64)
        self._core.forward(*self._arguments(inputs), -1.0 if normalizer is None else
                           float(normalizer), counts, float(rows), training, entropy,
                           _CHECKPOINTS[checkpoint])
        self._inputs = inputs
        return self._core.output(len(inputs.input_ids), per_token, entropy)

    def _output(self, inputs, loss, aux, weight_sum, targets):
        counts = self._core.router_counts() if self.config.sparse else None
        return Output(loss, targets, aux, counts, weight_sum)

    def backward(self, dlogprobs=None, dentropy=None):
        """Adds the gradients of the last forward's loss, or of a loss of your own.

        Parameters
        ----------
        dlogprobs, dentropy : float32[T], optional
            Slopes of any loss of what :meth:`logprobs` returned.

        Raises
        ------
        ValueError
            No forward in training mode came before, or wrong lengths.
        """
        slopes = []
        for name, value in (("dlogprobs", dlogprobs), ("dentropy", dentropy)):
            if value is not None:
                value = np.ascontiguousarray(value, np.float32)
                if self._inputs is None or value.shape != (len(self._inputs.input_ids),):
                    raise ValueError(f"{name} must have one number per token of the last forward; "
                                     f"got shape {value.shape}")
            slopes.append(value)
        self._core.backward(*slopes)

    def logprobs(self, inputs, entropy=False, *, training=True, checkpoint="none"):
        """Log-probability of every label, and the entropy where it was predicted.

        Parameters
        ----------
        inputs : Inputs
        entropy : bool
        training, checkpoint
            As in :meth:`forward`.

        Returns
        -------
        logp : float32[T]
            0 where the label is -100 or the first of a sample.
        entropy : float32[T] or None
        """
        out = self._forward(inputs, None, None, training, checkpoint, entropy, per_token=True)
        return out[4], out[5]

    def logits(self, rows):
        """float32[len(rows), V] logits of rows of the last forward: row t predicts token t + 1."""
        return self._core.logits(np.ascontiguousarray(rows, np.int32))

    def zero_grad(self):
        """Sets all gradients to 0."""
        self._core.zero_grad()

    def memory(self):
        """{"weights", "training", "activations", "workspace", "cache"}: bytes held now."""
        names = ("weights", "training", "activations", "workspace", "cache")
        return dict(zip(names, self._core.memory()))

    def generate(self, inputs, max_new_tokens=64, *, temperature=0.0, top_k=None, top_p=None,
                 seed=0, stop=(), callback=None):
        """Continues every sample of ``inputs``; see :func:`orchvlm.generation.generate`."""
        from .generation import generate
        return generate(self, inputs, max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, seed=seed, stop=stop, callback=callback)

    def __repr__(self):
        return (f"<Model {self.config.family}: {self.n_parameters / 1e6:,.1f}M parameters, "
                f"{self.dtype} on {self.device}>")
