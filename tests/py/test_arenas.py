"""Memory and FLOPs that are foretold, against what a model then holds and what plain sums say."""
import os
import time

import numpy as np
import pytest

import orchvlm
from model_cases import draw_config, draw_seed_config
from omni_cases import draw_any, draw_omni_config, pack_any
from orchvlm.parts import plan_memory
from orchvlm.peak import gemm_peak

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
FAMILIES = {"dense": (draw_config, False), "softmax experts": (draw_config, True),
            "seed": (draw_seed_config, False), "sigmoid experts": (draw_seed_config, True),
            "omni": (draw_omni_config, True)}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def seed(request):
    """Printed by a failing test; ORCHVLM_TEST_SEED repeats it."""
    print(f"ORCHVLM_TEST_SEED={SEED}")


def draw(family, number, tokens=1000, **options):
    """(model, inputs of at least so many tokens)"""
    rng = np.random.default_rng([SEED, number])
    drawer, sparse = FAMILIES[family]
    config, samples = drawer(rng, sparse), []
    while sum(len(ids) for ids, *_ in samples) < tokens:
        samples += draw_any(rng, config, 10)
    return orchvlm.Model(config, threads=1, **options), pack_any(samples)


def step(model, inputs, **options):
    """What is held after a whole step."""
    model.forward(inputs, **options)
    if options.get("training", True):
        model.backward()
        orchvlm.AdamW(model, 1e-3).step()
    return model.memory()


def near(foretold, held, within=0.03):
    for arena, bytes_ in held.items():
        assert abs(foretold[arena] - bytes_) <= within * bytes_ + 4096, (arena, foretold, held)


# ---------------------------------------------------------------- memory

@families
@pytest.mark.parametrize("checkpoint", ("none", "selective", "full"))
def test_a_step_holds_what_was_foretold(family, checkpoint):
    model, inputs = draw(family, 1)
    foretold = model.memory(inputs, checkpoint=checkpoint)
    assert model.memory()["activations"] == 0  # nothing ran
    near(foretold, step(model, inputs, checkpoint=checkpoint))


@families
def test_so_do_frozen_parts_and_adapters(family):
    for number, change in enumerate((
            lambda m: m.freeze("model.visual.*"), lambda m: m.freeze("model.language_model.*"),
            lambda m: m.freeze("model.visual.blocks.*", "model.visual.patch_embed.*",
                               "model.language_model.*"), lambda m: m.add_lora(r=3))):
        model, inputs = draw(family, 2 + number)
        change(model)
        foretold = model.memory(inputs)
        near(foretold, step(model, inputs))


@families
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_so_do_dtypes_and_passes_without_backward(family, dtype):
    model, inputs = draw(family, 6, dtype=dtype)
    foretold = model.memory(inputs, training=False)
    near(foretold, step(model, inputs, training=False))
    foretold = model.memory(inputs)
    near(foretold, step(model, inputs))


@pytest.mark.parametrize("checkpoint", ("none", "full"))
@pytest.mark.parametrize("name", ("tiny", "tiny-moe"))
def test_a_plan_of_a_configuration(name, checkpoint):
    """Of packs of pictures and text, and by token alone: the head's second gradient is a constant,
    the workspace grows with the tokens."""
    config = orchvlm.preset(name)
    plan = plan_memory(config, tokens=1500, checkpoint=checkpoint, image=(112, 140),
                       text_tokens=30)
    model = orchvlm.Model(config, threads=1)
    ids = ([262] * 20 + [72] * 30) * 30
    grid = [[1, 8, 10]] * 30
    held = step(model, orchvlm.Inputs(
        input_ids=ids, cu_seqlens=np.arange(0, 1501, 50), labels=[-100 if i == 262 else i
                                                                  for i in ids],
        pixels=np.zeros((2400, 588), np.float32), grid_thw=grid), checkpoint=checkpoint)
    near({**plan, "training": plan["gradients"] + plan["optimizer"], "cache": 0}, held)


def test_keys_and_values_of_a_generation():
    model, inputs = draw("dense", 7, tokens=50)
    seen = []
    foretold = model.memory(inputs, training=False, max_new_tokens=5)
    model.generate(inputs, 5, callback=lambda *_: seen.append(model._core.memory()[4]))
    assert max(seen) == foretold["cache"] > 0


def test_what_is_refused():
    model, inputs = draw("dense", 8, tokens=10)
    for call in (model.memory, model.flops):
        with pytest.raises(TypeError, match="inputs"):
            call([1, 2])
    with pytest.raises(ValueError, match="checkpoint"):
        model.memory(inputs, checkpoint="some")
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.memory(inputs, max_new_tokens=-1)


# ---------------------------------------------------------------- FLOPs

def forward_flops(model, inputs):
    """{(part, whether it has weights): FLOPs} of a forward of "tiny", in plain sums."""
    v, t = model.config.vision, model.config.text
    d, f, c = v["hidden_size"], v["intermediate_size"], t["hidden_size"]
    square = sum(n * (r * k) ** 2 for n, r, k in inputs.grid_thw.tolist())
    patches, tokens = inputs.pixels.shape[0], inputs.n_tokens
    q, kv = (t[key] * t["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    pairs = sum(n * (n + 1) // 2 for n in inputs.lengths.tolist())
    L, D = t["num_hidden_layers"], v["depth"]
    adapter = v["adapter_hidden_size"]
    return {("patches", True): 2 * patches * 588 * d,
            ("tower", True): 2 * patches * D * (4 * d * d + 2 * d * f),
            ("tower", False): 2 * 2 * square * d * D,
            ("adapter", True): 2 * patches / 4 * (d * adapter + adapter * c),
            ("decoder", True): 2 * tokens * L * (
                c * (2 * q + 2 * kv) + 3 * c * t["intermediate_size"]),
            ("decoder", False): 2 * 2 * pairs * q * L,
            ("head", True): 2 * inputs.n_target_tokens * c * t["vocab_size"]}


TOWER = ("model.visual.patch_embed.*", "model.visual.blocks.*", "model.visual.ln.*")


@pytest.mark.parametrize("freeze, times", (
    ((), {}),
    (TOWER, {"patches": 1, "tower": 1}),
    (TOWER + ("model.visual.merger.*",), {"patches": 1, "tower": 1, "adapter": 1}),
    # A frozen decoder passes gradients on: twice, and three times where there are no weights.
    (TOWER + ("model.language_model.*",), {"patches": 1, "tower": 1, "decoder": (2, 3),
                                           "head": 2}),
    (("*",), dict.fromkeys(("patches", "tower", "adapter", "decoder", "head"), 1))))
def test_frozen_parts_are_counted_for_what_they_do(freeze, times):
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    ids = [262] * 20 + [72] * 30
    inputs = orchvlm.Inputs(input_ids=ids, labels=[-100 if i == 262 else i for i in ids],
                            pixels=np.zeros((80, 588), np.float32), grid_thw=[[1, 8, 10]])
    whole = forward_flops(model, inputs)
    assert model.flops(inputs, training=False) == pytest.approx(sum(whole.values()))
    assert orchvlm.model_flops(model.config, inputs) == pytest.approx(3 * sum(whole.values()))
    if freeze:
        model.freeze(*freeze)
    wanted = 0
    for (part, weights), flops in whole.items():
        factor = times.get(part, 3)
        wanted += flops * (factor if isinstance(factor, int) else factor[0 if weights else 1])
    assert model.flops(inputs) == pytest.approx(wanted)


def test_the_peak_of_a_device_is_measured_once():
    first = gemm_peak("cpu", "float32", 1)
    assert 1e8 < first < 1e13 and gemm_peak("cpu", "float32", 1) == first
    assert gemm_peak("ref", "float64", 1) < first  # plain loops


def test_adapters_are_counted():
    """The base of an adapted product passes gradients on only where something below wants them."""
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    inputs = orchvlm.Inputs(input_ids=[72] * 50, labels=[72] * 50)
    forward = model.flops(inputs, training=False)
    t = model.config.text
    head = 2 * 49 * t["hidden_size"] * t["vocab_size"]
    each = (forward - head) / t["num_hidden_layers"]
    core = 2 * 2 * 50 * 51 / 2 * t["num_attention_heads"] * t["head_dim"]
    model.add_lora(r=4, match=["model.language_model.layers.2.self_attn.q_proj"])
    own = 2 * 50 * 4 * (t["hidden_size"] + t["num_attention_heads"] * t["head_dim"])
    above = t["num_hidden_layers"] - 2  # the layer itself and those above it
    wanted = 2 * each + above * (2 * (each - core) + 3 * core) + 2 * head + 3 * own
    assert model.flops(inputs) == pytest.approx(wanted)
