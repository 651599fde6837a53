"""Freshly drawn tiny models and batches, built twice: as `transformers` classes in float32 with
eager attention and eager experts, and as configurations and inputs of this library."""
import numpy as np

import orchvlm

IMAGE, VIDEO, START, END = 3, 4, 1, 2  # ids; text is from 6 on
FIRST_TEXT = 6


def draw_config(rng, sparse):
    """A Hugging Face configuration as a dict, odd on purpose."""
    vocab = int(rng.integers(40, 90))
    kv = int(rng.integers(1, 4))
    heads = kv * int(rng.integers(1, 4))
    head_dim = 2 * int(rng.integers(4, 13))
    half = head_dim // 2
    h, w = int(rng.integers(1, half // 3 + 1)), int(rng.integers(1, half // 3 + 1))
    text = {
        "vocab_size": vocab, "hidden_size": 4 * int(rng.integers(5, 14)),
        "intermediate_size": int(rng.integers(9, 60)),
        "num_hidden_layers": int(rng.integers(2, 5)), "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": head_dim, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "attention_bias": bool(not sparse and rng.random() < 0.3),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                            "mrope_section": [half - h - w, h, w], "mrope_interleaved": True}}
    if sparse:
        experts = int(rng.integers(2, 17))
        text |= {"num_experts": experts, "moe_intermediate_size": int(rng.integers(5, 30)),
                 "num_experts_per_tok": int(rng.integers(1, min(4, experts) + 1)),
                 "decoder_sparse_step": 1, "router_aux_loss_coef": 0.01,
                 "mlp_only_layers": [0] if rng.random() < 0.3 else []}
    vision_heads = int(rng.integers(1, 4))
    depth = int(rng.integers(2, 5))
    taps = min(depth, text["num_hidden_layers"], int(rng.integers(0, 3)))
    vision = {
        "depth": depth, "hidden_size": vision_heads * 4 * int(rng.integers(2, 6)),
        "hidden_act": "gelu_pytorch_tanh", "intermediate_size": int(rng.integers(9, 60)),
        "num_heads": vision_heads, "in_channels": 3, "patch_size": int(rng.integers(2, 5)),
        "spatial_merge_size": 2, "temporal_patch_size": int(rng.integers(1, 3)),
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": int(rng.integers(3, 9)) ** 2,
        "deepstack_visual_indexes": sorted(
            int(i) for i in rng.choice(depth, taps, replace=False))}
    return {"model_type": "qwen3_vl_moe" if sparse else "qwen3_vl", "text_config": text,
            "vision_config": vision, "image_token_id": IMAGE, "video_token_id": VIDEO,
            "vision_start_token_id": START, "vision_end_token_id": END,
            "tie_word_embeddings": bool(rng.random() < 0.4)}


def build(config, rng):
    """The `transformers` model with random weights that leave nothing at its trivial value."""
    import torch
    from transformers import (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig,
                              Qwen3VLMoeForConditionalGeneration)
    sparse = config["model_type"] == "qwen3_vl_moe"
    kind, made = ((Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration) if sparse
                  else (Qwen3VLConfig, Qwen3VLForConditionalGeneration))
    values = {k: v for k, v in config.items() if k != "model_type"}
    hf = kind(**values, attn_implementation="eager")
    hf._experts_implementation = "eager"
    if sparse:
        hf.text_config._experts_implementation = "eager"
    model = made(hf).float().train()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype("f4"))
            scale = 0.6 / max(1.0, parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(noise * scale + (1.0 if "norm" in name and "weight" in name and
                                             parameter.ndim == 1 else 0.0))
    return model


def to_ours(name, array):
    """A tensor of `transformers` in the hub's layout: experts lie [E, in, out] there."""
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return np.ascontiguousarray(array.transpose(0, 2, 1))
    return array


def state_of(model):
    """{hub name: array} of a `transformers` model."""
    return {name: to_ours(name, p.detach().numpy()) for name, p in model.named_parameters()}


def grads_of(model):
    """{hub name: gradient}; parameters that got none are zero."""
    return {name: to_ours(name, np.zeros(tuple(p.shape), "f4") if p.grad is None
                          else p.grad.numpy()) for name, p in model.named_parameters()}


def _sample(rng, config, pictures, text_only):
    """(ids, grids, kinds) of one sample: text with images or videos of different grids."""
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


def _positions(ids, grids):
    """M-RoPE positions by the rule of oracles B.3, written plainly."""
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


def draw_batch(rng, config, samples=3, targets=True):
    """(Inputs, keyword arguments of the `transformers` forward, rows that are no padding)."""
    import torch
    vision = config["vision_config"]
    drawn = [_sample(rng, config, int(rng.integers(1, 4)), rng.random() < 0.25)
             for _ in range(samples)]
    longest = max(len(ids) for ids, _ in drawn)
    patch = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    padded = np.zeros((samples, longest), np.int64)
    labels, mask = np.full_like(padded, -100), np.zeros_like(padded)
    pixels = {IMAGE: [], VIDEO: []}
    grid = {IMAGE: [], VIDEO: []}
    ours_pixels, ours_grid, flat_labels = [], [], []
    for b, (ids, grids) in enumerate(drawn):
        n = len(ids)
        padded[b, :n], mask[b, :n] = ids, 1
        wanted = (rng.random(n) < 0.7) & (np.array(ids) >= FIRST_TEXT) & targets
        labels[b, :n] = np.where(wanted, ids, -100)
        flat_labels.append(labels[b, :n])
        for kind, t, h, w in grids:
            rows = rng.standard_normal((t * h * w, patch)).astype(np.float32)
            pixels[kind].append(rows)
            grid[kind].append((t, h, w))
            ours_pixels.append(rows)
            ours_grid.append((t, h, w))
    kinds = np.select([padded == IMAGE, padded == VIDEO], [1, 2], 0)
    theirs = {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask),
              "labels": torch.from_numpy(labels), "mm_token_type_ids": torch.from_numpy(kinds)}
    for kind, name, key in ((IMAGE, "pixel_values", "image_grid_thw"),
                            (VIDEO, "pixel_values_videos", "video_grid_thw")):
        if grid[kind]:
            theirs[name] = torch.from_numpy(np.concatenate(pixels[kind]))
            theirs[key] = torch.tensor(grid[kind])
    if config["model_type"] == "qwen3_vl_moe":
        theirs["output_router_logits"] = True
    inputs = orchvlm.Inputs(
        input_ids=np.concatenate([ids for ids, _ in drawn]),
        cu_seqlens=np.cumsum([0] + [len(ids) for ids, _ in drawn]),
        position_ids=np.concatenate([_positions(*one) for one in drawn], axis=1),
        labels=np.concatenate(flat_labels),
        pixels=np.concatenate(ours_pixels) if ours_pixels else None,
        grid_thw=ours_grid or None)
    return inputs, theirs, mask.astype(bool)
