"""AdamW on a model's gradients, and schedules of its rate."""
import math
from fnmatch import fnmatchcase

import numpy as np

_STATE = {2: "exp_avg", 3: "exp_avg_sq", 4: "master"}


def _number(value, name, low, high=math.inf):
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or \
            not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be a finite number in [{low}, {high}]; got {value!r}")
    return float(value)


class AdamW:
    """Decoupled weight decay and bias-corrected moments, with the global norm clipped first.

    Parameters
    ----------
    model : Model
    lr : float
    betas : (float, float)
    eps : float
    weight_decay : float
        Of weight matrices and embeddings; norms and biases do not decay.
    max_grad_norm : float or None
        Gradients are scaled so that their global norm is at most this.
    groups : list of dict
        ``{"match": "model.visual.*", "lr": ..., "weight_decay": ...}``: other settings for the
        parameters that match; the last match counts.

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
        self.model = model
        self.lr = _number(lr, "lr", 0)
        self.betas = tuple(_number(b, "betas", 0, 1 - 1e-12) for b in betas)
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers; got {betas!r}")
        self.eps = _number(eps, "eps", 0)
        self.weight_decay = _number(weight_decay, "weight_decay", 0)
        self.max_grad_norm = 0.0 if max_grad_norm is None else _number(
            max_grad_norm, "max_grad_norm", 0)
        self.step_count = 0
        self._scale, self._decay = self._resolve(groups)

    def _resolve(self, groups):
        """Per parameter: rate relative to lr, and decay."""
        rows = self.model._list
        scale = np.ones(len(rows))
        decay = np.array([self.weight_decay if row[1] == 0 else 0.0 for row in rows])
        for group in groups:
            unknown = set(group) - {"match", "lr", "weight_decay"}
            if unknown or "match" not in group:
                raise ValueError(f"a group has 'match', 'lr' and 'weight_decay'; got {group!r}")
            hits = [i for i, row in enumerate(rows) if fnmatchcase(row[0], group["match"])]
            if not hits:
                raise ValueError(f"{group['match']!r} matches no parameter")
            if "lr" in group:
                scale[hits] = _number(group["lr"], "lr", 0) / self.lr if self.lr else 0.0
            if "weight_decay" in group:
                decay[hits] = _number(group["weight_decay"], "weight_decay", 0)
        return scale, decay

    def step(self, lr=None):
        """Updates the weights from the gradients.

        Parameters
        ----------
        lr : float, optional
            Rate of this step, e.g. from a schedule; groups keep their ratio to it.

        Returns
        -------
        dict
            ``grad_norm`` before clipping, ``clip`` (factor), ``skipped`` (bool).
        """
        rate = self.lr if lr is None else _number(lr, "lr", 0)
        norm, clip, bad = self.model._core.adamw(rate * self._scale, self._decay, *self.betas,
                                                 self.eps, self.max_grad_norm,
                                                 self.step_count + 1)
        if not bad:
            self.step_count += 1
        return {"grad_norm": norm, "clip": clip, "skipped": bool(bad)}

    def state_dict(self):
        """{"step": int, "parameter/exp_avg": array, ...}: copies."""
        state = {"step": np.int64(self.step_count)}
        for name, i in self.model._index.items():
            for which, label in _STATE.items():
                array = self.model._core.array(i, which, False)
                if array is not None:
                    state[f"{name}/{label}"] = array
        return state

    def load_state_dict(self, state):
        """Sets what :meth:`state_dict` gave; ValueError names what does not fit."""
        wanted = self.state_dict()
        if set(wanted) != set(state):
            odd = sorted(set(wanted) ^ set(state))
            raise ValueError(f"optimizer state: {odd[0]} is missing or surplus ({len(odd)} such)")
        for name, i in self.model._index.items():
            for which, label in _STATE.items():
                key = f"{name}/{label}"
                if key in wanted:
                    value = np.ascontiguousarray(state[key], wanted[key].dtype)
                    if value.shape != wanted[key].shape:
                        raise ValueError(f"optimizer state: {key} has shape {value.shape}; "
                                         f"needed {wanted[key].shape}")
                    self.model._core.write(i, which, value)
        self.step_count = int(state["step"])


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

    Examples
    --------
    >>> import orchvlm
    >>> rate = orchvlm.schedule("cosine", 1.0, steps=10, warmup=2)
    >>> [round(rate(s), 3) for s in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(f"kind must be 'constant', 'linear' or 'cosine'; got {kind!r}")
    peak, floor = _number(peak, "peak", 0), _number(floor, "floor", 0)
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
