"""AdamW on a model's gradients, and schedules of its rate."""
import math
from collections.abc import Mapping

import numpy as np

from ._numbers import finite_number
from ._pieces import joined, piece
from .weights import Weights, matching

_DECAYING = (0, 4)  # kinds: matrices and adapters
_STATE = {2: "exp_avg", 3: "exp_avg_sq", 4: "master"}


class AdamW:
    """Decoupled weight decay and bias-corrected moments, with the global norm clipped first.

    Parameters
    ----------
    model : Model
    lr : float
    betas : (float, float)
    eps : float
    weight_decay : float
        Of weight matrices, embeddings and adapters; norms and biases do not decay.
    max_grad_norm : float or None
        Gradients are scaled so that their global norm is at most this.
    groups : list of dict
        ``{"match": "model.visual.*", "lr": ..., "weight_decay": ...}``: other settings for the
        parameters that match; the last match counts.  Where ``lr`` is 0, groups with a rate of
        their own train alone, at that rate.

    Raises
    ------
    TypeError
        ``model`` is none, or a group is no dict.
    ValueError
        A figure out of range, a group that matches nothing.

    Notes
    -----
    A step with a gradient that is infinite or not a number changes nothing and says so.
    Moments are float32, and for bfloat16 models there is a float32 master of the weights.

    References
    ----------
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2.

    Examples
    --------
    >>> import orchvlm
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> opt = orchvlm.AdamW(model, lr=1e-3)
    >>> inputs = orchvlm.Inputs(input_ids=[72, 105, 33], labels=[72, 105, 33])
    >>> before = model.forward(inputs).loss
    >>> model.backward()
    >>> _ = opt.step()
    >>> model.forward(inputs).loss < before
    True
    """

    def __init__(self, model, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                 max_grad_norm=1.0, groups=()):
        if not isinstance(model, Weights):
            raise TypeError(f"model must be an orchvlm.Model; got {type(model).__name__}")
        self.model = model
        self.lr = finite_number(lr, "lr", 0)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers; got {betas!r}")
        self.betas = tuple(finite_number(b, "betas", 0, 1 - 1e-12) for b in betas)
        self.eps = finite_number(eps, "eps", 0)
        self.weight_decay = finite_number(weight_decay, "weight_decay", 0)
        self.max_grad_norm = 0.0 if max_grad_norm is None else finite_number(
            max_grad_norm, "max_grad_norm", 0)
        self.step_count = 0
        self._first = self.lr
        self._rates, self._decay = self._resolve(groups)

    def _resolve(self, groups):
        """Per parameter: its own rate, or NaN, and decay."""
        rows = self.model._list
        rates = np.full(len(rows), np.nan)
        decay = np.array([self.weight_decay if row[1] in _DECAYING else 0.0 for row in rows])
        for group in groups:
            if not isinstance(group, dict):
                raise TypeError(f"a group is a dict; got {type(group).__name__}")
            unknown = set(group) - {"match", "lr", "weight_decay"}
            if unknown or "match" not in group:
                raise ValueError(f"a group has 'match', 'lr' and 'weight_decay'; got {group!r}")
            hits = matching(self.model, group["match"])
            if "lr" in group:
                rates[hits] = finite_number(group["lr"], "lr", 0)
            if "weight_decay" in group:
                decay[hits] = finite_number(group["weight_decay"], "weight_decay", 0)
        return rates, decay

    def step(self, lr=None):
        """Updates the weights from the gradients.  Of a model with a :class:`Shard` all ranks call
        it; gradients that are not summed yet are summed first.

        Parameters
        ----------
        lr : float, optional
            Rate of this step, e.g. from a schedule; rates of groups change by the same factor,
            unless the optimizer's own is 0.

        Returns
        -------
        dict
            ``grad_norm`` before clipping, ``clip`` (factor), ``skipped`` (bool).

        Raises
        ------
        ValueError
            A rate out of range; the model has other adapters than when the optimizer was made.
        """
        rate = self.lr if lr is None else finite_number(lr, "lr", 0)
        factor = rate / self._first if self._first else 1.0
        rates = np.where(np.isnan(self._rates), rate, self._rates * factor)
        if len(rates) != len(self.model._list):
            raise ValueError("this optimizer was made before the model's adapters came or went; "
                             "make another one")
        shard = self.model.shard
        core = self.model._core if shard is None else shard._core
        norm, clip, bad = core.adamw(rates, self._decay, *self.betas, self.eps,
                                     self.max_grad_norm, self.step_count + 1)
        if not bad:
            self.step_count += 1
        return {"grad_norm": norm, "clip": clip, "skipped": bool(bad)}

    def __repr__(self):
        return (f"<AdamW: lr={self.lr:g}, betas={self.betas}, weight_decay={self.weight_decay:g}, "
                f"{self.step_count:,} steps taken>")

    def _sharded(self):
        shard = self.model.shard
        return shard if shard is not None and shard.holds_state else None

    def _arrays(self):
        """(name, number, shape, which, label) of all arrays of state."""
        narrow = self.model.dtype == "bfloat16"
        for name, i in self.model._index.items():
            if not self.model.trainable(name):
                continue
            for which, label in _STATE.items():
                if label != "master" or narrow:
                    yield name, i, self.model._list[i][2], which, label

    def state_dict(self):
        """All that a step depends on, beside weights and gradients.

        Returns
        -------
        dict
            ``step`` and, for each trained parameter, copies as ``NAME/exp_avg``,
            ``NAME/exp_avg_sq`` and, for bfloat16 models, ``NAME/master``.  Where a :class:`Shard`
            keeps them, this rank's parts that no lower rank has: flat, with ``NAME/piece``: first
            element, number of elements, full shape.
        """
        state, shard = {"step": np.int64(self.step_count)}, self._sharded()
        for name, i, shape, which, label in self._arrays():
            if shard is None:
                state[f"{name}/{label}"] = self.model._core.array(i, which, False)
                continue
            first, array, again = shard._read(i, which)
            if len(array) and not again:
                state[f"{name}/{label}"] = array
                state[f"{name}/piece"] = piece(first, len(array), shape)
        return state

    def load_state_dict(self, state):
        """Sets what :meth:`state_dict` gave; all of it or, when it does not fit, nothing.

        Parameters
        ----------
        state : mapping or list of mapping
            Of one rank that has all of it, or of all ranks that saved it: as many as they were.

        Raises
        ------
        ValueError
            What is missing, surplus or mis-shaped, by name.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        steps = {int(one["step"]) for one in states if "step" in one}
        if len(steps) != 1 or not 0 <= min(steps) < 2**62:
            raise ValueError("optimizer state: step must be >= 0, and the same in all states; got "
                             f"{sorted(steps)}")
        shard, exact = self._sharded(), self.model.dtype == "float64"
        wanted, places = {}, {}
        for name, i, shape, which, label in self._arrays():
            first, n = (0, int(np.prod(shape))) if shard is None else shard._core.part(i, which)[:2]
            wanted[f"{name}/{label}"] = (first, n, shape, np.float64 if exact else np.float32)
            places[f"{name}/{label}"] = i, which
        arrays = joined(wanted, states, "optimizer state")
        for key, (i, which) in places.items():
            (self.model._core if shard is None else shard._core).write(i, which, arrays[key])
        self.step_count = steps.pop()


def schedule(kind, peak, steps, warmup=0, floor=0.0):
    """A function of the step (0, 1, ...) that gives the rate.

    Parameters
    ----------
    kind : {"constant", "linear", "cosine"}
    peak : float
        Rate after the warm-up, which rises linearly from peak/warmup.
    steps : int
        All steps; the rate is ``floor`` from there on (constant: peak).
    warmup : int
    floor : float

    Returns
    -------
    callable

    Raises
    ------
    ValueError
        Another kind, a rate that is negative or infinite, steps below 1 or below the warm-up.

    Examples
    --------
    >>> import orchvlm
    >>> rate = orchvlm.schedule("cosine", 1.0, steps=10, warmup=2)
    >>> [round(rate(s), 3) for s in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(f"kind must be 'constant', 'linear' or 'cosine'; got {kind!r}")
    peak, floor = finite_number(peak, "peak", 0), finite_number(floor, "floor", 0)
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in (steps, warmup)):
        raise TypeError(f"steps and warmup must be whole numbers; got {steps!r}, {warmup!r}")
    if steps < 1 or not 0 <= warmup <= steps:
        raise ValueError(f"steps must be >= 1 and warmup in [0, steps]; got {steps}, {warmup}")

    def rate(step):
        if step < warmup:
            return peak * (step + 1) / warmup
        if kind == "constant":
            return peak
        part = min(1.0, (step - warmup) / max(1, steps - warmup))
        shape = 1 - part if kind == "linear" else 0.5 * (1 + math.cos(math.pi * part))
        return floor + (peak - floor) * shape
    return rate
