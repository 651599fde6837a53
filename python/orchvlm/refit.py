"""Costs of phases that follow what the phases took."""
from collections import deque
from dataclasses import replace

import numpy as np

from .cost import SequenceCost
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
    costs : dict of str to BatchCost or SequenceCost
        By phase, so far.

    Attributes
    ----------
    costs : dict of str to BatchCost or SequenceCost
        Of the last fit.
    """

    def __init__(self, costs):
        self.costs = dict(costs)
        self._rows = {name: deque(maxlen=_KEPT) for name in costs}
        self._single = dict.fromkeys(costs, True)

    def note(self, plans, name, work, seen=None):
        """Adds a step.

        Parameters
        ----------
        plans : list of StepPlan
            Of its rounds.
        name : str
            The phase.
        work : float64[N]
            Seconds that each rank computed in it.
        seen : Seen, optional
            Of the language phase, where groups may run it: its cost is fitted to their
            micro-batches one by one, a group's time being that of its slowest rank.
        """
        if isinstance(self.costs[name], SequenceCost):
            for m, first, degree, lengths in seen.groups():
                busy_s = float(seen.busy_s[m, first:first + degree].max())
                if busy_s > 0:
                    self._rows[name].append((lengths, degree, busy_s, None))
            return
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
            cost = self.costs[name]
            if isinstance(cost, SequenceCost):
                ratio = np.array([cost(lengths, degree) / seconds
                                  for lengths, degree, seconds, _ in rows])
                self.costs[name], after = _fitted_groups(cost, list(rows))
            else:
                # Seconds of several micro-batches do not tell what each takes besides.
                terms = (*_TERMS, "fixed") if self._single[name] else _TERMS
                ratio = np.array([cost(lengths, squares=squares) / seconds
                                  for lengths, seconds, squares in rows])
                self.costs[name], after, _ = fit(list(rows), terms=terms)
            middle = float(np.median(ratio))
            before = np.abs(ratio / middle - 1) if middle > 0 else np.ones(len(ratio))
            errors[name] = float(np.median(before)), float(np.median(np.abs(after)))
        return errors


def _fitted_groups(cost, rows):
    """(SequenceCost, errors): exchanges of degrees that were not seen cost what they did beside a
    token's computing."""
    found, after, _ = fit(rows, heads=cost.heads)
    scale = found.linear / cost.linear if cost.linear > 0 else 1.0
    comm = {degree: found.comm.get(degree, scale * value) for degree, value in cost.comm.items()}
    return replace(cost, quadratic=found.quadratic, linear=found.linear, fixed=found.fixed,
                   comm=comm), after
