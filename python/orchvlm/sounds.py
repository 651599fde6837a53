"""What an audio encoder makes of sounds: chunks, padded images, tokens, attention windows.

The core counts the same (csrc/model/sounds.c); these are for shapes, FLOPs and checks before it is
called.
"""
import numpy as np

CHUNK = 100        # mel frames that the encoder convolves at once
CHUNK_TOKENS = 13  # tokens of a full chunk
CONVOLUTIONS = 3   # each of stride 2 in both directions


def halved(n, times=CONVOLUTIONS):
    """Rows or columns that convolutions of stride 2 leave of n; 0 of 0, by floor division."""
    for _ in range(times):
        n = (n - 1) // 2 + 1
    return n


def sound_tokens(lengths):
    """Tokens of sounds.

    Parameters
    ----------
    lengths : int[n]
        Mel frames of each.

    Returns
    -------
    int64[n]
    """
    lengths = np.asarray(lengths, np.int64)
    return lengths // CHUNK * CHUNK_TOKENS + halved(lengths % CHUNK)


def sound_chunks(lengths):
    """(chunks, frames in each with its padding) of sounds, both int64[n]."""
    lengths = np.asarray(lengths, np.int64)
    return -(-lengths // CHUNK), np.minimum(lengths, CHUNK)


def window_squares(lengths, window):
    """Sum of the squared lengths of the attention windows, ``window`` chunks each."""
    tokens, size = sound_tokens(lengths), CHUNK_TOKENS * window
    return float((tokens // size * size ** 2 + (tokens % size) ** 2).sum())
