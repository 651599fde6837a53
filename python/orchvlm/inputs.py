"""What a model takes: token sequences packed end to end, with their images and sounds."""
from dataclasses import dataclass, fields, replace
from html import escape

import numpy as np

from .batch import integers

IGNORED = -100  # a label that the loss passes over, as in Hugging Face


def _column(value, name, length, dtype):
    """A read-only column of ``length`` integers that ``dtype`` can hold."""
    array = integers(value, name, length)
    limits = np.iinfo(dtype)
    if array.size and not (limits.min <= array.min() and array.max() <= limits.max):
        raise ValueError(f"{name} must fit {np.dtype(dtype)}; it spans {array.min()} to "
                         f"{array.max()}")
    return _frozen(array.astype(dtype))


def floats(value, name, shape, dtype=np.float32, finite=True):
    """A read-only array of this shape, where None stands for any length; float32 as a rule.  What
    is read is ``finite``; what was computed need not be."""
    array = np.asarray(value)
    if array.size and array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must hold numbers; got dtype {array.dtype}")
    wanted = tuple(have if want is None else want for have, want in zip(array.shape, shape))
    if array.ndim != len(shape) or array.shape != wanted:
        words = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape ({words}); got {array.shape}")
    if finite and not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if finite and not np.isfinite(array).all():
        raise ValueError(f"{name} holds a value that {np.dtype(dtype)} cannot hold")
    return _frozen(array)


def _frozen(array):
    array = np.ascontiguousarray(array).view()
    array.flags.writeable = False
    return array


def _pixel_rows(value):
    array = np.asarray(value)
    if array.dtype == np.uint8 and array.ndim == 2:
        return _frozen(array)
    if array.dtype.kind in "iu":  # whole numbers are raw pixels, and those are bytes
        raise TypeError(f"Inputs.pixels must be uint8 or float32; got {array.dtype}")
    return floats(array, "Inputs.pixels", (None, None))


@dataclass(frozen=True, eq=False, repr=False)
class Inputs:
    """Samples packed without padding, as a model takes them.

    Parameters
    ----------
    input_ids : int32[T]
        Tokens of all samples, end to end.  Every image, video or audio token (the model's
        placeholder ids) takes one feature row, in order of appearance.
    cu_seqlens : int32[B + 1], optional
        Sample b has the tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1] - 1``; by default all
        tokens are one sample.
    position_ids : float32[3, T], optional
        Time, height and width of each token for the rotary embedding; by default 0, 1, 2, ... in
        every sample, on all three axes.
    labels : int32[T], optional
        The token to predict, at the token's own place: the model compares ``labels[t]`` with what
        it says at t - 1, inside a sample, as Hugging Face does.  -100 is passed over; the default.
    weights : float32[T], optional
        Weight of ``labels[t]`` in the loss, >= 0; without it every label has weight 1.
    pixels : uint8[P, values] or float32[P, values], optional
        One row per patch, image after image.  A row holds channel, temporal, row and column, the
        last fastest.  Bytes are colours that the model still has to normalise.
    grid_thw : int32[n, 3], optional
        Frames (after temporal patches), rows and columns of each image or video, in patches.
    mel : float32[rows, bins], optional
        Log-mel frames (10 ms each), one row per frame, sound after sound.
    mel_lengths : int32[n], optional
        Frames of each sound.
    grid_sample : int32[n], optional
        The sample that each row of ``grid_thw`` belongs to; needed for taking samples out of
        several.
    mel_sample : int32[n], optional
        The same for ``mel_lengths``.
    encoded : sequence of (bytes or None), optional
        One for each row of ``grid_thw``: a picture that is still a file, as a
        :class:`orchvlm.data.RankLoader` of several ranks gives it, or None.  ``pixels`` then has
        the patches of the others alone.  An :class:`Orchestrator` takes such samples, a model
        takes what :meth:`decoded` makes of them.

    Raises
    ------
    TypeError
        An array of the wrong kind of numbers.
    ValueError
        Shapes that disagree, samples out of order, a label that is neither a token nor -100,
        more or fewer pixel rows than the grids hold, a film among what is encoded.

    Notes
    -----
    Arrays are read-only views where they had the right type, and copies otherwise.

    Examples
    --------
    >>> import orchvlm
    >>> two = orchvlm.Inputs(input_ids=[5, 6, 7, 8, 9], cu_seqlens=[0, 2, 5],
    ...                      labels=[-100, 6, -100, 8, 9])
    >>> two
    <Inputs: 2 samples, 5 tokens, 3 targets>
    >>> two[1].input_ids, two.position_ids[0]
    (array([7, 8, 9], dtype=int32), array([0., 1., 0., 1., 2.], dtype=float32))
    """

    input_ids: np.ndarray
    cu_seqlens: np.ndarray = None
    position_ids: np.ndarray = None
    labels: np.ndarray = None
    weights: np.ndarray = None
    pixels: np.ndarray = None
    grid_thw: np.ndarray = None
    mel: np.ndarray = None
    mel_lengths: np.ndarray = None
    grid_sample: np.ndarray = None
    mel_sample: np.ndarray = None
    encoded: tuple = None

    def __post_init__(self):
        self._check_tokens()
        self._check_grids()
        self._check_sounds()

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def _check_tokens(self):
        ids = _column(self.input_ids, "Inputs.input_ids", None, np.int32)
        self._set("input_ids", ids)
        if ids.size and ids.min() < 0:
            raise ValueError(f"Inputs.input_ids must be >= 0; the least is {ids.min()}")
        ends = [0, len(ids)] if self.cu_seqlens is None else self.cu_seqlens
        ends = _column(ends, "Inputs.cu_seqlens", None, np.int32)
        if not len(ends) or ends[0] != 0 or ends[-1] != len(ids) or (np.diff(ends) < 0).any():
            raise ValueError("Inputs.cu_seqlens must rise from 0 to the number of tokens, "
                             f"{len(ids)}; got {_brief(ends)}")
        self._set("cu_seqlens", ends)
        places = self.position_ids
        if places is None:
            places = np.arange(len(ids)) - np.repeat(ends[:-1], np.diff(ends))
            places = np.broadcast_to(places, (3, len(ids)))
        self._set("position_ids", floats(places, "Inputs.position_ids", (3, len(ids))))
        labels = np.full(len(ids), IGNORED) if self.labels is None else self.labels
        labels = _column(labels, "Inputs.labels", len(ids), np.int32)
        wrong = labels[(labels < 0) & (labels != IGNORED)]
        if len(wrong):
            raise ValueError(f"Inputs.labels must be tokens or {IGNORED}; got {wrong[0]}")
        self._set("labels", labels)
        if self.weights is not None:
            weights = floats(self.weights, "Inputs.weights", (len(ids),))
            if weights.size and weights.min() < 0:
                raise ValueError(f"Inputs.weights must be >= 0; the least is {weights.min()}")
            self._set("weights", weights)

    def _check_grids(self):
        if (self.pixels is None) != (self.grid_thw is None):
            raise ValueError("Inputs.pixels and Inputs.grid_thw belong together; one is missing")
        if self.grid_thw is None:
            for name in ("grid_sample", "encoded"):
                if getattr(self, name) is not None:
                    raise ValueError(f"Inputs.{name} needs grid_thw")
            return
        self._set("pixels", _pixel_rows(self.pixels))
        grid = np.asarray(self.grid_thw)
        if grid.ndim != 2 or grid.shape[1] != 3:
            raise ValueError(f"Inputs.grid_thw must have shape (n, 3); got {grid.shape}")
        flat = _column(grid.reshape(-1), "Inputs.grid_thw", None, np.int32)
        grid = _frozen(flat.reshape(-1, 3))
        if grid.size and grid.min() < 1:
            raise ValueError(f"Inputs.grid_thw must be >= 1; the least is {grid.min()}")
        self._set("encoded", _files(self.encoded, grid))
        rows = sum(t * h * w for (t, h, w), item in zip(
            grid.tolist(), self.encoded or (None,) * len(grid)) if item is None)
        if rows != len(self.pixels):
            raise ValueError(f"Inputs.pixels must have {rows} rows, as many as the grids hold; "
                             f"got {len(self.pixels)}")
        self._set("grid_thw", grid)
        self._set("grid_sample", self._owners(self.grid_sample, "Inputs.grid_sample", len(grid)))

    def _check_sounds(self):
        if (self.mel is None) != (self.mel_lengths is None):
            raise ValueError("Inputs.mel and Inputs.mel_lengths belong together; one is missing")
        if self.mel is None:
            if self.mel_sample is not None:
                raise ValueError("Inputs.mel_sample needs mel_lengths")
            return
        self._set("mel", floats(self.mel, "Inputs.mel", (None, None)))
        lengths = _column(self.mel_lengths, "Inputs.mel_lengths", None, np.int32)
        if lengths.size and lengths.min() < 1:
            raise ValueError(f"Inputs.mel_lengths must be >= 1; the least is {lengths.min()}")
        if int(lengths.sum(dtype=np.int64)) != len(self.mel):
            raise ValueError(f"Inputs.mel must have {lengths.sum(dtype=np.int64)} rows, the sum of "
                             f"mel_lengths; got {len(self.mel)}")
        self._set("mel_lengths", lengths)
        self._set("mel_sample", self._owners(self.mel_sample, "Inputs.mel_sample", len(lengths)))

    def _owners(self, value, name, n):
        if value is None:
            return _frozen(np.zeros(n, np.int32)) if len(self) == 1 else None
        owners = _column(value, name, n, np.int32)
        if n and (owners.min() < 0 or owners.max() >= len(self) or (np.diff(owners) < 0).any()):
            raise ValueError(f"{name} must rise within 0 .. {len(self) - 1}; got {_brief(owners)}")
        return owners

    def __len__(self):
        return len(self.cu_seqlens) - 1

    @property
    def n_tokens(self):
        """int : tokens of all samples."""
        return len(self.input_ids)

    @property
    def n_patches(self):
        """int : of all images and videos, those that are still encoded among them."""
        return 0 if self.grid_thw is None else int(_patches(self.grid_thw).sum())

    @property
    def n_target_tokens(self):
        """int : labels that the loss counts; the first token of a sample is never one."""
        counted = self.labels != IGNORED
        counted[self.cu_seqlens[:-1][np.diff(self.cu_seqlens) > 0]] = False
        return int(counted.sum())

    @property
    def lengths(self):
        """int64[B] : tokens of each sample."""
        return np.diff(self.cu_seqlens).astype(np.int64)

    def __getitem__(self, which):
        if isinstance(which, (int, np.integer)) and not isinstance(which, bool):
            if not -len(self) <= which < len(self):
                raise IndexError(f"sample {which} of {len(self)}")
            which = [which % len(self)]
        elif isinstance(which, slice):
            which = range(*which.indices(len(self)))
        else:
            which = integers(which, "Inputs[...]")
            if which.size and (which.min() < 0 or which.max() >= len(self)):
                raise IndexError(f"samples {which.min()} .. {which.max()} of {len(self)}")
        return Inputs(**self._take(np.asarray(which, np.int64)))

    def _take(self, which):
        """The columns of these samples, in this order."""
        lengths = np.diff(self.cu_seqlens)[which]
        tokens = _spans(self.cu_seqlens[:-1][which], lengths)
        part = {"input_ids": self.input_ids[tokens], "labels": self.labels[tokens],
                "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]),
                "position_ids": self.position_ids[:, tokens],
                "weights": None if self.weights is None else self.weights[tokens]}
        for rows, sizes, owner in (("pixels", "grid_thw", "grid_sample"),
                                   ("mel", "mel_lengths", "mel_sample")):
            size = getattr(self, sizes)
            if size is None:
                continue
            owners = getattr(self, owner)
            if owners is None:
                raise ValueError(f"taking samples needs Inputs.{owner}: which sample each item "
                                 "belongs to")
            counts = self._rows(sizes, size)
            first = np.searchsorted(owners, which, "left")
            n_items = np.searchsorted(owners, which, "right") - first
            items = _spans(first, n_items)
            starts = np.cumsum(counts) - counts
            part[rows] = getattr(self, rows)[_spans(starts[items], counts[items])]
            part[sizes] = size[items]
            part[owner] = np.repeat(np.arange(len(which)), n_items)
            if rows == "pixels" and self.encoded is not None:
                part["encoded"] = [self.encoded[k] for k in items]
        return part

    def _rows(self, sizes, size):
        """int64[n] : rows that each item has in ``pixels`` or ``mel``."""
        if sizes == "mel_lengths":
            return size.astype(np.int64)
        counts = _patches(size)
        if self.encoded is not None:
            counts[[item is not None for item in self.encoded]] = 0
        return counts

    def decoded(self):
        """The same samples, all pictures decoded.

        Returns
        -------
        Inputs
            Itself where nothing is encoded.

        Raises
        ------
        DataError
            A file that is broken behind its header.
        """
        if self.encoded is None:
            return self
        from .data.encoded import decoded
        kind, ends = self.pixels, np.cumsum(self._rows("grid_thw", self.grid_thw))
        rows = [kind[end - n:end] if item is None else decoded(item, n, kind.shape[1], kind.dtype)
                for item, end, n in zip(self.encoded, ends, _patches(self.grid_thw))]
        return replace(self, pixels=np.concatenate([kind[:0], *rows]), encoded=None)

    @classmethod
    def concatenate(cls, parts):
        """Packs several one behind the other.

        Parameters
        ----------
        parts : sequence of Inputs
            Pixels must be of one dtype and row size, mel rows of one size.

        Returns
        -------
        Inputs
            All samples, in order.

        Raises
        ------
        TypeError
            Something else than :class:`Inputs` among them.
        ValueError
            Rows that do not fit together.
        """
        parts = list(parts)
        for part in parts:
            if not isinstance(part, cls):
                raise TypeError(f"parts must be Inputs; got {type(part).__name__}")
        ends = np.cumsum([0, *(part.n_tokens for part in parts)])
        whole = {"input_ids": _joined(parts, "input_ids", np.int32),
                 "labels": _joined(parts, "labels", np.int32),
                 "cu_seqlens": np.concatenate(
                     [[0], *(part.cu_seqlens[1:] + end for part, end in zip(parts, ends))]),
                 "position_ids": np.concatenate(
                     [np.zeros((3, 0), np.float32), *(part.position_ids for part in parts)], 1)}
        if any(part.weights is not None for part in parts):
            whole["weights"] = np.concatenate(
                [np.ones(part.n_tokens, np.float32) if part.weights is None else part.weights
                 for part in parts])
        before = np.cumsum([0, *(len(part) for part in parts)])
        for rows, sizes, owner in (("pixels", "grid_thw", "grid_sample"),
                                   ("mel", "mel_lengths", "mel_sample")):
            having = [(part, b) for part, b in zip(parts, before)
                      if getattr(part, sizes) is not None]
            if not having:
                continue
            if len({(getattr(p, rows).dtype, getattr(p, rows).shape[1]) for p, _ in having}) > 1:
                raise ValueError(f"{rows} differ in dtype or row size, and cannot be packed")
            whole[rows] = np.concatenate([getattr(p, rows) for p, _ in having])
            whole[sizes] = np.concatenate([getattr(p, sizes) for p, _ in having])
            if all(getattr(p, owner) is not None for p, _ in having):
                whole[owner] = np.concatenate([getattr(p, owner) + b for p, b in having])
            if rows == "pixels":
                whole["encoded"] = [item for p, _ in having
                                    for item in p.encoded or (None,) * len(p.grid_thw)]
        return cls(**whole)

    def _facts(self):
        def several(count, word):
            return f"{count} {word}" + ("s" if count != 1 else "")
        facts = [several(len(self), "sample"), several(self.n_tokens, "token"),
                 several(self.n_target_tokens, "target")]
        if self.grid_thw is not None:
            facts.append(f"{several(len(self.grid_thw), 'image')} of {self.n_patches} patches")
        if self.mel is not None:
            facts.append(f"{several(len(self.mel_lengths), 'sound')} of {len(self.mel)} frames")
        return facts

    def __repr__(self):
        return f"<Inputs: {', '.join(self._facts())}>"

    def _repr_html_(self):
        rows = "".join(
            f"<tr><td><code>{field.name}</code></td><td>{array.dtype}</td>"
            f"<td>{escape(str(array.shape))}</td><td>{array.nbytes:,}</td></tr>"
            for field in fields(self)
            if isinstance(array := getattr(self, field.name), np.ndarray))
        return (f"<p><b>Inputs</b>: {', '.join(self._facts())}</p><table><tr><th>field</th>"
                f"<th>dtype</th><th>shape</th><th>bytes</th></tr>{rows}</table>")


def _patches(grid):
    """int64[n]"""
    return grid.astype(np.int64).prod(axis=1)


def _files(value, grid):
    """A tuple of bytes and None; None where none is bytes."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(
            item is None or isinstance(item, bytes) for item in value):
        raise TypeError("Inputs.encoded must be a list of bytes and None")
    if len(value) != len(grid):
        raise ValueError(f"Inputs.encoded must have {len(grid)} entries, as many as grid_thw has "
                         f"rows; got {len(value)}")
    if any(item is not None and frames != 1 for item, frames in zip(value, grid[:, 0])):
        raise ValueError("Inputs.encoded are pictures: their grids have one frame")
    return tuple(value) if any(item is not None for item in value) else None


def _joined(parts, name, dtype):
    return np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])


def _spans(starts, counts):
    """start, start + 1, ... of each span, one behind the other."""
    counts = np.asarray(counts, np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(np.asarray(starts, np.int64) - (ends - counts), counts)


def _brief(array):
    text = ", ".join(map(str, array[:6].tolist()))
    return f"[{text}, ...]" if len(array) > 6 else f"[{text}]"
