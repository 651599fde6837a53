"""Low-rank adapters: what they compute, their gradients, files, and a base that stays as it is."""
import json
import os
import time

import numpy as np
import pytest

import orchvlm
from model_cases import (draw_config, draw_model, draw_samples, draw_seed_config, grads_of, pack,
                         slope_along)
from orchvlm.checkpoint import SafeTensors
from test_training import CONFIG, Packs, losses, texts

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
# All that can be adapted: attention of both towers, MLPs, mergers.
EVERYTHING = {"dense": ["*_proj", "*.attn.qkv", "*.attn.proj", "*.linear_fc*"],
              "sparse": ["*self_attn.*_proj", "*shared_experts.*_proj", "*.attn.qkv",
                         "*layers.0.mlp.*_proj"],
              "some": ["*.q_proj", "*.v_proj", "*layers.1.mlp.up_proj", "*blocks.0.attn.proj",
                       "*merger.linear_fc1"]}


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def draw(kind="dense", number=0, alpha=3.0, **options):
    """(model with adapters that are not 0, inputs, generator)"""
    rng = np.random.default_rng([SEED, number])
    config = draw_seed_config(rng, True) if kind == "sparse" else draw_config(rng, False)
    model = draw_model([SEED, number], config, **{"threads": 1, **options})
    match = [p for p in EVERYTHING[kind]]
    model.add_lora(r=int(rng.integers(1, 5)), alpha=alpha, match=match)
    for name, array in model.parameters.items():
        if ".lora_B." in name:
            model._write(model._index[name], 0, 0.3 * rng.standard_normal(array.shape))
    return model, pack(draw_samples(rng, config, 2)), rng


def adapters_of(model):
    return {n: np.array(a) for n, a in model.parameters.items() if ".lora_" in n}


def step(model, inputs, **options):
    model.zero_grad()
    out = model.forward(inputs, **options)
    model.backward()
    return out, grads_of(model)


def whole_of(model):
    """(a plain model with W + scale B A for weights, its scale)"""
    scale = model.lora["alpha"] / model.lora["r"]
    state = model.state_dict()
    base = {n: w for n, w in state.items() if ".lora_" not in n}
    for module in model.lora["modules"]:
        a, b = (state[f"{module}.lora_{k}.weight"].astype(np.float64) for k in "AB")
        base[f"{module}.weight"] = base[f"{module}.weight"] + scale * b @ a
    plain = orchvlm.Model(model.config, device=model.device, dtype=model.dtype, threads=1)
    plain.load_state_dict(base)
    return plain, scale


@pytest.mark.parametrize("kind", EVERYTHING)
def test_it_is_the_model_with_the_sum_for_weights(kind):
    """In double: loss of W + s B A; with its gradient G: dA = s B^T G, dB = s G A^T."""
    model, inputs, _ = draw(kind, 1, device="ref", dtype="float64")
    plain, scale = whole_of(model)
    out, got = step(model, inputs)
    wanted, full = step(plain, inputs)
    assert out.loss == pytest.approx(wanted.loss, rel=1e-12)
    assert set(got) == set(adapters_of(model)) and len(got) == 2 * len(model.lora["modules"])
    for module in model.lora["modules"]:
        a, b = (np.array(model.parameters[f"{module}.lora_{k}.weight"]) for k in "AB")
        g = full[f"{module}.weight"]
        for kind_, slope in (("A", scale * b.T @ g), ("B", scale * g @ a.T)):
            error = np.linalg.norm(got[f"{module}.lora_{kind_}.weight"] - slope)
            assert error <= 1e-10 * (np.linalg.norm(slope) + np.linalg.norm(g)), (module, kind_)


def test_gradients_are_the_slopes_of_the_loss():
    model, inputs, rng = draw("some", 2, device="ref", dtype="float64")
    _, grads = step(model, inputs)
    total = np.sqrt(sum(float((g ** 2).sum()) for g in grads.values()))
    for name, gradient in grads.items():
        slope, wanted = slope_along(model, name, gradient,
                                    lambda: model.forward(inputs, training=False).loss, rng)
        assert abs(slope - wanted) <= 1e-6 * total, name


@pytest.mark.parametrize("kind", ("dense", "sparse"))
@pytest.mark.parametrize("device", ("cpu", "async"))
def test_backends_and_checkpoint_modes(kind, device):
    exact, inputs, _ = draw(kind, 3, device="ref", dtype="float64")
    _, wanted = step(exact, inputs)
    fast, _, _ = draw(kind, 3, device=device)
    out, got = step(fast, inputs)
    total = np.sqrt(sum(float((g ** 2).sum()) for g in wanted.values()))
    for name, one in wanted.items():
        assert np.linalg.norm(got[name] - one) <= 2e-4 * (np.linalg.norm(one) + 1e-3 * total), name
    for mode in ("selective", "full"):
        again, other = step(fast, inputs, checkpoint=mode)
        assert again.loss == out.loss
        for name, one in got.items():
            np.testing.assert_array_equal(other[name], one, err_msg=f"{mode} {name}")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_fresh_adapters_change_nothing_and_train_alone(dtype):
    rng = np.random.default_rng([SEED, 4])
    config = draw_config(rng, False)
    model = draw_model([SEED, 4], config, threads=1, dtype=dtype)
    inputs = pack(draw_samples(rng, config))
    before = model.state_dict()
    loss = model.forward(inputs, training=False).loss
    early = orchvlm.AdamW(model, lr=1e-2)
    model.add_lora(r=2)
    with pytest.raises(ValueError, match="before the model's adapters"):
        early.step()
    assert model.forward(inputs, training=False).loss == loss
    opt = orchvlm.AdamW(model, lr=1e-2)
    step(model, inputs)
    opt.step()
    count = sum(a.size for a in adapters_of(model).values())
    copies = 3 if dtype == "float32" else 4  # gradients, two moments and a master
    held, gaps = copies * 4 * count, copies * 64 * (len(adapters_of(model)) + 1)
    assert held <= model.memory()["training"] <= held + gaps
    assert {k.rpartition("/")[0] for k in opt.state_dict() if "/" in k} == set(adapters_of(model))
    for name, values in before.items():
        np.testing.assert_array_equal(model.parameters[name], values)
    assert model.forward(inputs, training=False).loss < loss
    fan = model.parameters["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert 0 < np.abs(fan).max() <= fan.shape[1] ** -0.5 * 1.5


@pytest.mark.parametrize("kind", ("dense", "sparse"))
def test_merged_and_back(kind, tmp_path):
    model, inputs, _ = draw(kind, 5)
    before = model.state_dict()
    loss = model.forward(inputs, training=False).loss
    text = orchvlm.Inputs(input_ids=inputs.input_ids[:1])
    tokens = model.generate(text, 4)
    model.merge_lora()
    plain, _ = whole_of(draw(kind, 5)[0])
    for name, values in plain.state_dict().items():
        got = model.parameters[name]
        assert np.abs(got - values).max() <= 1e-6 * np.abs(values).max(), name
    assert model.forward(inputs, training=False).loss == pytest.approx(loss, rel=1e-5)
    assert model.generate(text, 4) == tokens
    with pytest.raises(ValueError, match="unmerge"):
        model.forward(inputs)
    with pytest.raises(ValueError, match="already"):
        model.merge_lora()
    model.save_pretrained(tmp_path)
    alone = orchvlm.Model.from_pretrained(tmp_path, threads=1)
    assert alone.forward(inputs, training=False).loss == pytest.approx(loss, rel=1e-5)
    model.unmerge_lora()
    for name, values in before.items():
        assert np.abs(model.parameters[name] - values).max() <= 1e-6 * np.abs(values).max(), name
    step(model, inputs)
    with pytest.raises(ValueError, match="not merged"):
        model.unmerge_lora()


def test_taken_away():
    model, inputs, _ = draw("some", 6)
    array = model.parameters["model.language_model.layers.0.self_attn.q_proj.lora_B.weight"]
    with pytest.raises(RuntimeError, match="in use"):
        model.remove_lora()
    del array
    model.remove_lora()
    assert model.lora is None and not adapters_of(model)
    _, grads = step(model, inputs)
    assert len(grads) == len(model.parameters)
    with pytest.raises(ValueError, match="no adapters"):
        model.remove_lora()
    model.add_lora(match=["*.q_proj"])
    step(model, inputs)


# ---------------------------------------------------------------- files

def test_files_of_peft(tmp_path):
    model, inputs, _ = draw("some", 7)
    model.save_adapter(tmp_path, base="some/model")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == model.lora["r"]
    assert config["lora_alpha"] == 3.0 and config["base_model_name_or_path"] == "some/model"
    assert set(config["target_modules"]) == set(model.lora["modules"])
    file = SafeTensors(tmp_path / "adapter_model.safetensors")
    assert set(file.tensors) == {f"base_model.model.{n}" for n in adapters_of(model)}
    q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert file.read(q).shape == (config["r"], model.config.text["hidden_size"])
    again = draw_model([SEED, 7], model.config, threads=1)
    again.load_adapter(tmp_path)
    assert again.lora == model.lora
    for name, values in adapters_of(model).items():
        np.testing.assert_array_equal(again.parameters[name], values)
    np.testing.assert_array_equal(
        again.forward(inputs).loss, model.forward(inputs).loss)


@pytest.mark.parametrize("change, words", (
    ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"lora_dropout": 0.1}, "dropout"),
    ({"peft_type": "IA3"}, "peft_type"), ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"r": 0}, "r must"),
    ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"), ({"lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"use_other": False}, "use_other"),
    ({"r": 7}, "shape"), ({"lora_alpha": None}, "lora_alpha"), ({"r": "8"}, "r must")))
def test_adapters_of_another_kind_are_refused(change, words, tmp_path):
    model, _, _ = draw("some", 8)
    model.save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    again = draw_model([SEED, 8], model.config, threads=1)
    with pytest.raises(ValueError, match=words):
        again.load_adapter(tmp_path)
    assert again.lora is None and not adapters_of(again)


def test_keys_that_change_nothing(tmp_path):
    model, _, _ = draw("some", 8)
    model.save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "peft_version": "0.21.2", "init_lora_weights": "gaussian", "loftq_config": {},
        "exclude_modules": ["lm_head"],
        "megatron_core": "megatron.core", "qalora_group_size": 16, "use_bdlora": False}))
    again = draw_model([SEED, 8], model.config, threads=1)
    again.load_adapter(tmp_path)
    assert again.lora == model.lora


def test_tensors_that_do_not_fit(tmp_path):
    from orchvlm.checkpoint import write_file
    model, _, _ = draw("some", 9)
    model.save_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    file = SafeTensors(path)
    stored = {name: np.array(file.read(name)) for name in file.tensors}
    first = next(iter(stored))
    nan = np.full_like(stored[first], np.nan)
    for state, words in (({**stored, first: nan}, "finite"), ({**stored, "x": nan}, "no part"),
                         ({k: v for k, v in stored.items() if k != first}, "has no lora_"),
                         ({k.replace("layers", "layer"): v for k, v in stored.items()},
                          "no module")):
        write_file(path, [(n, a.shape, lambda a=a: a) for n, a in state.items()], "float32")
        with pytest.raises(ValueError, match=words):
            draw_model([SEED, 9], model.config, threads=1).load_adapter(tmp_path)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError):
        draw_model([SEED, 9], model.config, threads=1).load_adapter(tmp_path)


def test_what_cannot_be_adapted():
    rng = np.random.default_rng([SEED, 10])
    sparse = draw_model(SEED, draw_config(rng, True), threads=1)
    for pattern, words in (("*experts.gate_up_proj", "experts"), ("*embed_tokens", "embed_tokens"),
                           ("*mlp.gate", "gate"), ("*patch_embed.proj", "patch_embed"),
                           ("nothing*", "matches no")):
        with pytest.raises(ValueError, match=words):
            sparse.add_lora(match=[pattern])
        assert sparse.lora is None
    for wrong in ({"r": 0}, {"r": 2.0}, {"alpha": np.nan}, {"seed": -1}):
        with pytest.raises(ValueError):
            sparse.add_lora(**wrong)
    with pytest.raises(TypeError):
        sparse.add_lora(match="*q_proj")
    with pytest.raises(ValueError, match="no adapters"):
        sparse.merge_lora()
    sparse.add_lora()
    with pytest.raises(ValueError, match="already"):
        sparse.add_lora()


def test_a_run_of_adapters_goes_on(tmp_path):
    def run(folder):
        model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1)
        model.add_lora(r=2, match=["*_proj"])
        config = orchvlm.TrainingConfig(steps=6, lr=3e-3, warmup=2, ema=0.5)
        return orchvlm.Trainer(model, Packs(texts(6)), config, folder)
    whole = run(tmp_path / "whole")
    rows = list(whole.run())
    first = run(tmp_path / "parts")
    for row in first.run():
        if row["step"] == 3:
            break
    second = run(tmp_path / "parts")
    assert second.resume() == 3
    assert losses(second.run()) == losses(rows[3:])
    for name, values in whole.model.state_dict().items():
        np.testing.assert_array_equal(second.model.parameters[name], values)


def test_a_tensor_of_adapters_that_went_says_so():
    """Nor does it give what lies in its place by then."""
    model, _, _ = draw("some", 30)
    first = model.lora["modules"][0]
    name = f"{first}.lora_A.weight"
    held = model.tensor(name)
    assert np.shares_memory(np.from_dlpack(held), model.parameters[name])
    rank = model.lora["r"]
    model.remove_lora()
    with pytest.raises(BufferError, match="gone"):
        np.from_dlpack(held)
    model.add_lora(r=rank + 1, match=[first])
    with pytest.raises(BufferError, match="gone"):
        np.from_dlpack(held)
    assert np.from_dlpack(model.tensor(name)).shape[0] == rank + 1
