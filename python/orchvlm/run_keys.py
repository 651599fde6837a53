"""What the file of a training run may say, key by key: the one table from which files, options,
refusals, explanations and the reference are made."""
from dataclasses import fields
from typing import NamedTuple

from .choosing import LANGUAGE
from .configs import PRESETS
from .data.tasks import LARGE, SMALL
from .recipes import TASKS
from .routing import MODES
from .sharding import MODES as SHARD_MODES
from .training import TrainingConfig
from .watch import FIGURES

SECTIONS = {
    "model": "What is trained.",
    "lora": "Low-rank adapters, which are then trained alone.",
    "data": "What it is trained on.  Paths are relative to where the command runs.",
    "training": "Steps, rates and what a step does.",
    "pretraining": "Of `orchvlm pretrain` alone.",
    "ranks": "Processes that train together.",
    "evaluation": "Held-out samples.",
    "output": "What is written."}


class Kind(NamedTuple):
    """A type of value."""

    words: str      # what it must be
    holds: object   # whether a value is one
    made: object = lambda value: value  # of a value that holds: as it is kept
    cut: bool = False  # a text at the command line is cut at its commas

    def read(self, value):
        """The value as it is kept; ValueError with the words where it is none."""
        if not self.holds(value):
            raise ValueError(f"must be {self.words}; got {value!r:.60}")
        return self.made(value)

    def parse(self, text, plain=False):
        """The same of a text at the command line: as TOML has it, else the text itself; the text
        itself first where it is ``plain``."""
        tried = [lambda: toml_value(text), lambda: text, lambda: text.split(","),
                 lambda: float(text)]
        if plain:
            tried[:2] = tried[1::-1]
        if not self.cut:
            del tried[2]
        for made in tried:
            try:
                if self.holds(made()):
                    return self.made(made())
            except ValueError:
                continue
        raise ValueError(f"must be {self.words}; got {text:.60}")


class Key(NamedTuple):
    """One thing that a run is told."""

    name: str            # section.key
    kind: Kind
    words: str           # what it means, without its default
    default: object = None
    otherwise: str = ""  # the default in words, where it hangs on something else
    option: str = ""     # of the command line
    field: str = ""      # of TrainingConfig

    @property
    def section(self):
        return self.name.partition(".")[0]

    @property
    def short(self):
        return self.name.partition(".")[2]

    @property
    def default_words(self):
        if self.otherwise:
            return self.otherwise
        return "none" if self.default is None else toml(self.default)


# ---------------------------------------------------------------- values

def toml_value(text):
    """What a text is in TOML, else the text."""
    try:
        found = tomllib().loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if set(found) == {"value"} else text


def tomllib():
    """The standard library's reader of TOML, or, before Python 3.11, tomli."""
    try:
        import tomllib as found
    except ImportError:
        import tomli as found
    return found


def toml(value):
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    # The escapes of a basic string; everything else stands for itself.
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(short.get(c) or (c if c.isprintable() else f"\\U{ord(c):08X}")
                         for c in value) + '"'


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e308


def _is_text(value):
    return isinstance(value, str) and value != "" and not any(
        "\ud800" <= c <= "\udfff" for c in value)  # of names that are no UTF-8


def _whole(least):
    return Kind(f"a whole number >= {least}", lambda value: isinstance(
        value, int) and not isinstance(value, bool) and least <= value < 2**63)


def _real(words, holds):
    return Kind(f"a number {words}", lambda value: _is_number(value) and holds(value), float)


def _choice(*words):
    return Kind("one of " + ", ".join(words), lambda value: isinstance(value, str)
                and value in words)


def _list_of(words, holds):
    return Kind(words, lambda value: isinstance(value, (list, tuple)) and all(map(holds, value)),
                list, cut=True)


def _is_group(value):
    """A table of other settings for some parameters."""
    return isinstance(value, dict) and {"match"} < set(value) <= {"match", "lr", "weight_decay"} \
        and (_is_text(value["match"]) or isinstance(value["match"], (list, tuple))
             and all(map(_is_text, value["match"]))) \
        and all(_is_number(value[k]) and value[k] >= 0 for k in set(value) - {"match"})


def _is_shard(value):
    if isinstance(value, dict):
        return bool(value) and all(isinstance(v, str) and v in SHARD_MODES for v in value.values())
    return isinstance(value, str) and value in SHARD_MODES


_TEXT = Kind("a text that is not empty", _is_text)
_TEXTS = _list_of("a list of texts", _is_text)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_COUNT, _SIZE = _whole(0), _whole(1)
_ABOVE_0, _FROM_0 = _real("above 0", lambda v: v > 0), _real(">= 0", lambda v: v >= 0)
_SHARE = _real("in 0 .. 1", lambda v: 0 <= v <= 1)
_DECAY = _real(">= 0 and below 1", lambda v: 0 <= v < 1)
_BETAS = Kind("two numbers >= 0 and below 1", lambda value: isinstance(
    value, (list, tuple)) and len(value) == 2 and all(map(_DECAY.holds, value)),
    lambda value: [float(v) for v in value])
_WEIGHTS = Kind("a list of numbers above 0", lambda value: isinstance(
    value, (list, tuple)) and len(value) > 0 and all(map(_ABOVE_0.holds, value)),
    lambda value: [float(v) for v in value])
_GROUPS = Kind('a list of tables {match = "...", lr = ..., weight_decay = ...}',
               lambda value: isinstance(value, (list, tuple)) and all(map(_is_group, value)),
               lambda value: [dict(v) for v in value])
_SHARD = Kind("one of " + ", ".join(SHARD_MODES) + ", or a table of patterns to them", _is_shard)
_FRAME = Kind("a whole number in 1 .. 4096", lambda value: _SIZE.holds(value) and value <= 4096)
_SIDE = Kind(f"a whole number in {SMALL} .. 2048", lambda value: _SIZE.holds(value)
             and SMALL <= value <= 2048)

# ---------------------------------------------------------------- the table

_DEFAULTS = {field.name: field.default for field in fields(TrainingConfig)}


def _field(name, kind, words, otherwise="", option="", field=""):
    """A key that is a field of TrainingConfig, with its default."""
    field = field or name.partition(".")[2]
    default = _DEFAULTS[field]
    if isinstance(default, tuple):
        default = list(default)
    return Key(name, kind, words, None if otherwise else default, otherwise, option, field)


KEYS = (
    Key("model.preset", _choice(*PRESETS), "configuration of a model with new weights",
        None, '"tiny", unless folder is given', "--preset"),
    Key("model.folder", _TEXT, "goes on from the weights of a model or of a run", None, "none",
        "--model"),
    Key("model.dtype", _choice("float32", "bfloat16"), "of weights and activations", "float32"),
    Key("model.std", _ABOVE_0, "deviation of new weights", None, "as the preset needs"),
    Key("lora.r", _COUNT, "rank of the adapters; 0: no adapters", 0),
    Key("lora.alpha", _ABOVE_0, "adapters are scaled by alpha / r", 16.0),
    Key("lora.match", _TEXTS, "patterns of modules that get one",
        ["model.language_model.layers.*.self_attn.*_proj"]),
    Key("lora.rslora", _FLAG, "alpha / sqrt(r) instead", False),
    Key("data.files", _TEXTS, ".jsonl, .json, .tar or .zip files, or folders of them (but .json), "
        "mixed by their lengths; none: pictures with questions are drawn", [], "", "--data"),
    Key("data.weights", _WEIGHTS, "how often samples of each entry of files are drawn, relative to "
        "the others", None, "how many samples each has; headers of a .tar are read for that"),
    Key("data.held_out", _TEXTS, "files like those, which are not trained on: looks watch their "
        "loss, and answers are scored of samples with `answer` and `check`", [], "those of drawn "
        "tasks, and of packs in a .zip with a split"),
    Key("data.kinds", _TEXTS, "of drawn tasks: read, colour, shape, describe, count, point, box, "
        "chart, puzzle, screen, and, of very different lengths, album, frames, story; of packs in "
        "a .zip: captions, emoji, screens, nlvr, nlvr_captions, digits", None,
        toml(TASKS["kinds"]) + " of drawn tasks; of a .zip its first pack",
        "--kinds"),
    Key("data.difficulty", _SHARE, "of drawn tasks, 0 .. 1", None, str(TASKS["difficulty"]),
        "--difficulty"),
    Key("data.max_side", _SIDE, f"longer side of drawn pictures at most, pixels, {SMALL} .. 2048 "
        f"(drawn for {LARGE})", None, str(TASKS["max_side"])),
    Key("data.max_pixels", _SIZE, "pictures are shrunk to so many pixels; 3136 are 56 x 56", None,
        "as the family has it", "--max-pixels"),
    Key("data.frame", _FRAME, "pictures of the packs captions and emoji are cut to what is not "
        "transparent and put into the middle of a white square of so many pixels", None,
        "they stay as they are"),
    Key("data.tokens", _SIZE, "of a global batch, whatever the number of ranks", None,
        "2048 for tiny, else as the preset needs", "--tokens"),
    Key("data.patches", _SIZE, "of pictures in a global batch, at most", None, "no limit"),
    _field("training.steps", _SIZE, "of the whole run", "none: the minutes end it", "--steps"),
    _field("training.minutes", _ABOVE_0, "in steps, which end the run; the rate then follows "
           "time, so that no run repeats another", "10 for tiny, else as the preset needs; none "
           "where steps are given", "--minutes"),
    Key("training.seed", _COUNT, "of weights and data", 0, "", "--seed"),
    _field("training.lr", _FROM_0, "greatest learning rate", "5e-4 for tiny, else as the preset "
           "needs", "--lr"),
    _field("training.min_lr", _FROM_0, "last learning rate", "lr / 50"),
    _field("training.warmup", _COUNT, "steps in which the rate rises"),
    _field("training.schedule", _choice("cosine", "linear", "constant"), "how the rate falls"),
    _field("training.weight_decay", _FROM_0, "of matrices, embeddings and adapters"),
    _field("training.max_grad_norm", _FROM_0, "gradients are scaled to it; 0: never"),
    _field("training.betas", _BETAS, "decay of both moments of AdamW"),
    _field("training.groups", _GROUPS, "other rates and decays for the parameters that match; the "
           "last match counts"),
    _field("training.freeze", _TEXTS, "patterns of parameters that are not trained; each "
           "matches some"),
    _field("training.micro_batches", _SIZE, "packs of `data.tokens` in a step"),
    _field("training.checkpoint", _choice("none", "selective", "full"),
           "activations that are computed again, to save memory"),
    _field("training.aux", _choice(*MODES), "how experts are kept evenly used"),
    _field("training.bias_rate", _FROM_0, 'by which aux = "bias" moves a correction in a step'),
    _field("training.most_skipped", _SIZE, "steps in a row whose loss or gradient is no number; so "
           "many end the run"),
    _field("training.ema", _DECAY, "decay of a moving average of the weights", "none is kept"),
    Key("pretraining.batch", _SIZE, "pictures of a step", 128, "", "--batch"),
    Key("pretraining.places", _SIZE, "rows and columns of the grid that features are pooled into",
        2),
    Key("ranks.n", _SIZE, "processes; torchrun, mpirun and srun bring their own", None,
        "2, or the cores where there are fewer", "--ranks"),
    Key("ranks.threads", _SIZE, "of each rank", None, "all cores, shared out", "--threads"),
    _field("ranks.shard", _SHARD, "who keeps weights, gradients and optimizer state; by patterns "
           "of modules as a table"),
    _field("ranks.node_size", _SIZE, "ranks of a node, of hybrid", "no nodes"),
    _field("ranks.experts", _SIZE, "ranks that share the experts of a mixture, each with its part; "
           "divides `ranks.n`", "", "", "rank_experts"),
    _field("ranks.tokens", _SIZE, "that a rank takes at a time; more are done in micro-batches, "
           "which are as long as the longest sample where that is longer", "no limit", "",
           "rank_tokens"),
    _field("ranks.patches", _SIZE, "of pictures that a rank encodes at a time; a step with more is "
           "taken in several rounds", "no limit", "", "rank_patches"),
    _field("ranks.memory_bytes", _SIZE, "that the model of a rank holds at most; a step is taken "
           "in as many rounds as that needs", "no limit", "", "rank_memory_bytes"),
    _field("ranks.language", _choice(*LANGUAGE), "who runs the language phase: whole samples on "
           "ranks, groups of ranks that share long samples, or step by step what is foretold to "
           "be faster", "", "", "rank_language"),
    _field("ranks.refit", _COUNT, "steps from one fit of the plan's costs to what phases took to "
           "the next; 0: never", "", "", "rank_refit"),
    Key("evaluation.samples", _SIZE, "held-out samples of each kind, or the first of each file, at "
        "most", 100, "", "--samples"),
    Key("evaluation.every", _COUNT, "steps from one look at them to the next; 0: at the end only",
        0),
    Key("evaluation.figure", _choice(*FIGURES), "which one says what is best; answers are asked "
        "for where it is not the loss", "loss"),
    Key("evaluation.patience", _COUNT, "the run ends after so many looks that are no better than "
        "the best; 0: never", 0),
    Key("output.save_every", _COUNT, "steps between checkpoints; 0: at the end only", 200,
        field="save_every"),
    Key("output.keep", _COUNT, "latest checkpoints that stay, and the best besides; 0: all", 2,
        field="keep"),
    Key("output.folder", _TEXT, "of the run", None, "run-NAME, of the file, preset or model",
        "--out"),
)
BY_NAME = {key.name: key for key in KEYS}


def reference():
    """The table for people.

    Returns
    -------
    str
        Markdown: a table for each section.
    """
    lines = []
    for section, words in SECTIONS.items():
        lines += [f"### [{section}]", "", words, "", "| key | value | default | meaning | option |",
                  "| --- | --- | --- | --- | --- |"]
        for key in KEYS:
            if key.section == section:
                cells = (f"`{key.short}`", key.kind.words, key.default_words, key.words,
                         f"`{key.option}`" if key.option else "")
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
