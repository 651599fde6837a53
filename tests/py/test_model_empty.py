"""Calls with nothing to do, as ranks run them that got no token, image or sound; and units."""
import os
import time

import numpy as np
import pytest

import orchvlm
from test_model import FAMILIES, draw, grads_of, pack, same, step

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
families = pytest.mark.parametrize("family", FAMILIES)
devices = pytest.mark.parametrize("device", ("cpu", "async"))


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def nothing(model, segments):
    """Inputs without a token, but with arrays of no images and, for a model that hears, sounds."""
    vision = model.config.vision
    patch = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    heard = {"mel": np.zeros((0, model.config.audio["num_mel_bins"])), "mel_lengths": []} \
        if model.config.audible else {}
    return orchvlm.Inputs(input_ids=[], cu_seqlens=[0] * (segments + 1),
                          pixels=np.zeros((0, patch), np.float32),
                          grid_thw=np.zeros((0, 3), np.int32), **heard)


@families
@devices
@pytest.mark.parametrize("checkpoint", ("none", "selective", "full"))
def test_nothing_adds_nothing(family, device, checkpoint):
    """A part without anything changes no bit of a global batch's loss and gradients."""
    model, samples, _ = draw(family, 40, device=device)
    whole, empty = pack(samples), nothing(model, 2)
    counts = (np.arange(model.config.text["num_experts"]), 9) if model.config.sparse else None
    out, wanted = step(model, whole, router_counts=counts, checkpoint=checkpoint)
    none = model.forward(empty, normalizer=out.weight_sum, router_counts=counts,
                         checkpoint=checkpoint, vision_taps=[0])
    model.backward()
    assert (none.loss, none.aux_loss, none.weight_sum, none.n_target_tokens) == (0, 0, 0, 0)
    assert none.vision_states[0].shape == (0, model.config.vision["hidden_size"])
    assert none.router_counts is None or not none.router_counts.any()
    same(grads_of(model), wanted)
    assert model.logits([]).shape == (0, model.config.text["vocab_size"])
    logp, entropy = model.logprobs(empty, entropy=True)
    model.backward(dlogprobs=logp, dentropy=entropy)
    same(grads_of(model), wanted)


@families
@devices
def test_phases_of_nothing(family, device):
    model, samples, _ = draw(family, 41, device=device)
    width = model.config.text["hidden_size"]
    layers = len(model.config.vision.get("deepstack_visual_indexes") or ())
    _, wanted = step(model, pack(samples))
    empty = nothing(model, 0)
    features, extra = model.encode("vision", empty)
    assert features.shape == (0, width)
    assert extra is None if layers == 0 else extra.shape == (layers, 0, width)
    sounds = model.encode("audio", empty)[0] if model.config.audible else None
    hidden = model.decode(empty, features, extra, sounds)
    assert hidden.shape == (0, width)
    dfeatures, dextra, *dsounds = model.backward(dhidden=hidden)
    model.encode_backward(dfeatures, dextra)
    if model.config.audible:
        assert sounds.shape == dsounds[0].shape == (0, width)
        model.encode_backward(dsounds[0], modality="audio")
        model.encode("audio", empty)
        model.encode_backward(modality="audio")
    model.encode("vision", empty)
    model.encode_backward()
    same(grads_of(model), wanted)


@families
def test_slopes_that_are_left_out_are_zero(family):
    """The encoder's backward of no slope, over work that is there, adds nothing either."""
    model, samples, _ = draw(family, 42)
    inputs = pack(samples)
    for modality, sizes in (("vision", inputs.grid_thw), ("audio", inputs.mel_lengths)):
        if sizes is not None:
            model.encode(modality, inputs)
            model.encode_backward(modality=modality)
            assert not any(g.any() for g in grads_of(model).values())


@families
def test_units_hold_each_parameter_once(family):
    model, _, _ = draw(family, 43)
    modules = list(model.units)
    assert sorted(sum(model.units.values(), [])) == sorted(model.parameters)
    blocks = [f"model.visual.blocks.{i}" for i in range(model.config.vision["depth"])]
    text = [f"model.language_model.layers.{i}"
            for i in range(model.config.text["num_hidden_layers"])]
    assert set(blocks + text) < set(modules)
    for name, members in model.units.items():
        if name in blocks:
            assert all(member.startswith(name + ".") for member in members)
        assert name.endswith("experts") == any("mlp.experts." in member for member in members)
    tied = "lm_head.weight" not in model.parameters
    assert ("lm_head" in modules) == (not tied)
    model.add_lora(r=2, alpha=2, match=["*layers.0.self_attn.o_proj",
                                        "*layers.0.self_attn.out_proj"]
                   if model.config.audible else ["*layers.0.self_attn.o_proj"])
    assert sorted(sum(model.units.values(), [])) == sorted(model.parameters)
    assert "model.language_model.layers.0.self_attn.o_proj.lora_A.weight" in model.units[text[0]]
