"""What a device reaches at best in a matrix product: what a model's FLOPs are held against."""
import time
from functools import lru_cache

import numpy as np

from . import _core
from .configs import ModelConfig
from .weights import backend_of

_SIDES = (64, 256, 1024)  # of square products; larger ones where there is time
_SECONDS = 0.1            # for each


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
        tokens = np.zeros(side, np.int32), np.array([0, side], np.int32), np.zeros(
            (3, side), np.float32)
        end = time.perf_counter() + _SECONDS
        while True:
            core.trace_start()
            core.forward(*tokens, *[None] * 7, -1.0, None, 0.0, False, False, 0, None, None, None,
                         False, None, None)
            longest = max(end_s - start_s for name, _, start_s, end_s in core.trace_stop()
                          if name == "linear fwd")
            best = max(best, 2 * side ** 3 / longest)
            if time.perf_counter() > end:
                break
        if longest > _SECONDS / 10:  # 64 times that is too long
            break
    return best
