"""Sequence parallelism: groups of ranks that share the tokens of long sequences.

A group of d ranks packs its sequences end to end and cuts the tokens into d nearly equal shards.
Everything in the decoder but attention works on single tokens, and runs on the shard; around
attention an exchange turns shards of tokens into shards of heads (Ulysses).  A group of more ranks
than there are heads is several rows of ranks that do so, and between the rows keys and values go
around rings (Ring Attention).
"""
import hashlib
from dataclasses import dataclass

import numpy as np

from . import _core
from ._numbers import whole_number
from .inputs import IGNORED, Inputs

__all__ = ["SequenceGroups", "SequenceGroup", "TokenShard"]


@dataclass(frozen=True, eq=False, repr=False)
class TokenShard:
    """One rank's part of the packed tokens of a group; :meth:`SequenceGroup.shard` cuts it.

    In place of :class:`Inputs`, :meth:`Model.forward`, :meth:`Model.route`, :meth:`Model.decode`
    and :meth:`Model.logprobs` take it; all ranks of the group call them, with the same checkpoint,
    and so :meth:`Model.backward`.  Images and sounds come as features, one row for each of their
    tokens in this shard; where one rank gives features all do, if need be of no rows.  The routers'
    balance loss of a model with experts goes by the counts of the global batch where
    :meth:`Model.forward` is given them, else by this shard's.

    Parameters
    ----------
    group : SequenceGroup
    input_ids : int32[T]
        The shard's tokens: of n in the group, rank r of d has r n / d to (r + 1) n / d - 1, both
        rounded down.
    cu_seqlens : int32[B + 1]
        Of the whole group: sequence b has its tokens ``cu_seqlens[b]`` to
        ``cu_seqlens[b + 1] - 1``.
    position_ids : float32[3, T]
        Of the shard's tokens.
    labels : int32[T + 1]
        Of the shard's tokens, and of the one behind, which the shard predicts; -100 where there is
        none.  The first is predicted by the shard before.
    weights : float32[T + 1], optional
        Of these labels.
    """

    group: "SequenceGroup"
    input_ids: np.ndarray
    cu_seqlens: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray = None

    @property
    def n_tokens(self):
        """int : tokens of this shard."""
        return len(self.input_ids)

    def __repr__(self):
        return f"<TokenShard: {self.n_tokens} of {self.cu_seqlens[-1]} tokens, {self.group!r}>"


class SequenceGroup:
    """Ranks that share the tokens of their sequences; :class:`SequenceGroups` makes them.

    Parameters
    ----------
    comm : Comm
        Of the group's ranks alone.
    head_ranks : int, optional
        As in :class:`SequenceGroups`.

    Attributes
    ----------
    comm : Comm
    rank, degree : int
        This rank's place in the group, and how many there are.
    head_ranks : int or None
        As given.
    """

    def __init__(self, comm, head_ranks=None):
        from .comm import Comm
        if not isinstance(comm, Comm):
            raise TypeError(f"comm must be a Comm; got {type(comm).__name__}")
        self.head_ranks = _checked_limit(head_ranks)
        self.comm, self.rank, self.degree = comm, comm.rank, comm.size
        self._core = _core.SequenceGroup(comm._core, self.head_ranks or 0)

    def __repr__(self):
        return f"<rank {self.rank} of a group of {self.degree}>"

    def cut(self, n):
        """Where the shards begin.

        Parameters
        ----------
        n : int
            Tokens of the group.

        Returns
        -------
        list of int
            degree + 1 places: rank r has the tokens from the r-th on, up to the next place.
        """
        n = whole_number(n, "n", 0)
        return [n * r // self.degree for r in range(self.degree + 1)]

    def shard(self, inputs):
        """This rank's part of packed sequences.

        Parameters
        ----------
        inputs : Inputs
            The sequences of the group, in their order; the same on its ranks.  Pixels and log-mel
            frames stay behind: features stand for them.

        Returns
        -------
        TokenShard

        Raises
        ------
        TypeError
            No inputs.
        """
        if not isinstance(inputs, Inputs):
            raise TypeError(f"inputs must be orchvlm.Inputs; got {type(inputs).__name__}")
        first, end = self.cut(inputs.n_tokens)[self.rank:self.rank + 2]
        weights = inputs.weights
        if weights is not None:
            weights = _with_next(weights, first, end, np.float32(0))
        return TokenShard(
            self, np.ascontiguousarray(inputs.input_ids[first:end]), inputs.cu_seqlens,
            np.ascontiguousarray(inputs.position_ids[:, first:end]),
            _with_next(inputs.labels, first, end, np.int32(IGNORED)), weights)

    def feature_rows(self, inputs, tokens):
        """Which features of the group's images, or sounds, stand in this rank's shard.

        Parameters
        ----------
        inputs : Inputs
            As in :meth:`shard`.
        tokens : sequence of int
            Ids in whose place features stand: ``config.visual_tokens`` or ``config.sound_tokens``.

        Returns
        -------
        slice
            Of the rows of all features of the inputs.
        """
        first, end = self.cut(inputs.n_tokens)[self.rank:self.rank + 2]
        spots = np.isin(inputs.input_ids, tokens)
        before = int(spots[:first].sum())
        return slice(before, before + int(spots[first:end].sum()))

    def counts(self):
        """What this rank has exchanged with the group since it was made.

        Returns
        -------
        dict
            ``exchanges``, ``sent_bytes`` (to other ranks) and ``waited_s`` (seconds in exchanges,
            waiting for slower ranks included).
        """
        return dict(zip(("exchanges", "sent_bytes", "waited_s"), self._core.counts()))


class SequenceGroups:
    """The groups of a job, made when a plan first needs them, and kept.

    Parameters
    ----------
    comm : Comm
        All ranks of the job.
    head_ranks : int, optional
        At most so many ranks of a group share heads, in rows of consecutive ranks; the rows pass
        keys and values around: ranks of a node, for rings between nodes.  By default rings are for
        groups of more ranks than query heads alone.  A row has the largest divisor of the degree
        that both permit.

    Raises
    ------
    TypeError
        No communicator.
    ValueError
        ``head_ranks`` that is no whole number from 1 on.

    Notes
    -----
    Shards of a ring are contiguous, so that with causal attention the ranks of the last of c rows
    have 2 - 1/c times the mean work of a sequence that lies across all rows; of sequences that lie
    in one row each all have alike.

    References
    ----------
    Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509.  Liu et al., "Ring Attention with
    Blockwise Transformers", arXiv 2310.01889.  FlexSP, arXiv 2412.01523, section 5: groups that
    change from micro-batch to micro-batch.

    Examples
    --------
    Two of three ranks share a sequence, the third has one by itself; the loss of all is that of one
    rank with both:

    >>> import orchvlm
    >>> texts = [list(b"a long text"), list(b"short")]
    >>> pack = [orchvlm.Inputs(input_ids=ids, labels=ids) for ids in texts]
    >>> def work(comm):
    ...     model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    ...     groups = orchvlm.sequence_parallel.SequenceGroups(comm)
    ...     blocks = [(0, 2), (2, 1)]  # first rank and degree
    ...     groups.open(blocks)
    ...     group, mine = (groups[0, 2], pack[0]) if comm.rank < 2 else (groups[2, 1], pack[1])
    ...     part = group.shard(mine)
    ...     loss = model.forward(part, normalizer=14).loss
    ...     model.backward()
    ...     return part.n_tokens, loss
    >>> ranks = orchvlm.comm.run_threads(3, work)
    >>> [tokens for tokens, _ in ranks]
    [5, 6, 5]
    >>> model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0)
    >>> whole = model.forward(orchvlm.Inputs.concatenate(pack), normalizer=14).loss
    >>> abs(sum(loss for _, loss in ranks) - whole) < 1e-5
    True
    """

    def __init__(self, comm, head_ranks=None):
        from .comm import Comm
        if not isinstance(comm, Comm):
            raise TypeError(f"comm must be a Comm; got {type(comm).__name__}")
        self.comm, self.head_ranks = comm, _checked_limit(head_ranks)
        self._groups = {}  # (first rank, degree) -> SequenceGroup, None where others are in it

    def __len__(self):
        return len(self._groups)

    def __repr__(self):
        return f"<SequenceGroups: {len(self)} on {self.comm!r}>"

    def open(self, blocks):
        """Makes the groups that are not there yet; all ranks call it with the same blocks.

        Parameters
        ----------
        blocks : iterable of (int, int)
            First rank and degree of each, as :attr:`SequencePlan.communicators` says.

        Returns
        -------
        int
            How many were made.

        Raises
        ------
        TypeError
            Something else than pairs of whole numbers.
        ValueError
            Ranks that do not exist.
        CommError
            Ranks that say different blocks, on all ranks; or one that failed.

        Notes
        -----
        One small gather, and groups that share no rank are made in one call of the communicator.
        """
        wanted, missing = self._agreed(blocks), []
        for first, degree in wanted:
            if degree < 1 or first < 0 or first + degree > self.comm.size:
                raise ValueError(f"a group of {degree} from rank {first} on is not among the "
                                 f"{self.comm.size} ranks")
            if (first, degree) not in self._groups:
                missing.append((first, degree))
        made = len(missing)
        while missing:
            apart, later, end = [], [], 0
            for first, degree in missing:
                if first >= end:
                    apart.append((first, degree))
                    end = first + degree
                else:
                    later.append((first, degree))
            self._split(apart)
            missing = later
        return made

    def _agreed(self, blocks):
        """The blocks in order; all ranks must say the same, or their groups would not match."""
        try:
            wanted = sorted({(int(first), int(degree)) for first, degree in blocks})
        except (TypeError, ValueError):
            raise TypeError("blocks must be pairs (first rank, degree); got "
                            f"{blocks!r:.80}") from None
        digest = hashlib.blake2b(repr(wanted).encode(), digest_size=8).digest()
        told = self.comm.all_gather(np.frombuffer(digest, np.int64),
                                    np.ones(self.comm.size, np.int64))
        other = np.flatnonzero(told != told[0])
        if len(other):
            raise _core.CommError(f"ranks 0 and {other[0]} open different groups; here they are "
                                  f"{wanted}")
        return wanted

    def _split(self, apart):
        """Makes groups without a common rank."""
        rank = self.comm.rank
        own = [i for i, (first, degree) in enumerate(apart) if first <= rank < first + degree]
        part = self.comm.split(own[0] if own else None, rank)
        for i, block in enumerate(apart):
            self._groups[block] = SequenceGroup(part, self.head_ranks) if own == [i] else None

    def __contains__(self, block):
        return block in self._groups

    def __getitem__(self, block):
        if block not in self._groups:
            raise KeyError(f"the group {block} was not opened: all ranks call open() with it "
                           f"first; there are {sorted(self._groups)}")
        group = self._groups[block]
        if group is None:
            raise ValueError(f"rank {self.comm.rank} is not in the group of {block[1]} from rank "
                             f"{block[0]} on")
        return group

    def counts(self):
        """What this rank has exchanged in all groups.

        Returns
        -------
        dict
            As :meth:`SequenceGroup.counts`.
        """
        total = {"exchanges": 0, "sent_bytes": 0, "waited_s": 0.0}
        for group in self._groups.values():
            for name, value in (group.counts() if group is not None else {}).items():
                total[name] += value
        return total

    def close(self):
        """Frees the groups' communicators; waits for nobody."""
        for group in self._groups.values():
            if group is not None:
                group.comm.close()
        self._groups = {}


def _checked_limit(head_ranks):
    return None if head_ranks is None else whole_number(head_ranks, "head_ranks", 1)


def row_ranks(degree, heads, head_ranks=None):
    """How many ranks of a group share heads; the others repeat them in rings.

    Parameters
    ----------
    degree, heads : int
        Ranks of the group, query heads of the model.
    head_ranks : int, optional
        As in :class:`SequenceGroups`.

    Returns
    -------
    int
        The largest divisor of the degree that is at most both.

    Examples
    --------
    >>> from orchvlm.sequence_parallel import row_ranks
    >>> [row_ranks(degree, heads=6) for degree in (4, 6, 7, 8, 16)]
    [4, 6, 1, 4, 4]
    """
    degree, heads = whole_number(degree, "degree", 1), whole_number(heads, "heads", 1)
    most = min(degree, heads, _checked_limit(head_ranks) or degree)
    return next(ranks for ranks in range(most, 0, -1) if degree % ranks == 0)


def _with_next(column, first, end, none):
    """Entries first to end, the last of which may lie behind the column."""
    part = column[first:end + 1]
    return np.append(part, none) if end == len(column) else np.ascontiguousarray(part)
