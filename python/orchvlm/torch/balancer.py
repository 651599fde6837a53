"""Any torch encoder, balanced over the ranks of a process group: :class:`Balancer`."""
import math
from contextlib import contextmanager

import torch
from torch import distributed as dist

from .. import _core
from ..batch import amount
from ..cost import BatchCost, SequenceCost, _count
from .agreement import Agreement
from .checks import MOST_TENSORS, amounts, check_blank, packed, several, whole_numbers
from .exchange import Chain, Mover
from .placing import KINDS, BalancePlan, place


class Balancer:
    """Balances the work of a module over ranks, after sampling, without touching the module.

    Each rank holds some items (images, clips, sounds) as rows of packed tensors. The balancer sends
    every item to the rank that is to encode it, so that the most loaded rank has least to do, and
    sends the outputs back, or straight on to where they are needed. Gradients take the same ways
    back. What the module computes for an item does not change, nor does any token count.

    Parameters
    ----------
    module : torch.nn.Module or callable
        The encoder; wrapped (DDP, FSDP, compiled) is fine. A row's result must not depend on items
        that it does not belong to (no batch norm).
    group : torch.distributed.ProcessGroup, optional
        The ranks that share the work. Default: a new group of all ranks, so that the exchanges of
        the backward pass do not mix with other collectives. A group that is given is used as it is.
    cost : BatchCost or callable, optional
        What a set of items costs, or a function of this rank's ``lengths`` that gives one cost per
        item. Default: ``BatchCost(linear=1.0)``, rows.
    gpus_per_node : int
        Consecutive ranks of the group that share a node; bytes are kept inside.
    slack : float or None
        The largest load may grow by this share for fewer bytes moved. None: bytes are considered
        only when ranks are given their names.
    work_limit : int
        Steps of the search, instead of a clock: every rank finds the same plan by itself.
    seed : int
        Of the search.

    Raises
    ------
    TypeError, ValueError
        An argument is bad, or ranks give different ones.
    orchvlm.CommError
        ``torch.distributed`` is not initialised, this process is not in the group, or another rank
        refused its arguments: which, and why.

    Notes
    -----
    The constructor, a call and all methods but :meth:`anchor` are collective: every rank of the
    group calls the same ones in the same order, with zero rows where it has none. Before anything
    moves the ranks agree on it in one small all-reduce, so that a bad argument on one rank raises
    on all of them and none waits. That and the lengths travel through the group's CPU backend where
    it has one: ``init_process_group("cpu:gloo,cuda:nccl")`` spares the GPU the wait.

    Rows within a rank stand item by item, in the order of the batch: items of rank 0 first. Three
    kinds of rows: ``"in"``, ``lengths`` of them per item; ``"out"``, ``out_lengths``; ``"item"``,
    one per item (grids, sizes).

    A rank may end up with nothing to encode. A module that cannot take zero rows gets a `blank`
    there, whose outputs are dropped; data-parallel wrappers want every rank to run it anyway.

    Gradients, reduced over the ranks, are those of the unbalanced run up to rounding. Where outputs
    are restored, losses and token counts stay as they are. Where samples move, too
    (:meth:`forward_to`), the loss must be a sum over the global batch divided by one number that
    all ranks share, not a mean of each rank's mean. :meth:`anchor` the loss, or anything that it is
    computed from, once per backward pass. Do not recompute exchanges (activation checkpoints go
    inside the module). Evaluate under ``torch.no_grad()``.

    References
    ----------
    OrchMLLM, arXiv 2503.23830: post-balancing, node-wise rearrangement, composition.

    Examples
    --------
    One process stands for a group here; ``torchrun`` starts many:

    >>> import os, tempfile, torch, orchvlm.torch
    >>> store = os.path.join(tempfile.mkdtemp(), "store")
    >>> torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0,
    ...                                      world_size=1)
    >>> encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 4)), torch.nn.Flatten(1),
    ...                               torch.nn.Linear(4 * 6, 5))     # merges four rows into one
    >>> balancer = orchvlm.torch.Balancer(encoder, cost=orchvlm.BatchCost(linear=1, quadratic=0.1))
    >>> lengths = torch.tensor([8, 4, 12])                           # rows of this rank's images
    >>> plan = balancer.plan(lengths, out_lengths=lengths // 4)
    >>> rows = balancer.apply(torch.randn(24, 6))                    # of the images to encode here
    >>> features = balancer.restore(balancer.module(rows))           # of this rank's images
    >>> balancer.anchor(features.square().sum()).backward()
    >>> features.shape, encoder[2].weight.grad.shape
    (torch.Size([6, 5]), torch.Size([5, 24]))
    >>> print(plan.report().summary)
    3 items on 1 rank: max/mean 1.0000 -> 1.0000, largest load 46.4 -> 46.4, bound 46.4, \
gap 0.00 %, optimal

    The three in one call:

    >>> balancer(torch.randn(24, 6)).shape
    torch.Size([6, 5])
    >>> torch.distributed.destroy_process_group()
    """

    def __init__(self, module, group=None, cost=None, *, gpus_per_node=8, slack=0.002,
                 work_limit=1_000_000, seed=0):
        if not dist.is_initialized():
            raise _core.CommError("torch.distributed is not initialised: call "
                                  "torch.distributed.init_process_group() first")
        group = dist.new_group() if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise _core.CommError("group does not contain this process")
        self._mover = Mover(group)
        self._ranks = Agreement(group, self._mover.carrier(torch.device("cpu")))
        self._chain, self._plan = Chain(), None
        self.module, self.group = module, group

        def check():
            self._options = dict(
                gpus_per_node=_count("Balancer", "gpus_per_node", gpus_per_node),
                slack=None if slack is None else amount(slack, "slack"), seed=seed,
                work_limit=_count("Balancer", "work_limit", work_limit, least=0, most=2**62))
            self.cost = BatchCost(linear=1.0) if cost is None else cost
            if not callable(self.cost) or isinstance(self.cost, SequenceCost):
                raise TypeError("cost must be a BatchCost or a function of lengths; got "
                                f"{type(cost).__name__}")
            what = self.cost if isinstance(self.cost, BatchCost) else "a function"
            return f"Balancer(cost={what}, {self._options})"
        self._settle("Balancer", check)

    def _settle(self, call, check, numbers=lambda: ()):
        """Agrees on what `check` says, or raises everywhere what it raises here."""
        try:
            said, given, error = check(), numbers(), None
        except Exception as refused:  # any: the other ranks must hear of it
            said, given, error = call, (), refused
        return self._ranks.settle(said, error, given)

    @contextmanager
    def guard(self):
        """A block of one's own between two calls, such as the module between :meth:`apply` and
        :meth:`restore`: what this rank raises in it the others raise at their next call.

        Without it they would wait for this rank as long as the group waits. Whatever is inside may
        call the balancer, too. A rank that the others do not come to, as they wait for it in other
        collectives, raises after a minute.

        Raises
        ------
        Exception
            What is raised inside; the other ranks raise :class:`orchvlm.CommError`, which names the
            rank and says what it raised.
        """
        try:
            yield
        except Exception as error:  # any: the other ranks must hear of it
            self._ranks.tell(error)
            raise

    def meet(self):
        """Does nothing but raise where another rank has failed in :meth:`guard`. Collective.

        Raises
        ------
        orchvlm.CommError
            Another rank failed: which, and what it says.
        """
        self._settle("meet", lambda: "meet()")

    # ------------------------------------------------------------ plan

    def plan(self, lengths=None, *, costs=None, squares=None, out_lengths=None, to=None):
        """Decides which rank encodes which item. Collective.

        Parameters
        ----------
        lengths : tensor or array_like of int, shape (k,), optional
            Rows of each of this rank's items, >= 0. Default: one row each (with `costs`).
        costs : tensor or array_like of float, shape (k,), optional
            Cost of each, for this plan, in place of the balancer's `cost`.
        squares : tensor or array_like of float, shape (k,), optional
            Each item's sum of true segment lengths squared, for ``cost.quadratic``; default
            ``lengths**2``. A video that attends within frames has ``frames * rows_per_frame**2``.
        out_lengths : tensor or array_like of int, shape (k,), optional
            Rows of output of each item; default `lengths`.
        to : tensor or array_like of int, shape (k,), optional
            Rank (of the group) that needs each item's outputs, for :meth:`forward_to`; bytes are
            then saved on that way. Default: this rank.

        Returns
        -------
        BalancePlan
            Kept for the calls that follow; they take an older one as ``plan=``.

        Raises
        ------
        TypeError, ValueError
            An argument is bad on this rank, or ranks give different arguments.
        orchvlm.CommError
            An argument is bad on another rank.
        """
        columns = {}

        def check():
            columns.update(self._columns(lengths, costs, squares, out_lengths, to))
            return f"plan({', '.join(columns)})"
        most, = self._settle("plan", check, lambda: [len(columns["lengths"])])
        source, together = self._ranks.gather(list(columns.values()), most)
        columns = dict(zip(columns, together))
        self._plan = place(self._ranks.rank, self._ranks.size, source,
                           (columns["lengths"], columns["out_lengths"]),
                           columns.get("costs", self.cost), columns.get("squares"),
                           columns.get("to"), **self._options)
        return self._plan

    def _columns(self, lengths, costs, squares, out_lengths, to):
        """What this rank tells the others of its items, checked: {name: array}."""
        if lengths is None:
            if costs is None:
                raise TypeError("plan needs lengths, or costs")
            lengths = torch.ones(len(costs), dtype=torch.int64)
        columns = {"lengths": whole_numbers(lengths, "lengths")}
        n = len(columns["lengths"])
        columns["out_lengths"] = columns["lengths"] if out_lengths is None else whole_numbers(
            out_lengths, "out_lengths", n)
        if costs is None and not isinstance(self.cost, BatchCost):
            costs = self.cost(lengths)
        if costs is not None and squares is not None:
            raise ValueError("squares has no meaning with a cost per item; leave one of them out")
        for name, value in (("costs", costs), ("squares", squares)):
            if value is not None:
                columns[name] = amounts(value, name, n)
        if to is not None:
            columns["to"] = whole_numbers(to, "to", n, self._ranks.size)
        return columns

    # ------------------------------------------------------------ exchanges

    def apply(self, x, *, rows="in", blank=None, plan=None):
        """Sends items to the ranks that encode them. Collective, differentiable.

        Parameters
        ----------
        x : tensor or sequence of tensors, shape (rows of this rank's items, ...)
            Any dtype. Width and dtype are the same on all ranks, zero rows included.
        rows : {"in", "out", "item"}
            How many rows each item has.
        blank : tensor or sequence of tensors, optional
            What the module gets on a rank that has nothing to encode; one per tensor.
        plan : BalancePlan, optional
            Default: the last one.

        Returns
        -------
        tensor or tuple of tensors, shape (rows of ``plan.here``, ...)
            In the order of ``plan.here``. A tensor whose rows no rank needs a gradient of carries
            none.

        Raises
        ------
        TypeError, ValueError
            A tensor is bad on this rank, or ranks give different tensors.
        orchvlm.CommError
            A tensor is bad on another rank.
        """
        plan = self._plan if plan is None else plan
        arrived = self._exchange("apply", x, rows, plan, blank=blank)
        if blank is None or len(plan.here):
            return arrived
        plan.blank = True
        blanks = tuple(one.to(like.device) for one, like in
                       zip(several(blank, "blank"), several(x, "x")))
        return blanks if isinstance(x, (tuple, list)) else blanks[0]

    def restore(self, y, *, rows="out", plan=None):
        """Sends outputs back to the ranks that hold the items. Collective, differentiable.

        Parameters
        ----------
        y : tensor or sequence of tensors, shape (rows of ``plan.here``, ...)
            Outputs of the module, in the order of ``plan.here``: a main one and DeepStack features,
            for instance.
        rows : {"in", "out", "item"}
            How many rows each item has.
        plan : BalancePlan, optional
            Default: the last one.

        Returns
        -------
        tensor or tuple of tensors, shape (rows of ``plan.mine``, ...)
            In the order in which :meth:`plan` was given this rank's items.

        Raises
        ------
        TypeError, ValueError
            A tensor is bad on this rank, or ranks give different tensors.
        orchvlm.CommError
            A tensor is bad on another rank.
        """
        return self._exchange("restore", y, rows, self._plan if plan is None else plan)

    def forward_to(self, y, layout=None, *, rows="out", plan=None):
        """Sends outputs straight to another layout, in one exchange. Collective, differentiable.

        Parameters
        ----------
        y : tensor or sequence of tensors, shape (rows of ``plan.here``, ...)
            Outputs of the module.
        layout : tensor or array_like of int, shape (k,), or BalancePlan, optional
            Rank that gets the outputs of each of this rank's items, e.g. the rank of its sample in
            the language phase; or a plan of the same items. Default: the plan's `to`, which costs
            no further gathering.
        rows : {"in", "out", "item"}
            How many rows each item has.
        plan : BalancePlan, optional
            Default: the last one.

        Returns
        -------
        tensor or tuple of tensors
            Rows of the items that come to this rank, in the order of the batch: those of rank 0
            first, each rank's in its order.

        Raises
        ------
        TypeError, ValueError
            An argument is bad on this rank, or ranks give different ones.
        orchvlm.CommError
            An argument is bad on another rank.
        """
        plan = self._plan if plan is None else plan
        return self._exchange("forward_to", y, rows, plan, layout=self._layout(layout, plan))

    def _layout(self, layout, plan):
        """int64[n] : rank of each item; None for the plan's own."""
        if layout is None:
            return None
        mine = []

        def check():
            _check_plan(plan)
            if not isinstance(layout, BalancePlan):
                mine.append(whole_numbers(layout, "layout", len(plan.mine), self._ranks.size))
                return "forward_to(a layout)"
            for name in ("source", "out_lengths"):
                ours, theirs = getattr(plan, name), getattr(layout, name)
                if len(ours) != len(theirs) or (ours != theirs).any():
                    raise ValueError(f"layout is a plan of other items: its {name} differs")
            return f"forward_to(plan {layout.digest:x})"
        most, = self._settle("forward_to", check, lambda: [len(plan.mine)])
        return self._ranks.gather(mine, most)[1][0] if mine else layout.rank

    def _exchange(self, leg, x, rows, plan, blank=None, layout=None):
        """Agrees on one call, then moves its tensors."""
        tensors = []

        def check():
            tensors.extend(self._checked(leg, x, rows, plan))
            if blank is not None:
                check_blank(blank, tensors)
            kinds = ", ".join(f"{one.dtype}{list(one.shape[1:])}" for one in tensors)
            return (f"{leg}({kinds}{'' if blank is None else ', blank'}, rows={rows!r}, plan "
                    f"{plan.digest:x}, gradients {'on' if torch.is_grad_enabled() else 'off'})")

        def needed():
            needs = [int(one.requires_grad and torch.is_grad_enabled()) for one in tensors]
            return needs + [0] * (MOST_TENSORS - len(needs))
        # A rank without rows may have tensors that need no gradient where another's do.
        wanted = [bool(flag) for flag in self._settle(leg, check, needed)[:len(tensors)]]
        route, way = plan.way(leg, rows, layout)
        for one in tensors:
            plan.note(f"{leg}, rows {rows}", route, one.element_size() * math.prod(one.shape[1:]))
        arrived = self._chain.exchange(self._mover, way, tensors, wanted)
        return arrived if isinstance(x, (tuple, list)) else arrived[0]

    @staticmethod
    def _checked(leg, x, rows, plan):
        """The tensors of a call, with the rows that the plan says."""
        _check_plan(plan)
        if rows not in KINDS:
            raise ValueError(f"rows must be one of {', '.join(map(repr, KINDS))}; got {rows!r}")
        items, name, does = ((plan.mine, "x", "holds") if leg == "apply" else
                             (plan.here, "y", "encodes"))
        return packed(x, name, int(plan.rows(rows)[items].sum()), leg != "apply" and plan.blank,
                      f"those of kind {rows!r} of the {len(items)} items that this rank {does}")

    # ------------------------------------------------------------ all together

    def __call__(self, x, *items, blank=None, plan=None, **options):
        """:meth:`apply`, the module, and :meth:`restore`. Collective, differentiable.

        Parameters
        ----------
        x : tensor, shape (rows of this rank's items, ...)
            ``lengths`` rows per item.
        *items : tensors, shape (this rank's items, ...)
            One row per item: grids, sizes.
        blank : sequence of tensors, optional
            As for :meth:`apply`: one for x and one for each of `items`.
        plan : BalancePlan, optional
            Default: the last one.
        **options : keyword arguments
            Passed on to the module, which is called as ``module(x, *items, **options)`` and gives
            a tensor, or a tuple or list of tensors, of ``out_lengths`` rows per item.

        Returns
        -------
        tensor or tuple of tensors
            Outputs of this rank's items.

        Raises
        ------
        Exception
            What the module raises; then the other ranks raise, too.
        orchvlm.CommError
            An argument is bad on another rank, or its module raised.
        """
        plan = self._plan if plan is None else plan
        blanks = blank if isinstance(blank, (tuple, list)) else [blank]  # None: no blank
        here = self.apply(x, blank=blanks[0] if blanks else None, plan=plan)
        if items:
            items = self.apply(items, rows="item", plan=plan,
                               blank=None if blank is None else blanks[1:])
        with self.guard():
            y = self.module(here, *items, **options)
        return self._exchange("restore", y, "out", plan)

    def anchor(self, loss):
        """The same loss, made to depend on every exchange since the last anchor.

        A rank whose loss needs none of the features it received would not take part in the
        all-to-alls of the backward pass, and the others would wait for it. Anchor the loss on every
        rank, or one thing that it is computed from on all ranks, such as the embeddings that go
        into the decoder; also a loss of a rank without samples, ``torch.zeros(())``.

        Parameters
        ----------
        loss : tensor of floats

        Returns
        -------
        tensor
            The same values and gradients. `loss` itself when nothing needs a gradient.

        Raises
        ------
        TypeError
            No tensor of floats.
        """
        if not isinstance(loss, torch.Tensor) or not loss.is_floating_point():
            raise TypeError(f"loss must be a tensor of floats; got {type(loss).__name__}"
                            f"{f' of {loss.dtype}' if isinstance(loss, torch.Tensor) else ''}")
        chain, self._chain = self._chain, Chain()
        return chain.anchor(loss)

    @property
    def last_plan(self):
        """BalancePlan : what the last :meth:`plan` answered; None before the first."""
        return self._plan

    def __repr__(self):
        return (f"<Balancer of {type(self.module).__name__} over {self._ranks.size} ranks: "
                f"{self._plan or 'no plan yet'}>")


def _check_plan(plan):
    if not isinstance(plan, BalancePlan):
        raise TypeError("plan must be a BalancePlan" + (
            "; call plan() first" if plan is None else f"; got {type(plan).__name__}"))
