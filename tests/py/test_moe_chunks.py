"""Experts in chunks: nothing changes but memory and the last bits of the experts' gradients."""
import os
import time

import numpy as np
import pytest

import orchvlm
from model_cases import FIRST_TEXT, draw_config, draw_model, draw_seed_config, grads_of
from omni_cases import draw_any, draw_omni_config, pack_any

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
FAMILIES = {"softmax experts": draw_config, "sigmoid experts": draw_seed_config,
            "omni": draw_omni_config}
CHECKPOINTS = ("none", "selective", "full")
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def seed(request):
    """Printed by a failing test; ORCHVLM_TEST_SEED repeats it."""
    print(f"ORCHVLM_TEST_SEED={SEED}")


def draw(family, number, samples=3, **options):
    """(model, inputs, generator)"""
    rng = np.random.default_rng([SEED, number])
    config = FAMILIES[family](rng, True)
    model = draw_model([SEED, number], config, **{"threads": 1, **options})
    return model, pack_any(draw_any(rng, config, samples)), rng


def rows_of(model, inputs):
    return inputs.n_tokens * model.config.text["num_experts_per_tok"]


def step(model, inputs, **options):
    """(loss, log-probabilities, gradients)"""
    model.zero_grad()
    loss = model.forward(inputs, **options).loss
    model.backward()
    grads = grads_of(model)
    return loss, model.logprobs(inputs, training=False)[0], grads


def compare(got, wanted, tolerance):
    """All the same to the last bit, but the experts' weights' gradients within the tolerance."""
    assert got[0] == wanted[0]
    np.testing.assert_array_equal(got[1], wanted[1])
    for name, one in wanted[2].items():
        if ".experts." in name:
            assert np.linalg.norm(got[2][name] - one) <= tolerance * np.linalg.norm(one), name
        else:
            np.testing.assert_array_equal(got[2][name], one, err_msg=name)


@families
@pytest.mark.parametrize("device, dtype, tolerance", (
    ("cpu", "float32", 1e-5), ("cpu", "bfloat16", 1e-5), ("async", "float32", 1e-5),
    ("ref", "float64", 1e-13)))
def test_a_bound_changes_nothing(family, device, dtype, tolerance):
    model, inputs, rng = draw(family, 0, 1 if device == "ref" else 2, device=device, dtype=dtype)
    rows = rows_of(model, inputs)
    for checkpoint in CHECKPOINTS:
        model.moe_chunk_rows = None
        whole = step(model, inputs, checkpoint=checkpoint)
        for bound in (int(rng.integers(1, rows, endpoint=True)), int(rng.integers(1, 20)), rows):
            model.moe_chunk_rows = bound
            compare(step(model, inputs, checkpoint=checkpoint), whole, tolerance)


def test_one_row_at_a_time():
    model, inputs, _ = draw("sigmoid experts", 2, 1)
    whole = step(model, inputs)
    model.moe_chunk_rows = 1
    compare(step(model, inputs), whole, 1e-5)


@families
def test_frozen_experts_and_generation(family):
    model, inputs, _ = draw(family, 3, 1)
    model.freeze("*.experts.*")
    whole = step(model, inputs), model.generate(inputs, 4)
    model.moe_chunk_rows = 3
    compare(step(model, inputs), whole[0], 0)
    for got, wanted in zip(model.generate(inputs, 4), whole[1]):
        np.testing.assert_array_equal(got, wanted)


@families
def test_a_backward_goes_as_its_forward_went(family):
    model, inputs, _ = draw(family, 4)
    whole = step(model, inputs)[2]
    model.zero_grad()
    model.moe_chunk_rows = 5
    model.forward(inputs)
    model.moe_chunk_rows = None
    model.backward()
    for name, one in grads_of(model).items():
        assert np.linalg.norm(one - whole[name]) <= 1e-5 * np.linalg.norm(whole[name]), name


@families
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_memory_falls_as_foretold(family, checkpoint, dtype):
    rng = np.random.default_rng([SEED, 5])
    config = FAMILIES[family](rng, True)
    config["text_config"]["moe_intermediate_size"] = 200  # so that they need the most
    model = orchvlm.Model(config, threads=1, dtype=dtype)
    ids = rng.integers(FIRST_TEXT, model.config.text["vocab_size"], 600)
    inputs = orchvlm.Inputs(input_ids=ids, labels=ids)
    whole = model.memory(inputs, checkpoint=checkpoint)
    model.moe_chunk_rows = int(rng.integers(16, 100))
    foretold = model.memory(inputs, checkpoint=checkpoint)
    model.forward(inputs, checkpoint=checkpoint)
    held = model.memory()
    model.backward()
    assert model.memory()["workspace"] == held["workspace"]
    assert held["activations"] + held["workspace"] < whole["activations"] + whole["workspace"]
    for arena in ("activations", "workspace"):
        assert abs(foretold[arena] - held[arena]) <= 0.03 * held[arena] + 4096, arena


def test_what_is_refused():
    model = orchvlm.Model(orchvlm.preset("tiny-moe"), threads=1)
    for bad in (0, -3, 2.5, "8"):
        with pytest.raises(ValueError, match="moe_chunk_rows"):
            model.moe_chunk_rows = bad
    assert model.moe_chunk_rows is None
