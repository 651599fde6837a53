"""Recordings, never heard twice alike: other speeds, levels, pauses and noise."""
import numpy as np

from .audio import RATES, read_wav
from .vary import Endless

_SPEED = (0.85, 1.18)      # of speech, the voice with it
_LEVEL_DB = 12.0           # louder or softer by at most this
_PAUSE_S = 0.15            # of near silence, before and behind
_NOISE_DB = (15.0, 60.0)   # below the sound's own level


class VariedSounds(Endless):
    """Samples whose sounds are varied, drawn without end.

    Parameters
    ----------
    dataset : sequence of dict
        With messages, as a :class:`ZipPack` gives them; sounds are WAV files.
    seed : int
        Every seed varies otherwise.

    Raises
    ------
    TypeError
        A data set that is no sequence, a seed that is no integer.
    ValueError
        An empty data set, a seed below 0.

    Notes
    -----
    Item k is a function of the seed and k alone: pass k // n in an order of its own, and of the
    sample that comes, every sound at another speed (0.85 to 1.18 times), level (12 dB up or down),
    with pauses of up to 0.15 s around it and noise 15 to 60 dB below it.

    References
    ----------
    T. Ko et al., Audio Augmentation for Speech Recognition, Interspeech 2015.

    Examples
    --------
    >>> import io, wave, orchvlm
    >>> file = io.BytesIO()
    >>> with wave.open(file, "wb") as out:
    ...     out.setparams((1, 2, 8000, 0, "NONE", ""))
    ...     out.writeframes(bytes(8000))
    >>> said = {"messages": [{"role": "user", "content": [
    ...     {"type": "audio", "audio": file.getvalue()}]}, {"role": "assistant", "content": "no"}]}
    >>> part = orchvlm.data.VariedSounds([said], seed=1)[5]["messages"][0]["content"][0]
    >>> samples, rate = part["audio"]
    >>> 6800 <= rate <= 9600, len(samples) >= 4000
    (True, True)
    """

    medium = "audio"

    def _vary(self, rng, source, where):
        samples, rate = read_wav(source)
        speed = rng.uniform(*_SPEED)
        # In steps of a twentieth: two rates with a large common divisor are soon resampled.
        new_rate = int(np.clip(round(speed * 20) * rate // 20, *RATES))
        power = float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))
        noise = power * 10 ** (-rng.uniform(*_NOISE_DB) / 20)
        pauses = (rng.uniform(0, _PAUSE_S, 2) * rate).astype(int)
        loud = np.pad(samples, pauses) + noise * rng.standard_normal(len(samples) + pauses.sum())
        return loud * 10 ** (rng.uniform(-_LEVEL_DB, _LEVEL_DB) / 20), new_rate
