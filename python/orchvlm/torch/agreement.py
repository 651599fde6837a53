"""Ranks agree before they act: a rank with bad input makes all of them raise, and none waits."""
import datetime
import hashlib
import traceback

import numpy as np
import torch
from torch import distributed as dist

from .. import _core

#: Numbers of which :meth:`Agreement.settle` takes the largest over the ranks.
SLOTS = 16

#: How long a rank that fails between two calls waits for the others to come to theirs.
TELL_S = 60.0


def digest(*parts):
    """The same number in 0 .. 2^62-1 for the same strings and arrays."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
        state.update(b"\0")
    return int.from_bytes(state.digest(), "little") >> 2


class Agreement:
    """What the ranks of a group tell each other before an exchange.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
    device : torch.device
        Where small tensors travel: the CPU, where the group has a backend for it.
    """

    def __init__(self, group, device):
        self.group, self._device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def tell(self, error):
        """Joins the others' next :meth:`settle`, wherever they call it, with an error that they
        then raise, too. Nothing where they know it already. Collective.

        Parameters
        ----------
        error : Exception
            Of this rank, which raises it itself.

        Notes
        -----
        Others may wait elsewhere, in a sharded wrapper's gather, for this very rank: after
        `TELL_S` seconds it goes on without them.
        """
        if getattr(error, "_known_to", None) is self:
            return
        try:
            self.settle("an error", error, wait_s=TELL_S)
        except Exception:  # the error itself, or that nobody came: either way the caller raises
            return

    def settle(self, said, error=None, numbers=(), wait_s=None):
        """One small all-reduce: raises on all ranks, or on none. Collective.

        Parameters
        ----------
        said : str
            What this rank is about to do; must be the same on all ranks.
        error : Exception or None
            What keeps this rank from doing it.
        numbers : sequence of at most 16 int
            Any.
        wait_s : float, optional
            For the others, at most; default: as long as the group waits.

        Returns
        -------
        list of int
            The largest of each number over the ranks.

        Raises
        ------
        Exception
            This rank's own error.
        orchvlm.CommError
            Another rank has an error: which, and what it says.
        ValueError
            The ranks said different things: who what.
        """
        code = digest(said)
        row = [int(error is not None), code, -code, *numbers, *[0] * (SLOTS - len(numbers))]
        largest = torch.tensor(row, dtype=torch.int64, device=self._device)
        sent = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        sent.wait(*() if wait_s is None else (datetime.timedelta(seconds=wait_s),))
        failed, high, low, *largest = largest.tolist()
        if failed or high != -low:
            try:
                self._refuse(said, error)
            except Exception as refused:
                refused._known_to = self  # all ranks raise together
                raise
        return largest[:len(numbers)]

    def _refuse(self, said, error):
        """Everyone learns who said what, then raises."""
        told = None if error is None else "".join(
            traceback.format_exception_only(type(error), error)).strip()
        everyone = [None] * self.size
        dist.all_gather_object(everyone, (said, told), group=self.group)
        if error is not None:
            raise error
        for rank, (_, told) in enumerate(everyone):
            if told is not None:
                raise _core.CommError(f"rank {rank} of the group refused: {told}")
        first = {}  # what was said -> the first rank that said it
        for rank, (said, _) in enumerate(everyone):
            first.setdefault(said, rank)
        raise ValueError("the ranks of the group do not do the same: " + "; ".join(
            f"rank {rank}: {said}" for said, rank in list(first.items())[:4]))

    def gather(self, columns, counts_most):
        """Columns of every rank, one after the other. Collective.

        Parameters
        ----------
        columns : list of arrays, int64[n] or float64[n]
            One value per item of this rank; the same dtypes on all ranks.
        counts_most : int
            The most items of any rank, as :meth:`settle` found out.

        Returns
        -------
        source : int64[n]
            Rank of each item.
        columns : list of arrays
            All ranks' values.
        """
        if counts_most == 0:
            return np.zeros(0, np.int64), columns
        mine = np.zeros((1 + len(columns), counts_most), np.int64)
        mine[0, 0] = len(columns[0])
        for row, column in zip(mine[1:], columns):
            row[:len(column)] = column.view(np.int64)  # floats keep their bits
        mine = torch.from_numpy(mine).to(self._device)
        tables = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(tables, mine, group=self.group)
        tables = [table.cpu().numpy() for table in tables]
        counts = [int(table[0, 0]) for table in tables]
        source = np.repeat(np.arange(self.size), counts)
        together = [np.concatenate([table[1 + place, :count] for table, count in
                                    zip(tables, counts)]).view(column.dtype)
                    for place, column in enumerate(columns)]
        return source, together
