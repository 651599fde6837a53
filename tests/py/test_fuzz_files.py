"""Files of models with a part of them changed: only TypeError, ValueError, MemoryError and
orchvlm.Error come out, and FileNotFoundError for a shard that is not there.

Seeds are fresh on every run and printed; ORCHVLM_TEST_SEED repeats one, ORCHVLM_FUZZ_EXAMPLES sets
the number of changed files.
"""
import copy
import json
import os
import random
import time

import numpy as np
import pytest

import orchvlm
from model_cases import draw_config, draw_model, draw_seed_config
from omni_cases import draw_omni_config

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
EXAMPLES = int(os.environ.get("ORCHVLM_FUZZ_EXAMPLES", "200"))
FAIR = (TypeError, ValueError, MemoryError, orchvlm.Error)
JUNK = (None, True, False, 0, 1, -1, 2, 3, 7, 64, 0.5, -0.0, 1e308, float("inf"), float("nan"),
        2**31, 2**63, 10**400, "", "x", "0", "qwen3_vl", "silu", "default", "\0", "é" * 300, [], {},
        [0], [1, 2, 3], [-1], ["a"], [[]], {"": None}, {"type": "yarn"})
KEYS = ("use_qk_norm", "sliding_window", "rope_type", "factor", "num_experts", "n_group",
        "scoring_func", "attention_dropout", "weight_map", "r", "", "é")


@pytest.fixture(autouse=True)
def seed(request):
    """Printed by a failing test."""
    print(f"ORCHVLM_TEST_SEED={SEED}")


def places(value, path=()):
    """Paths to everything inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()
    for key, one in inside:
        yield (*path, key)
        yield from places(one, (*path, key))


def change_value(rng, values):
    """One part becomes junk or another part, goes, or gets company."""
    path = rng.choice(list(places(values)))
    at = values
    for key in path[:-1]:
        at = at[key]
    kind = rng.random()
    if kind < 0.6:
        at[path[-1]] = copy.deepcopy(rng.choice(JUNK))
    elif kind < 0.7:
        other = values
        for key in rng.choice(list(places(values))):
            other = other[key]
        at[path[-1]] = copy.deepcopy(other)
    elif kind < 0.85 or not isinstance(at, dict):
        del at[path[-1]]
    else:
        at[rng.choice(KEYS)] = copy.deepcopy(rng.choice(JUNK))


def change_text(rng, text):
    """Bytes of the file: cut off, overwritten, or with much nesting inside."""
    at = rng.randrange(len(text))
    kind = rng.random()
    if kind < 0.3:
        return text[:at]
    if kind < 0.6:
        return text[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 4))) + text[
            at + 1:]
    if kind < 0.7:
        return text[:at] + b"9" * rng.choice((20, 5000)) + text[at:]
    depth = rng.choice((3, 200, 400, 900, 100_000))
    more = rng.choice((b"[", b'{"a":')) * depth
    close = (b"]" if more[:1] == b"[" else b"0" + b"}") * depth if rng.random() < 0.7 else b""
    if kind < 0.8:
        return more + close
    colon = text.find(b":", at)
    return text[:colon + 1] + more + close + b"," + text[colon + 1:]


def changed(rng, values):
    """The bytes of a file that once was fine."""
    values = copy.deepcopy(values)
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 3)):
            if values:
                change_value(rng, values)
    text = json.dumps(values).encode()
    return text if rng.random() < 0.7 else change_text(rng, text)


def attempt(rng, values, path, read, fair=FAIR, slower=1):
    for _ in range(EXAMPLES // slower):
        path.write_bytes(text := changed(rng, values))
        try:
            read()
        except fair as error:
            assert len(str(error)) > 5, text[:300]
        except Exception as error:
            raise AssertionError(f"{path.name} = {text[:2000]!r} raised {error!r}") from error


@pytest.mark.parametrize("family", ("dense", "experts", "seed", "omni"))
def test_config_json(family, tmp_path):
    draw = {"dense": lambda r: draw_config(r, False), "experts": lambda r: draw_config(r, True),
            "seed": lambda r: draw_seed_config(r, True), "omni": draw_omni_config}[family]
    values = orchvlm.ModelConfig(draw(np.random.default_rng(SEED))).values

    def read():
        config = orchvlm.ModelConfig.load(tmp_path)
        layers = sum(part.get(key, 0) for part, key in (
            (config.text, "num_hidden_layers"), (config.vision, "depth")))
        if layers < 200:  # more are only slow
            assert config.n_parameters > 0
    attempt(random.Random(f"{SEED} {family}"), values, tmp_path / "config.json", read)


def test_index_of_shards(tmp_path):
    model = draw_model(0, draw_config(np.random.default_rng(SEED), True), threads=1)
    model.save_pretrained(tmp_path)
    names = list(orchvlm.checkpoint.open_folder(tmp_path))
    os.rename(tmp_path / "model.safetensors", tmp_path / "model-00001-of-00001.safetensors")
    values = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(
        names, "model-00001-of-00001.safetensors")}
    attempt(random.Random(f"{SEED} index"), values, tmp_path / "model.safetensors.index.json",
            lambda: orchvlm.Model.from_pretrained(tmp_path, threads=1),
            (*FAIR, FileNotFoundError), slower=2)


def test_adapter_config(tmp_path):
    model = draw_model(0, draw_config(np.random.default_rng(SEED), False), threads=1)
    model.add_lora(r=2)
    model.save_adapter(tmp_path)
    model.remove_lora()

    def read():
        model.load_adapter(tmp_path)
        model.remove_lora()
    path = tmp_path / "adapter_config.json"
    attempt(random.Random(f"{SEED} adapter"), json.loads(path.read_text()), path, read,
            slower=2)
