"""Floating-point operations of a model on a batch: vision per patch, sounds per frame, language per
token, attention by the true lengths of segments.  Recomputation is not counted."""
from typing import NamedTuple

import numpy as np

from .configs import ModelConfig
from .inputs import Inputs
from .sounds import halved, sound_chunks, sound_tokens, window_squares


class _Block(NamedTuple):
    """Multiply-adds of a step of the forward, lowest first: parameters' common beginning, products
    by the rest of their weights' names, rows that they see, and what has no weights."""

    name: str
    products: dict
    rows: float
    bare: float = 0.0


def _vision_blocks(config, grid):
    """The tower and its mergers."""
    v = config.vision
    d, hidden, merge = v["hidden_size"], v["intermediate_size"], v["spatial_merge_size"]
    cells = merge * merge
    out = v.get("out_hidden_size", config.text["hidden_size"])
    patch = v.get("in_channels", 3) * v.get("temporal_patch_size", 1) * v["patch_size"] ** 2
    frame = grid[:, 1].astype(float) * grid[:, 2]
    patches = float((frame * grid[:, 0]).sum())
    attention = 2 * float((frame ** 2 * grid[:, 0]).sum()) * d
    yield _Block("model.visual.patch_embed.", {"proj.weight": patch * d}, patches)
    yield _Block("model.visual.pos_embed.", {}, patches)
    for i in range(v["depth"]):
        yield _Block(f"model.visual.blocks.{i}.", {
            "attn.qkv.weight": 3 * d * d, "attn.proj.weight": d * d,
            "mlp.linear_fc1.weight": d * hidden, "mlp.linear_fc2.weight": hidden * d},
            patches, attention)
    middle = v.get("adapter_hidden_size", d * cells)
    merged = d if config.family == "seed1_5_vl" else d * cells
    taps = range(len(v.get("deepstack_visual_indexes", ())))
    yield _Block("model.visual.ln.", {}, patches)
    for name in (*(f"deepstack_merger_list.{i}." for i in taps), "merger."):
        yield _Block(f"model.visual.{name}", {
            "linear_fc1.weight": merged * middle, "linear_fc2.weight": middle * out},
            patches / cells)


def _audio_blocks(config, lengths):
    """The audio encoder; the convolutions' with the padding of last chunks."""
    a = config.audio
    d, hidden, channels = a["d_model"], a["encoder_ffn_dim"], a["downsample_hidden_size"]
    (chunks, width), tokens = sound_chunks(lengths), float(sound_tokens(lengths).sum())
    cells = [float((chunks * halved(width, k)).sum()) * halved(a["num_mel_bins"], k)
             for k in (1, 2, 3)]
    name = "model.audio_tower."
    for k, inside in enumerate((1, channels, channels)):
        yield _Block(f"{name}conv2d{k + 1}.", {"weight": 9 * inside * channels}, cells[k])
    yield _Block(f"{name}conv_out.", {"weight": channels * d}, cells[2])
    squares = window_squares(lengths, a["n_window_infer"] // (2 * a["n_window"]))
    for i in range(a["encoder_layers"]):
        yield _Block(f"{name}layers.{i}.", {
            **{f"self_attn.{word}_proj.weight": d * d for word in ("q", "k", "v", "out")},
            "fc1.weight": d * hidden, "fc2.weight": hidden * d}, tokens, 2 * squares * d)
    yield _Block(f"{name}ln_post.", {}, tokens)
    yield _Block(f"{name}proj1.", {"weight": d * d}, tokens)
    yield _Block(f"{name}proj2.", {"weight": d * a["output_dim"]}, tokens)


def _language_blocks(config, lengths, n_targets):
    """The decoder.  Experts' weights count for the rows that they see."""
    text = config.text
    width, head = text["hidden_size"], text["head_dim"]
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
    tokens, pairs = float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum())
    yield _Block("model.language_model.embed_tokens.", {}, tokens)
    for i, sparse in enumerate(config.sparse_layers):
        name = f"model.language_model.layers.{i}."
        products = {"self_attn.q_proj.weight": width * head * heads,
                    "self_attn.k_proj.weight": width * head * kv,
                    "self_attn.v_proj.weight": width * head * kv,
                    "self_attn.o_proj.weight": width * head * heads}
        if sparse:
            routed = width * text["moe_intermediate_size"] * text["num_experts_per_tok"]
            shared = width * text.get("shared_expert_intermediate_size", 0)
            products |= {"mlp.gate.weight": width * text["num_experts"],
                         "mlp.experts.gate_up_proj": 2 * routed,
                         "mlp.experts.down_proj": routed}
            products |= {f"mlp.shared_experts.{word}_proj.weight": shared
                         for word in ("gate", "up", "down")}
        else:
            products |= {f"mlp.{word}_proj.weight": width * text["intermediate_size"]
                         for word in ("gate", "up", "down")}
        yield _Block(name, products, tokens, 2 * pairs * heads * head)
    yield _Block("model.language_model.norm.", {}, tokens)
    table = "model.language_model.embed_tokens." if config.tied else "lm_head."
    yield _Block(table, {"weight": width * text["vocab_size"]}, float(n_targets))


class _Trained:
    """What is trained: all, or rows (name, kind, shape, trained) of a model's parameters."""

    def __init__(self, rows):
        self._shapes = None if rows is None else {row[0]: row[2] for row in rows if row[3]}

    def below(self, prefix):
        return self._shapes is None or any(name.startswith(prefix) for name in self._shapes)

    def weight(self, name):
        return self._shapes is None or name in self._shapes

    def adapters(self, prefix):
        """Multiply-adds of a row with the adapters there."""
        return 0 if self._shapes is None else sum(
            shape[0] * shape[1] for name, shape in self._shapes.items()
            if ".lora_" in name and name.startswith(prefix))


def _sum(blocks, trained, below):
    """(multiply-adds, whether anything is trained in these or below); ``trained`` None: forward."""
    total = 0.0
    for name, products, rows, bare in blocks:
        if trained is None:
            total += rows * sum(products.values()) + bare
            continue
        below = below or trained.below(name)
        total += bare * (3 if below else 1) + 3 * rows * trained.adapters(name)
        # Forward; of its input, where anything wants it; of its weights.
        total += rows * sum(count * (1 + below + trained.weight(name + word))
                            for word, count in products.items())
    return total, below


def model_flops(config, inputs, training=True):
    """FLOPs of one call.

    Parameters
    ----------
    config : ModelConfig
        Of the model.
    inputs : Inputs
        What it computes.
    training : bool
        Forward and backward of a model that is trained whole: three times the forward.  Of one
        with frozen parts or adapters, :meth:`Model.flops`.

    Returns
    -------
    float
        Additions and multiplications count one each.

    Raises
    ------
    TypeError
        Something else than a configuration and inputs.

    Notes
    -----
    Causal attention counts the pairs that are attended to, half the square.  The head counts the
    tokens that have a label.

    Examples
    --------
    >>> import orchvlm
    >>> inputs = orchvlm.Inputs(input_ids=[1, 2, 3], labels=[1, 2, 3])
    >>> orchvlm.model_flops(orchvlm.preset("tiny"), inputs) > 1e7
    True
    """
    if not isinstance(config, ModelConfig) or not isinstance(inputs, Inputs):
        raise TypeError("model_flops takes a ModelConfig and Inputs; got "
                        f"{type(config).__name__} and {type(inputs).__name__}")
    return flops_of(config, inputs, training)


def flops_of(config, inputs, training, rows=None):
    """The same of what is trained alone; ``rows`` as the core lists parameters."""
    return count_flops(config, inputs.cu_seqlens, inputs.n_target_tokens, inputs.grid_thw, training,
                       inputs.mel_lengths, rows)


def count_flops(config, cu_seqlens, n_targets, grid_thw, training, mel_lengths=None, rows=None):
    """The same from what of the inputs matters: segments, targets, grids, lengths of sounds (the
    last two may be None)."""
    trained, total, below = _Trained(rows) if training else None, 0.0, False
    encoders = []
    if grid_thw is not None and len(grid_thw):
        encoders.append(_vision_blocks(config, np.asarray(grid_thw)))
    if mel_lengths is not None and len(mel_lengths):
        if not config.audible:
            raise ValueError(f"{config.family} has no audio encoder; got sounds")
        encoders.append(_audio_blocks(config, mel_lengths))
    for blocks in encoders:
        more, some = _sum(blocks, trained, False)
        total, below = total + more, below or some
    lengths = np.diff(cu_seqlens).astype(float)
    more, _ = _sum(_language_blocks(config, lengths, n_targets), trained, below)
    return 2 * (total + more)
