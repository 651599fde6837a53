"""Generation and the optimizer: caches, samplers, steps that are skipped, runs that go on."""
import os
import time

import numpy as np
import pytest

import orchvlm
from model_cases import IMAGE, VIDEO, draw_config, draw_model, draw_seed_config, grads_of
from omni_cases import AUDIO, draw_omni_config
from omni_cases import draw_any as draw_samples
from omni_cases import pack_any as pack

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
FAMILIES = {"dense": (draw_config, False), "softmax experts": (draw_config, True),
            "sigmoid experts": (draw_seed_config, True), "omni": (draw_omni_config, True)}
families = pytest.mark.parametrize("family", FAMILIES)
devices = pytest.mark.parametrize("device", ("cpu", "async"))


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def draw(family, number=0, samples=3, **options):
    rng = np.random.default_rng([SEED, number])
    drawer, sparse = FAMILIES[family]
    config = drawer(rng, sparse)
    model = draw_model([SEED, number], config, **{"threads": 1, **options})
    return model, draw_samples(rng, config, samples), rng


# ---------------------------------------------------------------- generation

def longer(sample, inputs, said):
    """The prompt with what was said, as inputs of one sample."""
    ids = [*sample[0], *said]
    first = inputs.position_ids.max() + 1
    more = np.tile(first + np.arange(len(said), dtype=np.float32), (3, 1))
    return orchvlm.Inputs(input_ids=ids, pixels=inputs.pixels, grid_thw=inputs.grid_thw,
                          mel=inputs.mel, mel_lengths=inputs.mel_lengths,
                          position_ids=np.concatenate([inputs.position_ids, more], axis=1))


@families
@devices
def test_the_cache_changes_nothing(family, device):
    """Greedy tokens with kept keys are those of computing everything again."""
    model, samples, _ = draw(family, device=device)
    for sample in samples:
        prompt = pack([sample])
        said = model.generate(prompt, 6, stop=[IMAGE, VIDEO, AUDIO])[0]  # they need more
        for n in range(len(said)):
            model.forward(longer(sample, prompt, said[:n]), training=False)
            logits = model.logits([len(sample[0]) + n - 1])[0]
            assert logits[said[n]] >= logits.max() - 1e-4, n


@families
@devices
def test_company_changes_nothing(family, device):
    model, samples, rng = draw(family, 1, samples=4, device=device)
    alone = [model.generate(pack([s]), 5)[0] for s in samples]
    assert model.generate(pack(samples), 5) == alone
    order = rng.permutation(4)
    assert model.generate(pack([samples[i] for i in order]), 5) == [alone[i] for i in order]


def test_stop_tokens_and_callbacks():
    model, samples, _ = draw("dense", 2, samples=3)
    said = model.generate(pack(samples), 8)
    stop = said[0][2]
    heard = []
    got = model.generate(pack(samples), 8, stop=[stop], callback=lambda *one: heard.append(one))
    for before, after in zip(said, got):
        ends = before.index(stop) if stop in before else 8
        assert after == before[:ends]
    assert sorted(heard, key=lambda one: one[0]) == [
        (b, token) for b, tokens in enumerate(got) for token in tokens]
    assert model.memory()["cache"] == 0

    def fail(sample, token):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        model.generate(pack(samples), 8, callback=fail)
    assert model.memory()["cache"] == 0 and model.generate(pack(samples), 8) == said


def test_a_model_that_generates_refuses_to_generate():
    """Also between two tokens, where another thread would find the core idle."""
    model, samples, _ = draw("dense", 2, samples=2)
    said, refused = model.generate(pack(samples), 4), []

    def again(sample, token):
        for what in (pack(samples), pack(samples[:1])):
            with pytest.raises(RuntimeError, match="generating already"):
                model.generate(what, 2)
            refused.append(sample)
        model.forward(pack(samples))  # what needs no cache may run
    assert model.generate(pack(samples), 4, callback=again) == said and len(refused) == 16
    assert model.generate(pack(samples), 4) == said


def test_sampling():
    model, samples, _ = draw("dense", 3, samples=2)
    prompt = pack(samples)

    def go(**options):
        return model.generate(prompt, 12, **options)
    assert go(temperature=1.0, seed=3) == go(temperature=1.0, seed=3)
    assert go(temperature=5.0, seed=3) != go(temperature=5.0, seed=4)
    assert go(temperature=1.0, top_k=1) == go() == go(temperature=1e-6) == go(
        temperature=2.0, top_p=1e-9)
    for options in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 2}, {"seed": -1},
                    {"temperature": np.nan}, {"stop": [-1]}):
        with pytest.raises(ValueError, match=next(iter(options))):
            go(**options)
    for n in (0, True, 1.5):
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(prompt, n)
    with pytest.raises(ValueError, match="empty"):
        model.generate(orchvlm.Inputs(input_ids=[]), 3)
    assert model.generate(orchvlm.Inputs(input_ids=[], cu_seqlens=[0]), 3) == []


def test_draws_have_the_model_s_distribution():
    from orchvlm.generation import sample
    rng = np.random.default_rng(SEED)
    logits = rng.standard_normal(6).astype(np.float32)
    counts = np.bincount([sample(logits, rng, 0.7) for _ in range(20000)], minlength=6)
    p = np.exp(logits / 0.7)
    p /= p.sum()
    assert (np.abs(counts - 20000 * p) < 6 * np.sqrt(20000 * p)).all()
    top = np.argsort(-p)
    kept = {sample(logits, rng, 0.7, top_p=float(p[top[:2]].sum() * 0.999)) for _ in range(500)}
    assert kept <= set(top[:2].tolist())


# ---------------------------------------------------------------- AdamW

def train(model, optimizer, batches, rate=None):
    losses = []
    for inputs in batches:
        model.zero_grad()
        losses.append(model.forward(inputs).loss)
        model.backward()
        optimizer.step(rate)
    return losses


@devices
def test_adamw_by_the_book(device):
    """Ten steps against algorithm 2 in plain NumPy, with clipping, groups and no decay of norms."""
    model, samples, rng = draw("dense", 4, device=device)
    inputs, kinds = pack(samples), {row[0]: row[1] for row in model._list}
    opt = orchvlm.AdamW(model, 1e-2, max_grad_norm=0.5, groups=[
        {"match": "model.visual.*", "lr": 1e-3}, {"match": "*.mlp.*", "weight_decay": 0.3}])
    w = {n: np.array(a, np.float64) for n, a in model.parameters.items()}
    m, v = ({n: np.zeros_like(a) for n, a in w.items()} for _ in range(2))
    for t in range(1, 11):
        model.zero_grad()
        model.forward(inputs)
        model.backward()
        grads = grads_of(model)
        norm = np.sqrt(sum((g ** 2).sum() for g in grads.values()))
        done = opt.step()
        assert abs(done["grad_norm"] - norm) <= 1e-5 * norm and not done["skipped"]
        clip = min(1.0, 0.5 / (norm + 1e-6))
        assert abs(done["clip"] - clip) <= 1e-5
        for name, g in grads.items():
            g = g * clip
            rate = 1e-3 if name.startswith("model.visual.") else 1e-2
            decay = 0.3 if ".mlp." in name else 0.1 if kinds[name] == 0 else 0.0
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            w[name] -= rate * (decay * w[name] + m[name] / (1 - 0.9 ** t) / (
                np.sqrt(v[name] / (1 - 0.95 ** t)) + 1e-8))
            error = np.abs(model.parameters[name] - w[name]).max()
            assert error <= 2e-6 * max(1, t), (name, t, error)


def test_groups_keep_their_rates():
    """Where nothing else is trained, and by the factor of the schedule where it is."""
    norm, other = "model.language_model.norm.weight", "model.language_model.embed_tokens.weight"
    for lr, rate, moved in ((0.0, None, 1e-2), (0.0, 0.0, 1e-2), (1e-3, None, 1e-2),
                            (1e-3, 5e-4, 5e-3), (1e-3, 0.0, 0.0)):
        model, samples, _ = draw("dense", 3)
        model.forward(pack(samples))
        model.backward()
        opt = orchvlm.AdamW(model, lr, weight_decay=0.0, groups=[{"match": norm, "lr": 1e-2}])
        before = {name: np.array(model.parameters[name]) for name in (norm, other)}
        opt.step(rate)
        # Of a first step, every weight with a gradient moves by its rate.
        far = {name: np.abs(model.parameters[name] - before[name]).max() for name in before}
        assert far[norm] == pytest.approx(moved, rel=1e-3, abs=1e-12), (lr, rate)
        assert far[other] == pytest.approx(lr if rate is None else rate, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_a_step_that_is_not_finite_is_skipped(bad):
    model, samples, _ = draw("softmax experts", 5)
    opt, inputs = orchvlm.AdamW(model, 1e-2), pack(samples)
    train(model, opt, [inputs])
    before, state = model.state_dict(), opt.state_dict()
    model.forward(inputs)
    model.backward()
    list(model.grads.values())[-1][...] = bad
    assert opt.step()["skipped"] and opt.step_count == 1
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    after = opt.state_dict()
    assert all(np.array_equal(after[key], state[key]) for key in state)
    model.zero_grad()
    train(model, opt, [inputs])
    assert opt.step_count == 2


@families
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_run_goes_on_bit_for_bit(family, dtype, tmp_path):
    model, samples, _ = draw(family, 6, dtype=dtype)
    batches = [pack([s]) for s in samples] * 2
    opt = orchvlm.AdamW(model, 1e-2)
    train(model, opt, batches[:3])
    model.save_pretrained(tmp_path)
    state = opt.state_dict()
    wanted = train(model, opt, batches[3:])
    again = orchvlm.Model.from_pretrained(tmp_path, dtype=dtype, threads=1)
    other = orchvlm.AdamW(again, 1e-2)
    other.load_state_dict(state)
    assert train(again, other, batches[3:]) == wanted
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, again.state_dict()[name])
    assert opt.step_count == other.step_count == 6


def test_written_weights_reach_the_master():
    """A bfloat16 model whose weights are set goes on from those, not from what it had."""
    model, samples, _ = draw("dense", 7, dtype="bfloat16")
    opt = orchvlm.AdamW(model, 1e-6, weight_decay=0.0)
    start = model.state_dict()
    train(model, opt, [pack(samples)])
    state = {name: array * 2 for name, array in start.items()}
    model.load_state_dict(state)
    train(model, opt, [pack(samples)])
    for name, array in model.state_dict().items():
        assert np.abs(array - state[name]).max() <= 1e-2 * np.abs(state[name]).max() + 1e-4, name


def test_small_steps_add_up_in_bfloat16():
    """Updates below half a bfloat16 unit are not lost: the master keeps them."""
    model, samples, _ = draw("dense", 8, dtype="bfloat16")
    opt = orchvlm.AdamW(model, 1e-4, weight_decay=0.0)
    name = "model.language_model.norm.weight"
    start = model.parameters[name]
    train(model, opt, [pack(samples)] * 60)
    assert (model.parameters[name] != start).any()


def test_bad_state_changes_nothing():
    model, samples, _ = draw("dense", 9)
    opt = orchvlm.AdamW(model, 1e-2)
    train(model, opt, [pack(samples)])
    state = opt.state_dict()
    key = next(k for k in state if k.endswith("exp_avg"))
    for bad in ({k: v for k, v in state.items() if k != key}, {**state, "x": np.zeros(1)},
                {**state, key: np.zeros(3)}, {**state, "step": -1}):
        with pytest.raises(ValueError, match="optimizer state"):
            opt.load_state_dict(bad)
    assert all(np.array_equal(opt.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_freezing_in_the_middle_changes_nothing_for_the_others(dtype):
    """Their gradients, moments and masters are what they were."""
    model, samples, _ = draw("dense", 21, dtype=dtype)
    opt = orchvlm.AdamW(model, lr=1e-3)
    for _ in range(2):
        model.zero_grad()
        model.forward(pack(samples))
        model.backward()
        opt.step()
    assert "lr=0.001" in repr(opt) and "2 steps taken" in repr(opt)
    before, grads = opt.state_dict(), {name: np.array(g) for name, g in model.grads.items()}
    for change in (lambda: model.freeze("model.visual.*"), lambda: model.unfreeze("*")):
        change()
        after = opt.state_dict()
        assert any(array.any() for key, array in after.items() if key.endswith("/exp_avg_sq"))
        for key, array in after.items():
            if key.startswith("model.visual."):
                assert not array.any() or key.endswith("/master")
            else:
                assert np.array_equal(array, before[key])
        for name in model.grads:
            if not name.startswith("model.visual."):
                assert np.array_equal(model.grads[name], grads[name])


def test_frozen_parts_hold_no_moments():
    model, samples, _ = draw("dense", 10)
    model.freeze("model.visual.*")
    opt = orchvlm.AdamW(model, 1e-2)
    before = model.state_dict()
    train(model, opt, [pack(samples)])
    assert not any(key.startswith("model.visual") for key in opt.state_dict())
    for name, array in model.state_dict().items():
        assert np.array_equal(array, before[name]) == name.startswith("model.visual"), name


def test_bad_settings_are_refused():
    model, *_ = draw("dense", 11)
    for options, words in (({"lr": -1}, "lr"), ({"lr": np.inf}, "lr"), ({"betas": (1, 0)}, "betas"),
                           ({"betas": (0.9,)}, "betas"), ({"eps": -1}, "eps"),
                           ({"weight_decay": np.nan}, "weight_decay"),
                           ({"max_grad_norm": -1}, "max_grad_norm"),
                           ({"groups": [{"lr": 1}]}, "match"),
                           ({"groups": [{"match": "nothing"}]}, "nothing"),
                           ({"groups": [{"match": "*", "rate": 1}]}, "group")):
        with pytest.raises(ValueError, match=words):
            orchvlm.AdamW(model, **{"lr": 1e-3, **options})
    with pytest.raises(TypeError, match="Model"):
        orchvlm.AdamW(None, 1e-3)


def test_schedules():
    for kind in ("constant", "linear", "cosine"):
        rate = orchvlm.schedule(kind, 2.0, 100, warmup=10, floor=0.5)
        values = [rate(s) for s in range(130)]
        np.testing.assert_allclose(values[:10], 0.2 * np.arange(1, 11))
        assert all(a >= b for a, b in zip(values[9:], values[10:]))
        assert values[-1] == (2.0 if kind == "constant" else 0.5)
    for bad in (("steep", 1, 10), ("linear", -1, 10), ("linear", 1, 0), ("linear", 1, 5, 6)):
        with pytest.raises(ValueError):
            orchvlm.schedule(*bad)
