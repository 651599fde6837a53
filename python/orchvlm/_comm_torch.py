"""Communicators over process groups of torch.distributed."""
import numpy as np

from . import _core


class _TorchEngine:
    """A torch.distributed process group, as the core's engine calls it: bytes in lists."""

    def __init__(self, dist, group, members=None):
        import torch

        self.torch, self.dist, self.group, self.owned = torch, dist, group, members is not None
        self.size = dist.get_world_size(group)
        # Torch orders a group by itself: place[r] is our rank r in it.
        self.place = list(range(self.size)) if members is None else (
            [dist.get_group_rank(group, member) for member in members])
        self.rank = self.place.index(dist.get_rank(group))
        self.failed = None
        self.device = torch.device("cuda", torch.cuda.current_device()) if (
            dist.get_backend(group) == "nccl") else torch.device("cpu")

    def _check(self):
        if self.failed is not None:
            raise RuntimeError(f"rank {self.rank} failed: {self.failed}")

    def _placed(self, parts):
        """Parts in the group's order."""
        placed = [None] * self.size
        for part, place in zip(parts, self.place):
            placed[place] = part
        return placed

    def _global(self, rank):
        return self.place[rank] if self.group is None else (
            self.dist.get_global_rank(self.group, self.place[rank]))

    def _empty(self, size):
        return self.torch.empty(size, dtype=self.torch.uint8, device=self.device)

    def _joined(self, parts):
        """One tensor of all bytes; a copy, since torch takes no read-only memory."""
        joined = np.concatenate([np.frombuffer(part, np.uint8) for part in parts])
        return self.torch.from_numpy(joined).to(self.device)

    @staticmethod
    def _spread(data, parts):
        """Bytes one after the other to where they belong."""
        data, at = data.cpu().numpy(), 0
        for part in parts:
            np.frombuffer(part, np.uint8)[:] = data[at:at + len(part)]
            at += len(part)

    def all_to_all(self, send, recv):
        self._check()
        send, recv = self._placed(send), self._placed(recv)
        got = self._empty(sum(map(len, recv)))
        self.dist.all_to_all_single(got, self._joined(send), [len(part) for part in recv],
                                    [len(part) for part in send], group=self.group)
        self._spread(got, recv)

    def all_gather(self, send, recv):
        self._check()
        sizes = [len(part) for part in recv]
        if sum(sizes) * 2 < max(sizes) * self.size:  # few ranks have most of it
            for root, part in enumerate(recv):
                if len(part):
                    data = self._joined([send]) if root == self.rank else self._empty(len(part))
                    self.dist.broadcast(data, self._global(root), group=self.group)
                    self._spread(data, [part])
            return
        # Torch gathers equal pieces only; nothing to gather is a barrier.
        most = max(max(sizes), 1)
        mine = self._empty(most)
        mine[:len(send)] = self._joined([send])
        every = [self._empty(most) for _ in range(self.size)]
        self.dist.all_gather(every, mine, group=self.group)
        for data, part in zip(every, self._placed(recv)):
            self._spread(data[:len(part)], [part])

    def split(self, color, key):
        self._check()
        told = [None] * self.size
        self.dist.all_gather_object(told, (color, key), group=self.group)
        if color < 0:
            return None
        wishes = [told[place] for place in self.place]
        members = sorted((key, r) for r, (other, key) in enumerate(wishes) if other == color)
        ranks = [self._global(r) for _, r in members]
        # Only its members make a group; the others may be in another one meanwhile.
        group = self.dist.new_group(sorted(ranks), use_local_synchronization=True)
        engine = _TorchEngine(self.dist, group, ranks)
        return engine, engine.rank, engine.size

    def abort(self, message):
        self.failed = message

    def close(self):
        """A group of a split is ours; the first one is the program's."""
        if self.owned and self.dist.is_initialized():
            self.dist.destroy_process_group(self.group)


def torch_core(group, debug):
    """The core's communicator over a group of torch."""
    import torch.distributed as dist

    engine = _TorchEngine(dist, group)
    core = _core.comm_python(engine, engine.rank, engine.size)
    core.set_debug(debug)
    return core


def from_torch(group=None, debug=True):
    """Make a communicator of a process group of torch.distributed.

    Data is copied to and from tensors of torch (on the GPU for NCCL), so it is for programs that
    have such a group already; ranks are processes.  A rank that fails is noticed by torch, within
    the group's own timeout.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Left out: all ranks.
    debug : bool
        Compare calls and counts over the ranks, as :meth:`Comm.set_debug` does.

    Returns
    -------
    Comm
        The ranks of the group; the group stays yours.

    Raises
    ------
    ValueError
        torch.distributed is not initialised, or this process is not in the group.

    Examples
    --------
    >>> import orchvlm
    >>> def work():  # started by torchrun
    ...     torch.distributed.init_process_group("gloo")
    ...     return orchvlm.comm.from_torch()
    """
    from .comm import Comm

    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("torch.distributed is not initialised; call init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group")
    return Comm(torch_core(group, debug))
