"""The weights of a model: made at random or from files, seen as arrays, saved, frozen."""
import os
import threading
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import _core
from ._numbers import whole_number
from .adapters import KIND_ADAPTER, Adapters
from .checkpoint import CheckpointError, narrowed, open_folder, widened, write_folder
from .configs import ModelConfig, count_elements
from .dlpack import Tensor
from .profiling import watch
from .thinker import file_parts, plain_name

_KIND_WEIGHT, _KIND_NORM, _KIND_BIAS, _KIND_BUFFER = range(4)
_WEIGHT, _GRAD, _MOMENT1, _MOMENT2, _MASTER = range(5)
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_DEVICES = ("cpu", "ref", "async", "check")


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
    return whole_number(threads, "threads", 1, 1024)


def backend_of(device):
    """(what the core opens, device number) of "cpu", "cuda", "cuda:1", ..."""
    if not isinstance(device, str):
        raise TypeError(f"device must be a string such as 'cpu'; got {device!r}")
    name, _, number = device.partition(":")
    if name in _DEVICES and not number:
        return name, 0
    if name == "cuda" and (number.isdigit() or not number):
        return str(Path(__file__).with_name("_cuda.so")), int(number or 0)
    raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {device!r}")


def _deviation(std):
    if isinstance(std, bool) or not isinstance(std, (int, float, np.number)) or \
            not 0 <= std < 1e30:
        raise ValueError(f"std must be a number in [0, 1e30); got {std!r}")
    return float(std)


def matching(model, pattern):
    """Places of the parameters whose names match a shell pattern; ValueError without any."""
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern is a string such as 'model.visual.*'; got {pattern!r}")
    hits = [i for name, i in model._index.items() if fnmatchcase(name, pattern)]
    if not hits:
        raise ValueError(f"{pattern!r} matches no parameter")
    return hits


def fitting(wanted, state, what):
    """Copies of saved arrays by name; ValueError, naming it, for what is missing, surplus or
    mis-shaped against the arrays that are wanted."""
    if set(wanted) != set(state):
        odd = sorted(set(wanted) ^ set(state))
        raise ValueError(f"{what}: {odd[0]} is missing or surplus ({len(odd)} such)")
    arrays = {}
    for key, have in wanted.items():
        arrays[key] = np.array(state[key], np.asarray(have).dtype, order="C")
        if arrays[key].shape != np.shape(have):
            raise ValueError(f"{what}: {key} has shape {arrays[key].shape}; needed "
                             f"{np.shape(have)}")
    return arrays


class _Arrays(Mapping):
    """Weights or gradients by name."""

    def __init__(self, model, which):
        self._model, self._which = model, which

    def __getitem__(self, name):
        array = self._model._array(name, self._which, view=True)
        if array is None:
            raise KeyError(f"{name!r} is not trained")
        return array

    def __iter__(self):
        return (name for name in self._model._index if self._which == _WEIGHT
                or self._model.trainable(name))

    def __len__(self):
        return sum(1 for _ in self)

    def __repr__(self):
        return f"<{len(self)} arrays of {self._model!r}>"


class Weights(Adapters):
    """What :class:`orchvlm.Model` is beside its passes."""

    _shard = None

    def __init__(self, config, *, device="cpu", dtype="float32", threads=None):
        if isinstance(config, dict):
            config = ModelConfig(config)
        if not isinstance(config, ModelConfig):
            raise TypeError("config must be a ModelConfig, e.g. orchvlm.preset('tiny'); got "
                            f"{type(config).__name__}")
        backend, number = backend_of(device)
        self.config, self.device, self.dtype = config, device, dtype
        self.threads, self._moe_chunk_rows = _threads(threads), None
        self._core = _core.Model(*config.numbers(), backend, number, self.threads, dtype)
        self._list = self._core.parameters()
        self._index = {row[0]: i for i, row in enumerate(self._list)}
        self.parameters = _Arrays(self, _WEIGHT)
        self.grads = _Arrays(self, _GRAD)
        self._generates = threading.Lock()  # held from a prompt to its last new token
        watch(self)

    @property
    def shard(self):
        """Shard or None : that keeps the weights over ranks; :meth:`Shard.undo` ends it, and
        nothing else does, since a pass may be using it."""
        return self._shard

    # ------------------------------------------------------------ making

    @classmethod
    def from_config(cls, config, seed=0, *, device="cpu", dtype="float32", threads=None,
                    std=0.02):
        """A model with random weights.

        Weights are normal with deviation ``std``, those of convolutions over sounds with
        sqrt(2 / inputs), norms 1, biases 0; each parameter draws from a stream of its own, so that
        a model does not depend on the order of its layers.

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

        References
        ----------
        K. He et al., Delving Deep into Rectifiers, ICCV 2015: the deviation of convolutions.
        """
        seed, std = whole_number(seed, "seed", 0), _deviation(std)
        model = cls(config, device=device, dtype=dtype, threads=threads)
        for i, (_, kind, shape, _) in enumerate(model._list):
            if kind == _KIND_NORM:
                values = np.ones(shape, np.float32)
            elif kind == _KIND_WEIGHT:
                rng = np.random.Generator(np.random.Philox(key=[seed, i]))
                # With the one deviation, three convolutions of few inputs would leave a sound a
                # hundred times fainter than the positions that are added to it.
                deviation = np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else std
                values = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
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
        device : str
            As in :meth:`from_config`.
        dtype : {"float32", "bfloat16"}
        threads : int, optional

        Returns
        -------
        Model

        Raises
        ------
        FileNotFoundError
            The folder or a file is missing.
        ValueError
            A configuration or file that is not understood; a missing, surplus, mis-shaped or
            non-finite tensor, by name.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; nothing is downloaded here: fetch "
                                    "the model's files first, and name the folder that has them")
        model = cls(ModelConfig.load(folder), device=device, dtype=dtype, threads=threads)
        model._read_files(Path(folder), model.config)
        return model

    def _restore(self, folder):
        """Sets all weights, adapters among them, to those in a folder of this very model, with one
        tensor at a time in memory besides.  Of a sharded model every rank takes its part.

        ValueError, before anything is written: weights or adapters of another model.
        """
        config = ModelConfig.load(folder)
        here = {name: shape for name, kind, shape, _ in self._list if kind != KIND_ADAPTER}
        there = {row[0]: row[2] for row in _core.model_parameters(*config.numbers())}
        self._check_names(there, folder, here)
        for name, shape in here.items():
            if there[name] != shape:
                raise CheckpointError(f"{folder}: {name} has shape {there[name]}; the model's has "
                                      f"{shape}")
        adapters = {} if self.lora is None else self._read_adapter(folder)[1]
        self._check_names(adapters, folder, [name for name in self._index if name not in here])
        for name, values in adapters.items():
            self._check_values(self._index[name], values, folder)
        self._read_files(folder, config)
        for name, values in adapters.items():
            self._write(self._index[name], _WEIGHT, values)

    def _square_experts(self):
        """Whether a file's shapes cannot tell the two layouts of experts apart: transformers 5
        writes [E, out, in], the hub's files hold [E, in, out]; either is read, by shape."""
        text = self.config.text
        width, hidden = text["hidden_size"], text.get("moe_intermediate_size")
        return self.config.sparse and not self.config.audible and hidden is not None and \
            width in (hidden, 2 * hidden)

    def save_pretrained(self, folder, dtype=None):
        """Writes ``config.json`` and ``model.safetensors`` (in shards above 5 GiB).

        Adapters that are not merged are left out, see :meth:`save_adapter`.  Of a sharded model all
        ranks call it, and rank 0 writes.

        Parameters
        ----------
        folder : path-like
            Made when missing.
        dtype : {"float32", "bfloat16"}, optional
            Of the file; by default the model's.

        Raises
        ------
        ValueError
            Another dtype.
        """
        folder, dtype = Path(folder), self.dtype if dtype is None else dtype
        entries, config = self._files(dtype)
        if self._only_gathers(entries):
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(folder, entries, dtype)
        config.save(folder)

    def _files(self, dtype):
        """(tensors as write_folder takes them, configuration) of what :meth:`save_pretrained`
        writes."""
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16'; got {dtype!r}")
        square = self._square_experts()
        entries = [entry for name, kind, shape, _ in self._list if kind != KIND_ADAPTER
                   for entry in self._entries(name, shape, square and name.endswith(_EXPERTS))]
        return entries, ModelConfig({**self.config.values, "transformers_version": "5.0.0"}) \
            if square else self.config

    def _parts(self, name, shape):
        """[(name in files, index into the parameter or None: all of it)]"""
        return file_parts(name, shape) if self.config.audible else [(name, None)]

    def _entries(self, name, shape, turned):
        """What write_folder takes."""
        whole = lru_cache(1)(lambda: self._whole(name))
        if turned:
            return [(name, (shape[0], shape[2], shape[1]), lambda: whole().transpose(0, 2, 1))]

        def part(index):
            array = whole()
            return array if index is None else array[index].T
        # Of an indexed part the shape alone is needed here, not the numbers.
        empty = np.broadcast_to(np.float32(0), shape)
        return [(there, shape if index is None else empty[index].T.shape,
                 lambda index=index: part(index)) for there, index in self._parts(name, shape)]

    def state_dict(self):
        """All weights.  Of a sharded model all ranks call it, and all get the same.

        Returns
        -------
        dict
            {name: float32 copy}.
        """
        return {name: np.array(self._whole(name)) for name in self._index}

    def load_state_dict(self, state):
        """Sets all weights; the optimizer's float32 masters follow.  Of a sharded model every rank
        takes its part.

        Parameters
        ----------
        state : mapping
            Arrays by name, as :meth:`state_dict` gives them.

        Raises
        ------
        ValueError
            A missing, surplus, mis-shaped or non-finite tensor, by name.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays; got "
                            f"{type(state).__name__}")
        arrays = {name: np.asarray(value) for name, value in state.items()}
        self._check_names(arrays.keys(), "state")
        for name, i in self._index.items():  # all of it, before any is written
            self._check_values(i, arrays[name], "state")
        for name, i in self._index.items():
            self._write(i, _WEIGHT, arrays[name])

    def _check_names(self, names, where, wanted=None):
        wanted = self._index if wanted is None else wanted
        surplus = sorted(set(names) - set(wanted))
        missing = [name for name in wanted if name not in names]
        if self.config.tied and surplus == ["lm_head.weight"]:
            surplus = []  # some files keep the tied head as well
        if missing or surplus:
            raise CheckpointError(
                f"{where}: missing {', '.join(missing[:3]) or 'nothing'}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; surplus "
                f"{', '.join(surplus[:3]) or 'nothing'}"
                f"{f' and {len(surplus) - 3} more' if len(surplus) > 3 else ''}")

    def _check_values(self, i, values, where):
        name, _, shape, _ = self._list[i]
        if values.dtype.kind not in "fiu":
            raise CheckpointError(f"{where}: {name} holds no numbers, but {values.dtype}")
        if values.shape != shape:
            raise CheckpointError(f"{where}: {name} has shape {values.shape}; the configuration "
                                  f"says {shape}")
        self._check_finite(name, values, where)

    def _check_finite(self, name, values, where):
        if not np.isfinite(values).all():
            raise CheckpointError(f"{where}: {name} is not finite")

    def _read_files(self, folder, config):
        """Sets all weights but adapters to those of a folder with this configuration."""
        files = open_folder(folder)
        base = [(i, name, shape) for i, (name, kind, shape, _) in enumerate(self._list)
                if kind != KIND_ADAPTER]
        if self.config.audible:
            self._read_parts(base, files, folder)
            return
        self._check_names(files.keys(), folder, [name for _, name, _ in base])
        recent = str(config.values.get("transformers_version", "")).startswith("5")
        always = recent and self._square_experts()
        for i, name, shape in base:
            values = files[name].read(name)
            if name.endswith(_EXPERTS) and values.ndim == 3 and (
                    always or values.shape != shape):
                values = values.transpose(0, 2, 1)
            self._check_values(i, values, folder)
            self._write(i, _WEIGHT, values)

    def _read_parts(self, base, files, folder):
        """Weights that lie in files under other names, and experts one by one."""
        stored = {plain_name(name): name for name in files}
        stored.pop(None, None)
        parts = {name: self._parts(name, shape) for _, name, shape in base}
        self._check_names(stored.keys(), folder,
                          dict.fromkeys(there for some in parts.values() for there, _ in some))
        for i, name, shape in base:
            values = None
            for there, index in parts[name]:
                one = files[stored[there]].read(stored[there])
                if index is None:
                    values = one
                    continue
                values = np.empty(shape, np.float32) if values is None else values
                if one.T.shape != values[index].shape:
                    raise CheckpointError(f"{folder}: {stored[there]} has shape {one.shape}; the "
                                          f"configuration says {values[index].T.shape}")
                values[index] = one.T
            self._check_values(i, values, folder)
            self._write(i, _WEIGHT, values)

    # ------------------------------------------------------------ arrays

    def tensor(self, name, grad=False):
        """A weight or a gradient where it lies, for ``torch.from_dlpack`` and its like.

        Nothing is copied or converted: bfloat16 comes as bfloat16, and what is written there is
        written into the model.

        Parameters
        ----------
        name : str
            As in ``parameters``.
        grad : bool
            Its gradient instead.

        Returns
        -------
        Tensor
            With ``shape``, ``dtype``, ``__dlpack__`` and ``__dlpack_device__``.

        Raises
        ------
        KeyError
            No such parameter, or one that is not trained.
        BufferError
            On export: memory of a device that DLPack has no name for, or a copy was asked for.

        Notes
        -----
        The export waits until the model is done with what came before, so that any stream may
        read at once.  Let a stream that writes finish before the model's next call.  Gradients
        that are held somewhere keep :meth:`freeze` from moving them.

        Examples
        --------
        >>> import numpy as np, orchvlm
        >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
        >>> norm = np.from_dlpack(model.tensor("model.language_model.norm.weight"))
        >>> norm.shape, bool(np.shares_memory(norm, model.parameters[
        ...     "model.language_model.norm.weight"]))
        ((192,), True)
        """
        place = self._place(name)
        if grad and not self.trainable(name):
            raise KeyError(f"{name!r} is not trained")
        kind, shape = self._list[place][1:3]
        exact = self.dtype == "bfloat16" and (grad or kind == _KIND_BUFFER)
        return Tensor(self._core, place, _GRAD if grad else _WEIGHT, name, shape,
                      "float32" if exact else self.dtype)

    def _place(self, name):
        try:
            return self._index[name]
        except KeyError:
            raise KeyError(f"no parameter {name!r}") from None

    def _array(self, name, which, view):
        place = self._place(name)
        if self.shard is not None and self.shard.holds and self._list[place][1] != _KIND_BUFFER:
            raise ValueError(f"{name} lies on several ranks: on all of them, Model.state_dict() "
                             "gathers weights and Shard.gradients() gradients")
        array = self._core.array(place, which, view)
        if array is None or array.dtype != np.uint16:
            return array
        array = widened(array)
        array.flags.writeable = not view  # what is written into a copy would be lost
        return array

    def _whole(self, name):
        """A weight as float32: a view where the model has it, else gathered from all ranks."""
        if self.shard is None or not self.shard.holds:
            return self._array(name, _WEIGHT, view=True)
        array = self.shard._whole(self._place(name))
        return widened(array) if array.dtype == np.uint16 else array

    def _only_gathers(self, entries):
        """Whether this rank leaves the writing to another one; then it has taken part in it."""
        if self.shard is None or not self.shard.holds or self.shard.comm.rank == 0:
            return False
        for _, _, get in entries:
            get()
        return True

    def _need_whole(self, what):
        if self.shard is not None:
            raise ValueError(f"{what}: settle what is trained and adapted before the model is "
                             "sharded, or undo that first")

    def _write(self, i, which, values):
        exact = which != _WEIGHT or self._list[i][1] == _KIND_BUFFER
        if self.dtype == "bfloat16" and not exact:
            values = narrowed(np.asarray(values, np.float32))
        kind = np.float64 if self.dtype == "float64" else np.float32
        if values.dtype != np.uint16:
            values = np.ascontiguousarray(values, kind)
        (self._core.write if self.shard is None else self.shard._write)(i, which, values)

    @property
    def n_parameters(self):
        """int : number of weights, and of the routers' corrections."""
        return count_elements(shape for _, _, shape, _ in self._list)

    @property
    def units(self):
        """dict of str to list of str : the parameters that are gathered and reduced together when
        a model is spread over ranks, by the name of their module.

        Examples
        --------
        >>> import orchvlm
        >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny-moe"), seed=0)
        >>> model.units["model.language_model.norm"]
        ['model.language_model.norm.weight']
        >>> [name for name in model.units if "layers.1" in name]  # experts are beside their layer
        ['model.language_model.layers.1', 'model.language_model.layers.1.mlp.experts']
        """
        return {name: [self._list[i][0] for i in members] for name, members in self._core.units()}

    def trainable(self, name):
        """Whether a parameter is trained.

        Parameters
        ----------
        name : str

        Returns
        -------
        bool
        """
        return self._core.parameters()[self._place(name)][3]

    def freeze(self, *patterns):
        """Stops training what matches; it holds no gradient or optimizer memory from then on, while
        gradients and moments of what stays trained are kept.

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
        """Trains what matches again, from moments of 0; as :meth:`freeze`.

        Parameters
        ----------
        *patterns : str
        """
        self._train(patterns, True)

    def _train(self, patterns, value):
        self._need_whole("freeze")
        mask = np.array([row[3] for row in self._core.parameters()])
        for pattern in patterns:
            mask[matching(self, pattern)] = value
        kept = self._training_state(mask)
        self._core.train_only(mask)
        for (place, which), array in kept.items():
            self._core.write(place, which, array)

    def _training_state(self, mask):
        """{(place, which): copy} of gradients, moments and masters of the trained parameters that
        the mask has; their memory is laid out anew when it changes."""
        grads, moments = self._core.held()
        held = (_GRAD,) * grads + (_MOMENT1, _MOMENT2, _MASTER) * moments
        arrays = {(int(place), which): self._core.array(int(place), which, False)
                  for place in np.flatnonzero(mask) for which in held}
        return {key: array for key, array in arrays.items() if array is not None}
