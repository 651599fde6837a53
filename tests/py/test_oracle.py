"""Exact against `transformers`: logits, losses and every gradient of freshly drawn tiny models."""
import os
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch and transformers")
pytest.importorskip("transformers", reason="the oracle needs torch and transformers")

import orchvlm  # noqa: E402
from model_cases import draw_config, fill  # noqa: E402
from omni_cases import draw_omni_config  # noqa: E402
from oracle_cases import (build, compare_grads, draw_batch, draw_omni_batch,  # noqa: E402
                          grads_of, hear_alone, our_names, state_of)

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
DRAWS = int(os.environ.get("ORCHVLM_ORACLE_DRAWS", "3"))
DEVICES = ("cpu", "async")


def margin(model, theirs):
    """Smallest distance between the last expert that is taken and the first that is not."""
    rows, k = [], model.config.text_config.num_experts_per_tok
    hooks = [m.register_forward_hook(lambda m, i, o: rows.append(
        torch.nn.functional.linear(i[0].reshape(-1, i[0].shape[-1]), m.weight).detach()))
        for n, m in model.named_modules() if n.endswith("mlp.gate")]
    with torch.no_grad():
        model(**theirs)
    for hook in hooks:
        hook.remove()
    sorted_rows = torch.cat(rows).sort(dim=-1, descending=True).values
    return 1.0 if k == sorted_rows.shape[1] else float(
        (sorted_rows[:, k - 1] - sorted_rows[:, k]).min())


def draw(seed, sparse, **options):
    """A model and a batch whose routing no rounding can change."""
    for attempt in range(50):
        rng = np.random.default_rng([seed, attempt])
        config = draw_config(rng, sparse)
        model = build(config, rng)
        inputs, theirs, mask = draw_batch(rng, config, **options)
        if not sparse or margin(model, theirs) >= 1e-4:
            return config, model, inputs, theirs, mask
    raise AssertionError("no draw with a clear routing")


def draw_omni(seed, alone=False, **options):
    """The same for Qwen3-Omni's thinker, with sounds."""
    for attempt in range(50):
        rng = np.random.default_rng([seed, attempt])
        config = draw_omni_config(rng)
        model = build(config, rng)
        if alone:
            hear_alone(model)
        inputs, theirs, mask = draw_omni_batch(rng, config, **options)
        if margin(model, theirs) >= 1e-4:
            return config, model, inputs, theirs, mask
    raise AssertionError("no draw with a clear routing")


def compare(config, model, inputs, theirs, mask, device):
    """Logits, losses and every gradient."""
    sparse = config["model_type"] != "qwen3_vl"
    ours = orchvlm.Model(config, device=device)
    ours.load_state_dict(state_of(model))
    wanted = model(**theirs)
    wanted.loss.backward()
    got = ours.forward(inputs)
    logits = ours.logits(np.arange(len(inputs.input_ids)))
    flat = wanted.logits.detach().numpy()[mask]
    assert np.linalg.norm(logits - flat) <= 1e-5 * np.linalg.norm(flat)
    assert abs(got.loss - wanted.loss.item()) <= 1e-6 * max(1.0, abs(wanted.loss.item()))
    if sparse:
        assert abs(got.aux_loss - float(wanted.aux_loss)) <= 1e-5 * float(wanted.aux_loss)
    ours.backward()
    compare_grads({name: ours.grads[name] for name in ours.grads}, grads_of(model))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sparse", (False, True), ids=("dense", "moe"))
@pytest.mark.parametrize("number", range(DRAWS))
def test_logits_loss_and_gradients(number, sparse, device):
    print("seed", SEED + number)
    compare(*draw(SEED + number, sparse), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sounds", ((100, 330), (1, 330)), ids=("together", "alone"))
@pytest.mark.parametrize("number", range(DRAWS))
def test_omni_logits_loss_and_gradients(number, sounds, device):
    """Sounds of at least a chunk are the same in any company; transformers pads shorter ones to
    the longest of the call, and is given them one by one."""
    print("seed", SEED + number)
    compare(*draw_omni(SEED + number, alone=sounds[0] < 100, sounds=sounds), device)


@pytest.mark.parametrize("sparse", (False, True), ids=("dense", "moe"))
def test_no_targets(sparse):
    config, model, inputs, theirs, mask = draw(SEED + 100, sparse, targets=False)
    values = dict(config, text_config=dict(config["text_config"]))
    if sparse:
        values["text_config"]["router_aux_loss_coef"] = 0.0
    ours = orchvlm.Model(values)
    ours.load_state_dict(state_of(model))
    out = ours.forward(inputs)
    ours.backward()
    assert out.loss == 0 and out.n_target_tokens == 0
    assert all(not ours.grads[name].any() for name in ours.grads)


def test_positions_are_those_of_transformers():
    config, model, inputs, theirs, mask = draw(SEED + 200, False)
    given = {k: theirs.get(k) for k in ("image_grid_thw", "video_grid_thw")}
    wanted, _ = model.model.get_rope_index(
        theirs["input_ids"], mm_token_type_ids=theirs["mm_token_type_ids"],
        attention_mask=theirs["attention_mask"], **given)
    np.testing.assert_array_equal(inputs.position_ids, wanted.numpy()[:, mask])


@pytest.mark.parametrize("sparse", (False, True), ids=("dense", "moe"))
def test_files_go_out_and_come_in(sparse, tmp_path):
    config, model, inputs, theirs, mask = draw(SEED + 300, sparse)
    model.save_pretrained(tmp_path / "theirs")
    ours = orchvlm.Model.from_pretrained(tmp_path / "theirs")
    ours.forward(inputs, training=False)
    logits = ours.logits(np.arange(len(inputs.input_ids)))
    with torch.no_grad():
        flat = model(**theirs).logits.numpy()[mask]
    assert np.linalg.norm(logits - flat) <= 1e-5 * np.linalg.norm(flat)
    ours.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    for (name, a), (_, b) in zip(sorted(model.state_dict().items()),
                                 sorted(again.state_dict().items())):
        assert torch.equal(a, b), name


def test_omni_files_go_out_and_come_in(tmp_path):
    config, model, inputs, theirs, mask = draw_omni(SEED + 500, sounds=(100, 330))
    model.save_pretrained(tmp_path / "theirs")
    ours = orchvlm.Model.from_pretrained(tmp_path / "theirs")
    wanted = state_of(model)
    for name, array in ours.state_dict().items():
        np.testing.assert_array_equal(array, wanted[name], name)
    ours.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    for (name, a), (_, b) in zip(sorted(model.state_dict().items()),
                                 sorted(again.state_dict().items())):
        assert torch.equal(a, b), name
    with torch.no_grad():
        flat = model(**theirs).logits.numpy()[mask]
    ours.forward(inputs, training=False)
    logits = ours.logits(np.arange(inputs.n_tokens))
    assert np.linalg.norm(logits - flat) <= 1e-5 * np.linalg.norm(flat)


def test_omni_positions_are_those_of_transformers():
    config, model, inputs, theirs, mask = draw_omni(SEED + 600)
    wanted, _ = model.get_rope_index(
        theirs["input_ids"], theirs.get("image_grid_thw"), theirs.get("video_grid_thw"),
        theirs["attention_mask"], None, theirs["feature_attention_mask"].sum(1),
        theirs.get("video_second_per_grid"))
    np.testing.assert_array_equal(inputs.position_ids, wanted.numpy()[:, mask])


@pytest.mark.parametrize("name", ("Qwen3VL", "Qwen3VLMoe", "Qwen3OmniMoe", "Qwen3OmniMoeThinker"))
def test_configurations_of_transformers_classes_are_understood(name):
    import transformers as hub
    values = getattr(hub, f"{name}Config")().to_dict()
    config = orchvlm.ModelConfig(values)
    theirs = values.get("thinker_config", values)["text_config"]
    assert config.text["hidden_size"] == theirs["hidden_size"]
    assert not config.tied


def test_omni_of_the_published_size_has_the_same_weights():
    """Names and shapes of the 30B thinker, without its numbers."""
    from transformers import (Qwen3OmniMoeThinkerConfig,
                              Qwen3OmniMoeThinkerForConditionalGeneration)
    values = orchvlm.preset("qwen3-omni-thinker").values
    given = {k: v for k, v in values.items() if k != "model_type"}
    with torch.device("meta"):
        model = Qwen3OmniMoeThinkerForConditionalGeneration(Qwen3OmniMoeThinkerConfig(**given))
    names, ours = our_names(model), orchvlm.ModelConfig(values).parameters()
    theirs = {names[name]: tuple(p.shape) for name, p in model.named_parameters()}
    assert theirs.keys() == ours.keys()
    for name, shape in ours.items():
        turned = (shape[0], shape[2], shape[1]) if ".experts." in name else shape
        assert theirs[name] == turned, name


@pytest.mark.parametrize("sparse", (False, True), ids=("dense", "moe"))
def test_adamw_on_identical_gradients(sparse):
    """Ten steps, some of them clipped, with the weights of torch's."""
    rng = np.random.default_rng(SEED + 450)
    ours = orchvlm.Model(draw_config(rng, sparse))
    fill(ours, rng)
    weights = {name: torch.tensor(np.array(w), requires_grad=True)
               for name, w in ours.parameters.items()}
    kinds = {name: kind for name, kind, _, _ in ours._list}
    theirs = torch.optim.AdamW(
        [{"params": [w], "weight_decay": 0.0 if kinds[name] else 0.1}
         for name, w in weights.items()], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    opt = orchvlm.AdamW(ours, lr=1e-2, max_grad_norm=1.0)
    for _ in range(10):
        size = 10 ** rng.uniform(-4, 0)
        for name, weight in weights.items():
            g = (size * rng.standard_normal(weight.shape)).astype(np.float32)
            ours.grads[name][...], weight.grad = g, torch.from_numpy(g)
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        theirs.step()
        opt.step()
    for name, weight in weights.items():
        wanted = weight.detach().numpy()
        error = np.linalg.norm(ours.parameters[name] - wanted)
        assert error <= 1e-6 * np.linalg.norm(wanted), name


def test_ten_steps_of_adamw():
    """Ten whole training steps follow torch's AdamW."""
    config, model, inputs, theirs, mask = draw(SEED + 400, False)
    ours = orchvlm.Model(config)
    ours.load_state_dict(state_of(model))
    names = [name for name, _, _, _ in ours._list]
    decays = {name: 0.1 if kind == 0 else 0.0 for name, kind, _, _ in ours._list}
    by_name = dict(model.named_parameters())
    theirs_opt = torch.optim.AdamW(
        [{"params": [by_name[n]], "weight_decay": decays[n]} for n in names], lr=1e-3,
        betas=(0.9, 0.95), eps=1e-8)
    opt = orchvlm.AdamW(ours, lr=1e-3)
    for step in range(10):
        wanted = model(**theirs).loss
        theirs_opt.zero_grad()
        wanted.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        theirs_opt.step()
        ours.zero_grad()
        got = ours.forward(inputs).loss
        ours.backward()
        opt.step()
        assert abs(got - float(wanted)) <= 1e-5 * max(1.0, float(wanted)), step


def test_adapters():
    """y = W x + (alpha / r) B A x in plain torch, by hooks on the modules that PEFT would wrap."""
    config, model, inputs, theirs, mask = draw(SEED + 500, False)
    ours = orchvlm.Model(config)
    ours.load_state_dict(state_of(model))
    ours.add_lora(r=3, alpha=5, match=["*self_attn.*_proj", "*mlp.*_proj", "*.attn.qkv"])
    rng, weights = np.random.default_rng(SEED), {}
    for name, array in ours.parameters.items():
        if ".lora_" in name:
            array[...] = rng.standard_normal(array.shape) * 0.1  # beside weights of 0.6 / sqrt(K)
            weights[name] = torch.tensor(np.array(array), requires_grad=True)
    for name in ours.lora["modules"]:
        a, b = (weights[f"{name}.lora_{kind}.weight"] for kind in "AB")
        model.get_submodule(name).register_forward_hook(
            lambda module, given, out, a=a, b=b: out + 5 / 3 * (given[0] @ a.T) @ b.T)
    wanted = model(**theirs).loss
    wanted.backward()
    got = ours.forward(inputs)
    assert abs(got.loss - wanted.item()) <= 1e-6 * max(1.0, wanted.item())
    ours.backward()
    compare_grads({name: ours.grads[name] for name in ours.grads},
                  {name: weight.grad.numpy() for name, weight in weights.items()})
