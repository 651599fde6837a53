"""Adapters' files exchanged with PEFT, both ways, beside a tiny `transformers` model."""
import os
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch and transformers")
pytest.importorskip("transformers", reason="the oracle needs torch and transformers")
peft = pytest.importorskip("peft", reason="PEFT is not installed")

import orchvlm  # noqa: E402
from model_cases import draw_config  # noqa: E402
from oracle_cases import build, draw_batch, state_of  # noqa: E402

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
MODULES = (r"language_model.*\.(q_proj|v_proj|o_proj|up_proj|down_proj)",
           r"visual.*\.(qkv|proj|linear_fc1|linear_fc2)")
PATTERNS = [f"model.language_model.*.{name}"
            for name in ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")] + [
    "model.visual.blocks.*.attn.qkv", "model.visual.blocks.*.attn.proj",
    "model.visual.*.linear_fc1", "model.visual.*.linear_fc2"]


@pytest.fixture
def case():
    """(transformers' model, ours of the same weights, our inputs, theirs, mask, generator)"""
    print(f"ORCHVLM_TEST_SEED={SEED}")
    rng = np.random.default_rng(SEED)
    config = draw_config(rng, False)
    theirs = build(config, rng)
    inputs, batch, mask = draw_batch(rng, config)
    ours = orchvlm.Model(config, threads=1)
    ours.load_state_dict(state_of(theirs))
    return theirs, ours, inputs, batch, mask, rng


def logits_of(model, batch, mask):
    with torch.no_grad():
        return model.eval()(**batch).logits.numpy()[mask]


def our_logits(model, inputs):
    model.forward(inputs, training=False)
    return model.logits(np.arange(inputs.n_tokens))


def same(ours, theirs):
    return np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("rslora", (False, True))
def test_peft_reads_ours(case, rslora, tmp_path):
    theirs, ours, inputs, batch, mask, rng = case
    plain = our_logits(ours, inputs)
    ours.add_lora(r=3, alpha=5.0, match=PATTERNS, rslora=rslora)
    for name in [n for n in ours.parameters if ".lora_B." in n]:
        ours.parameters[name][...] = 0.3 * rng.standard_normal(ours.parameters[name].shape)
    ours.save_adapter(tmp_path)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path)
    held = {name.replace(".default", "") for name, _ in adapted.named_parameters()
            if ".lora_" in name}
    assert held == {f"base_model.model.{n}" for n in ours.parameters if ".lora_" in n}
    found = our_logits(ours, inputs)
    assert same(found, logits_of(adapted, batch, mask)) and not same(found, plain)


@pytest.mark.parametrize("options", ({}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}))
def test_we_read_peft_s(case, options, tmp_path):
    theirs, ours, inputs, batch, mask, rng = case
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=".*(" + "|".join(MODULES) + ")", exclude_modules=(
            r".*patch_embed.*"), **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.from_numpy(
                    (0.3 * rng.standard_normal(tuple(parameter.shape))).astype("f4")))
    adapted.save_pretrained(tmp_path)
    ours.load_adapter(tmp_path)
    assert ours.lora["rslora"] == options.get("use_rslora", False)
    assert same(our_logits(ours, inputs), logits_of(adapted, batch, mask))


@pytest.mark.parametrize("options, words", (
    ({"use_dora": True}, "use_dora"), ({"bias": "lora_only"}, "bias"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save")))
def test_what_peft_has_beyond_is_refused(case, options, words, tmp_path):
    theirs, ours, *_ = case
    peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
                        ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        ours.load_adapter(tmp_path)
    assert ours.lora is None
