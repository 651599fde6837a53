"""Low-rank adapters of linear layers, with PEFT's names and files."""
import json
import math
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ._files import read_object, short, write_whole
from ._numbers import finite_number, whole_number
from .checkpoint import CheckpointError, SafeTensors, write_file

_WEIGHT, KIND_ADAPTER = 0, 4
_RANK_MOST = 65536  # of the core
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # before every name in PEFT's files
# What another value of would change what an adapter computes.
_NEUTRAL = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False,
            "lora_dropout": 0.0, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
            "lora_bias": False, "layer_replication": None, "trainable_token_indices": None,
            "target_parameters": None, "use_qalora": False, "alora_invocation_tokens": None,
            "megatron_config": None}
# The same of later versions of PEFT; not written, as earlier ones refuse them.
_LATER = dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
                        "velora_config"))
# Read, or of no account for what stored adapters compute: tensors name the modules, and how they
# were started or quantised is over.  Not init_lora_weights: some starts change the base.
_KNOWN = {*_NEUTRAL, *_LATER, "r", "lora_alpha", "use_rslora", "init_lora_weights",
          "target_modules", "exclude_modules", "base_model_name_or_path", "inference_mode",
          "task_type", "revision", "auto_mapping", "peft_version", "layers_to_transform",
          "layers_pattern", "megatron_core", "runtime_config", "loftq_config", "eva_config",
          "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # that leave the base as it is


class Adapters:
    """What :class:`orchvlm.Model` does with low-rank adapters (LoRA).

    Attributes
    ----------
    lora : dict or None
        ``r``, ``alpha``, ``rslora``, ``merged`` and ``modules`` of the present adapters.
    """

    lora = None

    def add_lora(self, r=8, alpha=16.0, match=("model.language_model.layers.*.self_attn.*_proj",),
                 seed=0, *, rslora=False):
        """Low-rank adapters beside linear layers: y = W x + (alpha / r) B A x.

        They are what is trained from then on; the weights they adapt hold no gradients and no
        optimizer state.  ``A`` starts uniform in +-1/sqrt(columns) as PEFT's does, ``B`` at 0, so
        that the model computes what it did.  An optimizer made before is of no use after.

        Parameters
        ----------
        r : int
            Rank.
        alpha : float
        match : list of str
            Patterns over modules' names, the names of weights without ``.weight``: linear layers of
            attention, of MLPs, of shared experts, and of the mergers behind the towers.
        seed : int
            Each ``A`` draws from a stream of its own.
        rslora : bool
            alpha / sqrt(r) instead of alpha / r.

        Raises
        ------
        ValueError
            A pattern that matches nothing, or a module that cannot have an adapter: experts that
            are kept in one tensor, embeddings, convolutions, ...; there are adapters already.
        RuntimeError
            Arrays of gradients are still in use.

        References
        ----------
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.

        Examples
        --------
        >>> import orchvlm
        >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
        >>> model.add_lora(r=4, alpha=8, match=["*.q_proj", "*.v_proj"])
        >>> sum(model.trainable(name) for name in model.parameters)
        24
        >>> model.parameters["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"].shape
        (4, 192)
        """
        if not isinstance(match, (list, tuple)) or not match or \
                not all(isinstance(pattern, str) for pattern in match):
            raise TypeError(f"match must be a list of patterns; got {match!r}")
        modules = set()
        for pattern in match:
            hits = [name for name in self._modules() if fnmatchcase(name, pattern)]
            if not hits:
                raise ValueError(f"{pattern!r} matches no module")
            modules.update(hits)
        seed, r = whole_number(seed, "seed", 0), whole_number(r, "r", 1, _RANK_MOST)
        self._open_lora(modules, r, finite_number(alpha, "alpha", 0), bool(rslora))
        for name, i in self._index.items():
            if name.endswith(".lora_A.weight"):
                shape = self._list[i][2]
                rng = np.random.Generator(np.random.Philox(key=[seed, i]))
                bound = 1 / math.sqrt(shape[1])
                self._write(i, _WEIGHT, rng.uniform(-bound, bound, shape).astype(np.float32))

    def _modules(self):
        """Names of weights without the last word; experts in one tensor have no such word."""
        return {name.removesuffix(".weight"): i for name, i in self._index.items()
                if len(self._list[i][2]) > 1}

    def _open_lora(self, modules, r, alpha, rslora):
        places = self._modules()
        mask = np.zeros(len(self._list), bool)
        mask[[places[name] for name in modules]] = True
        scale = alpha / math.sqrt(r) if rslora else alpha / r
        self._need_whole("adapters")
        self._core.lora_open(mask, r, scale)
        self._relist()
        ordered = [name for name in places if name in modules]
        self.lora = {"r": r, "alpha": alpha, "rslora": rslora, "merged": False,
                     "modules": ordered}

    def _relist(self):
        self._list = self._core.parameters()
        self._index = {row[0]: i for i, row in enumerate(self._list)}

    def _need_lora(self):
        if self.lora is None:
            raise ValueError("this model has no adapters; see add_lora and load_adapter")

    def merge_lora(self):
        """Adds the adapters to the weights, so that they cost nothing in generation.

        :meth:`save_pretrained` then writes a model that needs no adapter.

        Raises
        ------
        ValueError
            No adapters, or they are merged.
        """
        self._need_lora()
        self._need_whole("merge_lora")
        self._core.lora_merge(True)
        self.lora["merged"] = True

    def unmerge_lora(self):
        """Takes merged adapters out of the weights again, up to rounding.

        Raises
        ------
        ValueError
            No adapters, or they are not merged.
        """
        self._need_lora()
        self._need_whole("unmerge_lora")
        self._core.lora_merge(False)
        self.lora["merged"] = False

    def remove_lora(self):
        """Takes the adapters away; merged ones stay in the weights.  All weights are trained again.

        Raises
        ------
        ValueError
            No adapters.
        RuntimeError
            Arrays of adapters or gradients are still in use.
        """
        self._need_lora()
        self._need_whole("remove_lora")
        self._core.lora_close()
        self._relist()
        self.lora = None

    # ------------------------------------------------------------ files

    def save_adapter(self, folder, base=None, dtype="float32"):
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT reads them.

        Parameters
        ----------
        folder : path-like
            Made when missing.
        base : str, optional
            Name of the base model, for the file.
        dtype : {"float32", "bfloat16"}
            Of the file.

        Raises
        ------
        ValueError
            No adapters, another dtype.
        """
        self._need_lora()
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16'; got {dtype!r}")
        if base is not None and not isinstance(base, str):
            raise TypeError(f"base must be a string; got {base!r}")
        entries, text = self._adapter_files(base)
        if self._only_gathers(entries):
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / ADAPTER, entries, dtype)
        write_whole(folder / ADAPTER_CONFIG, lambda stream: stream.write(text))

    def _adapter_files(self, base=None):
        """(tensors as write_file takes them, bytes of the configuration)"""
        entries = [(_PREFIX + name, shape, lambda name=name: self._whole(name))
                   for name, kind, shape, _ in self._list if kind == KIND_ADAPTER]
        values = {**_NEUTRAL, "r": self.lora["r"], "lora_alpha": self.lora["alpha"],
                  "use_rslora": self.lora["rslora"], "target_modules": self.lora["modules"],
                  "base_model_name_or_path": base, "inference_mode": True,
                  "init_lora_weights": True, "task_type": None, "revision": None,
                  "layers_to_transform": None, "layers_pattern": None, "auto_mapping": None}
        return entries, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()

    def load_adapter(self, folder):
        """Adds the adapters of a folder, ours or PEFT's; they are what is trained from then on.

        Parameters
        ----------
        folder : path-like

        Raises
        ------
        FileNotFoundError
            A file is missing.
        ValueError
            A kind of adapter that is not computed here (DoRA, trained biases or whole modules,
            ranks or scales by module, dropout, a start that changes the base, ...), a key of the
            file that is not known, each by its name; modules that this model has not, a mis-shaped
            or non-finite tensor; there are adapters already.
        """
        settings, values = self._read_adapter(Path(folder))
        self._open_lora({name.rpartition(".lora_")[0] for name in values}, *settings)
        for name, array in values.items():
            self._write(self._index[name], _WEIGHT, array)

    def _read_adapter(self, folder):
        """((r, alpha, rslora), {name: array}) of a folder's adapters, which fit this model."""
        r, alpha, rslora = _read_config(folder / ADAPTER_CONFIG)
        file = SafeTensors(folder / ADAPTER)
        tensors = {_our_name(name, folder): name for name in file.tensors}
        modules = {name.rpartition(".lora_")[0] for name in tensors}
        places = self._modules()
        for name in sorted(modules):
            if name not in places:
                raise CheckpointError(f"{folder}: this model has no module {name}")
            for kind in ("A", "B"):
                if f"{name}.lora_{kind}.weight" not in tensors:
                    raise CheckpointError(f"{folder}: {name} has no lora_{kind}")
        values = {}
        for name, stored in tensors.items():
            values[name] = np.asarray(file.read(stored))
            rows, columns = self._list[places[name.rpartition(".lora_")[0]]][2][:2]
            wanted = (r, columns) if ".lora_A." in name else (rows, r)
            if values[name].shape != wanted:
                raise CheckpointError(f"{folder}: {name} has shape {values[name].shape}; needed "
                                      f"{wanted}")
            if values[name].dtype.kind != "f":
                raise CheckpointError(f"{folder}: {name} holds no numbers, but "
                                      f"{values[name].dtype}")
            self._check_finite(name, values[name], folder)
        return (r, alpha, rslora), values


def _our_name(stored, folder):
    name = stored.removeprefix(_PREFIX)
    if name == stored or not name.endswith((".lora_A.weight", ".lora_B.weight")):
        raise CheckpointError(f"{folder}: {stored} is no part of a low-rank adapter")
    return name


def _read_config(path):
    """(r, alpha, rslora) of PEFT's file; ValueError for what is not computed here."""
    values = read_object(path, CheckpointError)
    for key in sorted(values.keys() - _KNOWN):
        raise CheckpointError(f"{path}: unknown key {short(key)}, got {short(values[key])}; it "
                              "might be a switch that is not computed here: take it out if it "
                              "changes nothing")
    start = values.get("init_lora_weights")
    if not any(start is one or isinstance(one, str) and start == one for one in _STARTS):
        raise CheckpointError(f"{path}: init_lora_weights = {short(start)} starts from another "
                              "base; adapters of an unchanged base alone are computed here")
    for key, neutral in (_NEUTRAL | _LATER).items():
        value = values.get(key, neutral)
        if value != neutral and value not in (None, [], {}, False):
            raise CheckpointError(f"{path}: {key} = {short(value)} is not computed here; only "
                                  f"{neutral!r} is")
    if "r" not in values or "lora_alpha" not in values:
        raise CheckpointError(f"{path}: r or lora_alpha missing")
    rslora = values.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise CheckpointError(f"{path}: use_rslora must be true or false; got {short(rslora)}")
    return (whole_number(values["r"], "r", 1, _RANK_MOST),
            finite_number(values["lora_alpha"], "lora_alpha", 0), rslora)
