"""Continuing samples token by token, with kept keys and values."""
import numpy as np

from ._numbers import finite_number, whole_number
from .inputs import Inputs


def _next_positions(inputs):
    """Position of the first new token of each sample: one more than the largest on any axis."""
    ends = inputs.cu_seqlens
    return np.array([inputs.position_ids[:, a:b].max() + 1 if b > a else 0.0
                     for a, b in zip(ends, ends[1:])], np.float32)


def sample(logits, rng, temperature=0.0, top_k=None, top_p=None):
    """One token from a row of logits.

    Parameters
    ----------
    logits : float32[V]
    rng : numpy.random.Generator
    temperature : float
        0 takes the largest.
    top_k : int, optional
        Only the k largest.
    top_p : float, optional
        Only the fewest that together have this probability.

    Returns
    -------
    int
    """
    if temperature == 0:
        return int(np.argmax(logits))
    with np.errstate(over="ignore"):  # -inf has probability 0
        scaled = (logits.astype(np.float64) - float(logits.max())) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k is not None:
        order = order[:top_k]
    p = np.exp(scaled[order])
    p /= p.sum()
    if top_p is not None:
        keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:keep], p[:keep] / p[:keep].sum()
    return int(order[rng.choice(len(order), p=p)])


def _check(max_new_tokens, temperature, top_k, top_p, seed, stop, callback):
    """The set of stop tokens, when all of this is in range."""
    whole_number(max_new_tokens, "max_new_tokens", 1)
    finite_number(temperature, "temperature", 0)
    whole_number(seed, "seed", 0)
    if top_k is not None:
        whole_number(top_k, "top_k", 1)
    if top_p is not None and finite_number(top_p, "top_p", 0, 1) == 0:
        raise ValueError(f"top_p must be above 0; got {top_p!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable; got {type(callback).__name__}")
    return {whole_number(token, "stop", 0) for token in stop}


def generate(model, inputs, max_new_tokens=64, *, temperature=0.0, top_k=None, top_p=None,
             seed=0, stop=(), callback=None):
    """Continues every sample of a packed batch.

    Parameters
    ----------
    model : Model
    inputs : Inputs
        Prompts; labels are not used.
    max_new_tokens : int
    temperature : float
        0 takes the likeliest token.
    top_k, top_p : optional
        See :func:`sample`.
    seed : int
        Sample b draws from a stream of its own, (seed, b), whatever else is in the batch.
    stop : iterable of int
        Tokens that end a sample; they are not returned.
    callback : callable, optional
        ``callback(sample, token)`` for every new token.

    Returns
    -------
    list of list of int
        New tokens of each sample.

    Raises
    ------
    ValueError
        A setting out of range, an empty prompt.
    RuntimeError
        The model generates already: in another thread, or what called ``callback``.
    """
    if not isinstance(inputs, Inputs):
        raise TypeError(f"inputs must be orchvlm.Inputs; got {type(inputs).__name__}")
    stop = _check(max_new_tokens, temperature, top_k, top_p, seed, stop, callback)
    lengths = np.diff(inputs.cu_seqlens)
    n = len(lengths)
    if n == 0:
        return []
    if lengths.min() == 0:
        raise ValueError(f"sample {int(lengths.argmin())} is empty: a prompt needs a token")
    # Between two tokens the core is not busy, but its cache is in use.
    if not model._generates.acquire(blocking=False):
        raise RuntimeError("the model is generating already, in another thread or around this "
                           "callback; use one model for each")
    try:
        model._core.cache_open(n, int(lengths.max()) + max_new_tokens)
        try:
            return _continued(model, inputs, max_new_tokens, temperature, top_k, top_p, seed, stop,
                              callback)
        finally:
            model._core.cache_close()
    finally:
        model._generates.release()


def _continued(model, inputs, max_new_tokens, temperature, top_k, top_p, seed, stop, callback):
    """New tokens of each sample, with an open cache."""
    n = len(inputs)
    rngs = [np.random.default_rng([int(seed), b]) for b in range(n)]
    position = _next_positions(inputs)
    said, active = [[] for _ in range(n)], list(range(n))
    logits = model._core.extend(*model._arguments(inputs))
    for _ in range(max_new_tokens):
        fresh = {}
        for b in active:
            token = sample(logits[b], rngs[b], temperature, top_k, top_p)
            if token in stop:
                continue
            said[b].append(token)
            fresh[b] = token
            if callback is not None:
                callback(b, token)
        active = list(fresh)
        if not active or len(said[active[0]]) == max_new_tokens:
            break
        step = Inputs(input_ids=[fresh[b] for b in active],
                      cu_seqlens=np.cumsum([0] + [b in fresh for b in range(n)]),
                      position_ids=np.tile(position[active], (3, 1)))
        position[active] += 1
        logits = model._core.extend(step.input_ids, step.cu_seqlens, step.position_ids,
                                    *[None] * 7)
    return said
