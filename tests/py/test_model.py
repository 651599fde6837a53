"""Gradients of whole models, what must not change them, freezing, bad input, threads, Ctrl-C."""
import os
import re
import signal
import threading
import time

import numpy as np
import pytest

import orchvlm
from model_cases import (FIRST_TEXT, IMAGE, MANY, draw_config, draw_model, draw_seed_config,
                         grads_of, slope_along)
from omni_cases import draw_any as draw_samples
from omni_cases import draw_omni_config
from omni_cases import pack_any as pack

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
DEVICES = ("cpu", "async")
FAMILIES = {"dense": (draw_config, False), "softmax experts": (draw_config, True),
            "seed": (draw_seed_config, False), "sigmoid experts": (draw_seed_config, True),
            "omni": (draw_omni_config, True)}
families = pytest.mark.parametrize("family", FAMILIES)
devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def seed(request):
    """Printed by a failing test; ORCHVLM_TEST_SEED repeats it."""
    print(f"ORCHVLM_TEST_SEED={SEED}")


def draw(family, number=0, samples=3, **options):
    """(model, samples, generator)"""
    rng = np.random.default_rng([SEED, number])
    drawer, sparse = FAMILIES[family]
    config = drawer(rng, sparse)
    model = draw_model([SEED, number], config, **{"threads": 1, **options})
    return model, draw_samples(rng, config, samples), rng


def step(model, inputs, **options):
    """(output, gradients)"""
    model.zero_grad()
    out = model.forward(inputs, **options)
    model.backward()
    return out, grads_of(model)


def assert_close(got, wanted, tolerance):
    total = np.sqrt(sum(float((g ** 2).sum()) for g in wanted.values()))
    for name, one in wanted.items():
        error = np.linalg.norm(got[name] - one)
        assert error <= tolerance * (np.linalg.norm(one) + 1e-3 * total), (name, error)


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


# ---------------------------------------------------------------- gradients

@families
def test_gradients_are_the_slopes_of_the_loss(family):
    """In double precision, along a random direction in each parameter."""
    model, samples, rng = draw(family, device="ref", dtype="float64", samples=1)
    inputs = pack(samples)
    out, grads = step(model, inputs)
    total = np.sqrt(sum(float((g ** 2).sum()) for g in grads.values()))
    for name, gradient in grads.items():
        slope, wanted = slope_along(model, name, gradient,
                                    lambda: model.forward(inputs, training=False).loss, rng)
        assert abs(slope - wanted) <= 1e-6 * np.linalg.norm(gradient) + 1e-7 * total, (
            name, slope, wanted)


@families
@devices
def test_the_fast_backend_follows_the_reference(family, device):
    exact, samples, _ = draw(family, 1, device="ref", dtype="float64")
    fast, _, _ = draw(family, 1, device=device)
    wanted, slopes = step(exact, pack(samples))
    got, ours = step(fast, pack(samples))
    assert abs(got.loss - wanted.loss) <= 1e-5 * max(1, wanted.loss)
    assert_close(ours, slopes, 2e-4)


@families
@devices
def test_checkpoint_modes_give_the_same_bits(family, device):
    model, samples, _ = draw(family, 2, device=device)
    inputs = pack(samples)
    out, grads = step(model, inputs)
    kept = model.memory()["activations"]
    for mode in ("selective", "full"):
        other, again = step(model, inputs, checkpoint=mode)
        assert other.loss == out.loss
        same(again, grads)
    lean, _, _ = draw(family, 2, device=device)
    lean.forward(inputs, checkpoint="full")
    assert lean.memory()["activations"] < kept


@families
def test_parts_add_up_to_the_whole(family):
    """However a batch is cut: one normalizer and one router count make the gradients add up."""
    model, samples, rng = draw(family, 3, samples=6)
    whole = pack(samples)
    out, wanted = step(model, whole)
    given = None
    if model.config.sparse:
        layers = sum(name.endswith("mlp.gate.weight") for name in model.parameters)
        given = (out.router_counts, layers * whole.n_tokens)
        assert out.router_counts.sum() == given[1] * model.config.text["num_experts_per_tok"]
    model.zero_grad()
    order, loss, targets = rng.permutation(6), 0.0, 0
    cuts = np.sort(rng.choice(np.arange(1, 6), int(rng.integers(1, 5)), replace=False))
    for part in np.split(order, cuts):
        one = model.forward(pack([samples[i] for i in part]), normalizer=out.weight_sum,
                            router_counts=given)
        model.backward()
        loss, targets = loss + one.loss, targets + one.n_target_tokens
    assert targets == out.n_target_tokens and abs(loss - out.loss) <= 1e-6 * max(1, out.loss)
    assert_close(grads_of(model), wanted, 2e-6)


def test_weights_scale_their_tokens():
    model, samples, rng = draw("dense", 4)
    inputs = pack(samples)
    weights = rng.random(inputs.n_tokens).astype(np.float32)
    weighted = orchvlm.Inputs(**{**vars(inputs), "weights": weights})
    logp, _ = model.logprobs(inputs, training=False)
    out = model.forward(weighted, training=False)
    counted = logp != 0
    assert abs(out.weight_sum - weights[counted].sum(dtype=float)) <= 1e-4
    wanted = -float((weights[counted] * logp[counted].astype(float)).sum()) / out.weight_sum
    assert abs(out.loss - wanted) <= 1e-6 * max(1, wanted)


@families
@devices
def test_tokens_do_not_see_other_samples(family, device):
    """Log-probabilities are the same bits in any batch, order and company."""
    model, samples, rng = draw(family, 5, samples=5, device=device)
    inputs = pack(samples)
    logp, entropy = model.logprobs(inputs, entropy=True, training=False)
    parts = np.split(logp, inputs.cu_seqlens[1:-1])
    for _ in range(3):
        order = rng.permutation(5)[:int(rng.integers(1, 5))]
        got, _ = model.logprobs(pack([samples[i] for i in order]), training=False)
        np.testing.assert_array_equal(got, np.concatenate([parts[i] for i in order]))
    assert (entropy >= 0).all() and (entropy <= np.log(model.config.text["vocab_size"])).all()


def test_what_has_no_label_has_no_entropy():
    """And what has one has that of the row of logits before it."""
    model, samples, _ = draw("softmax experts", 6)
    inputs = pack(samples)
    logp, entropy = model.logprobs(inputs, entropy=True, training=False)
    labelled = inputs.labels >= 0
    labelled[inputs.cu_seqlens[:-1]] = False
    assert not entropy[~labelled].any() and not logp[~labelled].any()
    rows = model.logits(np.flatnonzero(labelled) - 1).astype(np.float64)
    p = np.exp(rows - rows.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(entropy[labelled], -(p * np.log(p)).sum(axis=1), rtol=1e-4)


def test_slopes_of_a_loss_of_ones_own():
    """-sum(logp) / n is the loss itself."""
    model, samples, _ = draw("seed", 6)
    inputs = pack(samples)
    out, wanted = step(model, inputs)
    model.zero_grad()
    logp, entropy = model.logprobs(inputs, entropy=True)
    model.backward(dlogprobs=(logp != 0) * np.float32(-1 / out.n_target_tokens))
    assert_close(grads_of(model), wanted, 1e-6)
    model.logprobs(inputs, entropy=True)
    model.zero_grad()
    model.backward(dlogprobs=np.zeros_like(logp), dentropy=np.ones_like(logp))
    assert any(g.any() for g in model.grads.values())


def test_the_entropy_has_its_slope():
    model, samples, rng = draw("dense", 7, device="ref", dtype="float64", samples=1)
    inputs = pack(samples)
    name = "model.language_model.norm.weight"
    _, entropy = model.logprobs(inputs, entropy=True)
    model.backward(dlogprobs=np.zeros_like(entropy), dentropy=np.ones_like(entropy))
    gradient, weight = np.array(model.grads[name]), model.parameters[name]
    direction, sums = rng.standard_normal(weight.shape), []
    for h in (1e-3, -2e-3):
        weight += h * direction
        sums.append(model.logprobs(inputs, entropy=True, training=False)[1].sum(dtype=float))
    slope = (sums[0] - sums[1]) / 2e-3
    assert abs(slope - gradient @ direction) <= 1e-3 * np.linalg.norm(gradient) * np.linalg.norm(
        direction)


# ---------------------------------------------------------------- what is trained

@families
def test_freezing(family):
    model, samples, _ = draw(family, 8)
    inputs = pack(samples)
    _, wanted = step(model, inputs)
    before = model.memory()["training"]
    model.freeze("model.visual.*")
    assert not any(name.startswith("model.visual") for name in model.grads)
    _, got = step(model, inputs)
    assert model.memory()["training"] < before
    same(got, {name: g for name, g in wanted.items() if not name.startswith("model.visual")})
    model.unfreeze("model.visual.*")
    same(step(model, inputs)[1], wanted)
    model.freeze("*")
    out = model.forward(inputs)
    model.backward()
    assert len(model.grads) == 0 and np.isfinite(out.loss)
    with pytest.raises(ValueError, match="no parameter"):
        model.freeze("model.nothing.*")


def test_only_the_adapter():
    """Stage 0 of Seed1.5-VL: gradients pass through a decoder that is frozen."""
    model, samples, _ = draw("seed", 9)
    _, wanted = step(model, pack(samples))
    names = [n for n in model.parameters if "visual.merger" in n]
    model.freeze("*")
    model.unfreeze("model.visual.merger.*")
    same(step(model, pack(samples))[1], {name: wanted[name] for name in names})


def test_what_one_product_holds_is_frozen_together():
    model, *_ = draw("dense", 10)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        with pytest.raises(ValueError, match="proj"):
            model.freeze(f"*layers.0.{name}.weight")
    assert all(model.trainable(name) for name in model.parameters)
    held = next(iter(model.grads.values()))
    with pytest.raises(RuntimeError, match="in use"):
        model.freeze("*.q_proj.*", "*.k_proj.*", "*.v_proj.*")
    del held
    model.freeze("*.q_proj.*", "*.k_proj.*", "*.v_proj.*")


def test_router_corrections_are_no_parameters_of_the_optimizer():
    model, samples, _ = draw("sigmoid experts", 11)
    name = next(n for n in model.parameters if "e_score_correction_bias" in n)
    assert name not in model.grads and not model.trainable(name)


# ---------------------------------------------------------------- numbers

@families
@devices
def test_bfloat16_is_near(family, device):
    exact, samples, _ = draw(family, 12, device=device)
    rough, _, _ = draw(family, 12, device=device, dtype="bfloat16")
    out, wanted = step(exact, pack(samples))
    got, ours = step(rough, pack(samples))
    assert abs(got.loss - out.loss) <= 0.1 * max(1, out.loss)
    if not exact.config.sparse:  # there rounding may choose another expert
        total = {n: np.concatenate([g.ravel() for g in some.values()])
                 for n, some in (("got", ours), ("wanted", wanted))}
        cosine = total["got"] @ total["wanted"] / (
            np.linalg.norm(total["got"]) * np.linalg.norm(total["wanted"]))
        assert cosine > 0.99


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_threads_change_no_bit(threads):
    for family in ("softmax experts", "seed"):
        model, samples, _ = draw(family, 13)
        other, _, _ = draw(family, 13, threads=threads)
        (one, a), (two, b) = step(model, pack(samples)), step(other, pack(samples))
        assert one.loss == two.loss
        same(a, b)


def test_a_seed_makes_a_model():
    config = draw_config(np.random.default_rng(SEED), True)
    make = orchvlm.Model.from_config
    one, two, three = make(config, 7), make(config, 7, threads=2), make(config, 8)
    same(one.state_dict(), two.state_dict())
    name = "model.language_model.embed_tokens.weight"
    assert (one.parameters[name] != three.parameters[name]).any()
    assert (one.parameters["model.language_model.norm.weight"] == 1).all()


# ---------------------------------------------------------------- corners

@devices
def test_batches_with_little_in_them(device):
    for family in FAMILIES:
        model, _, _ = draw(family, 14, device=device)
        t = FIRST_TEXT
        for ids, ends, labels, targets in (
                ([], [0], [], 0), ([], [0, 0, 0], [], 0), ([t], [0, 1], [t], 0),
                ([t, t], [0, 2], [-100, -100], 0), ([t, t], [0, 1, 2], [t, t], 0),
                ([t, t, t], [0, 0, 3, 3], [t, t, t], 2)):
            inputs = orchvlm.Inputs(input_ids=ids, cu_seqlens=ends, labels=labels)
            out, grads = step(model, inputs)
            assert out.n_target_tokens == targets and np.isfinite(out.loss)
            if targets == 0 and not (model.config.sparse and out.aux_loss):
                assert out.loss == 0 and not any(g.any() for g in grads.values())


def test_bad_input_is_refused():
    model, samples, _ = draw("softmax experts", 15)
    vocab = model.config.text["vocab_size"]
    make = orchvlm.Inputs
    text = make(input_ids=[7, 8], labels=[7, 8])
    rows = np.zeros((4, 3), np.float32)
    patch = np.zeros((1, model.parameters["model.visual.patch_embed.proj.weight"][0].size), "f4")
    for inputs, words in ((make(input_ids=[vocab]), "id"), (make(input_ids=[IMAGE]), "image"),
                          (make(input_ids=[7], labels=[vocab]), "label"),
                          (make(input_ids=[7, 8], labels=[7, vocab]), "label"),
                          (make(input_ids=[7], pixels=rows, grid_thw=[[1, 2, 2]]), "features"),
                          (make(input_ids=[IMAGE], pixels=rows, grid_thw=[[1, 2, 2]]), "pixels"),
                          (make(input_ids=[7], pixels=patch, grid_thw=[[1, 1, 1]]), "multiples"),
                          (make(input_ids=[7], mel=rows, mel_lengths=[4]), "audio")):
        with pytest.raises(ValueError, match=words):
            model.forward(inputs)
    for options, words in (({"normalizer": -1}, "normalizer"), ({"checkpoint": "some"}, "checkp"),
                           ({"normalizer": np.nan}, "normalizer"),
                           ({"router_counts": ([1], 1)}, "router_counts")):
        with pytest.raises(ValueError, match=words):
            model.forward(text, **options)
    with pytest.raises(TypeError, match="Inputs"):
        model.forward([7, 8])
    model.forward(text)
    model.backward()
    with pytest.raises(ValueError, match="once"):
        model.backward()
    model.forward(text)
    with pytest.raises(ValueError, match="dlogprobs"):
        model.backward(dlogprobs=np.zeros(3))
    with pytest.raises(ValueError, match="rows"):
        model.logits([2])
    with pytest.raises(ValueError, match="dentropy"):
        model.backward(dlogprobs=np.zeros(2), dentropy=np.zeros(2))
    for device in ("gpu", "cpu:1", "cuda:x"):
        with pytest.raises(ValueError, match="device"):
            orchvlm.Model(model.config, device=device)
    with pytest.raises(ValueError, match="threads"):
        orchvlm.Model(model.config, threads=0)
    with pytest.raises(ValueError, match="dtype"):
        orchvlm.Model(model.config, dtype="float16")


def test_a_model_that_no_machine_holds():
    config = orchvlm.preset("seed1.5-vl").values
    config["text_config"] |= {"num_experts": 2**16, "moe_intermediate_size": 2**24}
    with pytest.raises(ValueError, match="parameters"):
        orchvlm.ModelConfig(config).parameters()


@pytest.mark.parametrize("name, millions, off", (("tiny", 5, 1), ("tiny-moe", 5, 0.5),
                                                 ("small", 110, 5)))
def test_presets_are_of_their_promised_sizes(name, millions, off):
    assert abs(orchvlm.preset(name).n_parameters / 1e6 - millions) < off
    assert re.fullmatch(r"<ModelConfig \w+: [\d,]+\.\dM parameters>", repr(orchvlm.preset(name)))


@pytest.mark.parametrize("name, count", (("qwen", 31_070_754_032), ("vision", 538_631_408),
                                         ("seed", 532_046_080)))
def test_published_parameter_counts(name, count):
    qwen = {"model_type": "qwen3_vl_moe", "tie_word_embeddings": False, "text_config": {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "rope_theta": 5e6,
        "rope_scaling": {"mrope_section": [24, 20, 20], "mrope_interleaved": True}},
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304,
            "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "num_position_embeddings": 2304, "out_hidden_size": 2048,
            "deepstack_visual_indexes": [8, 16, 24]}}
    config = orchvlm.preset("seed1.5-vl") if name == "seed" else orchvlm.ModelConfig(qwen)
    shapes = config.parameters()
    if name != "qwen":
        part = {"vision": "model.visual.", "seed": "model.visual."}[name]
        shapes = {n: s for n, s in shapes.items() if n.startswith(part) and (
            name == "vision" or "merger" not in n)}  # the adapter is no part of the tower
    assert sum(int(np.prod(s, dtype=np.int64)) for s in shapes.values()) == count
    if name == "qwen":
        assert config.n_parameters == count


# ---------------------------------------------------------------- threads and signals

def large(T=MANY):
    """A model and a batch that take a moment."""
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    ids = np.arange(T) % 250
    return model, orchvlm.Inputs(input_ids=ids, labels=ids)


def test_a_second_thread_is_refused():
    model, inputs = large()
    started, refused = threading.Event(), []

    def attempt(call, *arguments, **options):
        try:
            call(*arguments, **options)
        except RuntimeError as error:
            refused.append(str(error))

    def run():
        started.set()
        attempt(model.forward, inputs, training=False)
    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    while thread.is_alive() and not refused:  # whichever of the two comes second
        attempt(model.zero_grad)
    thread.join()
    assert refused and "busy" in refused[0]
    assert np.isfinite(model.forward(inputs[0], training=False).loss)


@pytest.mark.skipif(not hasattr(signal, "raise_signal") or os.name != "posix",
                    reason="needs POSIX signals")
@pytest.mark.parametrize("what", ("forward", "backward", "generate"))
def test_control_c_leaves_the_model_usable(what):
    model, inputs = large()
    short = inputs[0] if what != "generate" else None
    before = model.state_dict()
    wanted = model.forward(orchvlm.Inputs(input_ids=[5, 6, 7], labels=[5, 6, 7])).loss
    model.zero_grad()
    if what == "backward":
        model.forward(short)
    call = {"forward": lambda: model.forward(inputs),
            "backward": model.backward,
            "generate": lambda: model.generate(inputs, 50)}[what]
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        call()
        time.sleep(5)  # a machine that was done before: the signal comes now
    print(f"stopped after {time.perf_counter() - start:.3f} s")
    timer.join()
    same(model.state_dict(), before)
    model.zero_grad()
    out, grads = step(model, orchvlm.Inputs(input_ids=[5, 6, 7], labels=[5, 6, 7]))
    assert out.loss == wanted and model.memory()["cache"] == 0
    fresh, _ = large(1)
    same(step(fresh, orchvlm.Inputs(input_ids=[5, 6, 7], labels=[5, 6, 7]))[1], grads)
