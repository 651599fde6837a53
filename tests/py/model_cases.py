"""Freshly drawn tiny models and batches, odd on purpose."""
import os

import numpy as np

import orchvlm

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
MANY = 400 if SANITIZED else 3000  # tokens that take a moment
IMAGE, VIDEO, START, END = 3, 4, 1, 2  # ids; text is from 6 on
FIRST_TEXT = 6
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
       "vision_end_token_id": END}


def _text(rng, sparse):
    kv = int(rng.integers(1, 4))
    head_dim = 2 * int(rng.integers(4, 13))
    text = {
        "vocab_size": int(rng.integers(40, 90)), "hidden_size": 4 * int(rng.integers(5, 14)),
        "intermediate_size": int(rng.integers(9, 60)),
        "num_hidden_layers": int(rng.integers(2, 5)),
        "num_attention_heads": kv * int(rng.integers(1, 4)),
        "num_key_value_heads": kv, "head_dim": head_dim, "rms_norm_eps": 1e-6,
        "hidden_act": str(rng.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"])),
        "attention_bias": bool(not sparse and rng.random() < 0.3),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    if sparse:
        experts = int(rng.integers(2, 17))
        text |= {"num_experts": experts, "moe_intermediate_size": int(rng.integers(5, 30)),
                 "num_experts_per_tok": int(rng.integers(1, min(4, experts) + 1)),
                 "router_aux_loss_coef": 0.01}
    return text


def _vision(rng, text):
    heads = int(rng.integers(1, 4))
    return {
        "depth": int(rng.integers(2, 5)), "hidden_size": heads * 4 * int(rng.integers(2, 6)),
        "hidden_act": "gelu_pytorch_tanh", "intermediate_size": int(rng.integers(9, 60)),
        "num_heads": heads, "in_channels": 3, "patch_size": int(rng.integers(2, 5)),
        "spatial_merge_size": 2, "temporal_patch_size": int(rng.integers(1, 3)),
        "out_hidden_size": text["hidden_size"]}


def _unsay(rng, part, **others):
    """Leaves some keys out, or says what nobody reads."""
    for key, values in others.items():
        if (at := int(rng.integers(2 + len(values)))) > 1:
            part[key] = values[at - 2]
        elif at:
            part.pop(key, None)


def draw_config(rng, sparse):
    """Qwen3-VL's, dense or with experts, as a dict."""
    text = _text(rng, sparse)
    vision = _vision(rng, text)
    half = text["head_dim"] // 2
    h, w = int(rng.integers(1, half // 3 + 1)), int(rng.integers(1, half // 3 + 1))
    text["rope_parameters"] |= {"mrope_section": [half - h - w, h, w], "mrope_interleaved": True}
    _unsay(rng, text["rope_parameters"], mrope_section=(), mrope_interleaved=(False,))
    if sparse:
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": [0] if rng.random() < 0.3 else []}
        _unsay(rng, text, decoder_sparse_step=(), norm_topk_prob=(False, True))
    taps = min(vision["depth"], text["num_hidden_layers"], int(rng.integers(0, 3)))
    vision |= {"num_position_embeddings": int(rng.integers(3, 9)) ** 2,
               "deepstack_visual_indexes": sorted(
                   int(i) for i in rng.choice(vision["depth"], taps, replace=False))}
    return {"model_type": "qwen3_vl_moe" if sparse else "qwen3_vl", "text_config": text,
            "vision_config": vision, **IDS, "tie_word_embeddings": bool(rng.random() < 0.4)}


def draw_seed_config(rng, sparse):
    """Seed1.5-VL's; with experts: sigmoid routing in groups, a shared expert, a dense layer."""
    text = _text(rng, sparse)
    # Softmax takes no notice of a bias of keys that are neither normalised nor turned.
    text |= {"num_hidden_layers": 2,
             "use_qk_norm": bool(text["attention_bias"] or rng.random() < 0.5)}
    if (turned := 2 * int(rng.integers(1, text["head_dim"] // 2 + 1))) < text["head_dim"]:
        # Rounded down by those who read it.
        text["rope_parameters"]["partial_rotary_factor"] = (turned + 0.5) / text["head_dim"]
    if sparse:
        groups = int(rng.integers(1, 4))
        taken = int(rng.integers(1, groups + 1))
        experts = groups * int(rng.integers(2, 5))
        text |= {"num_experts": experts, "n_group": groups, "topk_group": taken,
                 "num_experts_per_tok": int(rng.integers(1, min(4, experts // groups * taken) + 1)),
                 "scoring_func": "sigmoid", "routed_scaling_factor": 1.7,
                 "shared_expert_intermediate_size": int(rng.integers(5, 30)),
                 "first_k_dense_replace": 1, "router_aux_loss_coef": 0.0}
    vision = _vision(rng, text) | {"adapter_hidden_size": int(rng.integers(9, 40)),
                                   "temporal_patch_size": 1}
    return {"model_type": "seed1_5_vl", "text_config": text, "vision_config": vision, **IDS,
            "tie_word_embeddings": bool(rng.random() < 0.4)}


def scale_of(name, shape):
    """(mean, deviation) of random weights that leave nothing at its trivial value."""
    if len(shape) > 1:
        return 0.0, 0.6 / shape[-1] ** 0.5
    norm = "norm" in name or ".ln_" in name
    return (1.0 if norm and "weight" in name else 0.0), 0.2


def fill(model, rng):
    """The model with such weights."""
    state = {}
    for name, array in model.parameters.items():
        mean, deviation = scale_of(name, array.shape)
        state[name] = mean + deviation * rng.standard_normal(array.shape)
    model.load_state_dict(state)
    return model


def draw_model(seed, config, **options):
    return fill(orchvlm.Model(config, **options), np.random.default_rng(seed))


def grads_of(model):
    """Copies of all gradients."""
    return {name: np.array(g, np.float64) for name, g in model.grads.items()}


def slope_along(model, name, gradient, loss, rng):
    """(slope of loss() along a random direction in a parameter, what its gradient says)"""
    weight, start = model.parameters[name], np.array(model.parameters[name])
    direction = rng.standard_normal(start.shape)
    direction /= np.linalg.norm(direction)

    def at(h):
        weight[...] = start + h * direction
        return loss()
    wanted = float((gradient * direction).sum())
    slope = slope_near(at, wanted)
    weight[...] = start
    return slope, wanted


def slope_near(function, wanted):
    """The slope of a function at 0, by the one of three steps that is nearest to what is wanted: a
    token may change its experts within a large one, and jumps."""
    slopes = [(function(h) - function(-h)) / (2 * h) for h in (1e-5, 1e-6, 1e-7)]
    return min(slopes, key=lambda slope: abs(slope - wanted))


# ---------------------------------------------------------------- batches

def draw_sample(rng, config, pictures, text_only):
    """(ids, grids) of one sample: text with images or videos of different grids."""
    vocab = config["text_config"]["vocab_size"]
    ids, grids = [], []

    def text(low, high):
        ids.extend(int(t) for t in rng.integers(FIRST_TEXT, vocab, rng.integers(low, high)))
    text(1, 6)
    for _ in range(0 if text_only else pictures):
        h, w = 2 * rng.integers(1, 4, 2)
        video = rng.random() < 0.3
        frames = int(rng.integers(1, 4)) if video else 1
        grids.append((VIDEO if video else IMAGE, frames, int(h), int(w)))
        for _ in range(frames):
            if video:
                text(1, 3)  # its timestamp
            ids.extend([START, *[VIDEO if video else IMAGE] * (h * w // 4), END])
        text(1, 5)
    return ids, grids


def positions(ids, grids):
    """M-RoPE positions by the rule of Qwen3-VL, written plainly."""
    frames = [g for kind, t, *g in grids for _ in range(t)]
    out, at, i = [], 0, 0
    while i < len(ids):
        if ids[i] in (IMAGE, VIDEO):
            h, w = frames.pop(0)
            out += [(at, at + r, at + c) for r in range(h // 2) for c in range(w // 2)]
            at += max(h, w) // 2
            i += h * w // 4
        else:
            out.append((at, at, at))
            at += 1
            i += 1
    return np.array(out, np.float32).T


def draw_samples(rng, config, samples=3, targets=True):
    """[(ids, grids, labels, [pixels of each grid])]"""
    vision, made = config["vision_config"], []
    patch = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    for ids, grids in [draw_sample(rng, config, int(rng.integers(1, 4)), rng.random() < 0.25)
                       for _ in range(samples)]:
        wanted = (rng.random(len(ids)) < 0.7) & (np.array(ids) >= FIRST_TEXT) & targets
        pixels = [rng.standard_normal((t * h * w, patch)).astype(np.float32)
                  for _, t, h, w in grids]
        made.append((ids, grids, np.where(wanted, ids, -100), pixels))
    return made


def pack(samples):
    """Inputs of what draw_samples gave."""
    pixels = [rows for *_, pixels in samples for rows in pixels]
    return orchvlm.Inputs(
        input_ids=np.concatenate([ids for ids, *_ in samples]),
        cu_seqlens=np.cumsum([0] + [len(ids) for ids, *_ in samples]),
        position_ids=np.concatenate([positions(ids, grids) for ids, grids, *_ in samples], axis=1),
        labels=np.concatenate([labels for _, _, labels, _ in samples]),
        pixels=np.concatenate(pixels) if pixels else None,
        grid_thw=[g for _, grids, *_ in samples for _, *g in grids] or None,
        grid_sample=[b for b, (_, grids, *_) in enumerate(samples) for _ in grids]
        if pixels else None)
