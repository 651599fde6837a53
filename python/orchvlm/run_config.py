"""What a training run is told: a TOML file, what overrides it, and what neither says."""
import copy
import os
from difflib import get_close_matches
from pathlib import Path

from ._files import write_whole
from .recipes import FIRST_STD, PRESET_KEYS, TASKS, starting_point
from .run_keys import BY_NAME, KEYS, SECTIONS, toml, tomllib
from .training import TrainingConfig

#: What a run was told, in its folder.
RUN_FILE = "config.toml"
_ENDLESS = 1_000_000  # steps of a run that the clock ends
# What a layer says takes back what lower ones say of these, unless it says that itself.
_INSTEAD = {"model.preset": ("model.folder",), "model.folder": ("model.preset", "model.std"),
            "training.steps": ("training.minutes",),
            "data.files": ("data.kinds", "data.difficulty", "data.max_side", "data.weights",
                           "data.held_out")}
_OF_TASKS = {"data.kinds": "kinds", "data.difficulty": "difficulty", "data.max_side": "max_side"}


class RunConfig:
    """A training run, resolved: what ``orchvlm train`` reads from a TOML file.

    Parameters
    ----------
    *layers : dict or (str, dict)
        ``{"training": {"steps": 200}}``, with sections and keys as in a file; later ones win.
        Beside each, optionally before it, what messages call it.

    Attributes
    ----------
    values : dict of str to object
        ``section.key`` to its value, of every key; None where nothing is said.
    origins : dict of str to str
        ``section.key`` to who said it; ``default`` for the others.

    Raises
    ------
    TypeError
        A layer that is no dict.
    ValueError
        An unknown section or key, with the nearest known one; a value of a wrong type or out of
        range; keys that exclude each other.

    Notes
    -----
    All keys are listed by ``orchvlm train --keys`` and in ``docs/training.md``.

    Examples
    --------
    >>> import orchvlm
    >>> run = orchvlm.RunConfig({"model": {"preset": "small"}, "training": {"steps": 200}})
    >>> run["training.lr"], run.origins["training.lr"], run["training.minutes"]
    (0.0006, 'preset small', None)
    >>> orchvlm.RunConfig({"training": {"stepz": 200}})
    Traceback (most recent call last):
    ValueError: configuration: there is no training.stepz; the nearest is training.steps
    """

    def __init__(self, *layers):
        said, origins = {}, {}
        for layer in layers:
            pair = isinstance(layer, tuple) and len(layer) == 2
            where, table = layer if pair else ("configuration", layer)
            if not isinstance(table, dict):
                raise TypeError(f"{where} must be a dict; got {type(table).__name__}")
            found = _flat(table, where)
            for name in _INSTEAD.keys() & found.keys():
                for other in _INSTEAD[name]:
                    said.pop(other, None)
            said |= found
            origins |= dict.fromkeys(found, where)
        self.values = {key.name: copy.deepcopy(key.default) for key in KEYS} | said
        self.origins = {name: origins[name] if name in said else "default"
                        for name in self.values}
        self._fill()
        self._check()

    @classmethod
    def load(cls, path, *layers, first=()):
        """Reads a file.

        Parameters
        ----------
        path : path-like
            TOML.  Where nobody names a folder for NAME.toml's run, it is ``run-NAME``.
        *layers : dict or (str, dict)
            What wins over it.
        first : sequence of dict or (str, dict)
            What it wins over.

        Returns
        -------
        RunConfig

        Raises
        ------
        OSError
            The file cannot be read.
        ValueError
            It is not TOML, or as of :class:`RunConfig`.
        """
        folder = {"output": {"folder": f"run-{Path(path).stem}"}}
        return cls(*first, ("default", folder), (str(path), read_toml(path)), *layers)

    def __getitem__(self, name):
        return self.values[name]

    def __repr__(self):
        said = ", ".join(f"{name} = {toml(self[name])}" for name, origin in self.origins.items()
                         if origin != "default" and self[name] is not None)
        return f"<RunConfig: {said or 'all by default'}>"

    def section(self, name):
        """A section's keys.

        Parameters
        ----------
        name : str

        Returns
        -------
        dict
        """
        return {key.short: self.values[key.name] for key in KEYS if key.section == name}

    def training(self):
        """What of it a :class:`Trainer` takes.

        Returns
        -------
        TrainingConfig
        """
        fields = {key.field: self.values[key.name] for key in KEYS if key.field}
        fields["steps"] = fields["steps"] or _ENDLESS
        for name in ("betas", "groups", "freeze"):
            fields[name] = tuple(fields[name])
        return TrainingConfig(**fields)

    def to_toml(self):
        """The file that says all of it.

        Returns
        -------
        str
        """
        lines = ["# All that this run was told; the same command with this file repeats it."]
        for section in SECTIONS:
            lines += ["", f"[{section}]"]
            lines += [f"{name} = {toml(value)}" for name, value in self.section(section).items()
                      if value is not None]
        return "\n".join(lines) + "\n"

    def write(self, folder):
        """Writes ``config.toml``.

        Parameters
        ----------
        folder : path-like
            Of the run.
        """
        write_whole(Path(folder) / RUN_FILE, lambda stream: stream.write(self.to_toml().encode()))

    def set(self, name, value, origin):
        """Says one thing more.

        Parameters
        ----------
        name : str
            ``section.key``.
        value : object
        origin : str
            Who says it.
        """
        self.values[name], self.origins[name] = BY_NAME[name].kind.read(value), origin

    # ------------------------------------------------------------ what is not said

    def _default(self, name, value, origin="default"):
        if self.values[name] is None:
            self.values[name], self.origins[name] = value, origin

    def _fill(self):
        """Defaults that hang on other keys."""
        if self["model.folder"] is None:
            self._default("model.preset", "tiny")
        preset = self["model.preset"]
        start = starting_point(preset)
        by = f"preset {preset}" if preset else "default"
        if self["training.steps"] is None:
            self._default("training.minutes", start["minutes"], by)
        self._default("training.lr", start["lr"], by)
        self._default("data.tokens", start["tokens"], by)
        self._default("training.min_lr", self["training.lr"] / 50)
        for name, value in PRESET_KEYS.get(preset, {}).items():
            drawn = name.startswith("data.") and self["data.files"]
            if self.origins[name] == "default" and not drawn:
                self.values[name], self.origins[name] = copy.copy(value), by
        if preset:
            self._default("model.std", FIRST_STD.get(preset, 0.02), by)
        if not self["data.files"]:
            for name, key in _OF_TASKS.items():
                self._default(name, copy.copy(TASKS[key]))
        self._default("ranks.n", min(2, cores()))
        self._default("output.folder", f"run-{preset or Path(self['model.folder']).name}")

    def _check(self):
        """Keys that do not go together."""
        if self["model.preset"] and self["model.folder"]:
            raise ValueError(f"{self.origins['model.folder']}: model.preset = "
                             f"{toml(self['model.preset'])} and model.folder = "
                             f"{toml(self['model.folder'])}: keep one of them")
        if self["model.folder"] and self["model.std"]:
            raise ValueError(f"{self.origins['model.std']}: model.std = {self['model.std']} is of "
                             "new weights, but model.folder brings its own: leave one of them out")
        for name in ("data.difficulty", "data.max_side"):
            if self["data.files"] and self[name] is not None:
                raise ValueError(f"{self.origins[name]}: {name} = {self[name]} is of drawn tasks, "
                                 "but data.files brings other data: leave one of them out")
        weights, files = self["data.weights"], self["data.files"]
        if weights and len(weights) != len(files):
            raise ValueError(f"{self.origins['data.weights']}: data.weights has {len(weights)} "
                             f"numbers for {len(files)} entries of data.files")
        if self["evaluation.patience"] and not self["evaluation.every"]:
            raise ValueError(f"{self.origins['evaluation.patience']}: evaluation.patience = "
                             f"{self['evaluation.patience']} counts looks, of which there are "
                             "none: set evaluation.every")


def cores():
    """int : that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def read_toml(path):
    """The tables of a file; ValueError with its name where it is none."""
    text = Path(path).read_bytes()
    try:
        return tomllib().loads(text.decode())
    except (ValueError, RecursionError) as error:  # among the first: no UTF-8
        raise ValueError(f"{path}: not TOML: {str(error)[:120]}") from None


def nested(values):
    """{section: {key: value}} of {section.key: value}, of what is not None."""
    tables = {}
    for name, value in values.items():
        if value is None:
            continue
        section, _, key = name.partition(".")
        tables.setdefault(section, {})[key] = value
    return tables


def override(text):
    """(section.key, value) of ``a.b=c``; ValueError for anything else."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals:
        raise ValueError(f"--set takes section.key=value, e.g. training.lr=1e-3; got {text!r:.60}")
    if name not in BY_NAME:
        section, _, key = name.partition(".")
        raise ValueError(f"--set: {_unknown(section, key)}")
    try:
        return name, BY_NAME[name].kind.parse(value.strip())
    except ValueError as error:
        raise ValueError(f"--set: {name} {error}") from None


def _unknown(section, key):
    """A sentence about a key that is not there."""
    name = f"{section}.{key}" if key else section
    same = [other.name for other in KEYS if other.short == (key or section)]
    meant = get_close_matches(section, SECTIONS, 1)[:1]  # itself, where there is one
    near = get_close_matches(key, [k.short for k in KEYS if k.section in meant], 1)
    near = [f"{meant[0]}.{one}" for one in near] or same or get_close_matches(
        name, BY_NAME, 1) or get_close_matches(name, [k.short for k in KEYS], 1)
    near = [k.name for one in near for k in KEYS if one in (k.name, k.short)][:1]
    return f"there is no {name}; " + (f"the nearest is {near[0]}" if near else
                                      "`orchvlm train --keys` lists all there are")


def _flat(table, where):
    """{section.key: value} of tables, every value looked at."""
    found = {}
    names = [*table, *(key for keys in table.values() if isinstance(keys, dict) for key in keys)]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"{where}: names of sections and keys are texts; got {wrong[0]!r:.60}")
    for section, keys in table.items():
        if section not in SECTIONS:
            near = get_close_matches(section, SECTIONS, 1)
            if near and isinstance(keys, dict):
                raise ValueError(f"{where}: there is no section [{section}]; the nearest is "
                                 f"[{near[0]}]")
            raise ValueError(f"{where}: {_unknown(section, '')}")
        if not isinstance(keys, dict):
            raise ValueError(f"{where}: {section} is a section: write [{section}] and its keys "
                             f"below; got {section} = {keys!r:.60}")
        for key, value in keys.items():
            name = f"{section}.{key}"
            if name not in BY_NAME:
                raise ValueError(f"{where}: {_unknown(section, key)}")
            try:
                found[name] = BY_NAME[name].kind.read(value)
            except ValueError as error:
                raise ValueError(f"{where}: {name} {error}") from None
    return found
