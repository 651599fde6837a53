"""What ranks tell each other behind a step about its language phase: who ran which micro-batch in
which group, and how long it took."""
from typing import NamedTuple

import numpy as np

from .rounds import mean
from .sequence_phase import groups_of
from .sequences import SequencePlan

_COLUMNS = 4


class Seen(NamedTuple):
    """A step's micro-batches, one behind the other over all rounds.

    Attributes
    ----------
    plans : list of StepPlan
        Of its rounds.
    block : int64[M, N, 2]
        First rank and degree of each rank's group; degree 0 where it had none.
    busy_s, waited_s : float64[M, N]
        What each rank computed, and waited in exchanges.
    """

    plans: list
    block: np.ndarray
    busy_s: np.ndarray
    waited_s: np.ndarray

    @property
    def in_groups(self):
        """bool : whether groups ran a round of it."""
        return any(isinstance(plan.llm, SequencePlan) for plan in self.plans)

    def groups(self):
        """Groups of the step.

        Yields
        ------
        (int, int, int, int64[k])
            Micro-batch, first rank, degree and lengths of the sequences.
        """
        m = 0
        for plan in self.plans:
            for groups in groups_of(plan):
                for first, degree, samples in groups:
                    yield m, first, degree, plan.batch.language_lengths[samples]
                m += 1

    def exposed_s(self):
        """Seconds of exchanges that nothing hid: in each group what the rank that came last to them
        waited, in each micro-batch the longest group's."""
        most = np.zeros(len(self.waited_s))
        for m, first, degree, _ in self.groups():
            most[m] = max(most[m], self.waited_s[m, first:first + degree].min())
        return float(most.sum())

    def row(self):
        """For a line of metrics, where groups ran.

        Returns
        -------
        dict
            ``sp_degrees``: the groups' degrees by micro-batch; ``sp_time`` and ``sp_gap`` of their
            plans.
        """
        plans = [plan.llm for plan in self.plans if isinstance(plan.llm, SequencePlan)]
        if not plans:
            return {}
        return {"sp_degrees": degrees_of(plans), "sp_time": float(sum(p.time for p in plans)),
                "sp_gap": mean([p.gap for p in plans], [p.bound for p in plans])}


def degrees_of(plans):
    """Degrees of sequence plans' groups, micro-batch by micro-batch.

    Parameters
    ----------
    plans : list of SequencePlan

    Returns
    -------
    str

    Examples
    --------
    >>> import orchvlm
    >>> from orchvlm.group_metrics import degrees_of
    >>> cost = orchvlm.SequenceCost(0.0, 1e-3, comm={1: 0.0, 2: 2e-4}, memory_per_token=1.0,
    ...                             memory_limit=1000)
    >>> degrees_of([orchvlm.plan_sequences([1500, 900, 850], 4, cost)])
    '2+1+1'
    """
    return "; ".join("+".join(str(group.degree) for group in micro.groups)
                     for plan in plans for micro in plan.micro_batches)


def seen_of(plans, runs, comm):
    """What all ranks did.

    Parameters
    ----------
    plans : list of StepPlan
    runs : list of GroupRun
        This rank's.
    comm : Comm

    Returns
    -------
    Seen
    """
    mine = np.array([(run.first_gpu, run.degree, run.busy_s, run.waited_s) for run in runs],
                    np.float64).reshape(1, -1)
    told = comm.all_gather(mine, np.ones(comm.size, np.int64))
    told = told.reshape(comm.size, -1, _COLUMNS).transpose(1, 0, 2)
    return Seen(plans, told[..., :2].astype(np.int64), told[..., 2], told[..., 3])


def labelled(name, first, degree):
    """What a timeline calls an event of a phase; of a group its first rank and degree."""
    return f"{name} {first}+{degree}" if degree else name
