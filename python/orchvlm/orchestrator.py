"""One global batch over ranks: every phase evenly, and a gradient that does not depend on how."""
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .choosing import LANGUAGE, counted_costs, group_cost, media_of, one_node, planned, warn
from .comm import Comm
from .cost import Cluster, _count
from .data.assets import DataError
from .dispatch import Dispatcher
from .group_metrics import labelled, seen_of
from .inputs import Inputs
from .model import Model
from .passes import Ran
from .rounds import Rounds, evenness, fewest, mean
from .refit import Refit
from .sequence_parallel import SequenceGroups
from .sequence_phase import blocks_of, features_of, micro_batches
from .sharding import Shard
from .shares import first_error, gathered, gathered_batch, medium, unpacked

_MOST_REFUSED = 100  # global batches in a row of which nothing is left
_MOST_BYTES = 2**62


@dataclass
class PreparedRound:
    """What this rank computes of a round.

    Attributes
    ----------
    plan : StepPlan
        The same on all ranks.
    micro : list of Part
        Micro-batches of the language phase.
    items : dict of str to (array, int32[n, 3])
        Rows and sizes of what is encoded, by medium.
    """

    plan: object
    micro: list
    items: dict


@dataclass
class Prepared:
    """A global batch that is where it will be used, before anything is computed.

    Attributes
    ----------
    normalizer : float
        Sum of all weights of the global batch.
    rounds : list of PreparedRound
        Equally many on all ranks.
    ran : Ran
        Counts the samples that this rank read, whoever computes them.
    inputs : Inputs
        Those samples.
    """

    normalizer: float
    rounds: list
    ran: Ran
    inputs: Inputs


class Orchestrator:
    """Encodes, routes and decodes global batches over the ranks of a communicator.

    Parameters
    ----------
    model : Model
        The same on all ranks.
    comm : Comm
    costs : dict of str to BatchCost or SequenceCost, optional
        By phase; by default counted from the configuration.  Where groups may run the language
        phase, ``"llm"`` is a :class:`SequenceCost`, whose degrees they have, or a BatchCost, beside
        which exchanges are counted.
    cluster : Cluster, optional
        By default one node of the communicator's ranks.
    language : {"balance", "sequence_parallel", "auto"}
        Who runs the language phase: whole samples on ranks; groups of ranks that share the tokens
        of their samples, other ones in every micro-batch (:func:`plan_sequences`); or, step by
        step, whichever takes less time by the cost, but groups where a sequence is longer than
        ``max_tokens``, or than the memory holds.  Where there is no plan with groups, samples are
        balanced and a warning says why.
    max_tokens, max_patches, max_frames : int, optional
        Of a micro-batch on one rank in the language phase; of a round on one rank in the vision and
        audio phase.  What is longer is taken too, and micro-batches of its round hold as much as
        it; with too many patches or frames a sample has a round to itself, in which its items are
        spread evenly, and a sequence that is longer than a group holds has the widest group.
    micro_batches : int
        Packs of the loader that make a global batch.
    memory_bytes : int, optional
        That a rank's model holds at most, from which the rounds of a step follow.
    checkpoint : {"none", "selective", "full"}
        With which :meth:`run` will be called; memory is foretold for it.
    refit : int
        After so many steps, each time, :attr:`costs` are fitted to what the phases took
        (:class:`orchvlm.refit.Refit`), and :meth:`metrics` says with which error; 0: never.  Plans
        then follow the machine, and a run does not repeat itself to the bit.

    Attributes
    ----------
    costs : dict of str to BatchCost or SequenceCost
        That plans are made with.
    language : str
        As above.
    shard : Shard
        The model's, or a new one that keeps all of it on every rank.

    Raises
    ------
    TypeError
        An argument of another kind.
    ValueError
        An MPI for one thread; a limit below 1; less memory than weights and state take; what the
        planner refuses, and a sample that does not fit into the memory, when a batch is prepared.

    Notes
    -----
    A step: lengths are gathered and every rank makes the same plan (:func:`plan_step`, with a limit
    on work, not on time); raw data and tokens travel, pictures as the files that they are, so that
    a rank decodes what it encodes; each rank encodes its items; one all-to-all per encoder
    brings features straight to the ranks of their tokens; the language phase runs in
    micro-batches, as many on every rank; gradients of features go back the way they came; gradients
    of weights are summed over the ranks.  Where that is more than the memory holds, the samples are
    dealt out to rounds, each with a plan, encoders, micro-batches and encoders' backwards of its
    own: the fewest found of which :meth:`Model.memory` foretells that they fit.  So they are where
    a rank would encode more than its limit, as all items of a round are encoded at once.  The loss
    is a sum over the global batch divided by one normaliser, so neither depends on the plan.

    References
    ----------
    OrchMLLM, arXiv 2503.23830: post-balancing per phase, composed all-to-all.
    FlexSP, arXiv 2412.01523: groups of ranks that change from micro-batch to micro-batch.

    Examples
    --------
    One sample, read by rank 0, on two ranks:

    >>> import orchvlm
    >>> from orchvlm.routing import Balance
    >>> def work(comm):
    ...     model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    ...     ids = [72, 105, 33] if comm.rank == 0 else []
    ...     mine = orchvlm.Inputs(input_ids=ids, labels=ids, cu_seqlens=[0, len(ids)])
    ...     ranks = orchvlm.Orchestrator(model, comm)
    ...     model.zero_grad()
    ...     ran = ranks.run(ranks.prepare(mine), Balance(model, "exact", 0.0, ranks.total))
    ...     ranks.reduce_gradients()
    ...     return ran.targets
    >>> sum(orchvlm.comm.run_threads(2, work))
    2
    """

    def __init__(self, model, comm, *, costs=None, cluster=None, max_tokens=None, max_patches=None,
                 max_frames=None, micro_batches=1, memory_bytes=None, checkpoint="none", refit=0,
                 language="balance"):
        for value, kind, name in ((model, Model, "model"), (comm, Comm, "comm")):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
        if comm.engine == "mpi" and not comm._any_thread:
            raise ValueError("comm: this MPI was started for calls from one thread at a time, but "
                             "data move beside the steps; start it with MPI.THREAD_MULTIPLE")
        if not isinstance(cluster, (Cluster, type(None))):
            raise TypeError(f"cluster must be a Cluster; got {type(cluster).__name__}")
        if not isinstance(costs, (dict, type(None))):
            raise TypeError(f"costs must be a dict; got {type(costs).__name__}")
        if language not in LANGUAGE:
            raise ValueError(f"language must be one of {', '.join(LANGUAGE)}; got {language!r}")
        limits = {"llm": _limit(max_tokens, "max_tokens"),
                  "vision": _limit(max_patches, "max_patches"),
                  "audio": _limit(max_frames, "max_frames")}
        self.model, self.comm = model, comm
        self._micro_batches = _limit(micro_batches, "micro_batches")
        self.timeline = []
        self._sums_s, self._waited_s = [], 0.0  # of the step: in total(), of the shard before it
        self.rank, self.size = comm.rank, comm.size
        # A step, and beside it the next one's data, in a thread of its own.
        self._ways = Dispatcher(comm), Dispatcher(comm.dup())
        self.media = media_of(model.config)
        self.shard = model.shard or Shard(model, comm)
        self.cluster = cluster or one_node(comm.size)
        self.language, self._groups, self._told = language, SequenceGroups(comm), ""
        self.costs = dict(costs or counted_costs(model.config, self.cluster))
        if language != "balance" and "llm" in self.costs:
            self.costs["llm"] = group_cost(self.costs["llm"], model.config, self.cluster)
        self._refit_every = _count("Orchestrator", "refit", refit, least=0)
        self._refit = Refit(self.costs) if self._refit_every else None
        self._made, self._coming = 0, [(0, self.costs)]  # batches begun; costs from one of them on
        memory_bytes = _limit(memory_bytes, "memory_bytes", _MOST_BYTES)
        self._rounds = None if memory_bytes is None else Rounds.of_model(
            model, memory_bytes, checkpoint)
        self._limits = {name: most for name, most in limits.items()
                        if most is not None and name in (*self.media, "llm")}

    # ------------------------------------------------------------ before the step

    ahead = 1  # batches that are planned, and whose data travels, while a step runs

    def make(self, loader):
        """The next step's batch, from this rank's samples; for a thread beside the steps.

        Parameters
        ----------
        loader : iterator of Inputs
            Is told by its ``refused``, where it has one, as :meth:`prepare` says.

        Returns
        -------
        Prepared

        Raises
        ------
        ValueError
            As of :meth:`prepare`; a hundred batches in a row have nothing but broken pictures.
        """
        refused, number = getattr(loader, "refused", None), self._made
        self._made += 1
        for _ in range(_MOST_REFUSED):
            prepared = self.prepare(
                Inputs.concatenate([next(loader) for _ in range(self._micro_batches)]),
                beside=True, refused=refused)
            if prepared is not None:
                prepared.ran.number = number
                return prepared
        raise ValueError(f"in {_MOST_REFUSED} global batches in a row no picture can be decoded")

    def prepare(self, inputs, beside=False, refused=None):
        """Plans a global batch and moves its data; computes nothing.

        Parameters
        ----------
        inputs : Inputs
            This rank's samples, which may be none.
        beside : bool
            In a thread of its own, while the step before runs: over a dup of the communicator.
        refused : callable, optional
            ``refused(n, error, here)`` is told on all ranks that n samples are left out, whose
            pictures have good headers and broken bodies, the error of one, and whether it is of
            this rank's decoding; else such a picture raises.

        Returns
        -------
        Prepared or None
            None where all samples were left out.

        Raises
        ------
        ValueError
            On all ranks: what :meth:`rounds` refuses; a broken picture.
        """
        ways, start = self._ways[beside], time.perf_counter()
        media = {name: medium(self.model.config, inputs, name) for name in self.media}
        batch, sizes, normalizer = gathered_batch(self.model.config, inputs, media, ways.comm)
        known = time.perf_counter()
        rounds = self.rounds(batch, sizes, media, beside)
        planned = time.perf_counter()
        broken = {}  # samples, and why
        ready = [self._ready(one, batch, inputs, media, ways, broken) for one in rounds]
        if any(one[:, 3].any() for one in sizes.values()):  # the same on all ranks
            lost, _ = gathered(ways.comm, np.array(sorted(broken), np.int64))
            if len(lost):
                return self._without(np.unique(lost), broken, batch, inputs, beside, refused)
        seconds = {"lengths": known - start, "plan": planned - known,
                   "data": time.perf_counter() - planned}
        ran = Ran([inputs], self.model)
        ran.plans, ran.prepared_seconds = [one.plan for one in rounds], seconds
        return Prepared(normalizer, ready, ran, inputs)

    def _without(self, lost, broken, batch, inputs, beside, refused):
        """A Prepared of the samples of a batch but these.  They are taken out where they were read,
        and all is done again: plan, counts and normaliser are those of what is left."""
        error = first_error(broken, batch, self._ways[beside].comm)
        if refused is None or not isinstance(error, DataError):
            raise error
        refused(len(lost), error, bool(broken))
        ours = np.flatnonzero(batch.source_rank == self.rank)
        return None if len(lost) == len(batch) else self.prepare(
            inputs[np.flatnonzero(~np.isin(ours, lost))], beside, refused)

    def rounds(self, batch, sizes, media, beside=False):
        """The rounds of a global batch; every rank makes the same ones.

        Parameters
        ----------
        batch : Batch
        sizes : dict of str to int64[k, 4]
            Of all its items.
        media : dict of str to Medium
            This rank's.
        beside : bool
            As in :meth:`prepare`.

        Returns
        -------
        list of Round
        """
        limited = [name for name in self.media if name in self._limits]
        # Of steps to come the same costs on every rank, whenever its thread gets there.
        costs = self.costs if not beside else next(
            costs for first, costs in reversed(self._coming) if first < max(1, self._made))
        plan = partial(self.plan, costs=costs)
        if self._rounds is None:
            return fewest(batch, sizes, plan, limited)
        dtype = media["vision"].rows.dtype if "vision" in media else np.float32
        return self._rounds.of(batch, sizes, dtype, plan, limited)

    def _ready(self, round, batch, inputs, media, ways, broken):
        """A PreparedRound: this rank's samples of it go where the plan says, others' come; adds
        those whose pictures are ``broken``."""
        if len(round.samples) < len(batch):
            ours = np.flatnonzero(batch.source_rank == self.rank)
            inputs = inputs[np.flatnonzero(np.isin(ours, round.samples))]
            kinds = {name: one.rows.dtype for name, one in media.items()}
            media = {name: medium(self.model.config, inputs, name) for name in media}
            media = {name: replace(one, rows=one.rows.astype(kinds[name], copy=False))
                     for name, one in media.items()}
        items = {name: self._raw(round, name, media[name], ways, broken)
                 for name, sizes in round.sizes.items() if len(sizes)}
        return PreparedRound(round.plan, micro_batches(inputs, round.plan, ways), items)

    def plan(self, batch, costs=None):
        """The plan of a global batch; every rank makes the same one.

        Parameters
        ----------
        batch : Batch
        costs : dict of str to BatchCost or SequenceCost, optional
            By default :attr:`costs`.

        Returns
        -------
        StepPlan
        """
        alone = self.language == "balance" or self._rounds is None
        return planned(batch, self.cluster, costs or self.costs, self._limits, self.language,
                       None if alone else self._rounds.tokens, self._tell)

    def _tell(self, text):
        """A warning of this rank's, if it is the first one; once where it is the same again."""
        if self.rank == 0 and text != self._told:
            warn(text)
        self._told = text

    def _raw(self, round, name, held, ways, broken):
        """(rows, sizes) of the items that this rank encodes."""
        share, items = round.plan.phases[name], round.batch.phases[name]
        order = np.lexsort((items.position, items.sample, share.micro_batch))
        mine = order[share.rank[order] == self.rank]
        route, sizes = round.plan.routes[name], round.sizes[name]
        if not sizes[:, 3].any():
            return ways.prepare(route).apply(held.rows), sizes[mine, :3].astype(np.int32)
        # Files travel as they are, and whoever encodes a picture decodes it.
        arrived = ways.prepare(route.in_bytes(items.bytes)).apply(held.packed())
        rows, failed = unpacked(arrived, sizes[mine], items.bytes[mine], held.rows.shape[1],
                                held.rows.dtype)
        broken.update((int(round.samples[items.sample[mine[k]]]), error)
                      for k, error in failed.items())
        return rows, sizes[mine, :3].astype(np.int32)

    # ------------------------------------------------------------ the step

    def run(self, prepared, balance, checkpoint="none"):
        """Forward and backward of a prepared batch: adds this rank's part of the gradients.

        Parameters
        ----------
        prepared : Prepared
        balance : Balance
            Of the routers.
        checkpoint : {"none", "selective", "full"}

        Returns
        -------
        Ran
        """
        model, ran = self.model, prepared.ran
        self._sums_s, self._waited_s = [], self.shard.waited_s()
        rounds = self._bound(prepared.rounds)
        if len(rounds) == 1:  # what is encoded for the counts serves the pass too
            given = self._features(rounds[0], checkpoint, ran)
            counts = balance.begin(ran.tokens, lambda: self._route(rounds[0], given))
        else:
            counts = balance.begin(ran.tokens, lambda: self._route_all(rounds, checkpoint, ran))
        for number, one in enumerate(rounds, 1):
            if len(rounds) > 1:
                given = self._features(one, checkpoint, ran)
            self._pass(one, given, prepared.normalizer, counts, balance, checkpoint, ran,
                       number == len(rounds))
        return ran

    def _bound(self, rounds):
        """Rounds whose parts have their groups' communicators, which are made where a plan is the
        first that needs them."""
        blocks = blocks_of(one.plan for one in rounds)
        if any(block not in self._groups for block in blocks):
            self._groups.open(blocks)
        return [replace(one, micro=[part.bound(self._groups) for part in one.micro])
                for one in rounds]

    def _pass(self, round, given, normalizer, counts, balance, checkpoint, ran, last):
        """Micro-batches of a round, and backwards of its encoders."""
        model, features = self.model, features_of(self.model.config, round.micro, given)
        slopes, left = [], len(features) if last else -1
        for micro, part in zip(round.micro, features):
            left -= 1
            with ran.micro_batch(micro, self._groups):
                out = model.forward(micro.pack, normalizer=normalizer, router_counts=counts,
                                    checkpoint=checkpoint, **part)
                ran.note(out)
                balance.note(out)
                if left == 0:
                    self.shard.last_backward()
                slopes.append(model.backward())
        for name in reversed(given):
            self._encode_backward(name, round, slopes, ran)

    def _to_llm(self, name, round):
        """The way of features to the tokens that wait for them."""
        return self._ways[0].prepare(round.plan.routes[f"{name}->llm"])

    def _features(self, round, checkpoint, ran, training=True):
        """By medium (features, extra) of this rank's tokens in a round."""
        return {name: self._encode(name, round, checkpoint, ran, training) for name in self.media
                if name in round.items}

    def _route(self, round, given):
        """(counts, rows) of the routers in a round."""
        seen = [self.model.route(one.pack, **part) for one, part in zip(
            round.micro, features_of(self.model.config, round.micro, given))]
        return sum(counts for counts, _ in seen), sum(rows for _, rows in seen)

    def _route_all(self, rounds, checkpoint, ran):
        """The same of all rounds, which are encoded for it, and forgotten."""
        seen = [self._route(one, self._features(one, checkpoint, ran, training=False))
                for one in rounds]
        return sum(counts for counts, _ in seen), sum(rows for _, rows in seen)

    def _encode(self, name, round, checkpoint, ran, training):
        """(features, extra) of this rank's tokens; what is not trained on is no time of the phase,
        to which costs are fitted."""
        rows, sizes = round.items[name]
        with ran.timed(name) if training else nullcontext():
            features, extra = self.model.encode(name, rows, sizes if name == "vision"
                                                else sizes[:, 0], training=training,
                                                checkpoint=checkpoint)
        with ran.timed(f"{name}->llm"):
            layers = [] if extra is None else list(extra)
            arrived = self._to_llm(name, round).apply([features, *layers])
        return arrived[0], None if extra is None else np.stack(arrived[1:])

    def _encode_backward(self, name, round, slopes, ran):
        """Gradients of the features of all micro-batches, back to who encoded them."""
        place = 0 if name == "vision" else 2
        with ran.timed(f"llm->{name}"):
            back = [np.concatenate([one[place] for one in slopes])]
            if name == "vision" and slopes[0][1] is not None:
                back += list(np.concatenate([one[1] for one in slopes], axis=1))
            back = self._to_llm(name, round).reverse(back)
        with ran.timed(name):
            self.model.encode_backward(back[0], np.stack(back[1:]) if back[1:] else None,
                                       modality=name)

    # ------------------------------------------------------------ over ranks

    @staticmethod
    def inputs(prepared):
        """The samples of a batch that this rank read, their pictures decoded.

        Parameters
        ----------
        prepared : Prepared

        Returns
        -------
        Inputs
        """
        return prepared.inputs.decoded()

    def total(self, array):
        """An array of numbers, summed over the ranks.

        Parameters
        ----------
        array : ndarray

        Returns
        -------
        ndarray
        """
        start = time.perf_counter()
        whole = self.comm.all_reduce(array)
        self._sums_s.append(time.perf_counter() - start)
        return whole

    def reduce_gradients(self):
        """Sums the gradients over the ranks, where the last backward has not done it yet."""
        self.shard.reduce_gradients()

    def abort(self, message):
        """Makes the other ranks fail.

        Parameters
        ----------
        message : str
            What they say.
        """
        self.comm.abort(message)

    def metrics(self, ran):
        """What a line of metrics says besides.

        Parameters
        ----------
        ran : Ran
            Of :meth:`run`.

        Returns
        -------
        dict of str to float or str
            ``rounds``; for every phase, over all rounds, largest load over mean: ``_sampled``,
            with every item where it was read, and ``_planned``, as the plan has it; ``_measured``:
            the same of what the ranks computed, and ``_seconds`` of the slowest rank.  Of transfers
            only the last.  ``plan_ms`` and ``plan_gap``: the plan's own time and its distance from
            the best possible; ``predicted_seconds``: its time.  Of a step that refits, by phase
            ``_cost_error`` and ``_cost_error_before``: how far what the new costs, and those
            before, say is from what was measured (the median, a share of 1).  Where groups ran the
            language phase ``sp_degrees``, a text: their degrees by micro-batch, such as 2+1+1; 4;
            ``sp_time`` and ``sp_gap``: of their plan.
            ``exposed_comm_ms``: communication since :meth:`run` began that no computing hid.

        Notes
        -----
        Exposed is the time that a rank's own thread spends in a collective.  Whoever comes last to
        one waits for nobody, so that the least time of any rank is that of the communication, and
        the rest of the others' is waiting for slower ranks.  Transfers of features and sums are
        counted one by one, each at its least; of the gathers and sums of weights and gradients each
        rank has the step's total, and the least of these counts, which may hold some waiting; of
        exchanges in groups the least of each group's ranks, and the longest group of a micro-batch.
        """
        plans, row = ran.plans, {"rounds": len(ran.plans)}
        names = sorted(ran.busy)
        mine = np.array([[ran.busy[name], ran.seconds[name]] for name in names]).reshape(1, -1, 2)
        busy = self.comm.all_gather(mine, np.ones(self.size, np.int64))
        seen = seen_of(plans, ran.groups, self.comm)
        for name, (work, passed) in zip(names, busy.transpose(1, 2, 0)):
            row[f"{name}_seconds"] = float(passed.max())
            if "->" not in name:
                row[f"{name}_sampled"], row[f"{name}_planned"] = evenness(plans, name)
                row[f"{name}_measured"] = float(work.max() / work.mean()) if work.any() else 1.0
            if self._refit is not None and name in self.costs:
                self._refit.note(plans, name, work, seen)
        self._gather_events(ran, names, seen.in_groups)
        if self._refit is not None and (ran.number + 1) % self._refit_every == 0:
            row |= self._refitted(ran.number)
        return {**row, **seen.row(),
                "exposed_comm_ms": 1e3 * (self._exposed_s(ran) + seen.exposed_s()),
                "plan_ms": 1e3 * ran.prepared_seconds["plan"],
                "plan_gap": mean([plan.gap for plan in plans], [plan.bound for plan in plans]),
                "predicted_seconds": sum(plan.time for plan in plans)}

    def _refitted(self, number):
        """Fits the costs behind step ``number``; the errors, for the line of metrics."""
        row = {}
        for name, errors in self._refit.fit().items():
            row[f"{name}_cost_error_before"], row[f"{name}_cost_error"] = errors
        self.costs = dict(self._refit.costs)
        # The next batch may be under way on some ranks; the one behind it is on none.
        first = max(k for k, (at, _) in enumerate(self._coming) if at <= number + 1)
        self._coming = [*self._coming[first:], (number + 2, self.costs)]
        return row

    def _exposed_s(self, ran):
        """Seconds of the step's communication that nothing hid; see :meth:`metrics`."""
        mine = np.array([[end - start for name, start, end in ran.events if "->" in name]
                         + self._sums_s + [self.shard.waited_s() - self._waited_s]])
        return float(self.comm.all_gather(mine, np.ones(self.size, np.int64)).min(axis=0).sum())

    def _gather_events(self, ran, names, in_groups):
        """Keeps when every rank did what, for reports."""
        runs = iter(ran.groups if in_groups else ())
        blocks = [next(runs, (0, 0)) if name == "llm" else (0, 0) for name, _, _ in ran.events]
        mine = np.array([(names.index(name), start, end, *block[:2])
                         for (name, start, end), block in zip(ran.events, blocks)],
                        np.float64).reshape(-1, 5)
        rows, ranks = gathered(self.comm, mine)
        self.timeline = [[(labelled(names[int(name)], int(first), int(degree)), start, end)
                          for name, start, end, first, degree in rows[ranks == r]]
                         for r in range(self.size)]


def _limit(value, name, most=2**31 - 1):
    return value if value is None else _count("Orchestrator", name, value, 1, most)
