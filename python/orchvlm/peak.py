"""What a device reaches at best in a matrix product: what a model's FLOPs are held against."""
import math
import time
from functools import lru_cache

import numpy as np

from . import _core
from .configs import ModelConfig
from .weights import backend_of

_SIDES = (64, 128, 256, 512, 1024)  # of square products; larger ones where there is time
_SECONDS, _CALLS = 0.05, 5  # for each, and how many at least: others may use the machine, too
_ENOUGH = 0.005             # seconds of a product, when the next takes eight times that


def _layer(side):
    """A decoder of one layer whose largest product, gate and up, is side x side x side."""
    return ModelConfig({
        "model_type": "seed1_5_vl",
        "vision_config": {"depth": 1, "hidden_size": 4, "intermediate_size": 4, "num_heads": 1,
                          "patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": side},
        "text_config": {"vocab_size": 2, "hidden_size": side, "intermediate_size": side // 2,
                        "num_hidden_layers": 1, "num_attention_heads": 1, "rope_theta": 1e4,
                        "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-6}})


@lru_cache(maxsize=None)
def gemm_peak(device="cpu", dtype="float32", threads=1):
    """FLOP/s of the best of a few square matrix products, as a model on the device runs them.

    Measured once per process, in less than half a second.

    Parameters
    ----------
    device, dtype, threads
        As of the model.

    Returns
    -------
    float

    Examples
    --------
    >>> from orchvlm.peak import gemm_peak
    >>> gemm_peak() > 1e8
    True
    """
    best = 0.0
    for side in _SIDES:
        core = _core.Model(*_layer(side).numbers(), *backend_of(device), threads, dtype)
        fastest = _fastest(core, side)
        best = max(best, 2 * side ** 3 / fastest)
        if fastest > _ENOUGH:
            break
    return best


def _fastest(core, side):
    """Seconds of the layer's largest product."""
    tokens = np.zeros(side, np.int32), np.array([0, side], np.int32), np.zeros((3, side),
                                                                               np.float32)
    fastest, calls, end = math.inf, 0, time.perf_counter() + _SECONDS
    while calls < _CALLS or time.perf_counter() < end:
        core.trace_start()
        core.forward(*tokens, *[None] * 7, -1.0, None, 0.0, False, False, 0, None, None, None,
                     False, None, None, None)
        fastest = min(fastest, max(end_s - start_s for name, _, start_s, end_s in
                                   core.trace_stop() if name == "linear fwd"))
        calls += 1
    return fastest
