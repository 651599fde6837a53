"""What ranks tell each other about a global batch: the lengths of everything, and nothing else."""
from dataclasses import dataclass, replace

import numpy as np

from .batch import Batch, Items
from .data.assets import DataError
from .inputs import IGNORED
from .sounds import sound_tokens

MEDIA = ("vision", "audio")

_TOLD = 400   # bytes of a message


@dataclass(frozen=True)
class Medium:
    """One encoder's items in a pack of samples.

    Attributes
    ----------
    sizes : int32[n, 3]
        Frames, rows and columns of each image; frames, 0 and 0 of each sound.
    rows : array[R, values]
        Patches or log-mel frames, item after item, of those that are not encoded.
    item_rows, tokens : int64[n]
        Rows of each item, and the tokens that it becomes.
    sample, position : int64[n]
        Where the first of these is: which sample of the pack, which token of that.
    encoded : list of (bytes or None)
        Pictures that are still files; empty where none is.
    """

    sizes: np.ndarray
    rows: np.ndarray
    item_rows: np.ndarray
    tokens: np.ndarray
    sample: np.ndarray
    position: np.ndarray
    encoded: list

    def __len__(self):
        return len(self.sizes)

    def packed(self):
        """uint8[B] : all items one behind the other, as files or as rows."""
        rows, parts, first = np.ascontiguousarray(self.rows), [np.zeros(0, np.uint8)], 0
        for item, n in zip(self.encoded or [None] * len(self), self.item_rows):
            if item is None:
                parts.append(rows[first:first + n].reshape(-1).view(np.uint8))
                first += n
            else:
                parts.append(np.frombuffer(item, np.uint8))
        return np.concatenate(parts)


def unpacked(content, sizes, item_bytes, values, dtype):
    """What :meth:`Medium.packed` packed, with all pictures decoded.

    Parameters
    ----------
    content : uint8[B]
    sizes : int64[n, 4]
        As :func:`gathered_batch` gives them.
    item_bytes : int64[n]
        Of each item.
    values : int
        Of a row.
    dtype : dtype

    Returns
    -------
    rows : array[R, values]
    failed : dict of int to ValueError
        Items whose files are broken behind their headers (DataError), or that a rule cut which is
        not that of the others; their rows are 0.
    """
    from .data.encoded import decoded
    counts = np.prod(sizes[:, :3], axis=1)
    rows, failed = np.zeros((counts.sum(), values), dtype), {}
    ends, places = np.cumsum(counts), np.cumsum(item_bytes)
    for k, (end, n, place, size) in enumerate(zip(ends, counts, places, item_bytes)):
        item = content[place - size:place]
        if not sizes[k, 3]:
            rows[end - n:end] = item.view(dtype).reshape(n, values)
            continue
        try:
            rows[end - n:end] = decoded(item.tobytes(), n, values, dtype)
        except ValueError as error:  # DataError is one
            failed[k] = error
    return rows, failed


def medium(config, inputs, name):
    """The items of one encoder in a pack; frames of a video, which see only themselves, are items
    of their own.

    Parameters
    ----------
    config : ModelConfig
    inputs : Inputs
    name : {"vision", "audio"}

    Returns
    -------
    Medium

    Raises
    ------
    ValueError
        Placeholders of one item that are not in one piece, or not as many as it has features.
    """
    if name == "vision":
        merge = config.vision["spatial_merge_size"]
        grid = np.zeros((0, 3), np.int32) if inputs.grid_thw is None else inputs.grid_thw
        sizes = np.repeat(grid, grid[:, 0], axis=0)
        sizes[:, 0] = 1
        encoded = [item for item, frames in zip(inputs.encoded or (), grid[:, 0])
                   for _ in range(frames)]
        item_rows = np.prod(sizes, axis=1, dtype=np.int64)
        tokens, ids, rows = item_rows // merge**2, config.visual_tokens, inputs.pixels
        width, dtype = _patch_values(config), np.uint8
    else:
        frames = np.zeros(0, np.int32) if inputs.mel_lengths is None else inputs.mel_lengths
        sizes = np.stack([frames, 0 * frames, 0 * frames], axis=1)
        item_rows = frames.astype(np.int64)
        tokens, ids, rows = sound_tokens(frames).astype(np.int64), config.sound_tokens, inputs.mel
        width, dtype, encoded = config.audio["num_mel_bins"], np.float32, []
    rows = np.zeros((0, width), dtype) if rows is None else rows
    sample, position = _places(inputs, np.flatnonzero(np.isin(inputs.input_ids, ids)), tokens)
    return Medium(sizes, rows, item_rows, tokens, sample, position, encoded)


def _patch_values(config):
    vision = config.vision
    return (vision.get("in_channels", 3) * vision.get("temporal_patch_size", 1)
            * vision["patch_size"] ** 2)


def _places(inputs, spots, tokens):
    """(sample, position) of items that fill these spots one after the other."""
    if tokens.sum() != len(spots):
        raise ValueError(f"{len(spots)} tokens wait for a feature, but the items give "
                         f"{tokens.sum()}")
    first = np.cumsum(tokens) - tokens
    full = tokens > 0
    start = np.zeros(len(tokens), np.int64)
    start[full] = spots[first[full]]
    if (spots[(first + tokens - 1)[full]] - start[full] != tokens[full] - 1).any():
        raise ValueError("the tokens of one image, frame or sound must follow each other")
    sample = np.searchsorted(inputs.cu_seqlens, start, "right") - 1
    return sample, start - inputs.cu_seqlens[sample]


def counted(inputs):
    """bool[T] : labels that the loss counts: not those at the start of a sample, which nothing
    predicts."""
    kept = inputs.labels != IGNORED
    starts = inputs.cu_seqlens[:-1]
    kept[starts[starts < len(kept)]] = False
    return kept


def label_weights(inputs):
    """float32[T] : of each label that the loss counts, 0 of the others."""
    return np.where(counted(inputs), 1 if inputs.weights is None else inputs.weights,
                    0).astype(np.float32)


# ---------------------------------------------------------------- over ranks


def gathered_batch(config, inputs, media, comm):
    """The global batch, from what every rank tells about its samples.

    Parameters
    ----------
    config : ModelConfig
    inputs : Inputs
        This rank's samples.
    media : dict of str to Medium
        Their items; where there are none, they take the others' dtype.
    comm : Comm

    Returns
    -------
    batch : Batch
        Samples by rank, each rank's in its own order.
    sizes : dict of str to int64[n, 4]
        Of all items of a medium, in the order of ``batch.phases``; last the bytes of those that are
        encoded, and 0 of others.
    normalizer : float
        Sum of all weights.

    Raises
    ------
    ValueError
        On all ranks: pixels that are bytes on one and floats on another, or in other patches.
    """
    total = np.array([label_weights(inputs).sum(dtype=np.float64)])
    value_bytes = _value_bytes(media, comm)
    for name, one in media.items():
        if not len(one):  # rows of nothing are of the others' kind
            media[name] = replace(one, rows=one.rows.astype(
                np.uint8 if value_bytes[name] == 1 else np.float32))
    (samples, ranks), *told_items = [gathered(comm, rows) for rows in _told(inputs, media)]
    first = np.searchsorted(ranks, np.arange(comm.size))  # sample of all that is a rank's first
    text, phases, sizes = samples[:, 0].copy(), {}, {}
    for (name, one), (rows, item_ranks) in zip(media.items(), told_items):
        sample, sizes[name] = rows[:, 0] + first[item_ranks], rows[:, 3:]
        length = sizes[name][:, 0] * np.where(sizes[name][:, 1] > 0,
                                              sizes[name][:, 1] * sizes[name][:, 2], 1)
        item_bytes = np.where(sizes[name][:, 3] > 0, sizes[name][:, 3],
                              length * one.rows.shape[1] * value_bytes[name])
        phases[name] = Items(sample, rows[:, 1], length, rows[:, 2], item_bytes,
                             out_bytes_per_token=4.0 * config.text["hidden_size"])
        np.subtract.at(text, sample, rows[:, 2])
    batch = Batch(text, samples[:, 1], ranks, phases, text_bytes_per_token=24.0)
    return batch, sizes, float(comm.all_reduce(total)[0])


def _told(inputs, media):
    """int64[n, 2] of a rank's samples (tokens, targets), and int64[k, 7] for each medium (sample,
    position, tokens, size, bytes where it is encoded)."""
    starts, lengths = inputs.cu_seqlens[:-1], np.diff(inputs.cu_seqlens)
    targets = np.zeros(len(lengths), np.int64)
    if len(lengths):
        targets = np.add.reduceat(np.append(counted(inputs), False).astype(np.int64), starts)
    samples = np.column_stack([lengths, np.where(lengths > 0, targets, 0)]).astype(np.int64)
    return [samples, *(np.column_stack([one.sample, one.position, one.tokens, one.sizes,
                                        [len(item or b"") for item in one.encoded]
                                        or np.zeros(len(one))])
                       .astype(np.int64) for one in media.values())]


def _value_bytes(media, comm):
    """Bytes of a value of each medium, after a look at rows on all ranks."""
    kinds = [(one.rows.dtype.itemsize, one.rows.shape[1]) if len(one) else (0, 0)
             for one in media.values()]
    kinds, _ = gathered(comm, np.array([kinds], np.int64).reshape(1, -1, 2))
    for name, told in zip(media, kinds.transpose(1, 0, 2)):
        having = np.flatnonzero(told[:, 0])
        for other in having[(told[having] != told[having[:1]]).any(axis=1)][:1]:
            (size, width), (size_there, width_there) = told[having[0]], told[other]
            raise ValueError(f"{name}: rows of {width} values of {size} bytes on rank {having[0]}, "
                             f"and of {width_there} of {size_there} on rank {other}; use one rule "
                             "on all ranks")
    return dict(zip(media, kinds[:, :, 0].max(axis=0, initial=0)))


def gathered(comm, rows):
    """(rows of all ranks, the rank of each)."""
    counts = comm.all_gather(np.array([len(rows)], np.int64)).reshape(-1)
    return (comm.all_gather(rows, counts), np.repeat(np.arange(comm.size), counts))


def first_error(broken, batch, comm):
    """Why pictures cannot be decoded, the same on all ranks: a ValueError where a rule is to blame
    and no file, else a DataError.

    Parameters
    ----------
    broken : dict of int to ValueError
        Samples, and why, of this rank's decoding; at least one on all ranks together.
    batch : Batch
    comm : Comm

    Returns
    -------
    ValueError
    """
    sample, error = min(broken.items(), key=lambda item: isinstance(item[1], DataError),
                        default=(0, None))
    mine = []
    if error is not None:
        blameless = isinstance(error, DataError)
        text = str(error) if blameless else f"rank {batch.source_rank[sample]} read it: {error}"
        mine = [blameless, *text.encode()[:_TOLD]]
    told, ranks = gathered(comm, np.array(mine, np.int64))
    kind, *text = min((told[ranks == rank].tolist() for rank in np.unique(ranks)),
                      key=lambda one: one[0])
    return (DataError if kind else ValueError)(bytes(text).decode(errors="replace"))
