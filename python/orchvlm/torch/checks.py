"""Arguments of :class:`orchvlm.torch.Balancer`, checked before anything moves."""
import numpy as np
import torch

from .._numbers import reals
from ..batch import integers

MOST_TENSORS = 15  # of one call


def on_host(value):
    """A tensor as an array that shares nothing with autograd; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()


def whole_numbers(value, name, n=None, n_ranks=None):
    """int64[n] of numbers >= 0, or of ranks."""
    array = integers(on_host(value), name, n)
    most = np.iinfo(np.int64).max if n_ranks is None else n_ranks - 1
    wrong = np.flatnonzero((array < 0) | (array > most))
    if len(wrong):
        limit = ">= 0" if n_ranks is None else f"a rank of the group, 0 to {most}"
        raise ValueError(f"{name}[{wrong[0]}] must be {limit}; got {array[wrong[0]]}")
    return array


def amounts(value, name, n):
    """float64[n] of finite numbers >= 0."""
    array = reals(on_host(value), name)
    if array.shape != (n,):
        raise ValueError(f"{name} must have one number for each of this rank's {n} items; got "
                         f"shape {array.shape}")
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if len(wrong):
        raise ValueError(f"{name}[{wrong[0]}] must be finite and >= 0; got {array[wrong[0]]}")
    return array


def several(value, name):
    """A list of tensors for one tensor or a sequence of them."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    for place, one in enumerate(values):
        if not isinstance(one, torch.Tensor):
            where = f"{name}[{place}]" if isinstance(value, (tuple, list)) else name
            raise TypeError(f"{where} must be a tensor; got {type(one).__name__}")
    if not 1 <= len(values) <= MOST_TENSORS:
        raise ValueError(f"{name} must be 1 to {MOST_TENSORS} tensors; got {len(values)}")
    return values


def packed(value, name, rows, dropped, what):
    """Tensors of so many rows each; with `dropped`, of any number, of which none is kept."""
    tensors = several(value, name)
    for place, x in enumerate(tensors):
        if x.ndim < 1 or not dropped and len(x) != rows:
            which = f"{name}[{place}]" if len(tensors) > 1 else name
            raise ValueError(f"{which} must have {rows} rows, {what}; got shape {tuple(x.shape)}")
    return [x[:0] for x in tensors] if dropped else tensors


def check_blank(blank, tensors):
    """A blank for each tensor, with rows like it."""
    blanks = several(blank, "blank")
    if len(blanks) != len(tensors):
        raise ValueError(f"blank must be {len(tensors)} tensors, like x; got {len(blanks)}")
    for place, (one, x) in enumerate(zip(blanks, tensors)):
        if one.ndim < 1 or one.shape[1:] != x.shape[1:] or one.dtype != x.dtype:
            raise ValueError(f"blank[{place}] must have rows {list(x.shape[1:])} of {x.dtype}, "
                             f"like x; got shape {tuple(one.shape)} of {one.dtype}")
