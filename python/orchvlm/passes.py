"""The passes of one step on one rank, and what they gave."""
import time
from contextlib import contextmanager

import numpy as np

from .inputs import Inputs
from .sequence_executor import GroupRun
from .shares import label_weights


class Ran:
    """What a rank's part of a step gave.

    Attributes
    ----------
    loss : float
        This rank's part; those of all ranks add up.
    targets, tokens, patches : int
        Of its part of the batch.
    flops : float
    aux_loss : float
        Of routers, its part.
    seconds, busy : dict of str to float
        By phase and transfer: what went by, and what the calling thread computed.
    events : list of (str, float, float)
        The same one after the other: name, start and end.
    groups : list of GroupRun
        With several ranks: what this one did in the language phase, by micro-batch.
    plans : list of StepPlan
        With several ranks: of the step's rounds.
    number : int
        Of the batch among those that were made beside steps; -1 for others.
    prepared_seconds : dict of str to float
        What gathering lengths, planning and moving data took, beside the step before.
    """

    def __init__(self, packs, model):
        self.loss, self.targets, self.aux_loss = 0.0, 0, 0.0
        self.tokens = sum(pack.n_tokens for pack in packs)
        self.patches = sum(pack.n_patches for pack in packs)
        self.flops = sum(map(model.flops, packs))
        self.seconds, self.busy, self.events = {}, {}, []
        self.groups, self.plans, self.prepared_seconds, self.number = [], [], {}, -1

    @contextmanager
    def timed(self, name):
        """Adds what happens inside to a phase."""
        start, busy = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.events.append((name, start, end))
            for total, now in ((self.seconds, end - start),
                               (self.busy, time.thread_time() - busy)):
                total[name] = total.get(name, 0.0) + now

    @contextmanager
    def micro_batch(self, part, groups):
        """Adds what happens inside to the language phase, as a micro-batch of it.

        Parameters
        ----------
        part : Part
        groups : SequenceGroups
            That it exchanges in.
        """
        waited, busy = groups.counts()["waited_s"], self.busy.get("llm", 0.0)
        with self.timed("llm"):
            yield
        self.groups.append(GroupRun(part.first, part.degree, part.pack.n_tokens,
                                    *self.events[-1][1:], groups.counts()["waited_s"] - waited,
                                    self.busy["llm"] - busy))

    def note(self, out):
        """Adds a micro-batch's output."""
        self.loss, self.targets = self.loss + out.loss, self.targets + out.n_target_tokens


class OneRank:
    """Steps without other ranks: the forward of each pack encodes its own images and sounds.

    Parameters
    ----------
    model : Model
    micro_batches : int
        Packs per step.
    """

    rank, size = 0, 1
    timeline = ()
    ahead = 3  # batches that are made before they are asked for

    def __init__(self, model, micro_batches):
        self._model, self._micro_batches = model, micro_batches

    def make(self, loader):
        """The packs of the next step."""
        return [next(loader) for _ in range(self._micro_batches)]

    def run(self, packs, balance, checkpoint):
        """Forwards and backwards of a step.

        Parameters
        ----------
        packs : list of Inputs
        balance : Balance
        checkpoint : {"none", "selective", "full"}

        Returns
        -------
        Ran
        """
        model = self._model
        ran = Ran(packs, model)
        total = sum(float(label_weights(pack).sum(dtype=np.float64)) for pack in packs)
        counts = balance.begin(ran.tokens, lambda: self._route(packs), len(packs) == 1)
        for pack in packs:
            out = model.forward(pack, normalizer=total, router_counts=counts,
                                checkpoint=checkpoint)
            ran.note(out)
            balance.note(out)
            model.backward()
        return ran

    def _route(self, packs):
        parts = [self._model.route(pack) for pack in packs]
        return sum(counts for counts, _ in parts), sum(rows for _, rows in parts)

    @staticmethod
    def inputs(packs):
        """The samples of a batch."""
        return Inputs.concatenate(packs)

    def total(self, array):
        """An array of numbers, summed over the ranks."""
        return np.asarray(array)

    def reduce_gradients(self):
        """Sums the gradients over the ranks."""

    def metrics(self, ran):
        """What a line of metrics says besides."""
        return {}

    def abort(self, message):
        """Tells other ranks that this one fails."""


def passes_of(model, config, comm):
    """Who runs the passes of a step."""
    if comm is None or comm.size == 1:
        if config.rank_experts > 1:
            raise ValueError(f"rank_experts = {config.rank_experts}: one rank shares its experts "
                             "with nobody; use more ranks, or 1")
        return OneRank(model, config.micro_batches)
    from .orchestrator import Orchestrator
    from .sharding import Shard
    Shard(model, comm, config.shard, config.node_size, config.rank_experts)
    memory = config.rank_memory_bytes
    if memory is not None and config.ema is not None:  # the average is made behind this
        memory = max(1, memory - 4 * sum(int(np.prod(row[2])) for row in model._list if row[3]))
    return Orchestrator(model, comm, max_tokens=config.rank_tokens,
                        max_patches=config.rank_patches, micro_batches=config.micro_batches,
                        memory_bytes=memory, checkpoint=config.checkpoint, refit=config.rank_refit,
                        language=config.rank_language)
