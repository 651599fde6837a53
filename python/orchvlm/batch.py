"""What a step is made of: the :class:`Batch`, and the :class:`Items` of its encoders."""
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ._numbers import real, reals, refuse_masked
from .tables import html_table

_RESERVED = ("llm", "text", "source")
ITEM_COLUMNS = ("sample", "position", "length", "out_tokens", "bytes")
BATCH_COLUMNS = ("text_tokens", "target_tokens", "source_rank")


def integers(value, name, n=None):
    """A read-only int64 array of one dimension (and n elements)."""
    array = np.asarray(refuse_masked(value, name))
    if array.dtype.kind not in ("iu" if array.size else "iuf"):  # [] is an array of floats
        if array.dtype.kind == "O" and all(type(one) is int for one in array.flat):
            raise ValueError(f"{name} holds a value above 2^63-1")
        raise TypeError(f"{name} must hold integers; got dtype {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional; got shape {array.shape}")
    if n is not None and len(array) != n:
        raise ValueError(f"{name} must have {n} elements; got {len(array)}")
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds a value above 2^63-1")
    array = array.astype(np.int64, copy=False).view()
    array.flags.writeable = False
    return array


def amount(value, name):
    """A finite float >= 0."""
    value = real(value, name)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and >= 0; got {value}")
    return value


def checked_memory(memory, phases):
    """{phase: (bytes per token, fixed bytes)} of floats, for some of the phases."""
    if memory is not None and not isinstance(memory, dict):
        raise TypeError(f"memory must be a dict; got {type(memory).__name__}")
    checked = {}
    for name, pair in (memory or {}).items():
        if name not in phases:
            raise ValueError(f"memory: there is no phase {name!r}; there are {phases}")
        try:
            per_token, fixed = pair
        except (TypeError, ValueError):
            raise TypeError(f"memory[{name!r}] must be (bytes_per_token, fixed_bytes); got "
                            f"{pair!r}") from None
        checked[name] = (amount(per_token, f"memory[{name!r}] bytes_per_token"),
                         amount(fixed, f"memory[{name!r}] fixed_bytes"))
    return checked


@dataclass(frozen=True, eq=False, repr=False)
class Items:
    """What one encoder has to do in a batch: images, clips' frame groups, sounds.

    Parameters
    ----------
    sample : int64[k]
        Sample of each item, 0 .. n-1; any order, and a sample may have many or none.
    position : int64[k]
        The item's first token in its sample, counted with everything in it: text and all items.
        Items of a sample must not overlap.
    length : int64[k]
        Rows of raw data (patches, frames), which the cost and the memory count; >= 0.
    out_tokens : int64[k]
        Tokens that the item becomes in the language model; >= 0.
    bytes : int64[k]
        Raw data, which routing the item to its encoder moves; >= 0.
    squares : float64[k], optional
        Sum of the item's true segment lengths squared, for ``cost.quadratic``; default length^2.
    out_bytes_per_token : float
        Bytes of encoder output per token, e.g. hidden size times two.

    Raises
    ------
    TypeError
        A column of floats, a column that is no array, or ``squares`` that are no numbers.
    ValueError
        Columns of different lengths, or ``squares`` that are not finite and >= 0.

    Examples
    --------
    Two images in sample 0, one in sample 2:

    >>> import orchvlm
    >>> orchvlm.Items(sample=[0, 0, 2], position=[1, 300, 0], length=[1024, 256, 512],
    ...               out_tokens=[256, 64, 128], bytes=[3_000_000, 750_000, 1_500_000],
    ...               out_bytes_per_token=8192)
    <Items: 3 items of 2 samples, 1792 rows in, 448 tokens out>
    """

    sample: np.ndarray
    position: np.ndarray
    length: np.ndarray
    out_tokens: np.ndarray
    bytes: np.ndarray
    squares: np.ndarray = None
    out_bytes_per_token: float = field(default=0.0, kw_only=True)

    def __post_init__(self):
        n = None
        for name in ITEM_COLUMNS:
            column = integers(getattr(self, name), f"Items.{name}", n)
            n = len(column)
            object.__setattr__(self, name, column)
        if self.squares is not None:
            squares = reals(self.squares, "Items.squares")
            if squares.shape != (n,) or not np.all(np.isfinite(squares) & (squares >= 0)):
                raise ValueError(f"Items.squares must be {n} finite values >= 0")
            squares.flags.writeable = False
            object.__setattr__(self, "squares", squares)
        object.__setattr__(self, "out_bytes_per_token",
                           amount(self.out_bytes_per_token, "Items.out_bytes_per_token"))

    def __len__(self):
        return len(self.sample)

    def __repr__(self):
        return (f"<Items: {len(self)} items of {len(np.unique(self.sample))} samples, "
                f"{self.length.sum()} rows in, {self.out_tokens.sum()} tokens out>")

    def _fields(self, name, cost, memory):
        return (name, *(getattr(self, column) for column in ITEM_COLUMNS), self.squares,
                self.out_bytes_per_token, cost._astuple(), memory)


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """One global batch, as the sampler dealt it out.

    Parameters
    ----------
    text_tokens : int64[n]
        Text tokens of each sample, >= 0. The sample's length in the language model is this plus
        the ``out_tokens`` of its items.
    target_tokens : int64[n]
        Tokens of each sample that the loss counts. Their sum, :attr:`normalizer`, divides the loss
        on every rank, so that the gradient does not depend on the plan.
    source_rank : int64[n]
        Rank that holds the sample now, 0 .. N-1; ranks without samples are fine.
    phases : dict of str to Items
        One entry per encoder, e.g. ``{"vision": ..., "audio": ...}``.
    text_bytes_per_token : float
        Bytes that a text token takes with it, by default a token id and a label of four each.

    Raises
    ------
    TypeError
        A column of floats, or a phase that is no :class:`Items`.
    ValueError
        Columns of different lengths, or a phase named ``llm``, ``text`` or ``source``.

    Examples
    --------
    >>> import orchvlm
    >>> orchvlm.Batch(text_tokens=[20, 30], target_tokens=[10, 30], source_rank=[0, 1])
    <Batch: 2 samples, 50 text tokens>
    """

    text_tokens: np.ndarray
    target_tokens: np.ndarray
    source_rank: np.ndarray
    phases: dict = field(default_factory=dict)
    text_bytes_per_token: float = 8.0

    def __post_init__(self):
        n = None
        for name in BATCH_COLUMNS:
            column = integers(getattr(self, name), f"Batch.{name}", n)
            n = len(column)
            object.__setattr__(self, name, column)
        if n and self.target_tokens.min() < 0:
            raise ValueError("Batch.target_tokens must be >= 0; the least is "
                             f"{self.target_tokens.min()}")
        for name, items in dict(self.phases).items():
            if not isinstance(name, str) or not isinstance(items, Items):
                raise TypeError("Batch.phases must be {name: Items}; got "
                                f"{{{name!r}: {type(items).__name__}}}")
            if name in _RESERVED or "->" in name or not name or len(name) > 64:
                raise ValueError(f"Batch.phases: {name!r} is not a name for a phase (reserved: "
                                 f"{', '.join(_RESERVED)}, '->', more than 64 characters)")
        object.__setattr__(self, "phases", dict(self.phases))
        object.__setattr__(self, "text_bytes_per_token",
                           amount(self.text_bytes_per_token, "Batch.text_bytes_per_token"))

    def __len__(self):
        return len(self.text_tokens)

    def __repr__(self):
        phases = "".join(f", {len(items)} {name} items" for name, items in self.phases.items())
        return f"<Batch: {len(self)} samples, {self.text_tokens.sum()} text tokens{phases}>"

    def _repr_html_(self):
        ranks = len(np.unique(self.source_rank))
        rows = [["text", len(self), self.text_tokens.sum(), self.text_tokens.sum(),
                 self.text_tokens.max(initial=0)]]
        rows += [[name, len(items), items.length.sum(), items.out_tokens.sum(),
                  items.out_tokens.max(initial=0)] for name, items in self.phases.items()]
        rows.append(["all", len(self), "", self.language_lengths.sum(),
                     self.language_lengths.max(initial=0)])
        return html_table(["phase", "items", "rows in", "tokens", "longest"], rows,
                          f"{len(self)} samples of {ranks} ranks, {self.normalizer} targets")

    @property
    def normalizer(self):
        """int : the global number of target tokens, by which the loss is divided everywhere."""
        return int(self.target_tokens.sum())

    @cached_property
    def language_lengths(self):
        """int64[n] : tokens of each sample in the language model."""
        lengths = self.text_tokens.copy()
        for items in self.phases.values():
            np.add.at(lengths, items.sample, items.out_tokens)
        lengths.flags.writeable = False
        return lengths
