"""What a configuration makes, counted without making it: parameters, FLOPs and memory by part."""
from .arenas import SIZES, cache_bytes, predict, state_bytes
from .flops import count_flops
from .sounds import halved


def _vision(config):
    """{part: parameters} of the tower and what joins it to the decoder."""
    v, text = config.vision, config.text
    d, hidden, merge = v["hidden_size"], v["intermediate_size"], v["spatial_merge_size"]
    patch = v.get("in_channels", 3) * v.get("temporal_patch_size", 1) * v["patch_size"] ** 2
    seed = config.family == "seed1_5_vl"
    block = 4 * d + (4 * d * d + 4 * d) + (2 * d * hidden + hidden + d)  # norms, attention, MLP
    merged = d if seed else d * merge * merge
    middle = v.get("adapter_hidden_size", d * merge * merge)
    out = v.get("out_hidden_size", text["hidden_size"])
    project = merged * middle + middle + middle * out + out
    taps = len(v.get("deepstack_visual_indexes") or [])
    # The seed family normalises behind the last block; Qwen's mergers do it, the main one by patch
    # and those of DeepStack by the merged row.
    return {"patch embedding": patch * d + (0 if seed else d),
            "position table": (v.get("num_position_embeddings") or 0) * d,
            "vision blocks": v["depth"] * block + (2 * d if seed else 0),
            "adapter": project + (0 if seed else 2 * d),
            "DeepStack adapters": taps * (project + 2 * merged)}


def _audio(config):
    """{part: parameters} of the audio encoder, where there is one."""
    if not config.audible:
        return {}
    a = config.audio
    d, hidden, channels = a["d_model"], a["encoder_ffn_dim"], a["downsample_hidden_size"]
    out = a["output_dim"]
    block = 4 * d + 4 * (d * d + d) + (2 * d * hidden + hidden + d)  # norms, attention, MLP
    return {"convolutions": (9 * channels + channels) + 2 * (9 * channels ** 2 + channels)
            + channels * halved(a["num_mel_bins"]) * d,
            "audio blocks": a["encoder_layers"] * block,
            "audio adapter": 2 * d + d * d + d + d * out + out}


def _language(config):
    """{part: (parameters, those that one token uses)} of the decoder."""
    t = config.text
    width, head, layers = t["hidden_size"], t["head_dim"], t["num_hidden_layers"]
    heads, kv = t["num_attention_heads"], t["num_key_value_heads"]
    attention = 2 * width * head * (heads + kv) + 2 * head * config.qk_norm
    if t.get("attention_bias"):
        attention += head * (heads + 2 * kv) + width
    sparse, table = sum(config.sparse_layers), t["vocab_size"] * width
    dense = (layers - sparse) * 3 * width * t["intermediate_size"]
    parts = {"embedding": (table, width), "attention": (layers * attention,) * 2,
             "dense MLPs": (dense, dense)}
    if sparse:
        expert = 3 * width * t["moe_intermediate_size"]
        shared = t.get("shared_expert_intermediate_size") or 0
        bias = t["num_experts"] if t.get("scoring_func") == "sigmoid" else 0
        parts["experts"] = (sparse * t["num_experts"] * expert,
                            sparse * t["num_experts_per_tok"] * expert)
        parts["shared experts"] = (sparse * 3 * width * shared,) * 2
        parts["routers"] = (sparse * (t["num_experts"] * width + bias),) * 2
    parts["norms"] = ((2 * layers + 1) * width,) * 2
    # A tied head is the embedding table; it is used whole for every token that is predicted.
    parts["head"] = (0 if config.tied else table, table)
    return parts


def count_parameters(config):
    """Parameters by part.

    Parameters
    ----------
    config : ModelConfig

    Returns
    -------
    dict of str to (int, int)
        Parameters of each part that has any, and those that one token (of a part of the vision
        tower: one patch, of the audio encoder: one frame) uses.

    Examples
    --------
    >>> import orchvlm
    >>> from orchvlm.parts import count_parameters
    >>> parts = count_parameters(orchvlm.preset("seed1.5-vl"))
    >>> sum(parts[name][0] for name in ("patch embedding", "vision blocks"))
    532046080
    """
    parts = {name: (count, count)
             for name, count in (_vision(config) | _audio(config)).items()}
    parts |= _language(config)
    return {name: (int(all_), int(used)) for name, (all_, used) in parts.items() if used}


def _sample(config, image, text_tokens):
    """(tokens, grid) of a picture and some text; its sides in pixels are rounded to tokens."""
    vision = config.vision
    merge = vision["spatial_merge_size"]
    rows, columns = (max(1, round(side / vision["patch_size"] / merge)) for side in image)
    return rows * columns + text_tokens, [1, rows * merge, columns * merge]


def sample_flops(config, image=(448, 448), text_tokens=128, training=True):
    """FLOPs of one sample: a picture and some text.

    Parameters
    ----------
    config : ModelConfig
    image : (int, int)
        Height and width in pixels, rounded to whole tokens.
    text_tokens : int
        Of which all count as targets.
    training : bool
        Forward and backward.

    Returns
    -------
    tokens : int
        In the decoder.
    flops : float
    """
    tokens, grid = _sample(config, image, text_tokens)
    return tokens, count_flops(config, [0, tokens], text_tokens, [grid], training)


def plan_memory(config, dtype="float32", tokens=4096, checkpoint="none", image=(448, 448),
                text_tokens=128):
    """Bytes by arena of a training step, and of generation.

    Parameters
    ----------
    config : ModelConfig
    dtype : {"float32", "bfloat16"}
        Of weights; gradients and both moments are float32, with a float32 master of bfloat16.
    tokens : int
        Of a pack: as many samples as fit, one at least, and of all that generation holds.
    checkpoint : {"none", "selective", "full"}
        As in :meth:`Model.forward`.
    image : (int, int)
    text_tokens : int
        The samples, as in :func:`sample_flops`.

    Returns
    -------
    dict of str to int
        ``weights``, ``gradients``, ``optimizer``, ``activations``, ``workspace`` and ``cache``
        (keys and values, where that many tokens are generated or read).

    Notes
    -----
    Nothing is allocated.  :meth:`Model.memory` foretells the same of one's own inputs.

    Examples
    --------
    >>> import orchvlm
    >>> from orchvlm.parts import plan_memory
    >>> plan_memory(orchvlm.preset("tiny"))["weights"]
    17709312
    >>> full = plan_memory(orchvlm.preset("seed1.5-vl"), "bfloat16", 131072, "full")
    >>> round(full["activations"] / 2**30), round(full["cache"] / 2**30)
    (96, 32)
    """
    total = sum(count for count, _ in count_parameters(config).values())
    one, grid = _sample(config, image, text_tokens)
    samples = max(1, tokens // one)
    phases, workspace = predict(config, [one * i for i in range(samples + 1)],
                                [grid] * samples, dtype=dtype, checkpoint=checkpoint)
    return {"weights": SIZES[dtype] * total, "gradients": 4 * total,
            "optimizer": state_bytes(total, dtype) - 4 * total,
            "activations": sum(phases.values()), "workspace": workspace,
            "cache": cache_bytes(config, 1, tokens, dtype)}
