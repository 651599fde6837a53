"""Folders and files of weights: round trips, what is refused, and bytes from nowhere."""
import json
import os
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest

import orchvlm
from model_cases import draw_config, draw_model, draw_seed_config
from omni_cases import draw_omni_config
from orchvlm import config_keys
from orchvlm.checkpoint import SafeTensors, narrowed, open_folder, widened, write_folder

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
FAMILIES = {"dense": (draw_config, False), "softmax experts": (draw_config, True),
            "seed": (draw_seed_config, False), "sigmoid experts": (draw_seed_config, True),
            "omni": (draw_omni_config, True)}


def draw(family="dense", number=0, **options):
    print(f"ORCHVLM_TEST_SEED={SEED}")
    drawer, sparse = FAMILIES[family]
    config = drawer(np.random.default_rng([SEED, number]), sparse)
    return draw_model([SEED, number], config, threads=1, **options)


def same(one, two):
    for name, array in one.state_dict().items():
        np.testing.assert_array_equal(array, two.state_dict()[name], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_round_trip(family, dtype, tmp_path):
    model = draw(family, dtype=dtype)
    model.save_pretrained(tmp_path / "a" / "b")
    again = orchvlm.Model.from_pretrained(tmp_path / "a" / "b", dtype=dtype)
    same(model, again)
    given = {k: v for k, v in again.config.values.items() if k != "transformers_version"}
    assert given == model.config.values
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "config.json", "model.safetensors"]


def test_rounding_to_bfloat16():
    """To nearest, ties to even; every value that is one already stays."""
    rng = np.random.default_rng(SEED)
    every = np.arange(2**16, dtype=np.uint16)
    values = widened(every)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(narrowed(values)[finite], every[finite])
    assert np.isnan(widened(narrowed(np.array([np.nan], np.float32))))[0]
    some = rng.standard_normal(9999).astype(np.float32)
    got = widened(narrowed(some))
    bits = some.view(np.uint32) & 0xFFFF0000
    low, high = bits.view(np.float32), (bits + 0x10000).view(np.float32)
    nearest = np.minimum(np.abs(some - low), np.abs(high - some))
    np.testing.assert_array_equal(np.abs(some - got), nearest)
    ties = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    np.testing.assert_array_equal(narrowed(ties), [0x3F80, 0x3F82])


def test_shards(tmp_path):
    rng = np.random.default_rng(SEED)
    arrays = {f"t{i}": rng.standard_normal((3, i + 1)).astype(np.float32) for i in range(7)}
    entries = [(n, a.shape, lambda a=a: a) for n, a in arrays.items()]
    write_folder(tmp_path, entries, shard_bytes=100)
    files = open_folder(tmp_path)
    assert len({f.path for f in files.values()}) > 1
    for name, array in arrays.items():
        np.testing.assert_array_equal(files[name].read(name), array)
    write_folder(tmp_path, entries)  # whole again: the index of before does not mislead
    assert {f.path.name for f in open_folder(tmp_path).values()} == {"model.safetensors"}


def test_strangers_read_what_we_write(tmp_path):
    """The header by the format's description: length, JSON, then the bytes without gaps."""
    write_folder(tmp_path, [("x", (2,), lambda: np.array([1.5, -2], np.float32))])
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + length])
    assert header["x"] == {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert raw[8 + length:] == struct.pack("<2f", 1.5, -2) and (8 + length) % 8 == 0


@pytest.mark.parametrize("kind, pack, values", (
    ("F16", "<3e", (1.5, -2, 0)), ("F64", "<1d", (7.5,)), ("BF16", "<2H", (0x3FC0, 0xC000))))
def test_other_numbers(kind, pack, values, tmp_path):
    n = len(values)
    raw = struct.pack(pack, *values)
    (tmp_path / "model.safetensors").write_bytes(file(
        {"x": {"dtype": kind, "shape": [n], "data_offsets": [0, len(raw)]}}, raw))
    got = open_folder(tmp_path)["x"].read("x")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, (1.5, -2.0) if kind == "BF16" else values)


# ---------------------------------------------------------------- what does not fit

def rewritten(tmp_path, change, model=None):
    """A folder whose tensors went through change(dict)."""
    model = model or draw()
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    change(state)
    write_folder(tmp_path, [(n, a.shape, lambda a=a: a) for n, a in state.items()])
    return tmp_path


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize("change, words", (
    (lambda s: s.pop(NORM), f"missing {NORM}"),
    (lambda s: s.update(more=np.zeros(2, np.float32)), "surplus more"),
    (lambda s: s.update({NORM: np.zeros(3, np.float32)}), f"{NORM} has shape"),
    (lambda s: s[NORM].__setitem__(1, np.nan), f"{NORM} is not finite"),
    (lambda s: s[NORM].__setitem__(0, -np.inf), f"{NORM} is not finite")))
def test_tensors_that_do_not_fit_are_named(change, words, tmp_path):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        orchvlm.Model.from_pretrained(rewritten(tmp_path, change))


def test_a_refused_state_changes_nothing():
    model = draw()
    before, state = model.state_dict(), {n: a + 1 for n, a in model.state_dict().items()}
    state[NORM][-1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        model.load_state_dict(state)
    for name, array in before.items():
        np.testing.assert_array_equal(model.parameters[name], array)


def test_a_head_that_is_tied_may_stand_in_the_file(tmp_path):
    config = draw_config(np.random.default_rng(SEED), False) | {"tie_word_embeddings": True}
    model = draw_model(SEED, config)
    table = "model.language_model.embed_tokens.weight"
    orchvlm.Model.from_pretrained(rewritten(
        tmp_path, lambda s: s.update({"lm_head.weight": s[table]}), model))


def test_any_cut_is_noticed(tmp_path):
    model = draw()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    rng = np.random.default_rng(SEED)
    for n in [0, 1, 7, 8, 9, len(whole) - 1, *rng.integers(0, len(whole), 40)]:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="cut off|no safetensors|JSON"):
            orchvlm.Model.from_pretrained(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="tail"):
        orchvlm.Model.from_pretrained(tmp_path)


def file(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one(**change):
    return {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **change}}


HOSTILE = [
    b"", b"\0" * 8, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2**64 - 1) + b"{}",
    file(b"[]"), file(b"null"), file(b"{"), file(b"\xff\xfe"), file(b"[" * 100000),
    file({"x": 3}), file({"x": []}), file(one(dtype="F31"), b"abcd"),
    file(one(dtype=[]), b"abcd"), file(one(shape=[-1]), b"abcd"), file(one(shape=[2]), b"abcd"),
    file(one(shape=[2**40, 2**40]), b"abcd"), file(one(shape=[True]), b"abcd"),
    file(one(shape=[1.0]), b"abcd"), file(one(shape="1"), b"abcd"), file(one(shape=1), b"abcd"),
    file(one(data_offsets=[4, 0]), b"abcd"), file(one(data_offsets=[0]), b"abcd"),
    file(one(data_offsets=[-4, 0]), b"abcd"), file(one(data_offsets=[0, 4, 8]), b"abcd"),
    file(one(data_offsets=[1, 5]), b"abcde"), file(one(), b"abcdefgh"), file(one(), b"abc"),
    file({**one(), "y": one()["x"]}, b"abcd"),
    file(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         b'"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"abcd"),
    file(b'{"x":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,4]}}', b"abcd"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_headers(number, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[number])
    with pytest.raises(ValueError):
        SafeTensors(path)


def test_bytes_from_nowhere(tmp_path):
    """Whatever is in the file: a reader, or ValueError, or OSError; and what it reads is inside."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    path = tmp_path / "fuzzed.safetensors"
    leaf = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**62, 2**64, None, True, 1.5]),
                     st.text(max_size=3))
    entry = st.one_of(leaf, st.fixed_dictionaries({
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "F64"]), leaf),
        "shape": st.one_of(st.lists(st.integers(0, 3), max_size=3), leaf),
        "data_offsets": st.one_of(st.lists(st.integers(0, 32), min_size=2, max_size=2), leaf)}))
    header = st.dictionaries(st.text(max_size=3), entry, max_size=3).map(
        lambda h: json.dumps(h).encode())
    raw = st.one_of(header, st.binary(max_size=40))
    length = st.one_of(st.none(), st.integers(0, 60), st.sampled_from([2**32, 2**63, 2**64 - 1]))

    @hypothesis.settings(max_examples=int(os.environ.get("ORCHVLM_FUZZ_EXAMPLES", 1000)),
                         deadline=None)
    @hypothesis.given(raw, length, st.binary(max_size=48))
    def run(raw, length, data):
        path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
        try:
            opened = SafeTensors(path)
        except (ValueError, OSError):
            return
        for name in opened.tensors:
            assert opened.read(name).shape == opened.tensors[name][3]
    run()


@pytest.mark.parametrize("text", ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"x": 3}}',
                                  '{"weight_map": {"x": "../model.safetensors"}}', "\x00",
                                  '{"weight_map": {"x": "/etc/passwd"}}',
                                  '{"weight_map": {"y": "model.safetensors"}}',
                                  '{"weight_map": {"x": ["a"]}}', '{"weight_map": {"x": ".."}}'))
def test_hostile_indices(text, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(file(one(), b"abcd"))
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises((ValueError, OSError)):
        open_folder(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        orchvlm.Model.from_pretrained("someone/some-model")
    with pytest.raises(FileNotFoundError):
        orchvlm.Model.from_pretrained(tmp_path)
    draw().config.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        orchvlm.Model.from_pretrained(tmp_path)


def test_nothing_is_left_half_written(tmp_path):
    """A write that fails leaves the file of before, and no other."""
    model = draw()
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail():
        raise OSError("no space")
    with pytest.raises(OSError, match="no space"):
        write_folder(tmp_path, [("x", (2,), lambda: np.zeros(2, np.float32)), ("y", (2,), fail)])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="dtype"):
        model.save_pretrained(tmp_path / "new", dtype="float16")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- configurations

@pytest.mark.parametrize("part, change, words", (
    ("text_config", {"attention_dropout": 0.1}, "dropout"),
    ("vision_config", {"attention_dropout": 0.1}, "dropout"),
    ("text_config", {"sliding_window": 4096}, "sliding_window"),
    ("text_config", {"hidden_act": "relu"}, "hidden_act"),
    ("vision_config", {"hidden_act": "relu"}, "hidden_act"),
    ("text_config", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0},
                     "rope_parameters": None}, "rope_type"),
    ("text_config", {"head_dim": 7}, "head_dim"),
    ("text_config", {"num_attention_heads": "4"}, "num_attention_heads"),
    ("text_config", {"hidden_size": 2.5}, "hidden_size"),
    ("text_config", {"hidden_size": None}, "hidden_size missing"),
    ("text_config", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("text_config", {"scoring_func": "tanh"}, "scoring_func"),
    ("vision_config", {"num_position_embeddings": 5}, "square"),
    ("vision_config", {"fullatt_block_indexes": [1]}, "fullatt_block_indexes"),
    ("vision_config", {"deepstack_visual_indexes": [99]}, "deepstack"),
    # off, or nothing: it may be on in the model
    ("text_config", {"use_qk_norm": False}, "use_qk_norm must be True.* got False"),
    ("text_config", {"is_causal": False}, "is_causal"),
    ("text_config", {"some_switch": False}, "some_switch.* got False"),
    ("text_config", {"some_switch": None}, "some_switch.* got None"),
    ("text_config", {"num_experts": 0}, "num_experts"),
    ("vision_config", {"qkv_bias": False}, "qkv_bias"),
    ("vision_config", {"window_size": 0}, "window_size.* got 0"),
    ("vision_config", {"extra": []}, r"extra.* got \[\]"),
    ("text_config", {"layer_types": ["linear_attention"]}, "layer_types.*linear_attention"),
    # numbers and types
    ("text_config", {"rms_norm_eps": np.inf}, "rms_norm_eps.* got inf"),
    ("text_config", {"rms_norm_eps": True}, "rms_norm_eps"),
    ("text_config", {"attention_bias": "false"}, "attention_bias.* got 'false'"),
    ("vision_config", {"num_position_embeddings": -4}, "num_position_embeddings.* got -4"),
    ("vision_config", {"deepstack_visual_indexes": 3}, "deepstack_visual_indexes.* got 3"),
    ("vision_config", {"hidden_act": ["gelu"]}, "hidden_act")))
def test_switches_that_are_not_computed_are_refused(part, change, words):
    config = draw_config(np.random.default_rng(SEED), False)
    config[part] = {**config[part], **change}
    with pytest.raises(ValueError, match=words):
        orchvlm.Model(config)


DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def _docs_rows(title, columns):
    """Rows of the table under a heading of the page on models."""
    if not DOCS.exists():
        pytest.skip("no docs here")
    body = DOCS.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in body.splitlines() if line.startswith("|")]
    assert len(rows) > 10 and all(len(row) == columns for row in rows), title
    return rows[2:]


def test_what_the_docs_call_refused():
    rng = np.random.default_rng(SEED)
    for key, part, value, _ in _docs_rows("Refused", 4):
        key, part, value = key.strip("`"), part.strip("`"), json.loads(value.strip("`"))
        for config in (draw_config(rng, False), draw_config(rng, True), draw_omni_config(rng),
                       draw_seed_config(rng, True)):
            orchvlm.ModelConfig(config)
            (config if part == "the top" else config[part])[key] = value
            with pytest.raises(ValueError, match=f"{key}.* got "):
                orchvlm.ModelConfig(config)


def test_what_the_docs_call_computed():
    parts, families = {"v": "vision_config", "a": "audio_config", "t": "text_config"}, (
        config_keys._KEYS.values())
    for *_, keys in _docs_rows("Computed", 3):
        for part, key in re.findall(r"([vatr]) `(\w+)`", keys):
            assert key in config_keys._ROPE_SEED if part == "r" else any(
                key in family.get(parts[part], {}) for family in families), key


@pytest.mark.parametrize("key, value", (
    ("image_token_id", "x"), ("image_token_id", -5), ("video_token_id", 1.5),
    ("tie_word_embeddings", "no"), ("tie_word_embeddings", 1), ("extra", False),
    ("quantization_config", None)))
def test_what_the_top_of_a_configuration_may_not_say(key, value):
    config = draw_config(np.random.default_rng(SEED), False)
    with pytest.raises(ValueError, match=f"{key}.* got {value!r}"):
        orchvlm.ModelConfig({**config, key: value})


@pytest.mark.parametrize("key, value", (
    ("factor", 8.0), ("attention_factor", None), ("mrope_section", "abc"),
    ("mrope_section", [1, 2]), ("mrope_section", [9, -1, 2]), ("rope_theta", [1]),
    ("rope_theta", 0), ("rope_theta", np.nan), ("mrope_interleaved", "yes"),
    ("rope_type", "dynamic"), ("partial_rotary_factor", 0.5)))
def test_what_rotary_parameters_may_not_say(key, value):
    config = draw_config(np.random.default_rng(SEED), False)
    config["text_config"]["rope_parameters"][key] = value
    with pytest.raises(ValueError, match=f"{key}.* got "):
        orchvlm.ModelConfig(config)


@pytest.mark.parametrize("value", (0, -0.5, 1.5, "0.5", True, np.nan))
def test_the_part_of_a_head_that_turns(value):
    config = draw_seed_config(np.random.default_rng(SEED), False)
    config["text_config"]["rope_parameters"]["partial_rotary_factor"] = value
    with pytest.raises(ValueError, match="partial_rotary_factor must be a number above 0"):
        orchvlm.ModelConfig(config)
    # 7 elements of 14: no half of them turns with the other
    config["text_config"] |= {"head_dim": 14, "rope_parameters": {
        "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    with pytest.raises(ValueError, match="turn must be even"):
        orchvlm.ModelConfig(config).parameters()


@pytest.mark.parametrize("key, value", (
    ("router_aux_loss_coef", np.nan), ("router_aux_loss_coef", -1), ("norm_topk_prob", "no"),
    ("scoring_func", "sigmoid"), ("shared_expert_intermediate_size", 8), ("n_group", 2),
    ("routed_scaling_factor", 2.5), ("mlp_only_layers", ["a"]), ("num_experts", 4.0)))
def test_what_experts_may_not_say(key, value):
    """Of Qwen3-VL's: transformers' class has no other router."""
    config = draw_config(np.random.default_rng(SEED), True)
    config["text_config"][key] = value
    with pytest.raises(ValueError, match=f"{key}.* got "):
        orchvlm.ModelConfig(config)


def test_what_is_left_out_is_what_transformers_classes_take():
    config = draw_config(np.random.default_rng(SEED), True)
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        del config["text_config"][key]
    del config["vision_config"]["deepstack_visual_indexes"]
    config["vision_config"]["depth"] = 27
    config["text_config"] |= {"num_key_value_heads": None, "head_dim": None,
                              "num_hidden_layers": 3}
    made = orchvlm.ModelConfig(config)
    heads = made.text["num_attention_heads"]
    assert [made.text[k] for k in ("num_experts", "num_experts_per_tok", "head_dim",
                                   "num_key_value_heads")] == [
        60, 4, made.text["hidden_size"] // heads, heads]
    assert made.vision["deepstack_visual_indexes"] == [8, 16, 24]
    assert orchvlm.ModelConfig(made.values) == made


def test_families_that_are_not_known():
    for values in ({}, {"model_type": "llama"}, {"model_type": "qwen3_vl"},
                   {"model_type": "qwen3_vl", "text_config": {}, "vision_config": {}}):
        with pytest.raises(ValueError):
            orchvlm.ModelConfig(values)


def test_an_unknown_key_that_is_off_is_fine():
    config = draw_config(np.random.default_rng(SEED), False)
    config["text_config"] |= {"attention_dropout": 0.0, "sliding_window": None, "use_cache": True}
    orchvlm.ModelConfig(config)
