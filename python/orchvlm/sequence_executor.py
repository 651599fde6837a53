"""Runs a plan of sequence-parallel groups: micro-batches whose groups change from one to the
next."""
import time
from typing import NamedTuple

import numpy as np

from .configs import ModelConfig
from .inputs import Inputs
from .model import Model
from .phases import checkpoint_number
from .sequence_parallel import SequenceGroups, row_ranks
from .sequences import SequencePlan
from .shares import label_weights

_SIZES = {"float32": 4, "bfloat16": 2, "float64": 8}


class GroupRun(NamedTuple):
    """What a rank did in one micro-batch.

    Attributes
    ----------
    first_gpu, degree : int
        Its group; degree 0 where it had none.
    tokens : int
        Of its shard.
    start_s, end_s : float
        On the clock of ``time.perf_counter``.
    waited_s : float
        Of that in exchanges, waiting for slower ranks of the group included.
    busy_s : float
        Of that, what the calling thread computed.
    """

    first_gpu: int
    degree: int
    tokens: int
    start_s: float
    end_s: float
    waited_s: float
    busy_s: float


class SequenceRun(NamedTuple):
    """What a rank's part of a plan gave.

    Attributes
    ----------
    loss, aux_loss : float
        This rank's part; those of all ranks add up.
    n_target_tokens : int
        Labels that its shards predicted.
    sent_bytes : int
        To other ranks in exchanges; :func:`exchange_bytes` foretells them.
    groups : list of GroupRun
        One per micro-batch.
    """

    loss: float
    aux_loss: float
    n_target_tokens: int
    sent_bytes: int
    groups: list


class SequenceExecutor:
    """Runs the plans of :func:`plan_sequences` on ranks that hold the whole batch.

    Groups' communicators are made by all ranks when a plan first needs them, and kept, so that
    changing groups costs nothing afterwards.  Ranks of different groups meet only in the parameter
    collectives of a :class:`Shard`, where there is one; a rank that a micro-batch leaves idle runs
    it without tokens, so that these match.

    Parameters
    ----------
    model : Model
        With the same weights on all ranks.
    comm : Comm
        All ranks; a GPU of the plan is a rank here.

    Attributes
    ----------
    model, comm
        As above.
    groups : SequenceGroups
        What was made so far.

    Raises
    ------
    TypeError
        No model, no communicator.

    References
    ----------
    FlexSP, arXiv 2412.01523, section 5 and algorithm 1.

    Examples
    --------
    >>> import numpy as np, orchvlm
    >>> texts = [np.arange(n) % 200 + 10 for n in (350, 60)]
    >>> batch = orchvlm.Inputs.concatenate(
    ...     [orchvlm.Inputs(input_ids=ids, labels=ids) for ids in texts])
    >>> cost = orchvlm.SequenceCost(1e-6, 1e-4, comm={1: 0.0, 3: 1e-5}, memory_per_token=1.0,
    ...                             memory_limit=120)
    >>> plan = orchvlm.plan_sequences(batch.lengths, 4, cost, work_limit=100, time_limit=None)
    >>> [group.degree for group in plan.micro_batches[0].groups]
    [3, 1]
    >>> def work(comm):
    ...     model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    ...     return orchvlm.SequenceExecutor(model, comm).run(plan, batch)
    >>> runs = orchvlm.comm.run_threads(4, work)
    >>> [run.groups[0].tokens for run in runs]
    [116, 117, 117, 60]
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> abs(sum(run.loss for run in runs) - model.forward(batch).loss) < 1e-5
    True
    >>> from orchvlm.sequence_executor import exchange_bytes
    >>> [run.sent_bytes for run in runs] == exchange_bytes(plan, model.config).tolist()
    True
    """

    def __init__(self, model, comm):
        if not isinstance(model, Model):
            raise TypeError(f"model must be a Model; got {type(model).__name__}")
        self.model, self.comm, self.groups = model, comm, SequenceGroups(comm)

    def __repr__(self):
        return f"<SequenceExecutor: {len(self.groups)} groups on {self.comm!r}>"

    def run(self, plan, batch, normalizer=None, router_counts=None, *, checkpoint="none",
            last=True):
        """Forwards and backwards of all micro-batches; gradients are added to.

        Parameters
        ----------
        plan : SequencePlan
            The same on all ranks.
        batch : Inputs
            Its sequences, of text, in the order of ``plan.lengths``.
        normalizer : float, optional
            As in :meth:`Model.forward`; by default the weight sum of the batch.
        router_counts : (int64[E], float), optional
            As in :meth:`Model.forward`; by default, for a model with experts, those of the batch,
            which a pass of its own finds: gradients do not depend on the plan.
        checkpoint : {"none", "selective", "full"}
        last : bool
            Nothing more is added to the gradients: a :class:`Shard` may sum them over the ranks
            while the last backward runs.

        Returns
        -------
        SequenceRun

        Raises
        ------
        TypeError
            No plan, no inputs.
        ValueError
            A plan for another number of ranks or for other lengths.
        CommError
            Another rank failed.
        """
        self._check(plan, batch)
        checkpoint_number(checkpoint)
        self.groups.open(plan.communicators)
        parts = self._parts(plan, batch)
        if normalizer is None:
            normalizer = float(label_weights(batch).sum(dtype=np.float64))
        if router_counts is None and self.model.config.sparse:
            router_counts = self._route(parts)
        before = self.groups.counts()["sent_bytes"]
        loss = aux = targets = 0
        ran = []
        for number, (group, part) in enumerate(parts, 1):
            waited, busy = self.groups.counts()["waited_s"], time.thread_time()
            start = time.perf_counter()
            out = self.model.forward(part, normalizer, router_counts, checkpoint=checkpoint)
            if last and number == len(parts) and self.model.shard is not None:
                self.model.shard.last_backward()
            self.model.backward()
            loss, aux, targets = loss + out.loss, aux + out.aux_loss, targets + out.n_target_tokens
            ran.append(GroupRun(*group, part.n_tokens, start, time.perf_counter(),
                                self.groups.counts()["waited_s"] - waited,
                                time.thread_time() - busy))
        sent = self.groups.counts()["sent_bytes"] - before
        return SequenceRun(float(loss), float(aux), int(targets), sent, ran)

    def _check(self, plan, batch):
        if not isinstance(plan, SequencePlan) or not isinstance(batch, Inputs):
            raise TypeError("run takes a SequencePlan and Inputs; got "
                            f"{type(plan).__name__} and {type(batch).__name__}")
        if plan.n_gpus != self.comm.size:
            raise ValueError(f"plan is for {plan.n_gpus} GPUs; there are {self.comm.size} ranks")
        if not np.array_equal(plan.lengths, batch.lengths):
            raise ValueError("batch: its sequences have other lengths than those of the plan")

    def _parts(self, plan, batch):
        """((first GPU, degree), shard or inputs without tokens) of each micro-batch."""
        parts = []
        for micro in plan.micro_batches:
            block, part = (0, 0), Inputs(input_ids=np.zeros(0, np.int32), cu_seqlens=[0])
            for group in micro.groups:
                if group.first_gpu <= self.comm.rank < group.first_gpu + group.degree:
                    block = group.first_gpu, group.degree
                    part = self.groups[block].shard(batch[group.items])
            parts.append((block, part))
        return parts

    def _route(self, parts):
        """Router counts of the whole batch."""
        found = [self.model.route(part) for _, part in parts]
        experts = self.model.config.text["num_experts"]
        mine = np.zeros(experts + 1, np.int64)
        for counts, rows in found:
            mine[:experts] += counts
            mine[experts] += rows
        total = self.comm.all_reduce(mine)
        return total[:experts], max(1, int(total[experts]))

    def close(self):
        """Frees the groups' communicators; waits for nobody."""
        self.groups.close()


def exchange_bytes(plan, config, dtype="float32", checkpoint="none", head_ranks=None):
    """Bytes that ranks send each other in a step's exchanges.

    In each layer a rank with t of the T tokens of its row (:func:`sequence_parallel.row_ranks`: the
    whole group, where it has no more ranks than the model query heads), and h query and g key/value
    heads of D columns among the row's sums H and G, sends in the forward its tokens' q, k and v to
    the others' heads and the others' o to their tokens, and in the backward the slopes of both; and
    in the ring the keys and values of u tokens that later rows read, and in the backward also the
    slopes of those that it read itself, of w tokens::

        t (H - h + 2 (G - g)) D + (T - t) h D + 2 u g D              forward
        t (H - h) D + (T - t) (h + 2 g) D + 2 (u + w) g D            backward

    Each row reads what the segment across its beginning has in earlier rows.

    Parameters
    ----------
    plan : SequencePlan
    config : ModelConfig
        Of a model that is trained from its first layer on.
    dtype : {"float32", "bfloat16"}
        Of activations.
    checkpoint : {"none", "selective", "full"}
        ``"full"`` runs the forward's exchanges twice.
    head_ranks : int, optional
        As in :class:`sequence_parallel.SequenceGroups`.

    Returns
    -------
    int64[N]
        Of each rank; the sum is what the network carries.

    Raises
    ------
    TypeError
        No plan, no configuration.
    ValueError
        Another dtype or checkpoint, or ``head_ranks`` below 1.

    References
    ----------
    FlexSP, arXiv 2412.01523, section 4.1: with d groups of whole heads and as many for keys, this
    is its 8 s width (d - 1) / d per layer over all ranks.

    Examples
    --------
    >>> import orchvlm
    >>> cost = orchvlm.SequenceCost(0.0, 1e-4, comm={2: 1e-5})
    >>> plan = orchvlm.plan_sequences([100], 2, cost)
    >>> config = orchvlm.preset("tiny")  # 6 layers, 6 query heads on 2, of 32 columns
    >>> orchvlm.sequence_executor.exchange_bytes(plan, config).tolist()
    [614400, 614400]
    """
    for value, kind, name in ((plan, SequencePlan, "plan"), (config, ModelConfig, "config")):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"dtype must be one of {', '.join(_SIZES)}; got {dtype!r}")
    forwards = 2 if checkpoint_number(checkpoint) == 2 else 1
    heads, kv_heads = (config.text[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    share, sent = heads // kv_heads, np.zeros(plan.n_gpus, np.int64)
    for micro in plan.micro_batches:
        for group in micro.groups:
            across = row_ranks(group.degree, heads, head_ranks)
            rows = group.degree // across
            cut = heads * np.arange(across + 1, dtype=np.int64) // across
            shards = group.tokens * np.arange(group.degree + 1, dtype=np.int64) // group.degree
            t, begins = np.diff(shards), shards[::across]
            h = np.tile(np.diff(cut), rows)
            g = np.tile(-(-cut[1:] // share) - cut[:-1] // share, rows)
            others = np.repeat(np.diff(begins), across) - t
            read, given = (np.repeat(n, across) for n in _ring_keys(
                np.cumsum([0, *plan.lengths[group.items]]), begins))
            forward = t * (heads - h + 2 * (g.sum() // rows - g)) + others * h + 2 * g * given
            backward = t * (heads - h) + others * (h + 2 * g) + 2 * g * (given + read)
            sent[group.first_gpu:group.first_gpu + group.degree] += forwards * forward + backward
    return sent * config.text["head_dim"] * config.text["num_hidden_layers"] * _SIZES[dtype]


def _ring_keys(starts, begins):
    """Keys that each row of a ring reads of all earlier ones, and gives to all later ones."""
    first, end = begins[:-1], begins[1:]
    reach = starts[np.searchsorted(starts, first, "right") - 1]  # of the segment across it
    reach = np.where(first < end, reach, first)
    keys = end[:, None] - np.maximum(first[:, None], reach)
    given = np.where(np.arange(len(first))[:, None] < np.arange(len(first)), keys, 0)
    return first - reach, given.clip(0).sum(axis=1)
