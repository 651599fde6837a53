"""The audio encoder: lengths, what is frozen, what is refused, files of a whole Qwen3-Omni."""
import json
import os
import time

import numpy as np
import pytest

import orchvlm
from model_cases import draw_model, grads_of
from omni_cases import (AUDIO, AUDIO_END, AUDIO_START, CHUNK, IMAGE, WORD, draw_omni_config,
                        draw_omni_samples, pack_omni, tokens_of)
from orchvlm.checkpoint import open_folder, write_folder
from orchvlm.parts import count_parameters
from orchvlm.sounds import sound_tokens

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
DEVICES = pytest.mark.parametrize("device", ("cpu", "async"))


def draw(number=0, **options):
    print(f"ORCHVLM_TEST_SEED={SEED}")
    rng = np.random.default_rng([SEED, number])
    config = draw_omni_config(rng)
    return draw_model([SEED, number], config, threads=1, **options), rng


def heard(model, rng, lengths):
    """One sample of these sounds, each token a label."""
    ids = []
    for n in lengths:
        ids += [AUDIO_START, *[AUDIO] * tokens_of(n), AUDIO_END, WORD]
    labels = np.where(np.array(ids) >= WORD, ids, -100)
    bins = model.config.audio["num_mel_bins"]
    return orchvlm.Inputs(input_ids=ids, labels=labels, mel_lengths=lengths,
                          mel=rng.standard_normal((sum(lengths), bins)))


def step(model, inputs):
    model.zero_grad()
    out = model.forward(inputs)
    model.backward()
    return out, grads_of(model)


# ---------------------------------------------------------------- lengths

def test_tokens_of_all_lengths():
    """Chunk by chunk in three places: here, in Python's formula, in the core."""
    lengths = np.arange(1, 3 * CHUNK + 2)
    assert sound_tokens(lengths).tolist() == [tokens_of(n) for n in lengths]
    assert [orchvlm.data.audio_tokens(int(n)) for n in lengths] == sound_tokens(lengths).tolist()
    model, rng = draw()
    some = rng.choice(lengths, 12, replace=False).tolist() + [1, 2, CHUNK - 1, CHUNK, CHUNK + 1]
    inputs = heard(model, rng, some)
    whole = model.logprobs(inputs, training=False)[0]
    assert np.isfinite(whole).all()
    arguments = model._arguments(inputs)
    arguments[3] = arguments[3] + (arguments[3] >= 0)  # one row further than there are features
    with pytest.raises(ValueError, match="stands for feature"):
        model._core.extend(*arguments)


@DEVICES
def test_a_sound_does_not_hear_the_others(device):
    """Short ones beside long ones, to the last bit: padding is a sound's own."""
    model, rng = draw(1, device=device)
    lengths = [7, 250, 64, 100, 1, 330]
    alone = [heard(model, rng, [n]) for n in lengths]
    together = orchvlm.Inputs.concatenate([alone[i] for i in rng.permutation(len(alone))])
    wanted = {len(one.mel): model.logprobs(one, training=False)[0] for one in alone}
    got = model.logprobs(together, training=False)[0]
    for b, n in enumerate(together.mel_lengths.tolist()):
        a, z = together.cu_seqlens[b:b + 2]
        np.testing.assert_array_equal(got[a:z], wanted[n])


def test_windows_end_what_a_sound_attends_to():
    """A change in one window of chunks reaches no feature of another."""
    model, rng = draw(2)
    config = {**model.config.values, "audio_config": {
        **model.config.values["audio_config"], "n_window_infer": 2 * CHUNK}}
    model = draw_model([SEED, 2], config, threads=1)
    inputs = heard(model, rng, [5 * CHUNK])
    # Text behind the sound sees all of it; the first feature that changes is that of the window.
    other = np.array(inputs.mel)
    other[-1] += 1.0
    changed = orchvlm.Inputs(**{**vars(inputs), "mel": other})
    logits = []
    for one in (inputs, changed):
        model.forward(one, training=False)
        logits.append(model.logits(np.arange(one.n_tokens)))
    differ = (logits[0] != logits[1]).any(axis=1)
    assert not differ[:1 + 4 * 13].any() and differ[1 + 4 * 13:].any()


# ---------------------------------------------------------------- what is trained

@pytest.mark.parametrize("trained", ("conv2d1.*", "conv2d2.bias", "conv2d3.weight", "conv_out.*",
                                     "layers.0.fc1.*", "ln_post.*", "proj2.bias", "nothing"))
def test_parts_that_are_trained_alone(trained):
    model, rng = draw(3)
    inputs = pack_omni(draw_omni_samples(rng, model.config.values))
    _, wanted = step(model, inputs)
    model.freeze("*")
    if trained != "nothing":
        model.unfreeze(f"model.audio_tower.{trained}")
    _, got = step(model, inputs)
    assert len(got) == (0 if trained == "nothing" else 1 + trained.endswith(".*")
                        - (trained == "conv_out.*"))
    for name, gradient in got.items():
        np.testing.assert_array_equal(gradient, wanted[name], name)


def test_flops_and_memory_are_counted():
    model, rng = draw(4)
    a, text = model.config.audio, heard(model, rng, [5])
    lengths = [30, 250, 100]
    inputs = heard(model, rng, lengths)
    plain = orchvlm.Inputs(input_ids=inputs.input_ids, labels=inputs.labels)
    more = orchvlm.model_flops(model.config, inputs, training=False) - orchvlm.model_flops(
        model.config, plain, training=False)
    d, c, total = a["d_model"], a["downsample_hidden_size"], 0
    window = a["n_window_infer"] // CHUNK * 13
    for n in lengths:
        height, width, channels = a["num_mel_bins"], min(n, CHUNK), 1
        chunks = -(-n // CHUNK)
        for _ in range(3):
            height, width = (height + 1) // 2, (width + 1) // 2
            total += chunks * height * width * 9 * channels * c
            channels = c
        total += chunks * width * height * c * d
        tokens = tokens_of(n)
        total += a["encoder_layers"] * tokens * (4 * d * d + 2 * d * a["encoder_ffn_dim"])
        total += tokens * (d * d + d * a["output_dim"])
        while tokens > 0:
            total += a["encoder_layers"] * 2 * d * min(tokens, window) ** 2
            tokens -= window
    assert more == pytest.approx(2 * total, rel=1e-12)
    parts = count_parameters(model.config)
    assert sum(count for count, _ in parts.values()) == model.n_parameters
    model.forward(text)
    before = model.memory()["activations"]
    model.forward(inputs)
    assert model.memory()["activations"] > before
    with pytest.raises(ValueError, match="audio encoder"):
        orchvlm.model_flops(orchvlm.preset("tiny"), inputs)


# ---------------------------------------------------------------- refusals

def test_sounds_that_do_not_fit_are_refused():
    model, rng = draw(5)
    make, bins = orchvlm.Inputs, model.config.audio["num_mel_bins"]
    mel = np.zeros((9, bins), np.float32)
    sound = {"mel": mel, "mel_lengths": [9]}
    for inputs, words in (
            (make(input_ids=[AUDIO]), "there are sound tokens but no sounds"),
            (make(input_ids=[WORD], **sound), "2 features, but 0 tokens"),
            (make(input_ids=[AUDIO] * 3, **sound), "2 features, but 3 tokens"),
            (make(input_ids=[IMAGE, IMAGE], **sound), "image tokens but no images"),
            (make(input_ids=[AUDIO] * 2, mel=np.zeros((9, bins + 1)), mel_lengths=[9]), "bins")):
        with pytest.raises(ValueError, match=words):
            model.forward(inputs)
        with pytest.raises(ValueError, match=words):
            model.generate(inputs, 1)
    for lengths in ([8], [10], [0, 9], [-1, 10]):
        with pytest.raises(ValueError, match="mel"):
            make(input_ids=[AUDIO], mel=mel, mel_lengths=lengths)


@pytest.mark.parametrize("lengths, mel", (
    ([0], 0), ([-5, 6], 1), ([2**31 - 1] * 3, 7), ([9], 8), ([9], 10), ([], 9), ([9], None),
    (None, 9), ("9", 9)))
def test_junk_at_the_c_boundary(lengths, mel):
    """What Inputs would not let through."""
    model, rng = draw(6)
    arguments = model._arguments(heard(model, rng, [9]))
    bins = model.config.audio["num_mel_bins"]
    arguments[8] = lengths if lengths is None or isinstance(lengths, str) else np.array(
        lengths, np.int32)
    arguments[9] = None if mel is None else np.zeros((mel, bins), np.float32)
    with pytest.raises((ValueError, TypeError)):
        model._core.forward(*arguments, -1.0, None, 0.0, True, False, 0, *[None] * 3, True, None,
                            None, None)
    model.forward(heard(model, rng, [9]))  # it still works


@pytest.mark.parametrize("change, words", (
    ({"n_window": 40}, "n_window must be 50"), ({"n_window_infer": 99}, "n_window_infer"),
    ({"dropout": 0.1}, "dropout"), ({"activation_function": "relu"}, "activation_function"),
    ({"d_model": 7}, "width must be even"), ({"encoder_layers": 0}, "encoder_layers"),
    ({"output_dim": 5}, "out_width"), ({"scale_embedding": True}, "scale_embedding"),
    ({"num_hidden_layers": 99}, "num_hidden_layers"), ({"num_mel_bins": 0}, "bins"),
    ({"encoder_ffn_dim": "8"}, "encoder_ffn_dim"), ({"d_model": None}, "d_model missing")))
def test_audio_switches_that_are_not_computed_are_refused(change, words):
    config = draw_omni_config(np.random.default_rng(SEED))
    config["audio_config"] = {**config["audio_config"], **change}
    with pytest.raises(ValueError, match=words):
        orchvlm.Model(config)


@pytest.mark.parametrize("name", ("audio_config", "audio_token_id"))
def test_what_a_thinker_needs(name):
    config = draw_omni_config(np.random.default_rng(SEED))
    with pytest.raises(ValueError, match=name):
        orchvlm.Model({k: v for k, v in config.items() if k != name})


@pytest.mark.parametrize("number", range(60))
def test_junk_in_a_configuration(number):
    """Refused with a message, or a model that can be counted."""
    rng = np.random.default_rng([SEED, number])
    config = draw_omni_config(rng)
    part = config["audio_config"] if rng.random() < 0.8 else config
    junk = [None, -1, 0, 1, 2.5, "x", True, [50], [], {}, 2**31, 2**63, 10**30, np.nan, b"a"]
    part[str(rng.choice(sorted(part)))] = junk[rng.integers(len(junk))]
    try:
        assert orchvlm.ModelConfig(config).n_parameters > 0
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 5


# ---------------------------------------------------------------- files

def test_a_whole_model_s_folder(tmp_path):
    """The hub's holds the thinker under a prefix, beside the parts that speak."""
    model, _ = draw(7)
    model.save_pretrained(tmp_path / "own")
    files = open_folder(tmp_path / "own")
    assert not any("gate_up_proj" in name or name.startswith("thinker.") for name in files)
    tensors = [(f"thinker.{name}", file.tensors[name][3], lambda f=file, n=name: f.read(n))
               for name, file in files.items()]
    tensors += [("talker.model.norm.weight", (3,), lambda: np.zeros(3, np.float32)),
                ("code2wav.code_offset", (2,), lambda: np.ones(2, np.float32))]
    whole = tmp_path / "whole"
    whole.mkdir()
    write_folder(whole, tensors)
    values = {"model_type": "qwen3_omni_moe", "talker_config": {"hidden_size": 3},
              "enable_audio_output": True, "thinker_config": {
                  **model.config.values, "seconds_per_chunk": 2, "dtype": "bfloat16"}}
    (whole / "config.json").write_text(json.dumps(values))
    again = orchvlm.Model.from_pretrained(whole)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, again.parameters[name], name)
    assert again.config.family == "qwen3_omni_moe"


def test_experts_that_do_not_fit_are_named(tmp_path):
    model, _ = draw(8)
    model.save_pretrained(tmp_path / "good")
    files = open_folder(tmp_path / "good")
    expert = next(name for name in files if ".experts.1.up_proj" in name)

    good = {name: np.array(file.read(name)) for name, file in files.items()}
    for i, (words, bad) in enumerate(((f"missing {expert}", None),
                                      (f"{expert} has shape", good[expert][1:]),
                                      ("not finite", good[expert] * np.inf))):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_folder(folder, [(name, array.shape, lambda a=array: a)
                              for name, array in {**good, expert: bad}.items()
                              if array is not None])
        model.config.save(folder)
        with pytest.raises(ValueError, match=words.replace(".", r"\.")):
            orchvlm.Model.from_pretrained(folder)


def test_the_published_configuration_is_understood():
    """Keys of the 30B model's config.json that its smaller relatives do not have."""
    values = orchvlm.preset("qwen3-omni-thinker").values
    rope = {**values["text_config"]["rope_parameters"], "interleaved": True, "type": "default"}
    thinker = {
        **values, "seconds_per_chunk": 2, "user_token_id": 872,
        "audio_config": {**values["audio_config"], "conv_chunksize": 500, "dropout": 0,
                         "max_source_positions": 1500, "scale_embedding": False,
                         "is_decoder": False, "pruned_heads": {}, "prefix": None,
                         "max_length": 20, "temperature": 1.0, "num_beams": 1, "top_k": 50,
                         "num_hidden_layers": 32, "tie_encoder_decoder": False,
                         "bad_words_ids": None, "add_cross_attention": False},
        "text_config": {**values["text_config"], "rope_parameters": rope, "use_qk_norm": True,
                        "shared_expert_intermediate_size": 0, "use_sliding_window": False,
                        "sliding_window": None},
        "vision_config": {**values["vision_config"], "apply_vit_abs_pos_embed": True,
                          "image_size": 768, "in_chans": 3, "spatial_patch_size": 16,
                          "tokens_per_second": 2, "tie_word_embeddings": True}}
    del thinker["vision_config"]["num_position_embeddings"]  # transformers' own default
    config = orchvlm.ModelConfig({"model_type": "qwen3_omni_moe", "thinker_config": thinker})
    assert config.n_parameters == 31_719_205_488
    for part, key in (("text_config", "use_qk_norm"), ("vision_config", "apply_vit_abs_pos_embed")):
        wrong = {**thinker, part: {**thinker[part], key: False}}
        with pytest.raises(ValueError, match=key):
            orchvlm.ModelConfig(wrong)


def test_cost_models_count_the_same():
    """What from_model says of ten full windows is what model_flops does."""
    config = orchvlm.preset("qwen3-omni-thinker")
    model = orchvlm.from_model(config.values, orchvlm.Cluster.preset("h100"))
    n = 10 * 8 * CHUNK
    ids = [151669] + [151675] * tokens_of(n) + [151670]
    inputs = [orchvlm.Inputs(input_ids=ids, **more) for more in (
        {}, {"mel": np.zeros((n, 128), np.float32), "mel_lengths": [n]})]
    plain, heard_ = (orchvlm.model_flops(config, one) for one in inputs)
    assert model.flops["audio"]([n]) == pytest.approx(heard_ - plain, rel=1e-9)


# ---------------------------------------------------------------- phases

def draw_both(number, device):
    """(model, a batch with images and sounds, the same without their data)"""
    model, rng = draw(number, device=device)
    inputs = pack_omni(draw_omni_samples(rng, model.config.values, 4))
    return model, inputs, orchvlm.Inputs(
        input_ids=inputs.input_ids, cu_seqlens=inputs.cu_seqlens, labels=inputs.labels,
        weights=inputs.weights, position_ids=inputs.position_ids)


@DEVICES
def test_phases_are_the_forward(device):
    """Images and sounds encoded one by one, in any order, and the backwards of both."""
    model, inputs, words = draw_both(20, device)
    taps = [model.config.text["num_hidden_layers"]]
    out, wanted = step(model, inputs)
    tapped = model.forward(inputs, taps=taps).hidden_states[taps[0]]
    model.zero_grad()
    sounds, none = model.encode("audio", inputs.mel, inputs.mel_lengths)
    features, extra = model.encode("vision", inputs)
    assert none is None and len(sounds) == sound_tokens(inputs.mel_lengths).sum()
    np.testing.assert_array_equal(model.encode("audio", inputs)[0], sounds)
    np.testing.assert_array_equal(model.decode(inputs, features, extra, sounds), tapped)
    again = model.forward(words, features=features, extra=extra, sounds=sounds)
    assert again.loss == out.loss
    dfeatures, dextra, dsounds = model.backward()
    model.encode_backward(dsounds, modality="audio")
    model.encode_backward(dfeatures, dextra)
    got = grads_of(model)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@DEVICES
def test_one_given_and_one_encoded(device):
    """Features of either may be given while the forward encodes the other."""
    model, inputs, _ = draw_both(21, device)
    out, wanted = step(model, inputs)
    features, extra = model.encode("vision", inputs)
    sounds, _ = model.encode("audio", inputs)
    for given, modality in (({"features": features, "extra": extra}, "vision"),
                            ({"sounds": sounds}, "audio")):
        model.zero_grad()
        model.encode(modality, inputs)
        assert model.forward(inputs, **given).loss == out.loss
        dfeatures, dextra, dsounds = model.backward()
        if modality == "vision":
            assert dsounds is None
            model.encode_backward(dfeatures, dextra)
        else:
            assert dfeatures is None and dextra is None
            model.encode_backward(dsounds, modality="audio")
        got = grads_of(model)
        for name, value in wanted.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_bad_phases_of_sounds():
    model, inputs, _ = draw_both(22, "cpu")
    sounds, _ = model.encode("audio", inputs)
    features, extra = model.encode("vision", inputs)
    text = orchvlm.Inputs(input_ids=[WORD, WORD])
    for call, words in (
            (lambda: model.encode("audio", text), "no sounds"),
            (lambda: model.encode("audio", inputs, inputs.mel_lengths), "mel_lengths"),
            (lambda: model.encode("audio", inputs.mel[:, :0], inputs.mel_lengths), "bins"),
            (lambda: model.encode("audio", inputs.mel[1:], inputs.mel_lengths), "rows"),
            (lambda: model.encode("touch", inputs), "modality"),
            (lambda: model.decode(inputs, features, extra), "no sounds"),
            (lambda: model.decode(inputs, features, extra, sounds[1:]), "tokens wait"),
            (lambda: model.decode(inputs, features, extra, sounds[:, 1:]), "sounds"),
            (lambda: model.decode(text, sounds=sounds), "tokens wait"),
            (lambda: model.encode_backward(sounds, sounds[None], modality="audio"), "dextra"),
            (lambda: model.encode_backward(sounds[1:], modality="audio"), "dfeatures")):
        with pytest.raises(ValueError, match=words):
            call()
    model.encode_backward(sounds, modality="audio")
    with pytest.raises(ValueError, match="once"):
        model.encode_backward(sounds, modality="audio")


def test_a_trace_marks_both_encoders(tmp_path):
    model, inputs, _ = draw_both(23, "cpu")
    with orchvlm.profile(tmp_path / "trace.json"):
        model.forward(inputs)
        model.backward()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "phase"]
    assert names == ["encode vision", "encode audio", "decode", "loss", "loss backward",
                     "decode backward", "encode audio backward", "encode vision backward"]
    layers = {event["name"] for event in events if event.get("cat") == "layer"}
    assert {"audio block 0", "audio block backward 0"} <= layers


# ---------------------------------------------------------------- adapters

def test_adapters_of_the_audio_encoder():
    """Trained alone they get gradients by way of the sounds; merged they are the same model."""
    model, inputs, _ = draw_both(24, "cpu")
    model.add_lora(r=2, alpha=4, match=[f"model.audio_tower.*.{name}" for name in (
        "q_proj", "out_proj", "fc2")])
    for name in model.lora["modules"]:
        model.parameters[f"{name}.lora_B.weight"][...] = 0.05
    out, grads = step(model, inputs)
    assert set(grads) == {f"{name}.lora_{k}.weight" for name in model.lora["modules"] for k in "AB"}
    assert all(np.abs(value).max() > 0 for value in grads.values())
    model.merge_lora()
    merged = model.forward(inputs, training=False)
    assert abs(merged.loss - out.loss) <= 1e-4 * abs(out.loss)
