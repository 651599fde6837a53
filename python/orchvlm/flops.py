"""Floating-point operations of a model on a batch: vision per patch, sounds per frame, language per
token, attention by the true lengths of segments.  Recomputation is not counted."""
import numpy as np

from .configs import ModelConfig
from .inputs import Inputs
from .sounds import halved, sound_chunks, sound_tokens, window_squares


def _vision_flops(config, grid):
    """Forward FLOPs of the tower and its mergers."""
    v = config.vision
    d, hidden, merge = v["hidden_size"], v["intermediate_size"], v["spatial_merge_size"]
    cells = merge * merge
    out = v.get("out_hidden_size", config.text["hidden_size"])
    patch = v.get("in_channels", 3) * v.get("temporal_patch_size", 1) * v["patch_size"] ** 2
    frame = grid[:, 1].astype(float) * grid[:, 2]
    patches = float((frame * grid[:, 0]).sum())
    per_block = 4 * d * d + 2 * d * hidden
    middle = v.get("adapter_hidden_size", d * cells)
    merged = d if config.family == "seed1_5_vl" else d * cells
    mergers = 1 + len(v.get("deepstack_visual_indexes") or [])
    products = patches * (patch * d + v["depth"] * per_block) + (
        patches / cells * mergers * (merged * middle + middle * out))
    attention = 2 * float((frame ** 2 * grid[:, 0]).sum()) * d * v["depth"]
    return 2 * (products + attention)


def _audio_flops(config, lengths):
    """Forward FLOPs of the audio encoder; the convolutions' with the padding of last chunks."""
    a = config.audio
    d, hidden, channels = a["d_model"], a["encoder_ffn_dim"], a["downsample_hidden_size"]
    (chunks, width), tokens = sound_chunks(lengths), float(sound_tokens(lengths).sum())
    cells = [float((chunks * halved(width, k)).sum()) * halved(a["num_mel_bins"], k)
             for k in (1, 2, 3)]
    convolutions = 9 * channels * (cells[0] + channels * (cells[1] + cells[2]))
    products = convolutions + cells[2] * channels * d + tokens * (
        a["encoder_layers"] * (4 * d * d + 2 * d * hidden) + d * d + d * a["output_dim"])
    squares = window_squares(lengths, a["n_window_infer"] // (2 * a["n_window"]))
    return 2 * (products + 2 * squares * d * a["encoder_layers"])


def _active_layer(text, layer, config):
    """Multiply-adds per token of a decoder layer, without attention's core."""
    hidden, head = text["hidden_size"], text["head_dim"]
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
    attention = hidden * head * (2 * heads + 2 * kv)
    dense = max(len(text.get("mlp_only_layers") or []), text.get("first_k_dense_replace") or 0)
    if not config.sparse or layer < dense or (layer + 1) % text.get("decoder_sparse_step", 1):
        return attention + 3 * hidden * text["intermediate_size"]
    shared = text.get("shared_expert_intermediate_size") or 0
    routed = text["moe_intermediate_size"] * text["num_experts_per_tok"]
    return attention + hidden * (text["num_experts"] + 3 * shared + 3 * routed)


def model_flops(config, inputs, training=True):
    """FLOPs of one call.

    Parameters
    ----------
    config : ModelConfig
        Of the model.
    inputs : Inputs
        What it computes.
    training : bool
        Forward and backward: three times the forward.

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
    return count_flops(config, inputs.cu_seqlens, inputs.n_target_tokens, inputs.grid_thw, training,
                       inputs.mel_lengths)


def count_flops(config, cu_seqlens, n_targets, grid_thw, training, mel_lengths=None):
    """The same from what of the inputs matters: segments, targets, grids, lengths of sounds (the
    last two may be None)."""
    text = config.text
    lengths = np.diff(cu_seqlens).astype(float)
    per_token = sum(_active_layer(text, i, config) for i in range(text["num_hidden_layers"]))
    pairs = float((lengths * (lengths + 1) / 2).sum())
    attention = 2 * pairs * text["num_attention_heads"] * text["head_dim"] * \
        text["num_hidden_layers"]
    head = n_targets * text["hidden_size"] * text["vocab_size"]
    total = 2 * (lengths.sum() * per_token + attention + head)
    if grid_thw is not None and len(grid_thw):
        total += _vision_flops(config, np.asarray(grid_thw))
    if mel_lengths is not None and len(mel_lengths):
        if not config.audible:
            raise ValueError(f"{config.family} has no audio encoder; got sounds")
        total += _audio_flops(config, mel_lengths)
    return float(total * (3 if training else 1))
