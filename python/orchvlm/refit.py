"""Costs of phases that follow what the phases took."""
from collections import deque

import numpy as np

from .fitting import fit
from .rounds import items_of, phase_of

_KEPT = 512    # shares of steps that a fit looks at, per phase: the latest
_LEAST = 8     # of them that it needs
_TERMS = ("linear", "quadratic", "per_item")


class Refit:
    """What the ranks' shares of steps took, and costs fitted to it.

    The plans of a step say which items each rank had, and the times of all ranks are gathered, so
    that every rank fits the same cost.

    Parameters
    ----------
    costs : dict of str to BatchCost
        By phase, so far.

    Attributes
    ----------
    costs : dict of str to BatchCost
        Of the last fit.
    """

    def __init__(self, costs):
        self.costs = dict(costs)
        self._rows = {name: deque(maxlen=_KEPT) for name in costs}
        self._single = dict.fromkeys(costs, True)

    def note(self, plans, name, work):
        """Adds a step.

        Parameters
        ----------
        plans : list of StepPlan
            Of its rounds.
        name : str
            The phase.
        work : float64[N]
            Seconds that each rank computed in it.
        """
        shares = [phase_of(plan, name) for plan in plans]
        items = [items_of(plan, name) for plan in plans]
        self._single[name] &= len(plans) == 1 and shares[0].micro_batches == 1
        for rank, seconds in enumerate(work):
            mine = [(share.rank == rank) & (length > 0)
                    for share, (length, _) in zip(shares, items)]
            lengths, squares = (np.concatenate([pair[k][ours] for ours, pair in zip(mine, items)])
                                for k in (0, 1))
            if len(lengths) and seconds > 0:
                self._rows[name].append((lengths, float(seconds), squares))

    def fit(self):
        """Fits the costs of phases that were seen often enough.

        Returns
        -------
        dict of str to (float, float)
            By phase: how far the cost before and the new one are from what was measured, as the
            median of \\|predicted / measured - 1\\|, each share of a step counting alike.  The one
            before may be in seconds of another machine, and is scaled to the same median first.
        """
        errors = {}
        for name, rows in self._rows.items():
            if len(rows) < _LEAST:
                continue
            # Seconds of several micro-batches do not tell what each takes besides.
            terms = (*_TERMS, "fixed") if self._single[name] else _TERMS
            ratio = np.array([self.costs[name](lengths, squares=squares) / seconds
                              for lengths, seconds, squares in rows])
            middle = float(np.median(ratio))
            before = np.abs(ratio / middle - 1) if middle > 0 else np.ones(len(ratio))
            self.costs[name], after, _ = fit(list(rows), terms=terms)
            errors[name] = float(np.median(before)), float(np.median(np.abs(after)))
        return errors
