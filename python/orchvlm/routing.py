"""What keeps a mixture's experts evenly used in a run, over the whole global batch."""
import math
import time

import numpy as np

MODES = ("exact", "lagged", "bias")


class Balance:
    """Counts of a run's routers, and what they are for.

    Parameters
    ----------
    model : Model
    mode : {"exact", "lagged", "bias"}
        As ``aux`` of :class:`orchvlm.TrainingConfig`.
    rate : float
        By which ``"bias"`` moves a correction in a step.
    total : callable, optional
        Sums an array of numbers over the ranks; by default there is one.

    Raises
    ------
    ValueError
        ``"bias"`` with routers that have no corrections.
    """

    def __init__(self, model, mode, rate, total=np.asarray):
        text = model.config.text
        if mode == "bias" and text.get("scoring_func") != "sigmoid":
            raise ValueError("aux='bias' needs a model with experts and scoring_func 'sigmoid': no "
                             "other router has corrections")
        self._model, self._mode, self._rate, self._total = model, mode, rate, total
        self._sparse = model.config.sparse
        self._loss = self._sparse and mode != "bias" and text.get(
            "router_aux_loss_coef", 0.001) > 0
        self._before = None  # "lagged": (counts, rows) of the step before

    def begin(self, tokens, route, whole=False):
        """Before a step's forwards.

        Parameters
        ----------
        tokens : int
            Of this rank's part of the batch.
        route : callable
            Gives (int64[E], rows) of this rank's part, as :meth:`Model.route` does.
        whole : bool
            One forward of one rank sees the whole batch.

        Returns
        -------
        (int64[E], float) or None
            What every forward of the step takes as ``router_counts``.
        """
        self._counts, self._aux_loss, self.seconds = None, 0.0, 0.0
        self._layers = self._model._core.router_layers().shape[0] if self._sparse else 0
        if self._sparse and self._mode == "bias":
            return np.zeros(self._model.config.text["num_experts"], np.int64), 1  # no loss
        if not self._loss or whole and self._mode == "exact":
            return None  # the forward's own counts are the whole batch's
        if self._mode == "lagged" and self._before is not None:
            counts, rows = self._before
            # The loss divides counts and scores by one number of rows: f = count / rows of then and
            # P = score / rows of now make the product of both that of their geometric mean.
            now = self._layers * int(self._total(np.array([tokens]))[0])
            return counts, math.sqrt(rows * max(1, now))
        start = time.perf_counter()
        counts, rows = route()
        seen = self._total(np.append(counts, rows).astype(np.int64))
        self.seconds = time.perf_counter() - start
        return seen[:-1], max(1, int(seen[-1]))

    def note(self, out):
        """After a forward of the step.

        Parameters
        ----------
        out : Output
        """
        if self._sparse:
            counts = self._model.layer_counts()
            self._counts = counts if self._counts is None else self._counts + counts
            self._aux_loss += out.aux_loss

    def end(self, skipped):
        """After the optimizer's step.

        Parameters
        ----------
        skipped : bool
            It changed nothing, so neither do the corrections.

        Returns
        -------
        dict
            ``aux_loss`` of the whole batch without its coefficient, ``expert_load``: slots of the
            fullest expert of any layer over the mean, and ``routing_seconds``: what the forwards
            for the counts alone took.  With experts over ranks ``expert_rank_load``: slots of the
            fullest rank over the mean, layer by layer, as layers wait for it.
        """
        if not self._sparse:
            return {}
        self._counts = self._total(self._counts)
        total = self._counts.sum(axis=0)
        if self._mode == "lagged":
            rows = int(total.sum()) // self._model.config.text["num_experts_per_tok"]
            self._before = (total, rows) if rows else self._before
        if self._mode == "bias" and not skipped:
            self._model.correct_routers(self._counts, self._rate)
        mean = self._counts.mean() if self._counts.size else 0.0
        aux_loss = float(self._total(np.array([self._aux_loss]))[0])
        return {"aux_loss": aux_loss, "routing_seconds": self.seconds,
                "expert_load": float(self._counts.max() / mean) if mean else 1.0,
                **self._over_ranks()}

    def _over_ranks(self):
        """How evenly the experts of ranks that share them are used: of all groups together."""
        shard = self._model.shard
        n = 1 if shard is None else shard.experts
        if n == 1:
            return {}
        cuts = [self._counts.shape[1] * rank // n for rank in range(n)]
        rows = np.add.reduceat(self._counts, cuts, axis=1)
        whole = rows.sum()
        return {"expert_rank_load": float(n * rows.max(axis=1).sum() / whole) if whole else 1.0}

    def state_dict(self):
        """What the next step depends on, as JSON takes it.

        Returns
        -------
        dict
        """
        if self._before is None:
            return {}
        return {"counts": self._before[0].tolist(), "rows": self._before[1]}

    def load_state_dict(self, state):
        """Sets what :meth:`state_dict` gave.

        Parameters
        ----------
        state : dict

        Raises
        ------
        ValueError
            Counts of another number of experts.
        """
        before = None
        if state:
            counts = np.array(state["counts"], np.int64)
            experts = self._model.config.text.get("num_experts")
            if counts.shape != (experts,):
                raise ValueError(f"state: counts must be of the model's {experts} experts; got "
                                 f"shape {counts.shape}")
            before = counts, state["rows"]
        self._before = before
