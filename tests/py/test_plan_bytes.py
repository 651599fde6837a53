"""The plan container: round trips, determinism, and no trust in what it reads."""
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from orchvlm import _bytes

ARRAYS = {"b": np.arange(5), "a": np.array([1.5, np.inf, -0.0]), "empty": np.zeros(0, np.int64),
          "two": np.arange(6).reshape(2, 3)}
GOOD = _bytes.pack("kind", ARRAYS, {"x": 1, "name": "\u00e9"})


def same(left, right):
    return set(left) == set(right) and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape
        and left[k].tobytes() == right[k].tobytes() for k in left)


def test_round_trip_and_determinism():
    arrays, header = _bytes.unpack("kind", GOOD)
    assert same(arrays, ARRAYS) and header == {"x": 1, "name": "\u00e9"}
    assert arrays["b"].flags.writeable
    shuffled = {name: ARRAYS[name] for name in sorted(ARRAYS)}
    assert _bytes.pack("kind", shuffled, {"name": "\u00e9", "x": 1}) == GOOD
    assert _bytes.pack("kind", {}) != GOOD and len(_bytes.digest(GOOD)) == 64


def test_layout_is_safetensors():
    length = int.from_bytes(GOOD[:8], "little")
    header = json.loads(GOOD[8:8 + length])
    assert length % 8 == 0
    assert all(isinstance(v, str) for v in header.pop("__metadata__").values())
    assert header["two"]["shape"] == [2, 3] and header["two"]["dtype"] == "I64"
    begin, end = header["b"]["data_offsets"]
    assert np.frombuffer(GOOD[8 + length:][begin:end], "<i8").tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutations_are_refused(data):
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(changed)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "end"])):
            case "flip" if position < len(changed):
                changed[position] ^= data.draw(st.integers(1, 255))
            case "cut":
                del changed[position:position + data.draw(st.integers(1, 9))]
            case "insert":
                changed[position:position] = data.draw(st.binary(min_size=1, max_size=9))
            case "end":
                del changed[position:]
    if bytes(changed) == GOOD:
        assert same(_bytes.unpack("kind", changed)[0], ARRAYS)
        return
    with pytest.raises(ValueError):
        _bytes.unpack("kind", changed)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.booleans(),
    lambda s: st.lists(s, max_size=4) | st.dictionaries(
        st.sampled_from(["__metadata__", "kind", "version", "header", "sha256", "dtype", "shape",
                         "data_offsets", "a"]), s, max_size=5), max_leaves=20))
def test_garbage_is_refused(raw, value):
    text = json.dumps(value).encode()
    for data in (raw, len(text).to_bytes(8, "little") + text + raw):
        with pytest.raises(ValueError):
            _bytes.unpack("kind", data)


@pytest.mark.parametrize("entry", [
    [], {"dtype": "I64"}, {"dtype": "I32", "shape": [1], "data_offsets": [0, 8]},
    {"dtype": ["I64"], "shape": [1], "data_offsets": [0, 8]},
    {"dtype": "I64", "shape": [True], "data_offsets": [0, 8]},
    {"dtype": "I64", "shape": [-1], "data_offsets": [0, -8]},
    {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
    {"dtype": "I64", "shape": [1], "data_offsets": [0, 7]},
    {"dtype": "I64", "shape": [1], "data_offsets": [0.5, 8]},
    {"dtype": "I64", "shape": [1, 1, 1, 1, 1], "data_offsets": [0, 8]},
    {"dtype": "I64", "shape": [10**400], "data_offsets": [0, 8]},
])
def test_well_signed_nonsense_is_refused(entry):
    """The checksum is right: only the fields are wrong."""
    body = bytes(8)
    try:
        text = _bytes._text("kind", "{}", {"a": entry}, body)
    except ValueError:
        pytest.skip("cannot be written")
    with pytest.raises(ValueError, match="not valid plan bytes"):
        _bytes.unpack("kind", len(text).to_bytes(8, "little") + text + body)


def test_wrong_use():
    with pytest.raises(ValueError, match="expected 'other'"):
        _bytes.unpack("other", GOOD)
    with pytest.raises(TypeError, match="bytes-like"):
        _bytes.unpack("kind", "text")
    with pytest.raises(TypeError, match="int64 or float64"):
        _bytes.pack("kind", {"a": np.zeros(1, np.int32)})
    with pytest.raises(ValueError, match="reserved"):
        _bytes.pack("kind", {"__metadata__": np.zeros(1)})
    with pytest.raises(ValueError):
        _bytes.pack("kind", {}, {"x": float("nan")})
    deep = b'{"a":' * 3000 + b"1" + b"}" * 3000
    with pytest.raises(ValueError):
        _bytes.unpack("kind", len(deep).to_bytes(8, "little") + deep)
