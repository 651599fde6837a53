"""Sounds: against the wave module, scipy's resampler, transformers' features, and bad files."""
import io
import os
import secrets
import struct
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchvlm import data

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))


def wav(samples, width, rate=8000):
    """A file as the standard library writes it; samples are whole numbers, (n, channels)."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        low = 128 if width == 1 else 0
        file.writeframes(b"".join(int(v + low).to_bytes(width, "little", signed=width > 1)
                                  for v in samples.reshape(-1)))
    return out.getvalue()


def riff(form, body, before=b""):
    chunks = before + b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_widths_and_channels(width, channels):
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    most = 2**(8 * width - 1)
    samples = rng.integers(-most, most, (50, channels))
    values, rate = data.read_wav(wav(samples, width, 11025))
    assert rate == 11025 and values.dtype == np.float32
    np.testing.assert_allclose(values, (samples / most).mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("bits, kind", [(32, "<f4"), (64, "<f8")])
def test_floating_point_and_other_chunks(bits, kind):
    body = np.array([0.5, -0.25, 1.5]).astype(kind).tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 16000, 0, bits // 8, bits)
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # chunks are padded to even lengths
    assert data.read_wav(riff(form, body, odd))[0].tolist() == [0.5, -0.25, 1.5]


def test_the_extensible_header():
    form = struct.pack("<HHIIHH", 0xFFFE, 1, 16000, 0, 3, 24) + struct.pack("<HHIH", 22, 24, 4, 1)
    form += b"\0" * 14
    assert data.read_wav(riff(form, b"\0\0\x40"))[0].tolist() == [0.5]


def test_a_stream_that_was_never_finished():
    content = bytearray(wav(np.array([[16384], [0]]), 2))
    content[40:44] = b"\xff\xff\xff\xff"
    assert data.read_wav(bytes(content))[0].tolist() == [0.5, 0]


@pytest.mark.parametrize("content, words", [
    (b"", "not a WAV"), (b"RIFF\0\0\0\0WAVE", "without samples"),
    (riff(struct.pack("<HHIIHH", 6, 1, 8000, 0, 1, 8), b"\0"), "format 6"),
    (riff(struct.pack("<HHIIHH", 1, 0, 8000, 0, 0, 16), b"\0"), "0 channels"),
    (riff(struct.pack("<HHIIHH", 1, 2, 8000, 0, 2, 16), b"\0"), "blocks of 2"),
    (riff(struct.pack("<HHIIHH", 1, 1, 0, 0, 2, 16), b"\0\0"), "0 samples per second"),
    (riff(struct.pack("<HHIIHH", 1, 1, 8000, 0, 2, 16), b"\0"), "no samples in it"),
    (riff(struct.pack("<HHIIHH", 3, 1, 8000, 0, 4, 32), b"\0\0\xc0\x7f"), "not finite"),
    (wav(np.zeros((100, 1)), 2)[:-80], "breaks off behind 120 of 200 bytes"),
    (riff(b"\1\0", b"\0\0"), "fmt"),
])
def test_refused(content, words):
    with pytest.raises(data.DataError, match=words):
        data.read_wav(content)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)),
                                         max_size=5))
def test_junk(tail, changes):
    good = bytearray(wav(np.arange(30).reshape(-1, 1), 2) + tail)
    for place, value in changes:
        good[place] = value
    for content in (bytes(good), tail, b"RIFF0000WAVE" + tail):
        try:
            values, rate = data.read_wav(content)
            assert np.isfinite(values).all() and rate > 0
        except data.DataError:
            pass


# ---------------------------------------------------------------- rates

@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 12345])
def test_resampling_equals_scipys(rate):
    signal = pytest.importorskip("scipy.signal", reason="scipy is the reference")
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for n in (1, 7, 3000):
        samples = rng.standard_normal(n)
        common = np.gcd(rate, 16000)
        want = signal.resample_poly(samples, 16000 // common, rate // common)
        got = data.resample(samples, rate)
        assert got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_tone_stays_a_tone():
    time = np.arange(8000) / 8000
    got = data.resample(np.sin(2 * np.pi * 440 * time), 8000)
    want = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(got - want)[200:-200].max() < 2e-3


@pytest.mark.parametrize("arguments, error", [
    (([1.0], 8000.0), TypeError), (([1.0], 10), ValueError), (([[1.0]], 8000), ValueError),
    ((["a"], 8000), TypeError), (([np.inf], 8000), ValueError)])
def test_rates_refused(arguments, error):
    with pytest.raises(error):
        data.resample(*arguments)


# ---------------------------------------------------------------- features

@pytest.mark.parametrize("bins", [80, 128])
def test_equal_to_transformers(bins):
    module = pytest.importorskip("transformers.models.whisper.feature_extraction_whisper",
                                 reason="needs transformers")
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    extractor = module.WhisperFeatureExtractor(feature_size=bins)
    for n in (480, 16000, 16001, 33333, int(rng.integers(500, 50_000))):
        loud = 10.0**rng.uniform(-4, 0)
        samples = (loud * rng.standard_normal(n)).astype(np.float32)
        samples[:n // 3] = 0
        want = extractor(samples, sampling_rate=16000, padding=True, return_attention_mask=True,
                         return_tensors="np")
        got = data.log_mel(samples, bins)
        assert len(got) == int(want["attention_mask"].sum())
        assert np.abs(got - want["input_features"][0].T).max() <= 1e-4


def test_features_by_the_definition():
    """A tone's greatest bin is the one whose triangle stands over it, by an own mel scale."""
    for hertz in (200.0, 950.0, 3000.0, 7000.0):
        mel = data.log_mel(np.sin(2 * np.pi * hertz * np.arange(8000) / 16000))
        def scale(f):
            return f / (200 / 3) if f < 1000 else 15 + np.log(f / 1000) / (np.log(6.4) / 27)
        want = scale(hertz) / (scale(8000.0) / 129) - 1
        assert abs(int(mel[25].argmax()) - want) <= 1
    assert (data.log_mel(np.zeros(1600)) == np.float32(-1.5)).all()


def test_long_sounds_are_transformed_in_pieces():
    samples = np.random.default_rng(5).standard_normal(160 * 5000)
    whole = data.log_mel(samples)
    assert len(whole) == 5000
    # Frames in the middle depend on their own window alone, but for the common floor.
    part = data.log_mel(samples[160 * 4050:160 * 4150])
    np.testing.assert_allclose(whole[4053:4147], part[3:97], atol=1e-5)


def test_token_counts_against_three_convolutions():
    """Each is a sum over the places that a kernel of 3, stride 2, padding 1 can take."""
    def brute(frames):
        total = 0
        for start in range(0, frames, 100):
            length = min(100, frames - start)
            for _ in range(3):
                length = len([k for k in range(-1, length + 1) if (k + 1) % 2 == 0
                              and k + 2 <= length])
            total += length
        return total
    for n in range(1, 450):
        assert data.audio_tokens(n) == brute(n), n
    assert data.audio_tokens(0) == 0 and data.audio_tokens(100) == 13


def test_any_source():
    want = data.load_sound((np.linspace(-1, 1, 4000), 8000))
    assert np.array_equal(want, data.load_sound(
        {"array": np.linspace(-1, 1, 4000), "sampling_rate": 8000}))
    stereo = np.stack([np.linspace(-1, 1, 4000)] * 2)
    np.testing.assert_allclose(data.load_sound((stereo, 8000)), want, atol=1e-6)
    with pytest.raises(data.DataError, match="more than 200 samples"):
        data.load_sound((np.zeros(9), 16000))
    with pytest.raises(TypeError):
        data.load_sound(7)
