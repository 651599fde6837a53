"""Sounds: WAV files to log-mel frames at 16 kHz, as the Whisper and Qwen3-Omni encoders take them.
"""
import functools
import math
import struct

import numpy as np

from ..sounds import sound_tokens
from .assets import DataError, as_asset

RATE = 16_000      # samples per second that the encoders take
WINDOW = 400       # samples of a Fourier window: 25 ms
HOP = 160          # samples from one frame to the next: 10 ms
MOST_SECONDS = 4 * 3600
RATES = (1_000, 768_000)
_UNKNOWN_BYTES = 0x7FFF0000


def read_wav(source, name="sound"):
    """The samples of a WAV file, its channels averaged.

    Parameters
    ----------
    source : path, bytes or Asset
        Plain PCM of 8, 16, 24 or 32 bits, or floating point of 32 or 64; also under the extensible
        header.

    name : str
        What messages call it.

    Returns
    -------
    (float32[n], int)
        Samples in -1 .. 1, and how many there are per second.

    Raises
    ------
    TypeError
        A source of another kind.
    DataError
        A file that is no WAV, cut off, compressed or empty.  One written by a stream that never
        filled in its length is read to its end.

    Examples
    --------
    >>> import io, wave, orchvlm
    >>> file = io.BytesIO()
    >>> with wave.open(file, "wb") as out:
    ...     out.setparams((1, 2, 8000, 0, "NONE", ""))
    ...     out.writeframes(b"\\x00\\x40\\x00\\xc0")
    >>> orchvlm.data.read_wav(file.getvalue())
    (array([ 0.5, -0.5], dtype=float32), 8000)
    """
    asset = as_asset(source, name)
    if asset is None:
        raise TypeError(f"{name}: a sound must be a path, bytes or an Asset; got "
                        f"{type(source).__name__}")
    name = asset.name
    kind, channels, rate, width, block, body = _chunks(asset.read(), name)
    n = len(body) // block
    if n < 1:
        raise DataError(f"{name}: no samples in it")
    if n > MOST_SECONDS * rate:
        raise DataError(f"{name}: {n / rate:.0f} seconds are more than {MOST_SECONDS}; cut it")
    values = _samples(np.frombuffer(body, np.uint8, n * block), kind, width)
    values = values.reshape(n, channels).mean(axis=1, dtype=np.float64).astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{name}: it holds samples that are not finite")
    return values, rate


def _chunks(content, name):
    """Format and samples of a RIFF file.  The standard library's reader knows neither floating
    point nor, before Python 3.12, the extensible header that 24-bit files usually have."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise DataError(f"{name}: not a WAV file (RIFF with WAVE)")
    place, form = 12, None
    while place + 8 <= len(content):
        tag, size = struct.unpack_from("<4sI", content, place)
        start = place + 8
        if tag == b"fmt ":
            form = content[start:start + min(size, 40)]
        elif tag == b"data":
            # A stream whose length was never filled in claims all that the field can hold, or
            # nearly; any other length is that of the whole file.
            if len(content) - start < size < _UNKNOWN_BYTES:
                raise DataError(f"{name}: it breaks off behind {len(content) - start:,} of "
                                f"{size:,} bytes of samples")
            return *_format(form, name), content[start:start + size]
        place = start + size + size % 2
    raise DataError(f"{name}: a WAV file without samples (no 'data' chunk)")


def _format(form, name):
    if form is None or len(form) < 16:
        raise DataError(f"{name}: the 'fmt ' chunk is missing, short or behind the samples")
    kind, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", form)
    if kind == 0xFFFE and len(form) >= 26:
        kind = struct.unpack_from("<H", form, 24)[0]
    width = bits // 8
    if (kind, bits) not in {(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)}:
        raise DataError(f"{name}: format {kind} with {bits} bits; known: PCM of 8, 16, 24 and 32 "
                        "bits and floating point of 32 and 64: convert it")
    if not 1 <= channels <= 64 or block != channels * width:
        raise DataError(f"{name}: {channels} channels in blocks of {block} bytes make no sense")
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(f"{name}: {rate} samples per second; {RATES[0]} to {RATES[1]} make sense")
    return kind, channels, rate, width, block


def _samples(raw, kind, width):
    if kind == 3:
        return raw.view(f"<f{width}")
    if width == 1:  # the one unsigned width
        return (raw.astype(np.float32) - 128) / 128
    if width == 3:  # the three bytes become the upper ones of four
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = raw.reshape(-1, 3)
        return wide.reshape(-1).view("<i4").astype(np.float64) / 2**31
    return raw.view(f"<i{width}").astype(np.float64) / 2**(8 * width - 1)


def resample(samples, rate, to=RATE):
    """Samples at another rate, through a windowed-sinc low pass.

    Parameters
    ----------
    samples : float[n]
        Any rate.
    rate, to : int
        Samples per second before and after, 1,000 to 768,000.

    Returns
    -------
    float32[n]
        ``ceil(len(samples) * to / rate)`` of them.

    Raises
    ------
    TypeError
        Rates that are no integers, samples that are no numbers.
    ValueError
        A rate out of range, samples of more than one dimension.

    Notes
    -----
    A polyphase filter: a sinc cut off at the lower Nyquist frequency, ten of its zero crossings to
    each side under a Kaiser window (beta 5), which is what ``scipy.signal.resample_poly`` does.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> len(orchvlm.data.resample(np.ones(100), 8000))
    200
    """
    for name, value in (("rate", rate), ("to", to)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
        if not RATES[0] <= value <= RATES[1]:
            raise ValueError(f"{name} must be in {RATES[0]} .. {RATES[1]}; got {value}")
    samples = _one_channel(samples)
    common = math.gcd(int(rate), int(to))
    up, down = int(to) // common, int(rate) // common
    if up == down or not len(samples):
        return samples.astype(np.float32)
    half = 10 * max(up, down)
    reach = half // up + 1             # input samples on either side of an output
    margin = (reach + 1) * up          # zeros about the filter, so that no index leaves it
    taps = np.pad(_low_pass(half, max(up, down)) * up, margin)
    padded = np.pad(samples.astype(np.float64), reach)
    n_out = -(-len(samples) * up // down)
    out = np.empty(n_out, np.float32)
    offsets = np.arange(-reach, reach + 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(offsets))
    for phase in range(min(up, n_out)):
        # Output m lies at m*down on the grid of `up` points per input, input k at k*up: every
        # up-th output meets the same part of the filter, `down` inputs further on.
        at = phase * down
        part = out[phase::up]
        part[:] = windows[at // up::down][:len(part)] @ taps[at % up + half + margin - offsets * up]
    return out


def _one_channel(samples):
    samples = np.asarray(samples)
    if samples.dtype.kind not in "iuf":
        raise TypeError(f"samples must be numbers; got dtype {samples.dtype}")
    if samples.ndim != 1:
        raise ValueError(f"samples must have one dimension; got shape {samples.shape}")
    if samples.size and not np.isfinite(samples).all():
        raise ValueError("samples must be finite")
    return samples


@functools.lru_cache(maxsize=8)
def _low_pass(half, divisor):
    place = np.arange(-half, half + 1)
    taps = np.sinc(place / divisor) * np.kaiser(2 * half + 1, 5.0)
    taps /= taps.sum()
    taps.flags.writeable = False
    return taps


@functools.lru_cache(maxsize=4)
def mel_filters(bins):
    """Triangles on Slaney's mel scale from 0 to 8 kHz, each of unit area.

    Parameters
    ----------
    bins : int
        How many.

    Returns
    -------
    float64[201, bins]
    """
    def to_mel(hertz):  # linear below 1 kHz, logarithmic above
        return np.where(hertz < 1000, hertz * 3 / 200,
                        15 + np.log(np.maximum(hertz, 1) / 1000) * 27 / np.log(6.4))

    def to_hertz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    corners = to_hertz(np.linspace(0, to_mel(np.array(8000.0)), bins + 2))
    lines = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    left, top, right = corners[:-2], corners[1:-1], corners[2:]
    rise, fall = (lines - left) / (top - left), (right - lines) / (right - top)
    filters = np.maximum(0, np.minimum(rise, fall)) * 2 / (right - left)
    filters.flags.writeable = False
    return filters


def log_mel(samples, bins=128):
    """Log-mel frames of a sound.

    The power spectrum of each Hann window of 25 ms, every 10 ms, through triangular mel filters;
    then ``y = log10(max(x, 1e-10))``, ``y = max(y, max(y) - 8)``, ``(y + 4) / 4``.

    Parameters
    ----------
    samples : float[n]
        At 16 kHz, in -1 .. 1, more than 200 of them.
    bins : int
        Mel filters: 80 for the first Whisper models, 128 for Qwen3-Omni.

    Returns
    -------
    float32[rows, bins]
        ``len(samples) // 160`` rows.

    Raises
    ------
    TypeError
        Samples that are no numbers, bins that are no integer.
    ValueError
        Fewer than 201 samples, or more than one dimension; bins out of 1 .. 512.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> orchvlm.data.log_mel(np.sin(np.arange(16000) * 0.1)).shape
    (100, 128)
    """
    if isinstance(bins, bool) or not isinstance(bins, (int, np.integer)):
        raise TypeError(f"bins must be an integer; got {type(bins).__name__}")
    if not 1 <= bins <= 512:
        raise ValueError(f"bins must be in 1 .. 512; got {bins}")
    samples = _one_channel(samples).astype(np.float64)
    if len(samples) <= WINDOW // 2:
        raise ValueError(f"a sound needs more than {WINDOW // 2} samples at 16 kHz; got "
                         f"{len(samples)}")
    padded = np.pad(samples, WINDOW // 2, mode="reflect")
    n = len(samples) // HOP
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:n]
    power = np.empty((n, bins))
    for start in range(0, n, 4096):  # a long sound's spectra are never all in memory
        spectra = np.fft.rfft(frames[start:start + 4096] * window)
        power[start:start + 4096] = (spectra.real**2 + spectra.imag**2) @ mel_filters(int(bins))
    log = np.log10(np.maximum(power, 1e-10))
    log = np.maximum(log, log.max() - 8.0)
    return ((log + 4.0) / 4.0).astype(np.float32)


def audio_tokens(n_frames):
    """Tokens that the audio encoder makes of a sound.

    Chunks of 100 frames give 13 tokens each; of the last one's r frames, three convolutions of
    stride 2 leave ``((((r - 1) // 2 + 1 - 1) // 2 + 1) - 1) // 2 + 1``, with divisions that round
    down (at r = 0 that is 0, where truncation would give 1).

    Parameters
    ----------
    n_frames : int
        Mel frames, >= 0.

    Returns
    -------
    int

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        Below 0 or above 2^40.

    Examples
    --------
    >>> import orchvlm
    >>> [orchvlm.data.audio_tokens(n) for n in (0, 1, 99, 100, 101)]
    [0, 1, 13, 13, 14]
    """
    if isinstance(n_frames, bool) or not isinstance(n_frames, (int, np.integer)):
        raise TypeError(f"n_frames must be an integer; got {type(n_frames).__name__}")
    if not 0 <= n_frames <= 2**40:
        raise ValueError(f"n_frames must be in 0 .. 2^40; got {n_frames}")
    return int(sound_tokens(int(n_frames)))


def load_sound(source, bins=128, name="sound"):
    """Log-mel frames of any sound.

    Parameters
    ----------
    source : path, bytes, Asset, (samples, rate), or dict
        A WAV file, or samples with their rate; as the Hub's data sets keep them, ``{"array":
        samples, "sampling_rate": rate}`` or ``{"path": ..., "bytes": ...}``, and as chats do,
        ``{"data": base64}``.
    bins : int
        Mel filters.
    name : str
        What messages call it.

    Returns
    -------
    float32[rows, bins]

    Raises
    ------
    TypeError
        A source of another kind.
    DataError
        A broken file, or a sound shorter than 201 samples at 16 kHz.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> orchvlm.data.load_sound((np.zeros(4000), 8000)).shape
    (50, 128)
    """
    if isinstance(source, dict) and source.get("array") is not None:
        source = (source["array"], source.get("sampling_rate"))
    try:
        if isinstance(source, tuple) and len(source) == 2:
            samples, rate = source
            samples = np.asarray(samples)
            if samples.ndim == 2:
                samples = samples.mean(axis=np.argmin(samples.shape))
        else:
            source = as_asset(source, name) or source
            name = getattr(source, "name", name)
            samples, rate = read_wav(source, name)
        return log_mel(resample(samples, rate), bins)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None
