"""Bytes of a model's arenas on a batch, before anything runs: the core's walks over its layers
(csrc/model), with sizes in the place of tensors."""
from bisect import bisect_left
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ._walk import Run, Stream
from .sounds import CONVOLUTIONS, halved, sound_chunks, sound_tokens

SIZES = {"float32": 4, "bfloat16": 2, "float64": 8}
_ROUNDED = 1024  # small sizes that are taken together here, and apart in the core
_HEAD_CHUNK, _HEAD_ROWS = 1 << 22, 192  # logits at a time, and the least rows (cpu_loss.c)


@dataclass(frozen=True)
class _Block:
    """Shape of a transformer block; ``ranks``: the sum of its adapters'."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    gated: bool = False
    qk_norm: bool = False
    experts: int = 0
    k: int = 0
    shared: int = 0
    ranks: int = 0
    trained: bool = field(default=True, compare=False)  # blocks that take the same are equal

    @property
    def cols(self):
        """Of queries and of keys."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim


def _chunks(rows):
    """Into which rows are cut for a norm's weights; more rows may be cut into fewer."""
    return -(-rows // max(32, -(-rows // 64)))


def _sums(rows, cols):
    """Of a norm's weights, chunk by chunk."""
    return _chunks(rows) * 8 * cols


def _listed(b):
    """Of products of the experts: where the tiles of each begin."""
    return 8 * (b.experts + 1)


def _kept(b, rows, run):
    """(bytes, whether it is cheap to compute again) of all that a block's backward reads."""
    row, (q, kv) = rows * run.size, b.cols
    yield row * b.width, False  # between attention and MLP
    for _ in range(2):  # norms
        yield row * b.width, True
        yield 8 * rows, False
    yield row * (q + 2 * kv), False
    if b.qk_norm:
        yield row * (q + kv), False
        yield 4 * rows * b.heads, False
        yield 4 * rows * b.kv_heads, False
    yield row * q, False
    yield 4 * rows * b.heads, False
    yield row * b.ranks, False
    if b.experts:
        for size in (run.exact * b.experts, run.exact * b.k, 4 * b.k, 4 * b.k):
            yield rows * size, False
        yield 4 * (b.experts + 1), False
        yield 2 * row * b.shared, False
        yield row * b.shared, True
        come, _ = run.arriving(b, rows)
        if come and run.checkpoint in ("none", "selective"):
            yield 2 * come * run.size * b.hidden, False
            yield 2 * come * run.size * b.width, False
            yield come * run.size * b.hidden, True
        elif run.spread == 1 and not run.chunked(b, rows):
            yield 2 * row * b.k * b.hidden, False
            yield row * b.k * b.width, False
            yield row * b.k * b.hidden, True
    else:
        for n in (2,) if b.gated else (1, 1):
            yield n * row * b.hidden, False
        if b.gated:
            yield row * b.hidden, True


def _forward(b, rows, run):
    """What a block gives is taken by the caller."""
    key = b, rows, run.checkpoint
    if key not in run.seen:
        run.seen[key] = run.alone()
        _walk(b, rows, run.seen[key])
    run.keep.add(run.seen[key].keep)
    run.work.add(run.seen[key].work)


def _walk(b, rows, run):
    if b.experts:
        run.stack.take(4 * rows * b.k)
    with run.work.rewound():
        for size, again in _kept(b, rows, run):
            redo = run.checkpoint in (None, "full") or again and run.checkpoint == "selective"
            (run.work if redo else run.keep).take(size)
        come, go = run.arriving(b, rows)
        if b.experts:  # the router's sums, and where each expert's tiles begin
            run.work.touch(max(12 * _chunks(rows) * b.experts, _listed(b)))
        if come:
            run.work.touch(8 * come, run.size * (
                b.width * (rows * b.k + go + 3 * come) + 3 * come * b.hidden))
        elif chunk := run.chunked(b, rows):
            run.work.touch(chunk * run.size * (3 * b.hidden + b.width), run.sums(rows * b.width))


def _experts_backward(b, rows, run):
    again, work = run.checkpoint == "selective", run.work
    work.take(rows * b.k * run.exact)
    come, go = run.arriving(b, rows)
    if come:
        work.touch(8 * come + 2 * run.exact * (rows * b.k + come), run.size * (
            b.width * (rows * b.k + go + 4 * come) + 6 * come * b.hidden))
    elif chunk := run.chunked(b, rows):
        work.take(run.sums(rows * b.width))
        work.touch(chunk * run.size * (6 * b.hidden + 2 * b.width))
    else:
        work.touch(rows * b.k * run.size * b.width, rows * b.k * run.size * b.hidden * (3 + again),
                   _listed(b))
    work.take(rows * b.experts * run.exact, rows * run.size * b.shared * (3 + again))


def _backward(b, rows, segments, run):
    row, work, (q, kv) = rows * run.size, run.work, b.cols
    again = run.checkpoint == "selective"
    with work.rewound():
        if run.checkpoint == "full":
            work.take(row * b.width, *(size for size, _ in _kept(b, rows, run)))
        with work.rewound(row * b.width * (1 + again)):
            if b.experts:
                _experts_backward(b, rows, run)
            elif b.gated:
                work.take(row * b.hidden * (3 + again))
            else:
                work.take(row * b.hidden)
                work.touch(4 * rows * b.hidden, 4 * -(-rows // 256) * b.hidden)
            work.touch(_sums(rows, b.width))
        work.take(row * b.width * again, row * q, row * (q + 2 * kv))
        work.touch(8 * (segments + 1) + 4 * rows * (b.heads + (0 if run.size >= 4 else q)))
        work.take(row * b.width)
        work.touch(_sums(rows, b.width))


def _lowest(blocks, fed):
    """The first block that a backward reaches: -1 where it goes on to what is fed to the blocks,
    their number where it reaches none."""
    return -1 if fed else next((i for i, b in enumerate(blocks) if b.trained), len(blocks))


def _backward_all(blocks, rows, segments, run, lowest):
    for block in dict.fromkeys(blocks[max(0, lowest):]):  # each leaves the stack as it was
        _backward(block, rows, segments, run)


def _rope(rows, axes, turned):
    """Positions on so many axes, frequencies and their axes, cosines and sines."""
    return 4 * axes * rows, *(2 * turned,) * 2, *(2 * turned * rows,) * 2


def _merger_kept(run, rows, cols, hidden, pooled, normed):
    """What a merger keeps of so many rows of the merged, and reads first."""
    first = (4 * pooled, 4 * pooled) if pooled else (8 * normed,)
    return *first, rows * cols * run.size, rows * hidden * run.size, rows * hidden * run.size


# ---------------------------------------------------------------- towers

class _Vision:
    def __init__(self, config, grid, pixel_size, trained, ranks):
        v = config.vision
        grid = np.asarray(grid, np.int64)
        self.v, self.pixel_size = v, pixel_size
        self.frames = int(grid[:, 0].sum())
        self.patches = int(grid.prod(axis=1).sum())
        self.tokens = self.patches // v["spatial_merge_size"] ** 2
        self.out = v.get("out_hidden_size", config.text["hidden_size"])
        self.deepstack = len(v.get("deepstack_visual_indexes") or ())
        self.pools = config.family == "seed1_5_vl"
        self.trained = trained("model.visual.")
        fed = trained("model.visual.patch_embed.") or trained("model.visual.pos_embed.")
        self.mergers = {after: trained(f"model.visual.deepstack_merger_list.{k}.")
                        for k, after in enumerate(v.get("deepstack_visual_indexes") or ())}
        self.end = trained("model.visual.merger.") or trained("model.visual.ln.")
        self.blocks = [_Block(
            v["hidden_size"], v["num_heads"], v["num_heads"], v["hidden_size"] // v["num_heads"],
            v["intermediate_size"], ranks=ranks(f"model.visual.blocks.{i}."),
            trained=trained(f"model.visual.blocks.{i}.")) for i in range(v["depth"])]
        self.lowest = _lowest(self.blocks, fed)

    def _merger(self, run, normed):
        width, merge = self.v["hidden_size"], self.v["spatial_merge_size"] ** 2
        merged = width if self.pools else width * merge
        hidden = self.v.get("adapter_hidden_size", width * merge)
        return _merger_kept(run, self.tokens, merged, hidden, self.patches * self.pools, normed)

    def forward(self, run):
        v, rows = self.v, self.patches
        row = rows * v["hidden_size"] * run.size
        values = rows * v.get("in_channels", 3) * v.get("temporal_patch_size", 1) * \
            v["patch_size"] ** 2
        depth = len(self.blocks)
        first = self.lowest if run.checkpoint else depth + 1
        for _ in range(1 + self.deepstack):
            run.keep.take(self.tokens * self.out * run.size)
        # Whether a backward comes there: to the mergers, by the block before them, and to the end.
        mergers = {after: run.checkpoint and (first <= after or trained)
                   for after, trained in self.mergers.items()}
        end = run.checkpoint and (first < depth or self.end)
        with run.work.rewound():
            stream, front = Stream(row), run.at(first < 0)
            stream.next(run, first <= 0)
            front.stack.take(values * run.size)
            run.work.touch(values * self.pixel_size)
            if v.get("num_position_embeddings"):
                front.stack.take(16 * rows, 16 * rows)
            run.at(first < depth).stack.take(*_rope(rows, 2, self.blocks[0].head_dim),
                                             4 * (self.frames + 1))
            for i, block in enumerate(self.blocks):
                read = first <= i + 1 if i + 1 < depth else end
                stream.next(run, read or mergers.get(i, False))
                _forward(block, rows, run.at(first <= i))
                if i in mergers:
                    with run.work.rewound():
                        run.at(mergers[i]).stack.take(*self._merger(run, self.tokens))
            run.at(end).stack.take(*(row, 8 * rows) * self.pools, *self._merger(run, rows))

    def backward(self, run):
        row = self.patches * self.v["hidden_size"] * run.size
        with run.work.rewound(row * (self.lowest < len(self.blocks))):
            hidden = self._merger(run, self.patches)[-1]
            run.work.touch(hidden, row, hidden // run.size * 4)
            run.work.touch(row * self.pools)
            _backward_all(self.blocks, self.patches, self.frames, run, self.lowest)
            if self.lowest < 0:
                run.work.touch(4 * (self.v.get("num_position_embeddings", 0) + 1
                                    + 4 * self.patches))


def _sound_numbers(a, lengths):
    """Tokens, sounds, columns behind all convolutions; values before and behind each of them."""
    chunks, width = sound_chunks(lengths)
    return (int(sound_tokens(lengths).sum()), len(chunks), int((chunks * halved(width)).sum()),
            *(int((chunks * halved(width, k)).sum()) * halved(a["num_mel_bins"], k)
              for k in range(CONVOLUTIONS + 1)))


class _Audio:
    def __init__(self, config, lengths, trained, ranks):
        self.a = a = config.audio
        self.tokens, self.segments, self.columns, *self.rows = _sound_numbers(a, lengths)
        self.trained = trained("model.audio_tower.")
        heads = a["encoder_attention_heads"]
        self.blocks = [_Block(
            a["d_model"], heads, heads, a["d_model"] // heads, a["encoder_ffn_dim"],
            ranks=ranks(f"model.audio_tower.layers.{i}."),
            trained=trained(f"model.audio_tower.layers.{i}."))
            for i in range(a["encoder_layers"])]
        self.lowest = _lowest(self.blocks, trained("model.audio_tower.conv"))

    def _stages(self):
        """(rows, patch values, channels) of the convolutions and of what follows them."""
        channels = self.a["downsample_hidden_size"]
        for k in range(CONVOLUTIONS):
            yield self.rows[k + 1], 9 * (channels if k else 1), channels
        yield self.columns, channels * halved(self.a["num_mel_bins"]), self.a["d_model"]

    def forward(self, run):
        row = self.tokens * self.a["d_model"] * run.size
        run.keep.take(self.tokens * self.a["output_dim"] * run.size)
        depth = len(self.blocks)
        first = self.lowest if run.checkpoint else depth + 1
        with run.work.rewound():
            stream, front = Stream(row), run.at(first < 0)
            stream.next(run, first <= 0)
            front.stack.take(self.rows[0] * run.size)
            run.work.touch(4 * self.rows[0])
            *convolutions, last = self._stages()
            for rows, values, channels in convolutions:
                front.stack.take(*(rows * channels * run.size,) * 2)
                run.work.touch(rows * values * run.size)
            front.stack.take(4 * self.tokens)
            run.at(first < depth).stack.take(4 * (self.segments + 1))
            run.work.touch(last[0] * (last[1] + last[2]) * run.size)
            for i, block in enumerate(self.blocks):
                stream.next(run, first <= i + 1)
                _forward(block, self.tokens, run.at(first <= i))
            width = self.a["d_model"]
            run.stack.take(*_merger_kept(run, self.tokens, width, width, 0, self.tokens))

    def backward(self, run):
        row = self.tokens * self.a["d_model"] * run.size
        with run.work.rewound(row * (self.lowest < len(self.blocks))):
            run.work.touch(row, row, row // run.size * 4)
            _backward_all(self.blocks, self.tokens, self.segments, run, self.lowest)
            if self.lowest < 0:
                run.work.take(self.columns * self.a["d_model"] * run.size)
                for stage, (rows, values, channels) in reversed(list(enumerate(self._stages()))):
                    if stage:  # the gradient of what it read
                        run.work.take(self.rows[stage] * self.a["downsample_hidden_size"]
                                      * run.size)
                    run.work.touch(*(rows * values * run.size,) * (2 if stage else 1),
                                   4 * rows * channels * (stage < CONVOLUTIONS))


# ---------------------------------------------------------------- decoder

def _decoder_blocks(config, trained, ranks):
    t, made = config.text, []
    common = {"width": t["hidden_size"], "heads": t["num_attention_heads"],
              "kv_heads": t["num_key_value_heads"], "head_dim": t["head_dim"], "gated": True,
              "qk_norm": config.qk_norm}
    for i, sparse in enumerate(config.sparse_layers):
        own = {"hidden": t["moe_intermediate_size"], "experts": t["num_experts"],
               "k": t["num_experts_per_tok"],
               "shared": t.get("shared_expert_intermediate_size", 0)} if sparse else {
            "hidden": t["intermediate_size"]}
        name = f"model.language_model.layers.{i}."
        made.append(_Block(**common, **own, ranks=ranks(name), trained=trained(name)))
    return made


def _decoder_forward(config, blocks, tokens, segments, mixed, lowest, run):
    row = tokens * config.text["hidden_size"] * run.size
    first = lowest if run.checkpoint else len(blocks) + 1
    with run.work.rewound():
        run.keep.take(row)
        stream = Stream(row)
        stream.next(run, first <= 0)
        run.at(first < 0).stack.take(*(4 * tokens,) * (1 + mixed))
        run.at(first < len(blocks)).stack.take(*_rope(tokens, 3, config.rotary),
                                               4 * (segments + 1))
        run.stack.take(8 * tokens)
        for i, block in enumerate(blocks):
            stream.next(run, first <= i + 1)
            _forward(block, tokens, run.at(first <= i))


def _head_scratch(config, tokens):
    vocab, width = config.text["vocab_size"], config.text["hidden_size"]
    rows = min(tokens, max(_HEAD_ROWS, _HEAD_CHUNK // vocab))
    return 4 * sum(-(-n // 16) * 16 for n in (tokens, rows * vocab)) + 4 * rows * width


def _feature_rows(config, name, rows, size):
    """Bytes of a medium's features, and of DeepStack's; of each alike."""
    deepstack = config.vision.get("deepstack_visual_indexes") or () if name == "vision" else ()
    return (rows * config.text["hidden_size"] * size,) * (1 + len(deepstack))


def _load(config, name, rows, run, stack):
    """Features, or gradients, that come from the host."""
    stack.take(*_feature_rows(config, name, rows, run.size))
    run.work.touch(rows * config.text["hidden_size"] * run.exact)


def _decode(config, cu_seqlens, media, wanted, given, trained, ranks, run):
    """The language phase, of tokens with these media, and its backward, of which the gradients of
    the features that are wanted stay in the workspace."""
    tokens, segments = int(cu_seqlens[-1]), len(cu_seqlens) - 1
    for name, rows in given.items():
        _load(config, name, rows, run, run.keep)
    blocks, training = _decoder_blocks(config, trained, ranks), run.checkpoint is not None
    lowest = _lowest(blocks, bool(wanted) or trained("model.language_model.embed_tokens."))
    reached = training and (lowest < len(blocks) or trained("model.language_model.norm."))
    _decoder_forward(config, blocks, tokens, segments, len(media), lowest, run.at(reached))
    text, work, row = config.text, run.work, tokens * config.text["hidden_size"] * run.size
    run.keep.take(*(4 * tokens,) * 4)  # slopes, labels, weights, log-probabilities
    work.touch(_head_scratch(config, tokens))
    work.touch(8, 8, 8 * text.get("num_experts", 0))  # the normalizer, counts of the routers
    if training:
        head = trained("model.language_model.embed_tokens." if config.tied else "lm_head.")
        run.keep.take(row * reached, text["vocab_size"] * text["hidden_size"] * run.exact * head)
        work.take(row * reached, 4 * tokens)
        work.touch(_head_scratch(config, tokens))
        for name, rows in wanted.items():
            work.take(*_feature_rows(config, name, rows, run.size))
        with work.rewound(row * (lowest < len(blocks))):
            _backward_all(blocks, tokens, segments, run, lowest)
            if trained("model.language_model.embed_tokens."):
                work.touch(4 * (text["vocab_size"] + 1 + tokens))


def predict(config, cu_seqlens, grid_thw=None, mel_lengths=None, *, dtype="float32",
            checkpoint="none", training=True, pixel_size=4, trained=lambda prefix: True,
            ranks=lambda prefix: 0, chunk=None, spread=1, given=None):
    """Activations and workspace of a forward with labels, and of its backward.

    Parameters
    ----------
    config : ModelConfig
    cu_seqlens : int[B + 1]
    grid_thw : int[I, 3], optional
    mel_lengths : int[S], optional
    dtype : {"float32", "bfloat16", "float64"}
    checkpoint : {"none", "selective", "full"}
    training : bool
        Whether a backward follows.
    pixel_size : int
        Bytes of a pixel value as it is given.
    trained, ranks : callable
        Of the first letters of parameters' names: whether one of them is trained, and the sum of
        the ranks of adapters there.
    chunk : int, optional
        Bound of the experts' rows at a time; None: all.
    spread : int
        Ranks that share the experts, and have as many tokens as this one.
    given : dict of str to int, optional
        By medium, rows of features that the decoder is given, and gives the gradients of: the
        encoders are called on their own, for whomever.  None: one call encodes and decodes.

    Returns
    -------
    parts : dict of str to int
        Activations of ``"llm"``, ``"vision"`` and ``"audio"``, each in an arena of its own.
    workspace : int
    """
    size, exact = SIZES[dtype], max(4, SIZES[dtype])
    run = Run(size, exact, checkpoint if training else None, chunk or 0, spread)
    towers = {}
    if grid_thw is not None and (len(grid_thw) or given is not None):
        towers["vision"] = _Vision(config, grid_thw, pixel_size, trained, ranks)
    if mel_lengths is not None and (len(mel_lengths) or given is not None):
        towers["audio"] = _Audio(config, mel_lengths, trained, ranks)
    runs = {name: run.tower(training and tower.trained, given is not None)
            for name, tower in towers.items()}
    for name, tower in towers.items():
        tower.forward(runs[name])
    backs = [name for name in towers if runs[name].checkpoint]
    wanted = {name: towers[name].tokens for name in backs} if given is None else given
    _decode(config, cu_seqlens, towers if given is None else given, wanted, given or {}, trained,
            ranks, run)
    for name in backs:
        with runs[name].work.rewound():
            if given is not None:
                _load(config, name, towers[name].tokens, runs[name], runs[name].work)
            towers[name].backward(runs[name])
    return ({"llm": run.keep.most + _ROUNDED, **dict.fromkeys(("vision", "audio"), 0),
             **{name: one.keep.most for name, one in runs.items()}},
            max([run.work.most, *(one.work.most for one in runs.values())]) + _ROUNDED)


def numbers(config, inputs, chunk=None):
    """Of what :func:`of_model` depends on besides the model: where none of these is less for one
    pack than for another, no byte is less.

    Parameters
    ----------
    config : ModelConfig
    inputs : Inputs
        Or what has its sizes.
    chunk : int, optional
        As in :func:`predict`.

    Returns
    -------
    list of int
    """
    tokens, grid = int(inputs.cu_seqlens[-1]), inputs.grid_thw
    once = bool(chunk) and tokens * config.text.get("num_experts_per_tok", 0) <= chunk
    found = [tokens, _chunks(tokens), len(inputs.cu_seqlens), once, not once]
    if config.vision:
        grid = np.zeros((0, 3), np.int64) if grid is None else np.asarray(grid, np.int64)
        patches = int(grid.prod(axis=1).sum())
        found += [patches, _chunks(patches), int(grid[:, 0].sum()), len(grid) > 0, not len(grid)]
    if config.audible:
        lengths = [] if inputs.mel_lengths is None else inputs.mel_lengths
        sounds = _sound_numbers(config.audio, lengths)
        found += [*sounds, _chunks(sounds[0]), len(lengths) > 0, not len(lengths)]
    given = getattr(inputs, "given", None) or {}
    for name in ("vision", "audio"):
        found += [given.get(name, 0), name in given, name not in given]
    return found


def of_model(config, inputs, rows, dtype, training, checkpoint, chunk=None, spread=1):
    """Of inputs, with the parameters' rows (name, kind, shape, trained) as the core lists them:
    {arena: bytes} after a step, or after a forward alone."""
    parts, workspace = parts_of(config, inputs, rows, dtype, training, checkpoint, chunk, spread)
    elements = sum(prod(shape) for _, _, shape, trained in rows if trained)
    return {"training": bool(training) * state_bytes(elements, dtype),
            "activations": sum(parts.values()), "workspace": workspace}


def parts_of(config, inputs, rows, dtype, training, checkpoint, chunk=None, spread=1):
    """As :func:`predict` has it, of what :func:`of_model` takes; inputs may say what features
    are ``given``."""
    names = sorted(name for name, _, _, trained in rows if trained)
    ranks = {name: shape[0] for name, _, shape, _ in rows if name.endswith(".lora_A.weight")}

    def trained(prefix):  # the first name that is not before it begins with it, or none does
        at = bisect_left(names, prefix)
        return at < len(names) and names[at].startswith(prefix)
    pixels = inputs.pixels is not None and inputs.pixels.dtype == np.uint8
    return predict(
        config, inputs.cu_seqlens, inputs.grid_thw, inputs.mel_lengths, dtype=dtype,
        checkpoint=checkpoint, training=bool(training), pixel_size=1 if pixels else 4,
        trained=trained,
        ranks=lambda prefix: sum(r for name, r in ranks.items() if name.startswith(prefix)),
        chunk=chunk, spread=spread, given=getattr(inputs, "given", None))


def state_bytes(elements, dtype):
    """Gradients, two moments and, of bfloat16, a float32 master."""
    return elements * max(4, SIZES[dtype]) * (4 if dtype == "bfloat16" else 3)


def cache_bytes(config, sequences, length, dtype="float32"):
    """Keys and values of so many sequences of at most ``length`` tokens, all layers'."""
    text = config.text
    return (2 * text["num_hidden_layers"] * sequences * length * text["num_key_value_heads"]
            * text["head_dim"] * SIZES[dtype])
