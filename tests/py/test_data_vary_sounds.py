"""Recordings that never sound alike: functions of seed and item, in bounds, the words untouched."""
import io
import os
import time
import wave

import numpy as np
import pytest

from orchvlm import data

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))


def spoken(n, rng, rate=8000):
    """n samples with a sound each, and one of text alone."""
    made = []
    for i in range(n):
        body = io.BytesIO()
        with wave.open(body, "wb") as out:
            out.setparams((1, 2, rate, 0, "NONE", ""))
            out.writeframes(rng.integers(-9000, 9000, 1000 + 100 * i).astype("<i2").tobytes())
        made.append({"number": i, "answer": str(i), "messages": [
            {"role": "user", "content": [{"type": "audio", "audio": body.getvalue()},
                                         {"type": "text", "text": "Which?"}]},
            {"role": "assistant", "content": str(i)}]})
    return [*made, {"number": n, "messages": [{"role": "user", "content": "Hm?"},
                                              {"role": "assistant", "content": "ha"}]}]


def sound(sample):
    return sample["messages"][0]["content"][0]["audio"]


def test_a_function_of_seed_and_item():
    print("seed", SEED)
    samples = spoken(6, np.random.default_rng(SEED))
    one, two, other = (data.VariedSounds(samples, seed) for seed in (3, 3, 4))
    order = np.random.default_rng(SEED).permutation(21).tolist()
    kept = {k: one[k] for k in range(21)}
    for k in order:
        again = two[k]
        assert again["number"] == kept[k]["number"]
        if again["number"] < 6:
            np.testing.assert_array_equal(sound(again)[0], sound(kept[k])[0])
    for turn in range(3):  # every sample once in a pass
        assert sorted(kept[7 * turn + i]["number"] for i in range(7)) == list(range(7))
    assert any(other[k]["number"] != kept[k]["number"] for k in range(21))


def test_what_changes_and_what_does_not():
    samples = spoken(5, np.random.default_rng(SEED))
    varied, rates, levels = data.VariedSounds(samples, SEED), set(), []
    for k in range(120):
        got = varied[k]
        whole = samples[got["number"]]
        assert got["messages"][1] == whole["messages"][1]
        if got["number"] == 5:
            assert got == whole
            continue
        assert got["messages"][0]["content"][1] == whole["messages"][0]["content"][1]
        heard, rate = sound(got)
        plain, own = data.read_wav(sound(whole))
        assert own == 8000 and 6800 <= rate <= 9600 and rate % 400 == 0
        assert len(plain) <= len(heard) <= len(plain) + 2 * 1200
        rates.add(rate)
        levels.append(20 * np.log10(np.abs(heard).max() / np.abs(plain).max()))
    assert len(rates) > 4 and min(levels) < -6 and max(levels) > 6
    assert min(levels) > -13 and max(levels) < 15
    inputs = data.Processor(family="qwen3_omni_moe")([varied[k] for k in range(6)])
    assert len(inputs.mel_lengths) == 5  # all but the text


def test_refused():
    with pytest.raises(TypeError, match="sequence"):
        data.VariedSounds(iter([1]))
    with pytest.raises(ValueError, match="empty"):
        data.VariedSounds([])
    for seed, kind in ((-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(kind, match="seed"):
            data.VariedSounds([{}], seed)
    for k, kind in ((-1, IndexError), (1.5, TypeError), (True, TypeError), ("a", TypeError)):
        with pytest.raises(kind, match="number"):
            data.VariedSounds([{}])[k]
    with pytest.raises(data.DataError, match="WAV"):
        data.VariedSounds([{"messages": [{"role": "user", "content": [
            {"type": "audio", "audio": b"nothing"}]}]}])[0]
