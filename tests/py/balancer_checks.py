"""What :class:`orchvlm.torch.Balancer` must do on every rank; test_oracle_balancer.py runs these.

Each check is called on all ranks of a gloo group as ``check(rank, size, seed)``.
"""
import itertools

import numpy as np
import torch
from torch import distributed as dist

import orchvlm
from orchvlm.torch import Balancer, agreement

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8,
          torch.bool, torch.complex64, torch.float8_e4m3fn)


def everyone(value):
    """What each rank has."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def draw_lengths(rng, rank, size, most=9):
    """Rows of this rank's items; the last rank has none, others may have none."""
    n = 0 if rank == size - 1 else int(rng.integers(0, 7))
    return rng.integers(0, most, n)


def named_rows(rank, rows):
    """int64[sum(rows), 3] : (rank, item, row) of every row."""
    return torch.tensor([(rank, item, row) for item, count in enumerate(rows)
                         for row in range(count)], dtype=torch.int64).reshape(-1, 3)


def expected(all_rows, where, rank):
    """The rows that `rank` must hold, from the definition; where[source][item] is a rank."""
    return torch.tensor([(source, item, row) for source, rows in enumerate(all_rows)
                         for item, count in enumerate(rows) if where[source][item] == rank
                         for row in range(count)], dtype=torch.int64).reshape(-1, 3)


def by_source(plan, ranks):
    """[[rank of each item] of each source]"""
    return [ranks[plan.source == source].tolist() for source in range(plan.n_ranks)]


def there_and_back(rank, size, seed):
    """Rows that carry their own names arrive where the plan says, and return bit for bit."""
    rng = np.random.default_rng([*seed, rank])
    balancer = Balancer(None, cost=orchvlm.BatchCost(linear=1.0, quadratic=0.1), gpus_per_node=2)
    for _ in range(6):
        lengths = draw_lengths(rng, rank, size)
        out = rng.integers(0, 5, len(lengths))
        plan = balancer.plan(lengths, out_lengths=torch.from_numpy(out))
        assert everyone(plan.digest) == [plan.digest] * size
        for kind, rows in (("in", lengths), ("out", out), ("item", np.ones_like(lengths))):
            mine = named_rows(rank, rows)
            all_rows = everyone(rows.tolist())
            arrived = balancer.apply(mine, rows=kind)
            assert torch.equal(arrived, expected(all_rows, by_source(plan, plan.rank), rank))
            assert torch.equal(balancer.restore(arrived, rows=kind), mine)


def any_rows(rank, size, seed):
    """Every dtype and width, NaNs and all, several at once; nothing is shared with the input."""
    rng = np.random.default_rng([*seed, rank])
    balancer = Balancer(None)
    for shape in ((), (3,), (1,), (2, 4), (0,), (5, 0), (7, 3)):
        lengths = draw_lengths(rng, rank, size)
        balancer.plan(lengths)
        width = int(np.prod(shape))
        given = []
        for dtype in DTYPES:
            size_bytes = torch.empty(0, dtype=dtype).element_size()
            raw = rng.integers(0, 2 if dtype == torch.bool else 256,
                               (int(lengths.sum()), width * size_bytes), dtype=np.uint8)
            given.append(torch.from_numpy(raw).view(dtype).reshape(-1, *shape) if width and len(
                raw) else torch.zeros((int(lengths.sum()), *shape), dtype=dtype))
        kept = [x.clone() for x in given]
        arrived = balancer.apply(given)
        assert [(x.dtype, x.shape[1:]) for x in arrived] == [(x.dtype, x.shape[1:]) for x in given]
        returned = balancer.restore(tuple(arrived), rows="in")
        for before, x, now in zip(kept, given, returned):
            assert now.dtype == before.dtype and now.shape == before.shape
            assert now.numel() == 0 or now.data_ptr() != x.data_ptr()
            if now.numel():
                assert torch.equal(now.contiguous().view(torch.uint8) if shape else
                                   now.reshape(-1, 1).view(torch.uint8),
                                   before.contiguous().view(torch.uint8) if shape else
                                   before.reshape(-1, 1).view(torch.uint8))
    # A view that does not start at a multiple of eight bytes, and one that is not contiguous.
    lengths = np.full(4, 2)
    balancer.plan(lengths)
    base = torch.arange(33 * 4, dtype=torch.bfloat16)
    odd = base[1:33].reshape(8, 4)
    strided = torch.arange(80).reshape(10, 8).T
    arrived = balancer.apply([odd, strided])
    assert all(torch.equal(x, y) for x, y in
               zip(balancer.restore(arrived, rows="in"), (odd, strided)))


def composed(rank, size, seed):
    """Straight to another layout is the way back and then there, and as the definition says."""
    rng = np.random.default_rng([*seed, rank])
    balancer = Balancer(None, slack=None)
    for _ in range(5):
        lengths = draw_lengths(rng, rank, size)
        n = len(lengths)
        out = rng.integers(0, 6, n)
        to = rng.integers(0, size, n)
        second = balancer.plan(lengths, out_lengths=out, costs=rng.random(n))  # some other layout
        plan = balancer.plan(lengths, out_lengths=out, to=to)
        y = balancer.apply(named_rows(rank, out), rows="out")
        assert balancer.last_plan is plan
        two_steps = balancer.apply(balancer.restore(y), rows="out", plan=second)
        assert torch.equal(balancer.forward_to(y, second), two_steps)
        mine = second.rank[second.mine]
        assert torch.equal(balancer.forward_to(y, torch.from_numpy(mine)), two_steps)
        straight = balancer.forward_to(y)
        assert torch.equal(straight, expected(everyone(out.tolist()), everyone(to.tolist()), rank))
        assert torch.equal(straight, balancer.forward_to(y, to))
        assert np.array_equal(plan.to[plan.mine], to)
        assert plan.out_lengths[plan.arriving].sum() == len(straight)


class Merger(torch.nn.Module):
    """Four rows become one, with what DeepStack would add; `scale` is one number per item."""

    def __init__(self, seed, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.three = (torch.nn.Linear(a, b).double() for a, b in
                                          ((width, 8), (32, 5), (32, 3)))

    def forward(self, x, scale, lengths):
        spread = scale.repeat_interleave(lengths)[:, None]
        merged = torch.tanh(self.one(x) * spread).reshape(-1, 32)
        return self.two(merged), self.three(merged)


def loss_of(outputs, weights):
    return sum((y.square() * w).sum() + (y * w).sum() for y, w in zip(outputs, weights))


def summed_gradients(module):
    """The gradients summed over the ranks, and forgotten."""
    gradients = {}
    for name, p in module.named_parameters():
        total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(total)
        gradients[name], p.grad = total, None
    return gradients


def near(got, wanted, relative=1e-12):
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    assert torch.linalg.norm(got - wanted) <= relative * torch.linalg.norm(wanted) + 1e-300, (
        float(torch.linalg.norm(got - wanted)), float(torch.linalg.norm(wanted)))


def draw_merging(rng, rank, size, none=()):
    """(lengths, rows, scale, weights) for a :class:`Merger`."""
    n = 0 if rank in none else int(rng.integers(0, 6))
    lengths = torch.from_numpy(4 * rng.integers(1, 9, n))
    merged = int(lengths.sum()) // 4
    return (lengths, torch.from_numpy(rng.standard_normal((4 * merged, 6))),
            torch.from_numpy(rng.random(n) + 0.5),
            [torch.from_numpy(rng.standard_normal((merged, width))) for width in (5, 3)])


def gradients_as_unbalanced(rank, size, seed):
    """Outputs, losses, gradients of parameters and of the rows themselves, step after step."""
    rng = np.random.default_rng([*seed, rank])
    module = Merger(seed[0])
    balancer = Balancer(module, cost=orchvlm.BatchCost(linear=1, quadratic=0.2))
    for step in range(5):
        lengths, x, scale, weights = draw_merging(rng, rank, size, none=[size - 1] * (step > 0))
        needed = step == 3 or step == 1 and rank == 0  # by all, or by one alone
        x.requires_grad_(needed)
        wanted = module(x, scale, lengths)
        loss = loss_of(wanted, weights)
        loss.backward()
        reference, dx, x.grad = summed_gradients(module), x.grad, None

        balancer.plan(lengths, out_lengths=lengths // 4)
        here = balancer.apply([scale, lengths], rows="item")
        got = balancer.restore(module(balancer.apply(x), *here))
        for y, want in zip(got, wanted, strict=True):
            near(y.detach(), want.detach())
        balanced = balancer.anchor(loss_of(got, weights))
        near(balanced.detach(), loss.detach(), 1e-11)
        balanced.backward()
        for name, gradient in summed_gradients(module).items():
            near(gradient, reference[name], 1e-11)
        if needed:
            near(x.grad, dx, 1e-11)


def straight_to_the_language_ranks(rank, size, seed):
    """A second module on other ranks: outputs go straight there, gradients come straight back."""
    rng = np.random.default_rng([*seed, rank])
    module = Merger(seed[0])
    torch.manual_seed(seed[0] + 1)
    decoder = torch.nn.Linear(8, 2).double()
    vision, language = Balancer(module), Balancer(decoder)
    for _ in range(3):
        lengths, x, scale, _ = draw_merging(rng, rank, size, none=[0])
        n = len(lengths)
        target = torch.from_numpy(rng.standard_normal(n))
        # Here a sample is an item with its rows in the language phase.
        language.plan(lengths // 4, costs=rng.random(n))
        layout = language.last_plan.rank[language.last_plan.mine]

        def loss_on(features, lengths, target):
            seen = decoder(torch.cat(features, 1)).sum(1)
            return (torch.sigmoid(seen) * target.repeat_interleave(lengths)).sum()
        loss = loss_on(module(x, scale, lengths), lengths // 4, target)
        loss.backward()
        reference = summed_gradients(module) | summed_gradients(decoder)
        total = loss.detach().clone()
        dist.all_reduce(total)

        vision.plan(lengths, out_lengths=lengths // 4, to=layout)
        here = vision.apply([scale, lengths], rows="item")
        features = vision.forward_to(module(vision.apply(x), *here))
        loss = loss_on(features, *language.apply([lengths // 4, target], rows="item"))
        vision.anchor(loss).backward()
        balanced = loss.detach().clone()
        dist.all_reduce(balanced)
        near(balanced, total, 1e-11)
        for name, gradient in (summed_gradients(module) | summed_gradients(decoder)).items():
            near(gradient, reference[name], 1e-11)


def anchored(rank, size, seed):
    """Ranks whose losses need none, or some, of their features all run the backward exchanges."""
    rng = np.random.default_rng([*seed, rank])
    module = Merger(seed[0])
    images, sounds = Balancer(module), Balancer(module)
    for step in range(6):
        sums, loss = [], torch.zeros((), dtype=torch.float64)
        reference = torch.zeros((), dtype=torch.float64)
        for part, balancer in enumerate((images, sounds, images)):  # twice in one pass
            lengths, x, scale, weights = draw_merging(rng, rank, size, none=[size - 1])
            used = (rank + part + step) % 3 != 0
            balancer.plan(lengths, out_lengths=lengths // 4)
            here = balancer.apply([scale, lengths], rows="item")
            rows = balancer.apply(x)  # where there are none, the module need not run
            first, second = module(rows, *here) if len(rows) else (rows.new_zeros(0, 5),
                                                                   rows.new_zeros(0, 3))
            # One by one: used in one order here and in another there.
            features = [balancer.restore(first), balancer.restore(second)]
            if used:
                order = (0, 1) if rank % 2 else (1, 0)
                for k in order:
                    loss = loss * 1.5 + loss_of(features[k:k + 1], weights[k:k + 1])
                plain = module(x, scale, lengths)
                for k in order:
                    reference = reference * 1.5 + loss_of(plain[k:k + 1], weights[k:k + 1])
            sums.append(used)
        if reference.requires_grad:
            reference.backward()
        wanted = summed_gradients(module)
        loss = sounds.anchor(images.anchor(loss))
        if loss.requires_grad:  # any rank had something: the same on all
            loss.backward()
        for name, gradient in summed_gradients(module).items():
            near(gradient, wanted[name], 1e-11)


def without_anchor(rank, size, seed):
    """Where every rank uses its features no anchor is needed, and steps do not hang together."""
    rng = np.random.default_rng([*seed, rank])
    module = Merger(seed[0])
    balancer = Balancer(module)
    for step in range(3):
        lengths, x, scale, weights = draw_merging(rng, rank, size)
        balancer.plan(lengths, out_lengths=lengths // 4)
        here = balancer.apply([scale, lengths], rows="item")
        got = balancer.restore(module(balancer.apply(x), *here))
        if step == 1:
            with torch.no_grad():
                balancer.apply(x)
        loss_of(got, weights).backward()
        summed_gradients(module)
    module.requires_grad_(False)  # frozen: nothing to go back for
    balancer.plan(lengths, out_lengths=lengths // 4)
    got = balancer.restore(module(balancer.apply(x), *balancer.apply([scale, lengths],
                                                                     rows="item")))
    loss = torch.zeros(())
    assert not any(y.requires_grad for y in got) and balancer.anchor(loss) is loss


def everywhere_the_same_error(rank, size, seed):
    """One rank's bad argument raises on all, by name, at once; and the next call works."""
    balancer = Balancer(Merger(seed[0]))
    bad = seed[0] % size  # the rank that errs

    def refuses(wanted, call, *words):
        try:
            call(rank == bad)
        except Exception as error:
            kind = wanted if rank == bad else orchvlm.CommError
            assert type(error) is kind, repr(error)
            missing = [word for word in words if word not in str(error)]
            assert not missing, (missing, str(error))
            if rank != bad:
                assert f"rank {bad}" in str(error) and wanted.__name__ in str(error)
        else:
            raise AssertionError(f"{words}: nothing was raised")

    plan, x = balancer.plan, torch.zeros(6, 2)
    refuses(ValueError, lambda me: plan([4, -2 if me else 2]), "lengths[1] must be >= 0; got -2")
    refuses(TypeError, lambda me: plan([4, 2.5 if me else 2] if me else [4, 2]), "lengths",
            "integers")
    refuses(ValueError, lambda me: plan([4, 2], out_lengths=[1] if me else [1, 1]), "out_lengths",
            "2 elements")
    refuses(ValueError, lambda me: plan([4, 2], costs=[1, float("nan") if me else 1]), "costs[1]")
    refuses(ValueError, lambda me: plan([4, 2], to=[0, size if me else 0]), "to[1]",
            f"0 to {size - 1}")
    refuses(ValueError, lambda me: plan([4, 2], squares=[1] if me else [1, 1]), "squares")
    refuses(TypeError, lambda me: plan(None, costs=None if me else [1]), "lengths")
    refuses(TypeError, lambda me: Balancer(None, cost=3 if me else None), "cost", "int")
    refuses(ValueError, lambda me: Balancer(None, gpus_per_node=0 if me else 8), "gpus_per_node")
    balancer.plan([4, 2], out_lengths=[1, 1])
    here = balancer.last_plan.here
    refuses(TypeError, lambda me: balancer.apply(x, plan=7 if me else None), "plan", "got int")
    refuses(ValueError, lambda me: balancer.apply(x[:5] if me else x), "x must have 6 rows",
            "2 items")
    refuses(TypeError, lambda me: balancer.apply("x" if me else x), "x must be a tensor", "str")
    refuses(ValueError, lambda me: balancer.apply(x, rows="rows" if me else "in"), "'item'")
    refuses(ValueError, lambda me: balancer.restore(torch.zeros(99 if me else len(here), 3)),
            f"must have {len(here) if rank == bad else ''}", "encodes")
    refuses(ValueError, lambda me: balancer.forward_to(torch.zeros(len(here), 3),
                                                       [0, -1] if me else [0, 0]), "layout[1]")
    refuses(ValueError, lambda me: balancer.apply(x, blank=torch.zeros(1, 3 if me else 2)),
            "blank[0]")
    balancer.module = lambda x, fails=False: 1 / 0 if rank == bad else x[:len(here)]
    refuses(ZeroDivisionError, lambda me: balancer(x), "division")

    def fails_inside(me):
        with balancer.guard():
            assert not me, "of one's own"
        balancer.meet()
    refuses(AssertionError, fails_inside, "of one's own")

    def refused_inside(me):  # all know it already: none is told twice
        with balancer.guard():
            plan([4, -1 if me else 1])
    refuses(ValueError, refused_inside, "lengths[1]")
    balancer.plan([4, 2], out_lengths=[1, 1])

    def differ(call, *words):
        try:
            call(rank == bad)
        except ValueError as error:
            assert all(word in str(error) for word in words), (words, str(error))
        else:
            raise AssertionError(f"{words}: nothing was raised")
    if size > 1:
        differ(lambda me: balancer.apply(torch.zeros(6, 3 if me else 2)), "float32[3]",
               "float32[2]", f"rank {bad}")
        differ(lambda me: balancer.apply(x.double() if me else x), "float64", "float32")
        differ(lambda me: plan([1], costs=[1.0] if me else None), "costs", "plan(lengths")
        differ(lambda me: plan([6]) if me else balancer.apply(x), "plan(", "apply(")
        differ(lambda me: Balancer(None, seed=int(me)), "'seed': 1", "'seed': 0")
        differ(lambda me: balancer.apply([x, x] if me else x), "apply(")
        with torch.set_grad_enabled(rank != bad):
            differ(lambda me: balancer.apply(x), "gradients on", "gradients off")
    assert torch.equal(balancer.restore(balancer.apply(x), rows="in"), x)


def nobody_comes(rank, size, seed):
    """A rank that fails while the others wait for it elsewhere raises its own error even so."""
    balancer, elsewhere = Balancer(None), dist.new_group()
    before, agreement.TELL_S = agreement.TELL_S, 0.2
    if rank == seed[0] % size:
        try:
            with balancer.guard():
                raise KeyError("alone")
        except KeyError:
            pass
    dist.barrier(elsewhere)
    agreement.TELL_S = before


def best_by_hand(cost, lengths, size):
    """The least largest load over all assignments."""
    return min(max(cost(np.array(lengths)[np.array(ranks) == r]) for r in range(size))
               for ranks in itertools.product(range(size), repeat=len(lengths)))


def loads_and_bytes(rank, size, seed):
    """What the plan says of loads, bounds and bytes is so, counted by hand."""
    rng = np.random.default_rng([*seed, rank])
    cost = orchvlm.BatchCost(linear=1.0, quadratic=0.05, per_item=2.0)
    balancer = Balancer(None, cost=cost, gpus_per_node=2, slack=0.02)
    for step in range(4):
        lengths = rng.integers(1, 60, rng.integers(1, 9 // size + 1))
        out = rng.integers(0, 9, len(lengths))
        plan = balancer.plan(lengths, out_lengths=out)
        all_lengths = np.concatenate(everyone(lengths))
        assert np.array_equal(plan.lengths, all_lengths)
        loads = [cost(all_lengths[plan.rank == r]) for r in range(size)]
        assert np.allclose(plan.loads, loads)
        assert np.allclose(plan.loads_before, [cost(one) for one in everyone(lengths)])
        if rank == 0:
            best = best_by_hand(cost, all_lengths, size)
            assert plan.bound <= best * (1 + 1e-9) and max(loads) <= best * 1.02 * (1 + 1e-9)

        balancer.restore(balancer.apply(torch.zeros(int(out.sum()), 3), rows="out"))
        report = plan.report()
        assert everyone(report) == [report] * size
        sent = np.zeros((size, size), np.int64)
        np.add.at(sent, (plan.source, plan.rank), 12 * plan.out_lengths)
        node = np.arange(size) // 2
        far = node[:, None] != node
        there, back = report.moved
        assert there.name == "apply, rows out" and back.name == "restore, rows out"
        assert there[1:] == back[1:] == (np.trace(sent), sent[~far].sum() - np.trace(sent),
                                         sent[far].sum(), max((sent * far).sum(0).max(),
                                                              (sent * far).sum(1).max()))
        assert report.load_after == max(loads) and "between nodes" in str(report)
        # Any names of the ranks would do for the loads; these keep most bytes inside nodes.
        by_name = []
        for names in itertools.permutations(range(size)):
            named = sent[:, np.argsort(names)]
            by_name.append(max((named * far).sum(0).max(), (named * far).sum(1).max()))
        assert there.worst_bytes <= by_name[0]
        if step % 2 == 0:
            unnamed = Balancer(None, cost=cost, gpus_per_node=2, slack=None)
            plan = unnamed.plan(lengths, out_lengths=out)
            sent = np.zeros((size, size), np.int64)
            np.add.at(sent, (plan.source, plan.rank), plan.out_lengths)
            assert max((sent * far).sum(0).max(), (sent * far).sum(1).max()) == min(
                max((named * far).sum(0).max(), (named * far).sum(1).max())
                for named in (sent[:, np.argsort(p)] for p in itertools.permutations(range(size))))


def costs_of_all_kinds(rank, size, seed):
    """A cost per item, from a function or from the call, and squares."""
    rng = np.random.default_rng([*seed, rank])
    lengths = rng.integers(1, 50, 3)
    everything = np.concatenate(everyone(lengths))
    by_function = Balancer(None, cost=lambda lengths: np.asarray(lengths)**1.5, slack=None)
    assert np.allclose(by_function.plan(lengths).loads.sum(), (everything**1.5).sum())
    given = by_function.plan(costs=torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    assert given.loads.sum() == 6 * size and (given.lengths == 1).all()
    squares = Balancer(None, cost=orchvlm.BatchCost(quadratic=1.0))
    plan = squares.plan(lengths, squares=2.0 * lengths)
    assert np.isclose(plan.loads.sum(), 2 * everything.sum())
    empty = squares.plan([])
    assert len(empty.rank) == 0 and empty.gap == 0
    assert squares.restore(squares.apply(torch.zeros(0, 2))).shape == (0, 2)
