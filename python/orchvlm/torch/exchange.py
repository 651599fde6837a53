"""Rows of tensors on their way between ranks, forward and backward: an all-to-all with counts."""
import math
import weakref
from functools import cached_property

import numpy as np
import torch
from torch import distributed as dist
from torch.autograd.function import once_differentiable


def _spans(first, count):
    """count[0] numbers from first[0] on, then count[1] from first[1], ...; None for 0, 1, 2, ..."""
    index = np.repeat(first - (np.cumsum(count) - count), count)
    index += np.arange(len(index))
    return None if np.array_equal(index, np.arange(len(index))) else index


def _inverted(index):
    if index is None:
        return None
    inverse = np.empty_like(index)
    inverse[index] = np.arange(len(index))
    return inverse


class Way:
    """One rank's part in a route: which rows it sends in which order, and where arrivals go.

    Parameters
    ----------
    send_index, receive_index : int64[k] or None
        Rows in the order in which they are sent; for each row afterwards, which arrival it is.
        Both are permutations; None stands for the identity.
    send_counts, receive_counts : int64[N]
        Rows to and from each rank.
    moves : bool
        Any row changes its rank, anywhere; the same on all ranks.
    """

    def __init__(self, send_index, send_counts, receive_counts, receive_index, moves):
        self.send_index, self.receive_index = send_index, receive_index
        self.send_counts, self.receive_counts = send_counts, receive_counts
        self.moves, self._on_device = moves, {}

    @classmethod
    def of(cls, route, rank):
        """The part of `rank` in an :class:`orchvlm.Route`."""
        # Pieces are ordered by (destination, receive_row): so they leave, and so those of one
        # source arrive.
        mine = route.source == rank
        send = _spans(route.send_row[mine], route.n_rows[mine])
        pieces = np.flatnonzero(route.destination == rank)
        pieces = pieces[np.argsort(route.source[pieces], kind="stable")]
        place = _spans(route.receive_row[pieces], route.n_rows[pieces])
        return cls(send, route.send_counts(rank), route.receive_counts(rank), _inverted(place),
                   bool((route.source != route.destination).any()))

    @cached_property
    def back(self):
        """The way of gradients: everything returns to the row it came from."""
        return Way(_inverted(self.receive_index), self.receive_counts, self.send_counts,
                   _inverted(self.send_index), self.moves)

    def permute(self, rows, name):
        """Rows by ``send_index`` or ``receive_index``, which several tensors share."""
        index = getattr(self, name)
        if index is None:
            return rows
        key = name, rows.device
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(index).to(rows.device)
        return rows.index_select(0, self._on_device[key])


class Mover:
    """Moves tensors along a :class:`Way` through a process group.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
    """

    def __init__(self, group):
        self.group = group
        # "cpu:gloo,cuda:nccl": what the group can carry.
        self._devices = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]

    def carrier(self, device):
        """The device through which tensors of `device` travel: itself, where the group can."""
        if device.type in self._devices:
            return device
        if "cpu" in self._devices:
            return torch.device("cpu")
        return torch.device(self._devices[0], torch.accelerator.current_device_index())

    def move(self, x, way):
        """The rows of x after the exchange; bit for bit, whatever the dtype. Collective.

        Parameters
        ----------
        x : tensor, shape (sum(way.send_counts), ...)
        way : Way

        Returns
        -------
        tensor, shape (sum(way.receive_counts), ...)
        """
        arriving = int(way.receive_counts.sum())
        words = _words(x)
        if words is None:  # rows of no bytes
            return x.new_empty((arriving, *x.shape[1:]))
        rows = way.permute(words, "send_index")
        if way.moves:
            sent = rows.to(self.carrier(x.device))
            received = sent.new_empty((arriving, words.shape[1]))
            dist.all_to_all_single(received, sent, way.receive_counts.tolist(),
                                   way.send_counts.tolist(), group=self.group)
            rows = received.to(x.device)
        rows = way.permute(rows, "receive_index")
        if rows is words:  # nothing moved: what is returned never shares memory with x
            rows = rows.clone()
        return rows.view(x.dtype).reshape(arriving, *x.shape[1:])


def _words(x):
    """Rows as whole numbers, so that every backend carries every dtype; None for empty rows."""
    width = math.prod(x.shape[1:])
    size = width * x.element_size()
    if size == 0:
        return None
    rows = x.detach().resolve_conj().resolve_neg().contiguous().reshape(len(x), width)
    if rows.storage_offset() * x.element_size() % 8:  # a view as int64 starts at a multiple of 8
        rows = rows.clone()
    return rows.view(torch.int64 if size % 8 == 0 else torch.uint8)


class Chain:
    """Strings the exchanges of a pass together, so that all ranks run all of them backward.

    Autograd visits what the loss depends on. A rank whose loss needs none of the rows it received
    would leave the others waiting in the backward all-to-all. So each exchange also takes a token
    from the one before and hands one on, and :meth:`anchor` makes the loss depend on the last.
    """

    def __init__(self):
        self.token = None

    def exchange(self, mover, way, tensors, wanted):
        """What arrives of each tensor; differentiable in those that are wanted.

        Parameters
        ----------
        mover : Mover
        way : Way
        tensors : sequence of tensors
        wanted : sequence of bool
            Tensors whose gradient some rank needs, equal on all ranks.

        Returns
        -------
        tuple of tensors
        """
        if not any(wanted):
            return tuple(mover.move(x, way) for x in tensors)
        device = tensors[wanted.index(True)].device
        token = self.token
        if token is None:
            token = torch.zeros((), requires_grad=True, device=device)
        self.token, *arrived = _Exchange.apply(token.to(device), weakref.ref(self), mover, way,
                                               wanted, *tensors)
        return tuple(arrived)

    def anchor(self, loss):
        """The same loss, which now needs every exchange of the chain.

        Parameters
        ----------
        loss : tensor of floats

        Returns
        -------
        tensor
        """
        return loss if self.token is None else _Anchor.apply(loss, self.token)


class _Exchange(torch.autograd.Function):
    """y = P_receive all_to_all(P_send x); dx = P_send^T all_to_all^T(P_receive^T dy)."""

    @staticmethod
    def forward(ctx, token, chain, mover, way, wanted, *tensors):
        # The chain holds the last token and with it this node: only a weak reference back.
        ctx.chain, ctx.mover, ctx.way, ctx.wanted = chain, mover, way, wanted
        arrived = [mover.move(x, way) for x in tensors]
        ctx.mark_non_differentiable(*(y for y, want in zip(arrived, wanted) if not want))
        return (token.new_zeros(()), *arrived)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_token, *gradients):
        chain = ctx.chain()
        if chain is not None:  # its graph is used up: what comes next must not lean on it
            chain.token = None
        returned = [ctx.mover.move(dy, ctx.way.back) if want else None
                    for dy, want in zip(gradients, ctx.wanted)]
        return (d_token, None, None, None, None, *returned)


class _Anchor(torch.autograd.Function):
    """The loss itself; the token gets a gradient of zero."""

    @staticmethod
    def forward(ctx, loss, token):
        ctx.save_for_backward(token)
        return loss.clone()  # no view: callers scale their loss in place

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        token, = ctx.saved_tensors
        return d_loss, torch.zeros_like(token)
