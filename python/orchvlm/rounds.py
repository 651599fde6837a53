"""A global batch in rounds, so that what each rank holds at a time fits into its memory."""
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace

import numpy as np

from .arenas import SIZES, numbers, parts_of
from .choosing import media_of
from .policies import squares_of
from .sequence_phase import groups_of, loads_of
from .sequences import SequencePlan
from .sharding import Shard
from .tables import format_bytes

_LONGEST = 1 << 24  # tokens


@dataclass
class Round:
    """Samples that are encoded, decoded and taken backwards together.

    Attributes
    ----------
    samples : int64[n]
        Their places in the global batch, rising.
    batch : Batch
        Of these alone.
    sizes : dict of str to int64[k, 4]
        Of its items, as :func:`orchvlm.shares.gathered_batch` gives them.
    plan : StepPlan
    """

    samples: np.ndarray
    batch: object
    sizes: dict
    plan: object


def share_of(round, rank, pixels=None):
    """What a rank holds in a round, as the arenas need it.

    Parameters
    ----------
    round : Round
    rank : int
    pixels : array, optional
        Of the dtype that pixels have.

    Returns
    -------
    list of SimpleNamespace
        Of each micro-batch: its tokens and, as ``given``, how many of them are a medium's, whoever
        encodes it; and all items of the round that the rank encodes.
    """
    plan, own = round.plan, {"vision": None, "audio": None}
    media = {name: items for name, items in round.batch.phases.items() if len(items)}
    for name in media:
        own[name] = round.sizes[name][plan.phases[name].rank == rank, :3]
    sounds = None if own["audio"] is None else own["audio"][:, 0]
    shares = []
    for groups in groups_of(plan):
        lengths, given, group = _held(plan, groups, rank, media)
        shares.append(SimpleNamespace(
            cu_seqlens=np.cumsum([0, *lengths]), grid_thw=own["vision"], mel_lengths=sounds,
            pixels=pixels, given=given, groups={group} if group[1] > 1 else set()))
    return shares


def _held(plan, groups, rank, media):
    """Lengths of what a rank runs of a micro-batch, of a shard its tokens among as many sequences
    as the group's; tokens of each medium among them; and its group's tokens and degree."""
    for first, degree, samples in groups:
        if first <= rank < first + degree:
            lengths = plan.batch.language_lengths[samples]
            tokens = int(lengths.sum())
            begin, end = (tokens * (rank - first + k) // degree for k in range(2))
            before = np.full(len(plan.batch), -1)  # of each sample, the group's tokens
            before[samples] = np.cumsum(lengths) - lengths
            given = {name: _inside(items, before, begin, end) for name, items in media.items()}
            return (lengths if degree == 1 else [*[0] * (len(samples) - 1), -(-tokens // degree)],
                    given, (tokens, degree))
    return [], dict.fromkeys(media, 0), (0, 0)


def _inside(items, before, begin, end):
    """Tokens of items that are in a part of a group's axis, on which samples begin behind what is
    before them; -1: they are on another's."""
    start = before[items.sample] + items.position
    inside = np.minimum(start + items.out_tokens, end) - np.maximum(start, begin)
    return int(inside[(before[items.sample] >= 0) & (inside > 0)].sum())


def exchanged_bytes(config, tokens, degree, dtype, checkpoint):
    """What a shard takes besides its own tokens' arenas, at most: queries, keys, values and outputs
    of the group's tokens for this rank's heads, their slopes, and what is packed to be sent.

    Parameters
    ----------
    config : ModelConfig
    tokens, degree : int
        Of the group.
    dtype, checkpoint : str

    Returns
    -------
    (int, int)
        Activations, workspace.
    """
    text, size = config.text, SIZES[dtype]
    heads, kv_heads, width = (text[name] for name in (
        "num_attention_heads", "num_key_value_heads", "head_dim"))
    cut = heads * np.arange(degree + 1) // degree
    own_kv = -(-cut[1:] * kv_heads // heads) - cut[:-1] * kv_heads // heads
    own = int((np.diff(cut) + own_kv).max())  # of queries, and of keys
    kept = tokens * (2 * own * width * size + 4 * own) + 256
    rows = -(-tokens // degree)
    blocks = rows * width * (heads + 2 * int(own_kv.sum())) * size
    passing = rows * width * (heads + 2 * kv_heads) * size
    work = 2 * tokens * own * width * size + max(blocks, passing) + 256
    if checkpoint == "full":
        return 0, work + kept
    return text["num_hidden_layers"] * kept, work


def most_exchanged(config, groups, dtype, checkpoint):
    """The same of several groups: [most activations, most workspace]."""
    return np.max([(0, 0), *(exchanged_bytes(config, *group, dtype, checkpoint)
                             for group in groups)], axis=0).tolist()


def step_bytes(config, shares, rows, dtype, checkpoint, *, counts=False, encoded=True, chunk=None,
               spread=1):
    """Activations and workspace of a rank's step, in packs one after the other.

    Each encoder and the decoder have activations of their own, which stay from one pack to the
    next: a rank holds the most that each takes in any of them.

    Parameters
    ----------
    config : ModelConfig
    shares : list of SimpleNamespace or Inputs
        Of each micro-batch of each round, from :func:`share_of`.
    rows : list
        Of the parameters, as :func:`orchvlm.arenas.of_model` takes them.
    dtype, checkpoint : str
    counts : bool
        A forward for the routers' counts alone comes first; it keeps nothing and works in more
        scratch.
    encoded : bool
        For that one the features are there already.
    chunk : int, optional
        As ``Model.moe_chunk_rows``.
    spread : int
        Ranks that share the experts.

    Returns
    -------
    dict of str to int
    """
    def ran(share, training=True):
        return parts_of(config, share, rows, dtype, training,
                        checkpoint if training else "none", chunk, spread)
    groups = {group for share in shares for group in getattr(share, "groups", ())}
    heavy = extremes([[numbers(config, share, chunk)] for share in shares])
    shares = [shares[i] for i in heavy]
    seen = [ran(share) for share in shares]
    activations = sum(max(parts[name] for parts, _ in seen) for name in seen[0][0])
    if counts and config.sparse and config.text.get("router_aux_loss_coef", 0.001) > 0:
        seen += [ran(_encoded(share) if encoded else share, False) for share in shares]
    kept, work = most_exchanged(config, groups, dtype, checkpoint)
    return {"activations": activations + kept,
            "workspace": max(workspace for _, workspace in seen) + work}


def extremes(sets):
    """Places of the sets of which one has the most bytes, where bytes rise with every number, and
    a set has the most of each kind that its members have.

    Parameters
    ----------
    sets : list of list of list of int
        Members are as many numbers each.

    Returns
    -------
    list of int
        Rising.  For every set that is left out, one of these has for each of its members one in
        which no number is less.

    Examples
    --------
    >>> from orchvlm.rounds import extremes
    >>> extremes([[[3, 1]], [[2, 2], [0, 3]], [[1, 2]], [[3, 1]]])
    [0, 1]
    """
    def covered(left, kept):
        return (left[:, None] <= kept).all(axis=2).any(axis=1).all()
    sets, found = [np.array(members, np.int64) for members in sets], []
    for i in sorted(range(len(sets)), key=lambda i: -sets[i].sum(axis=1).max()):
        if not any(covered(sets[i], sets[k]) for k in found):
            found.append(i)
    return sorted(found)


def _encoded(share):
    """A share whose features are there already."""
    return SimpleNamespace(**{**vars(share), "grid_thw": None, "mel_lengths": None})


class Rounds:
    """Cuts global batches into the fewest rounds found whose memory is at most a limit.

    Parameters
    ----------
    config : ModelConfig
    rows : list
        Of the parameters, as :func:`orchvlm.arenas.of_model` takes them.
    dtype : str
        Of the model.
    ranks : int
    held_bytes : int
        Weights, gradients and optimizer state of the rank that holds most.
    memory_bytes : int
        Of a rank: these, activations and workspace.
    checkpoint : {"none", "selective", "full"}
        With which the steps will run.
    chunk : int, optional
        As ``Model.moe_chunk_rows``.
    spread : int
        Ranks that share the experts.

    Raises
    ------
    ValueError
        Weights and state alone are more.

    Notes
    -----
    What is foretold is that of :meth:`Model.memory`.  Arrays of Python come on top: raw data, and
    features on their way.
    """

    def __init__(self, config, rows, dtype, ranks, held_bytes, memory_bytes, checkpoint="none",
                 chunk=None, spread=1):
        self._config, self._rows, self._dtype, self._ranks = config, rows, dtype, ranks
        self._checkpoint, self._chunk, self._spread = checkpoint, chunk, spread
        self._held, self._limit = held_bytes, memory_bytes
        self._room = memory_bytes - held_bytes
        if self._room <= 0:
            raise ValueError(f"memory_bytes = {memory_bytes} is too little: weights, gradients and "
                             f"optimizer state of a rank take {format_bytes(held_bytes)}; shard "
                             "them over more ranks, or give more")

    @classmethod
    def of_model(cls, model, memory_bytes, checkpoint="none"):
        """Those of a model that is sharded as it will train.

        Parameters
        ----------
        model : Model
        memory_bytes : int
        checkpoint : {"none", "selective", "full"}

        Returns
        -------
        Rounds
        """
        shard = model.shard
        ranks = shard.comm.size
        held = max(sum(Shard.predict(model, ranks, shard.modes, shard.node_size, rank=rank,
                                     experts=shard.experts).values()) for rank in range(ranks))
        return cls(model.config, model._core.parameters(), model.dtype, ranks, held, memory_bytes,
                   checkpoint, model.moe_chunk_rows, shard.experts)

    @cached_property
    def tokens(self):
        """int : of text, that a rank holds of the widest group's."""
        degree = min(self._ranks, self._config.text["num_attention_heads"])

        def fits(tokens):
            share = SimpleNamespace(cu_seqlens=np.array([0, tokens]), grid_thw=None,
                                    mel_lengths=None, pixels=None,
                                    given=dict.fromkeys(media_of(self._config), 0),
                                    groups={(tokens * degree, degree)} if degree > 1 else ())
            return sum(step_bytes(self._config, [share], self._rows, self._dtype,
                                  self._checkpoint, counts=True,
                                  chunk=self._chunk, spread=self._spread).values()) <= self._room
        return max(1, bisect_left(range(_LONGEST), True, key=lambda n: not fits(n)) - 1)

    def bytes(self, rounds, dtype):
        """Activations and workspace, on the rank that takes most.

        Parameters
        ----------
        rounds : list of Round
            Those of a batch.
        dtype : dtype
            Of pixels.

        Returns
        -------
        int
        """
        pixels = np.zeros(0, dtype)
        shares = [[share for one in rounds for share in share_of(one, rank, pixels)]
                  for rank in range(self._ranks)]
        heavy = extremes([[[*numbers(self._config, share, self._chunk), *most_exchanged(
            self._config, share.groups, self._dtype, self._checkpoint)] for share in some]
            for some in shares])
        return max(sum(step_bytes(
            self._config, shares[rank], self._rows, self._dtype, self._checkpoint, counts=True,
            encoded=len(rounds) == 1, chunk=self._chunk, spread=self._spread).values())
            for rank in heavy)

    def of(self, batch, sizes, dtype, plan, limited=()):
        """The rounds of a global batch; every rank finds the same.

        Parameters
        ----------
        batch : Batch
        sizes : dict of str to int64[k, 4]
        dtype : dtype
            Of pixels.
        plan : callable
            Makes the plan of a Batch.
        limited : iterable of str
            As :func:`fewest` takes it.

        Returns
        -------
        list of Round

        Raises
        ------
        ValueError
            A sample that does not fit even alone: which, how long, what it would take.
        """
        def wanted(rounds):
            needed, n = self.bytes(rounds, dtype), len(rounds)
            if needed <= self._room:
                return n
            if n == max(1, len(batch)):
                alone = [self.bytes([one], dtype) for one in rounds]
                raise self._too_long(batch, rounds[int(np.argmax(alone))], needed)
            return max(n + 1, int(n * needed / self._room))
        return fewest(batch, sizes, plan, limited, wanted)

    def _too_long(self, batch, round, needed):
        sample, lengths = int(round.samples[0]), round.batch.language_lengths
        items = "".join(f" and {items.length.sum():,} rows of {name}"
                        for name, items in round.batch.phases.items() if len(items))
        return ValueError(
            f"memory_bytes = {self._limit} is too little for one sample of rank "
            f"{batch.source_rank[sample]}: {lengths.sum():,} tokens{items} take "
            f"{format_bytes(needed)} beside {format_bytes(self._held)} of weights and state; "
            "give more, set checkpoint, or make samples shorter")


def fewest(batch, sizes, plan, limited=(), wanted=len):
    """The fewest rounds found of a global batch.

    Parameters
    ----------
    batch : Batch
    sizes : dict of str to int64[k, 4]
    plan : callable
        Makes the plan of a Batch.
    limited : iterable of str
        Phases whose items a rank encodes at once, for their backward needs them together, and that
        must be one micro-batch therefore, in every round of more than one sample.
    wanted : callable
        Of a list of rounds: how many it takes, for another reason.

    Returns
    -------
    list of Round
    """
    n, most = 1, max(1, len(batch))
    while True:
        rounds = [taken(batch, sizes, samples, plan) for samples in dealt(batch, n)]
        packs = sum(max((one.plan.phases[name].micro_batches for name in limited), default=1)
                    if len(one.samples) > 1 else 1 for one in rounds)
        more = packs if packs > n else wanted(rounds)
        if more <= n or n == most:
            return rounds
        n = min(most, more)


def phase_of(plan, name):
    """A plan's share of a phase, the language's among them.

    Parameters
    ----------
    plan : StepPlan
    name : str

    Returns
    -------
    Share
    """
    return plan.llm if name == "llm" else plan.phases[name]


def evenness(plans, name):
    """Of a phase over all rounds, largest load over mean: as sampled, as planned.

    Parameters
    ----------
    plans : list of StepPlan
    name : str

    Returns
    -------
    sampled, planned : float
    """
    rows = [_evenness(phase_of(plan, name), plan) for plan in plans]
    return tuple(mean([row[i] for row in rows], [row[2] for row in rows]) for i in range(2))


def _evenness(phase, plan):
    """(as sampled, as planned, seconds of the mean load) of one plan's phase."""
    if not isinstance(phase, SequencePlan):
        return phase.sampled_imbalance, phase.imbalance, phase.loads.mean()
    sampled, loads = loads_of(plan)
    return *(float(one.max() / one.mean()) if one.any() else 1.0
             for one in (sampled, loads)), loads.mean()


def mean(values, weights):
    """Of figures of rounds; that of one round is what it is."""
    whole = sum(weights)
    if len(values) == 1 or not whole:
        return float(values[0])
    return float(np.dot(values, weights) / whole)


def dealt(batch, n):
    """Samples of a batch in n rounds, longest first to the emptiest.

    Parameters
    ----------
    batch : Batch
    n : int

    Returns
    -------
    list of int64[k]
        Rising; none is empty where there are as many samples.
    """
    if n == 1:
        return [np.arange(len(batch))]
    size = batch.language_lengths / max(1, batch.language_lengths.sum())
    for items in batch.phases.values():
        np.add.at(size, items.sample, items.length / max(1, items.length.sum()))
    sums, members = np.zeros(n), [[] for _ in range(n)]
    for sample in np.argsort(-size, kind="stable"):
        # Of rounds that are alike the one with fewer samples, so that empty samples fill them too.
        at = min(range(n), key=lambda r: (sums[r], len(members[r])))
        sums[at] += size[sample]
        members[at].append(sample)
    return [np.sort(np.array(some, np.int64)) for some in members]


def taken(batch, sizes, samples, plan):
    """The round of some samples of a batch.

    Parameters
    ----------
    batch : Batch
    sizes : dict of str to int64[k, 4]
    samples : int64[n]
        Rising.
    plan : callable
        Makes the plan of a Batch.

    Returns
    -------
    Round
    """
    if len(samples) < len(batch):
        place = np.full(len(batch), -1)
        place[samples] = np.arange(len(samples))
        kept = {name: place[items.sample] >= 0 for name, items in batch.phases.items()}
        sizes = {name: sizes[name][keep] for name, keep in kept.items()}
        phases = {name: replace(items, sample=place[items.sample[kept[name]]], **{
            column: getattr(items, column)[kept[name]]
            for column in ("position", "length", "out_tokens", "bytes")})
            for name, items in batch.phases.items()}
        batch = replace(batch, text_tokens=batch.text_tokens[samples],
                        target_tokens=batch.target_tokens[samples],
                        source_rank=batch.source_rank[samples], phases=phases)
    return Round(samples, batch, sizes, plan(batch))


def items_of(plan, name):
    """What a phase of a plan works on, the language's among them.

    Parameters
    ----------
    plan : StepPlan
    name : str

    Returns
    -------
    lengths : int64[n]
        0 where there is nothing to do.
    squares : float64[n]
        As in :class:`BatchCost`.
    """
    if name == "llm":
        lengths = plan.batch.language_lengths
        return lengths, lengths.astype(float) ** 2
    items = plan.batch.phases[name]
    return items.length, squares_of(items)
