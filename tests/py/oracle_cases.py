"""The models of model_cases.py as `transformers` classes, in float32 with eager attention and eager
experts, and what those give and take in this library's names and layouts."""
import numpy as np

import orchvlm
from model_cases import IMAGE, VIDEO, draw_samples, pack, scale_of
from omni_cases import AUDIO, draw_omni_samples, pack_omni
from orchvlm.thinker import file_name


def make(config):
    """The `transformers` model with eager attention and eager experts, in training mode."""
    import transformers as hub
    sparse = config["model_type"] != "qwen3_vl"
    kind, made = {
        "qwen3_vl": (hub.Qwen3VLConfig, hub.Qwen3VLForConditionalGeneration),
        "qwen3_vl_moe": (hub.Qwen3VLMoeConfig, hub.Qwen3VLMoeForConditionalGeneration),
        "qwen3_omni_moe_thinker": (hub.Qwen3OmniMoeThinkerConfig,
                                   hub.Qwen3OmniMoeThinkerForConditionalGeneration),
    }[config["model_type"]]
    values = {k: v for k, v in config.items() if k != "model_type"}
    hf = kind(**values, attn_implementation="eager")
    hf._experts_implementation = "eager"
    if sparse:
        hf.text_config._experts_implementation = "eager"
    return made(hf).float().train()


def build(config, rng):
    """The same with random weights that leave nothing at its trivial value."""
    import torch
    model = make(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype("f4"))
            mean, deviation = scale_of(name, parameter.shape)
            parameter.copy_(mean + deviation * noise)
    return model


def to_ours(name, array):
    """A tensor of `transformers` in the hub's layout: experts lie [E, in, out] there."""
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return np.ascontiguousarray(array.transpose(0, 2, 1))
    return array


def our_names(model):
    """{name in `transformers`: ours}; they differ for Qwen3-Omni's thinker."""
    names = [name for name, _ in model.named_parameters()]
    if model.config.model_type != "qwen3_omni_moe_thinker":
        return dict(zip(names, names))
    ours = orchvlm.ModelConfig(model.config.to_dict()).parameters()
    return {file_name(name): name for name in ours}


def state_of(model):
    """{our name: array} of a `transformers` model."""
    names = our_names(model)
    return {names[name]: to_ours(name, p.detach().numpy())
            for name, p in model.named_parameters()}


def grads_of(model):
    """{our name: gradient}; parameters that got none are zero."""
    names = our_names(model)
    return {names[name]: to_ours(name, np.zeros(tuple(p.shape), "f4") if p.grad is None
                                 else p.grad.numpy()) for name, p in model.named_parameters()}


def drawn_with_targets(draw, targets=True):
    """Samples of which one has a target; the mean over none is no number in torch."""
    while True:
        drawn = draw()
        if not targets or any((labels[1:] >= 0).any() for *_, labels, _ in drawn):
            return drawn


def draw_batch(rng, config, samples=3, targets=True):
    """(Inputs, keyword arguments of the `transformers` forward, rows that are no padding)."""
    import torch
    drawn = drawn_with_targets(lambda: draw_samples(rng, config, samples, targets), targets)
    padded = np.zeros((samples, max(len(ids) for ids, *_ in drawn)), np.int64)
    labels, mask = np.full_like(padded, -100), np.zeros_like(padded)
    pixels, grid = {IMAGE: [], VIDEO: []}, {IMAGE: [], VIDEO: []}
    for b, (ids, grids, wanted, rows) in enumerate(drawn):
        padded[b, :len(ids)], mask[b, :len(ids)], labels[b, :len(ids)] = ids, 1, wanted
        for (kind, *g), one in zip(grids, rows):
            pixels[kind].append(one)
            grid[kind].append(g)
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
    return pack(drawn), theirs, mask.astype(bool)


def draw_omni_batch(rng, config, samples=3, sounds=(1, 330)):
    """The same for Qwen3-Omni's thinker."""
    import torch
    drawn = drawn_with_targets(lambda: draw_omni_samples(rng, config, samples, sounds))
    padded = np.zeros((samples, max(len(ids) for ids, *_ in drawn)), np.int64)
    labels, mask = np.full_like(padded, -100), np.zeros_like(padded)
    rows, sizes, steps = ({kind: [] for kind in (AUDIO, IMAGE, VIDEO)} for _ in range(3))
    for b, (ids, media, _, wanted, some) in enumerate(drawn):
        padded[b, :len(ids)], mask[b, :len(ids)], labels[b, :len(ids)] = ids, 1, wanted
        for (kind, size, step), one in zip(media, some):
            rows[kind].append(torch.from_numpy(one))
            sizes[kind].append(size)
            steps[kind].append(step)
    frames = torch.nn.utils.rnn.pad_sequence(rows[AUDIO], batch_first=True)
    heard = torch.arange(frames.shape[1]) < torch.tensor(sizes[AUDIO])[:, None]
    theirs = {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask),
              "labels": torch.from_numpy(labels), "output_router_logits": True,
              "input_features": frames.transpose(1, 2), "feature_attention_mask": heard.long()}
    for kind, name, key in ((IMAGE, "pixel_values", "image_grid_thw"),
                            (VIDEO, "pixel_values_videos", "video_grid_thw")):
        if rows[kind]:
            theirs[name], theirs[key] = torch.cat(rows[kind]), torch.tensor(sizes[kind])
    if rows[VIDEO]:
        theirs["video_second_per_grid"] = torch.tensor(steps[VIDEO])
    return pack_omni(drawn), theirs, mask.astype(bool)


def hear_alone(model):
    """Makes the audio encoder of a `transformers` thinker take one sound after the other, so that
    none is padded to another's length."""
    import torch
    tower = model.audio_tower
    forward = tower.forward

    def one_by_one(input_features, feature_lens, **more):
        parts = [forward(part, n[None], **more) for part, n in
                 zip(input_features.split(feature_lens.tolist(), dim=1), feature_lens)]
        parts[0].last_hidden_state = torch.cat([part.last_hidden_state for part in parts])
        return parts[0]
    tower.forward = one_by_one


def compare_grads(ours, theirs):
    """||dg|| <= 1e-5 ||g|| + 1e-8 ||all g||, and the worst element <= 1e-4 of the largest."""
    total = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in theirs.values()))
    for name, wanted in theirs.items():
        error = ours[name].astype(np.float64) - wanted
        norm = np.linalg.norm(wanted)
        assert np.linalg.norm(error) <= 1e-5 * norm + 1e-8 * total, (
            name, np.linalg.norm(error), norm, total)
        assert np.abs(error).max() <= 1e-4 * np.abs(wanted).max() + 1e-8 * total, name
