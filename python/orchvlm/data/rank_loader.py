"""Global batches of one mixture over ranks: each rank reads its own samples, and knows only the
lengths of the others."""
import numpy as np

from ..inputs import Inputs
from ..shares import gathered
from .assets import DataError
from .mixture import MOST_SKIPPED, Loader, sample_extent

_AT_ONCE = 8              # samples that a rank reads before lengths are told
_TOLD = 1000              # bytes of a message
_SKIP, _FAILED, _END = -1, -2, -3  # in the place of a length


class RankLoader(Loader):
    """Cuts a mixture into global batches; yields this rank's samples of each.

    Parameters
    ----------
    source : Mixture
        The same on all ranks.
    processor : Processor
        What makes inputs of its samples.
    max_tokens : int
        Tokens of a global batch: whole samples are taken, in the mixture's order, until the next
        does not fit.
    comm : Comm
        Of the ranks; a dup of it tells lengths.
    max_patches : int, optional
        Patches of a global batch, besides.
    too_long : str
        ``"raise"`` or ``"skip"`` a sample that fits into no batch, and ones that cannot be used.

    Raises
    ------
    TypeError
        A source without state.
    ValueError
        A budget below 1, an unknown word for ``too_long``.

    Notes
    -----
    Sample k of the mixture is read by rank k mod N; of tasks, packs and JSON lines the others read
    nothing.  What a batch holds depends on the mixture and the budget, not on N, and is what a
    :class:`Loader` yields.  With several ranks, pictures that are files stay so
    (``Inputs.encoded``) where the processor's ``one`` has a parameter ``encoded``: an
    :class:`orchvlm.Orchestrator` decodes each on the rank that encodes it, and a sample whose
    picture turns out to be broken then is taken out of its batch.  The state is the same on all
    ranks, and loads with any number of them.

    Examples
    --------
    >>> import orchvlm
    >>> from orchvlm import data
    >>> def work(comm):
    ...     source = data.Mixture([data.Tasks(seed=0)])
    ...     processor = data.Processor(family="seed1_5_vl")
    ...     return next(data.RankLoader(source, processor, 512, comm)).n_tokens
    >>> two = orchvlm.comm.run_threads(2, work)
    >>> one = orchvlm.comm.run_threads(1, work)
    >>> sum(two) == one[0]
    True
    """

    def __init__(self, source, processor, max_tokens, comm, max_patches=None, too_long="raise"):
        super().__init__(source, processor, max_tokens, max_patches, too_long)
        if not callable(getattr(source, "skip", None)):
            raise TypeError(f"source must be a Mixture; got {type(source).__name__}")
        self._comm = comm.dup()  # batches are made in a thread beside the steps
        self._next = []       # samples told and not used: (state before, skipped, extent, inputs)
        self._drawn = source.drawn  # samples of the mixture so far: says whose turn it is
        self._ended = False
        self._in_a_row, self._last = 0, ""  # samples skipped, and why the last one here was

    def _usable(self, pack):
        before = self.skipped
        used = super()._usable(pack)
        self._skip_read(self.skipped - before)
        return used

    def _skip_read(self, n):
        """So many more are skipped before what was read ahead."""
        self._next = [(state, skipped + n, *rest) for state, skipped, *rest in self._next]

    def __next__(self):
        if self._comm.size == 1:  # nobody else decodes
            return super().__next__()
        mine = self._pack()
        return Inputs.concatenate(mine) if mine else Inputs(
            input_ids=np.zeros(0, np.int32), cu_seqlens=[0])

    def _pack(self):
        batch, tokens, patches = [], 0, 0
        while True:
            while not self._next and not self._ended:  # none of those that were told may be of use
                self._tell()
            if not self._next:
                break
            _, _, (more_tokens, more_patches), _ = self._next[0]
            if batch and (tokens + more_tokens > self.max_tokens or self.max_patches is not None
                          and patches + more_patches > self.max_patches):
                break
            batch.append(self._next.pop(0))
            tokens, patches = tokens + more_tokens, patches + more_patches
        if not batch:
            raise StopIteration
        return [inputs for _, _, _, inputs in batch if inputs is not None]

    def _tell(self):
        """Reads this rank's share of the next samples and hears the lengths of all."""
        n, comm = _AT_ONCE * self._comm.size, self._comm
        mine = np.full((_AT_ONCE, 2), _END, np.int64)
        states, own, error = [], {}, None
        for k in range(n):
            states.append(self._source.state_dict())
            try:
                if (self._drawn + k) % comm.size != comm.rank:
                    self._source.skip()
                    continue
                own[k], mine[k // comm.size], error = self._read(error)
            except StopIteration:
                break
        extents = comm.all_gather(mine, np.full(comm.size, _AT_ONCE))
        self._raise(extents, error)
        for k, state in enumerate(states):
            owner = (self._drawn + k) % comm.size
            extent = extents[owner * _AT_ONCE + k // comm.size]
            if extent[0] == _SKIP:
                self.skipped += 1
                self._in_a_row += 1
            elif extent[0] != _END:
                self._in_a_row = 0
                self._next.append((state, self.skipped, tuple(extent.tolist()), own.get(k)))
        self._ended = bool((extents[:, 0] == _END).any())
        self._drawn += n
        if self._in_a_row >= MOST_SKIPPED:  # on all ranks: all count the same samples
            raise DataError(f"{MOST_SKIPPED:,} samples in a row cannot be used"
                            f"{self._last and '; the last here: '}{self._last}")

    def _read(self, error):
        """(inputs, extent, the first error) of the next sample."""
        try:
            inputs = self._fitting(next(self._source))
            return inputs, sample_extent(inputs), error
        except DataError as now:
            if self.too_long == "skip":
                self._warn(now)
                self._last = str(now)
                return None, (_SKIP, 0), error
            return None, (_FAILED, 0), error or now

    def refused(self, n, error, here):
        """Counts samples whose pictures turned out to be broken when they were decoded; on all
        ranks.

        Parameters
        ----------
        n : int
            Of a batch that this loader gave.
        error : DataError
            Of one of them.
        here : bool
            This rank decoded it.

        Raises
        ------
        DataError
            Where what cannot be used is not skipped.
        """
        if self.too_long != "skip":
            raise error
        if here:
            self._warn(error)
        self.skipped += n
        self._skip_read(n)

    def _raise(self, extents, error):
        """On all ranks when a sample failed on one."""
        failed = np.flatnonzero(extents[:, 0] == _FAILED)
        if len(failed):
            first = failed[0] // _AT_ONCE
            text = np.frombuffer(str(error or "").encode()[:_TOLD], np.uint8)
            told, ranks = gathered(self._comm, text)
            raise error or DataError(
                f"rank {first}: {told[ranks == first].tobytes().decode(errors='replace')}")

    def state_dict(self):
        """What a later run, on any number of ranks, needs to go on with the next batch.

        Returns
        -------
        dict
        """
        if not self._next:
            return {"source": self._source.state_dict(), "skipped": self.skipped}
        return {"source": self._next[0][0], "skipped": self._next[0][1]}

    def load_state_dict(self, state):
        """Goes on where another loader of the same source stopped.

        Parameters
        ----------
        state : dict
            From :meth:`state_dict`.

        Raises
        ------
        ValueError
            The state of another source.
        """
        super().load_state_dict(state)
        self._next, self._ended, self._drawn = [], False, self._source.drawn
        self._in_a_row = 0
