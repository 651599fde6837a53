"""The moving average of weights: its figures, the swap and back, and runs that go on."""
import os
import time

import numpy as np
import pytest

import orchvlm
from model_cases import draw_config, draw_model, draw_samples, draw_seed_config, pack
from orchvlm.averaging import has_average, take_average
from orchvlm.building import open_model
from orchvlm.checkpoint import CheckpointError
from test_training import CONFIG, Packs, losses, made, texts

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def draw(number=0, sparse=False, **options):
    rng = np.random.default_rng([SEED, number])
    config = draw_seed_config(rng, True) if sparse else draw_config(rng, False)
    model = draw_model([SEED, number], config, threads=1, **options)
    return model, pack(draw_samples(rng, config))


def trained(model, inputs, opt, ema, steps=4):
    """Takes steps; the float32 (or float64) weights after each."""
    seen = []
    for _ in range(steps):
        model.zero_grad()
        model.forward(inputs)
        model.backward()
        opt.step()
        ema.update()
        state = opt.state_dict()
        seen.append({n: state.get(f"{n}/master", w) for n, w in model.state_dict().items()})
    return seen


@pytest.mark.parametrize("device, dtype, tolerance", (
    ("cpu", "float32", 1e-6), ("async", "float32", 1e-6), ("cpu", "bfloat16", 1e-6),
    ("ref", "float64", 1e-14)))
def test_it_is_the_average(device, dtype, tolerance):
    model, inputs = draw(1, device=device, dtype=dtype)
    if not model.config.tied:
        model.freeze("model.language_model.embed_tokens.*")
    opt = orchvlm.AdamW(model, lr=1e-2)
    wanted = {n: w.astype(np.float64) for n, w in model.state_dict().items()}
    ema = orchvlm.EMA(model, decay=0.75)
    assert "decay 0.75" in repr(ema)
    for weights in trained(model, inputs, opt, ema):
        for name, values in weights.items():
            wanted[name] = 0.75 * wanted[name] + 0.25 * values
    state = ema.state_dict()
    assert set(state) == {f"{n}/average" for n in model.parameters if model.trainable(n)}
    for key, got in state.items():
        exact = wanted[key.removesuffix("/average")]
        assert np.abs(got - exact).max() <= tolerance * np.abs(exact).max(), key
    assert all(g.dtype == (np.float64 if dtype == "float64" else np.float32)
               for g in state.values())


@pytest.mark.parametrize("device, dtype", (("cpu", "float32"), ("async", "float32"),
                                           ("cpu", "bfloat16")))
def test_swapped_and_back(device, dtype):
    model, inputs = draw(2, sparse=True, device=device, dtype=dtype)
    opt, ema = orchvlm.AdamW(model, lr=1e-2), orchvlm.EMA(model, decay=0.5)
    trained(model, inputs, opt, ema, 2)
    before, average = model.state_dict(), ema.state_dict()
    own = model.forward(inputs, training=False).loss
    with pytest.raises(ZeroDivisionError):  # an error within brings the weights back too
        with ema.swap() as same:
            assert same is model
            inside = model.forward(inputs, training=False).loss
            for key, values in average.items():
                got = np.array(model.parameters[key.removesuffix("/average")])
                np.testing.assert_allclose(got, values, rtol=2**-8 if dtype == "bfloat16" else 0)
            for call in (ema.update, opt.step, ema.swap().__enter__):
                with pytest.raises(ValueError, match="average"):
                    call()
            raise ZeroDivisionError
    for name, values in before.items():
        np.testing.assert_array_equal(model.parameters[name], values)
    assert model.forward(inputs, training=False).loss == own != inside
    opt.step()


def test_another_model_with_the_average(tmp_path):
    """What is saved within the block is a model of its own."""
    model, inputs = draw(3)
    opt, ema = orchvlm.AdamW(model, lr=1e-2), orchvlm.EMA(model, decay=0.5)
    trained(model, inputs, opt, ema, 2)
    with ema.swap():
        model.save_pretrained(tmp_path)
        loss = model.forward(inputs, training=False).loss
    again = orchvlm.Model.from_pretrained(tmp_path, threads=1)
    assert again.forward(inputs, training=False).loss == loss


def test_a_run_goes_on_with_its_average(tmp_path):
    whole = made(tmp_path / "whole", loader=Packs(texts(6)), ema=0.6)
    rows = list(whole.run())
    first = made(tmp_path / "parts", loader=Packs(texts(6)), ema=0.6)
    for row in first.run():
        if row["step"] == 3:
            break
    second = made(tmp_path / "parts", loader=Packs(texts(6)), ema=0.6)
    assert second.resume() == 3
    assert losses(second.run()) == losses(rows[3:])
    for key, values in whole.ema.state_dict().items():
        np.testing.assert_array_equal(second.ema.state_dict()[key], values)
    plain = made(tmp_path / "parts", loader=Packs(texts(6)))
    assert plain.resume() == 6  # without an average of its own


@pytest.mark.parametrize("dtype, adapted", (("float32", 0), ("bfloat16", 0), ("float32", 2)))
def test_a_checkpoint_is_opened_with_its_average(tmp_path, dtype, adapted):
    model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1, dtype=dtype)
    if adapted:
        model.add_lora(r=adapted)
    else:
        model.freeze("model.visual.*")
    trainer = orchvlm.Trainer(model, Packs(texts(3)),
                              orchvlm.TrainingConfig(steps=3, lr=3e-3, ema=0.6), tmp_path)
    list(trainer.run())
    with trainer.ema.swap():
        average = model.state_dict()
    folder = tmp_path / "checkpoint-3"
    assert has_average(folder) and not has_average(tmp_path)
    apart = 0
    for average_, wanted in ((True, average), (False, model.state_dict())):
        seen = open_model(folder, average_, threads=1, dtype=dtype).state_dict()
        assert seen.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_array_equal(seen[name], values, err_msg=name)
            apart += int((values != average[name]).any())
    assert apart  # the two are not the same
    other = orchvlm.Model.from_config(orchvlm.ModelConfig(
        CONFIG | {"text_config": CONFIG["text_config"] | {"intermediate_size": 24}}), seed=0)
    with pytest.raises(CheckpointError, match="no .*lora" if adapted else "has shape"):
        take_average(other, folder)


def test_memory_and_what_is_refused():
    model, _ = draw(4)
    held = model.memory()["training"]
    ema = orchvlm.EMA(model)
    assert model.memory()["training"] > held
    for call in (lambda: orchvlm.EMA(model), lambda: model.freeze("*norm*"),
                 lambda: ema.load_state_dict({}), lambda: orchvlm.EMA(model, decay=1.0)):
        with pytest.raises(ValueError):
            call()
    state = ema.state_dict()
    key = next(iter(state))
    with pytest.raises(ValueError, match="shape"):
        ema.load_state_dict(state | {key: np.zeros((7, 7, 7))})
    ema.load_state_dict({k: v + 1 for k, v in state.items()})
    np.testing.assert_array_equal(ema.state_dict()[key], state[key] + 1)
    ema.close()
    for call in (ema.update, ema.swap().__enter__):
        with pytest.raises(ValueError, match="no average"):
            call()
    assert ema.state_dict() == {} and model.memory()["training"] == held
    model.freeze("*")
    with pytest.raises(ValueError, match="trained"):
        orchvlm.EMA(model)
    with pytest.raises(TypeError, match="model"):
        orchvlm.EMA(3)
