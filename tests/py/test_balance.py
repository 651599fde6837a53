"""balance() from Python: brute force, invariants under renaming, bad input, and the Partition."""
import heapq
import itertools
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orchvlm
from orchvlm import BatchCost, balance

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**32))
COSTS = [BatchCost(linear=1.0), BatchCost(linear=0.3, quadratic=0.01), BatchCost(padded_linear=1.0),
         BatchCost(padded_linear=0.5, padded_quadratic=0.02, linear=0.2, per_item=3, fixed=7)]


@pytest.fixture
def rng():
    print(f"ORCHVLM_TEST_SEED={SEED}")
    return np.random.default_rng(SEED)


def f(cost, lengths):
    """The cost of one rank's items, from its definition."""
    n, longest = len(lengths), max(lengths, default=0)
    if n == 0:
        return 0.0
    return (cost.fixed + cost.per_item * n + cost.linear * sum(lengths)
            + cost.quadratic * sum(x * x for x in lengths)
            + n * longest * (cost.padded_linear + cost.padded_quadratic * longest))


def longest_first(costs, n_ranks):
    heap = [(0.0, r) for r in range(n_ranks)]
    for c in sorted(costs, reverse=True):
        load, r = heapq.heappop(heap)
        heapq.heappush(heap, (load + c, r))
    return max(heap)[0]


@pytest.mark.parametrize("cost", COSTS)
def test_equals_brute_force(cost, rng):
    for _ in range(15):
        n, n_ranks = rng.integers(0, 7), rng.integers(1, 4)
        lengths = rng.integers(0, 40, n).tolist()
        best = min(max(f(cost, [x for x, r in zip(lengths, ranks) if r == k])
                       for k in range(n_ranks))
                   for ranks in itertools.product(range(n_ranks), repeat=int(n)))
        p = balance(lengths, n_ranks, cost).check()
        assert p.loads.max() == pytest.approx(best, rel=1e-12)
        assert p.bound <= best * (1 + 1e-15)
        assert p.status == "optimal"


@pytest.mark.parametrize("cost", COSTS[:2])
def test_never_worse_than_longest_first(cost, rng):
    for n, n_ranks in ((3, 5), (20, 4), (60, 20), (500, 16), (3000, 100)):
        lengths = rng.integers(1, 5000, n)
        item = [f(cost, [int(x)]) for x in lengths]
        least = longest_first(item, n_ranks)
        maxima = [balance(lengths, n_ranks, cost, work_limit=w).check().loads.max()
                  for w in (0, 100, 10_000, 300_000)]
        assert maxima[0] == pytest.approx(least, rel=1e-9)
        assert all(b <= a * (1 + 1e-9) for a, b in zip(maxima, maxima[1:]))


@pytest.mark.parametrize("draw", [
    lambda rng: np.clip(rng.normal(300, 80, 2048), 40, 620),
    # every rank must take 32, and the one with the longest item short ones beside it
    lambda rng: np.append(399 + np.minimum(rng.exponential(9, 2047), 40), 613)])
def test_many_similar_items_per_rank_reach_the_mean(draw, rng):
    for _ in range(3):
        lengths = np.rint(draw(rng)).astype(int)
        p = balance(lengths, 64).check()
        assert p.loads.max() == -(-lengths.sum() // 64)
        assert p.status == "optimal"


def test_similar_items_gain_from_more_work(rng):
    lengths = np.append(399 + np.minimum(np.rint(rng.exponential(9, 2047)), 40), 613).astype(int)
    maxima = [balance(lengths, 64, work_limit=w).check().loads.max()
              for w in (0, 3_000, 30_000, 100_000, 300_000, 1_000_000, None)]
    assert all(b <= a for a, b in zip(maxima, maxima[1:]))


def test_renaming_items_changes_no_load_of_the_greedy(rng):
    lengths = rng.permutation(5000)[:400]  # distinct: no ties to break differently
    order = rng.permutation(400)
    a, b = (balance(x, 16, work_limit=0) for x in (lengths, lengths[order]))
    assert np.array_equal(a.loads, b.loads)
    assert np.array_equal(a.rank[order], b.rank)


def test_scaling_changes_no_assignment(rng):
    lengths = rng.integers(1, 1000, 200)
    a = balance(lengths, 7, BatchCost(linear=1.0), work_limit=50_000)
    b = balance(lengths, 7, BatchCost(linear=4.0), work_limit=50_000)
    assert np.array_equal(a.rank, b.rank)
    assert np.array_equal(4 * a.loads, b.loads)


def test_deterministic_and_seeded(rng):
    lengths = rng.integers(250, 500, 60)
    one, two, other = (balance(lengths, 20, work_limit=200_000, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.rank, two.rank) and one.work == two.work
    assert other.check()


def test_order_splits_inverse(rng):
    p = balance(rng.integers(1, 100, 50), 7)
    for r in range(7):
        mine = p.order[p.splits[r]:p.splits[r + 1]]
        assert np.all(p.rank[mine] == r)
        assert np.all(np.diff(mine) > 0)
    assert np.array_equal(p.inverse[p.order], np.arange(50))


def test_constraints_together(rng):
    n, n_ranks = 200, 10
    lengths = rng.integers(1, 1000, n)
    size = rng.integers(1, 50, n)
    pinned = np.where(rng.random(n) < 0.1, rng.integers(0, n_ranks, n), -1)
    p = balance(lengths, n_ranks, size=size, capacity=int(size.sum() * 1.2 / n_ranks),
                min_items=18, max_items=23, pinned=pinned,
                base_load=rng.random(n_ranks) * 100, speed=rng.choice([1.0, 1.25], n_ranks))
    p.check()
    assert p.gap < 0.05


def test_keep_together(rng):
    labels = rng.integers(-2**62, 2**62, 30)[rng.integers(0, 30, 100)]
    p = balance(rng.integers(1, 1000, 100), 5, keep_together=labels).check()
    for label in np.unique(labels):
        assert len(set(p.rank[labels == label])) == 1


def test_home_moves_little(rng):
    n_ranks, each = 64, 32
    lengths = np.minimum(np.exp(6.8 + rng.standard_normal(n_ranks * each)), 8192).astype(np.int64)
    home = np.repeat(np.arange(n_ranks), each)
    p = balance(lengths, n_ranks, home=home, slack=0.01).check()
    best = balance(lengths, n_ranks)
    assert p.loads.max() <= best.loads.max() * 1.01 * (1 + 1e-9)
    crossing = lengths[p.rank // 8 != home // 8].sum() / lengths.sum()
    surplus = np.maximum(np.bincount(home // 8, lengths)
                         - lengths.sum() / n_ranks * 8, 0).sum() / lengths.sum()
    assert crossing <= 2 * surplus + 0.01


def bytes_moved(lengths, home, rank, node):
    """(between nodes, between ranks)"""
    rank = np.asarray(rank)
    return lengths[rank // node != home // node].sum(), lengths[rank != home].sum()


def test_home_moves_least_bytes_by_brute_force(rng):
    for _ in range(20):
        n, n_ranks, node = rng.integers(2, 7), int(rng.integers(2, 5)), int(rng.integers(1, 3))
        lengths, home = rng.integers(1, 40, n), rng.integers(0, n_ranks, n)
        slack = float(rng.choice([0, 0.05, 0.3]))
        plans = [(np.bincount(ranks, lengths, n_ranks).max(), ranks)
                 for ranks in itertools.product(range(n_ranks), repeat=int(n))]
        limit = min(load for load, _ in plans) * (1 + slack) * (1 + 1e-12)
        least = min(bytes_moved(lengths, home, ranks, node) for load, ranks in plans
                    if load <= limit)
        p = balance(lengths, n_ranks, home=home, node_size=node, slack=slack).check()
        assert p.loads.max() <= limit
        assert bytes_moved(lengths, home, p.rank, node) == least


def test_home_is_graceful_as_slack_falls(rng):
    """What leaves a node beyond its surplus, which must, is mostly a few per cent, down to slack 0.

    The median of some draws: about one draw in 500 has no exact plan that the search from the homes
    finds, and then the plan without homes, its ranks renamed, is all there is at slack 0."""
    node, draws = 8, 7
    slacks = (0.05, 0.01, 0.003, 0.001, 3e-4, 1e-4, 0)
    beyond = np.empty((draws, len(slacks), 2))  # between nodes, between ranks; of all bytes
    for d in range(draws):
        n_ranks, each = int(rng.choice([16, 32, 64])), int(rng.integers(12, 33))
        lengths = np.clip(np.exp(6.4 + rng.standard_normal(n_ranks * each)), 16, 8192)
        lengths, home = lengths.astype(np.int64), np.repeat(np.arange(n_ranks), each)
        loads = np.bincount(home, lengths, n_ranks)
        for s, slack in enumerate(slacks):
            p = balance(lengths, n_ranks, home=home, node_size=node, slack=slack).check()
            most = p.loads.max()
            must = (np.maximum(loads.reshape(-1, node).sum(1) - node * most, 0).sum(),
                    np.maximum(loads - most, 0).sum())
            moved = bytes_moved(lengths, home, p.rank, node)
            assert must[0] <= moved[0] * (1 + 1e-12) and must[1] <= moved[1] * (1 + 1e-12)
            beyond[d, s] = np.subtract(moved, must) / lengths.sum()
    crossing, moved = np.median(beyond, axis=0).T
    assert crossing.max() < 0.1 and moved.max() < 0.4
    assert np.all(np.diff(crossing) < 0.05)


def test_home_already_balanced_moves_nothing():
    p = balance([5, 5, 5, 5], 2, home=[0, 0, 1, 1])
    assert p.rank.tolist() == [0, 0, 1, 1]


def test_groups_are_independent(rng):
    lengths, home = rng.integers(1, 1000, 120), np.repeat(np.arange(12), 10)
    p = balance(lengths, 12, home=home, group_size=4, slack=10.0).check()
    assert np.array_equal(p.rank // 4, home // 4)
    assert p.bound >= max(lengths[home // 4 == g].sum() / 4 for g in range(3)) * (1 - 1e-9)


def test_empty_and_zero():
    for p in (balance([], 3), balance([0, 0], 3), balance([], 1, BatchCost(fixed=5.0))):
        assert (p.imbalance, p.gap, p.status) == (1.0, 0.0, "optimal")
        assert p.check().splits[-1] == len(p.rank)
    p = balance([7], 4)
    assert sorted(p.loads) == [0, 0, 0, 7] and p.gap == 0


def test_cost_per_item():
    p = balance([1, 1, 1, 1], 2, [9.0, 1.0, 2.0, 6.0])
    assert p.loads.tolist() == [9.0, 9.0] and p.check()


def test_time_limit_cuts_short(rng):
    lengths = rng.integers(250_001, 500_000, 120)
    p = balance(lengths, 40, work_limit=10**12, time_limit=0.02)
    assert p.cut_short or p.status == "optimal"


def test_representations(rng):
    p = balance(rng.integers(1, 100, 300), 40)
    assert "n_ranks=40" in repr(p)
    assert p._repr_html_().count("<tr>") == 1 + 16 + 1


def test_check_finds_a_broken_plan():
    p = balance([4, 3, 2, 1], 2)
    p.rank[0] = 1 - p.rank[0]
    with pytest.raises(ValueError, match="loads"):
        p.check()


@pytest.mark.parametrize("arguments, error, words", [
    (dict(n_ranks=0), ValueError, "n_ranks"),
    (dict(n_ranks=2.0), TypeError, "n_ranks"),
    (dict(lengths=[1, -1]), ValueError, r"lengths\[1\]"),
    (dict(lengths=[1.5, 2]), TypeError, "lengths"),
    (dict(lengths=[[1, 2]]), ValueError, "lengths"),
    (dict(lengths=[2**62, 2**62]), ValueError, "lengths"),
    (dict(lengths=np.array([2**63], np.uint64)), ValueError, "lengths"),
    (dict(cost=[1.0, float("nan"), 1, 1]), ValueError, "cost"),
    (dict(cost=[1.0, -1, 1, 1]), ValueError, "cost"),
    (dict(cost="linear"), TypeError, "cost"),
    (dict(cost=BatchCost(quadratic=1e300), lengths=[2**50]), ValueError, "overflows"),
    (dict(squares=[1.0, float("inf"), 1, 1]), ValueError, "squares"),
    (dict(cost=[1.0] * 4, squares=[1.0] * 4), ValueError, "squares"),
    (dict(capacity=5), ValueError, "size"),
    (dict(size=[1, 1, 1, 9], capacity=5), ValueError, "item 3"),
    (dict(size=[5, 5, 5, 5], capacity=5), ValueError, "capacit"),
    (dict(size=[3, 3, 3, 1], capacity=5), ValueError, "no assignment"),
    (dict(min_items=3), ValueError, "min_items"),
    (dict(max_items=1), ValueError, "max_items"),
    (dict(max_items=-1), ValueError, "max_items"),
    (dict(min_items=2, max_items=1), ValueError, "min_items"),
    (dict(pinned=[0, 1, 2, -1]), ValueError, r"pinned\[2\]"),
    (dict(pinned=[0, 1, -1, -1], keep_together=[0, 0, 1, 1]), ValueError, "pinned"),
    (dict(base_load=[1.0]), ValueError, "base_load"),
    (dict(speed=[1.0, 0.0]), ValueError, "speed"),
    (dict(group_size=1), ValueError, "home"),
    (dict(group_size=3, home=[0, 0, 1, 1]), ValueError, "group_size"),
    (dict(group_size=0, home=[0, 0, 1, 1]), ValueError, "group_size"),
    (dict(home=[0, 0, 1, 2]), ValueError, r"home\[3\]"),
    (dict(home=[0, 0, 1, 1], group_size=1, keep_together=[0, 1, 1, 2]), ValueError, "label"),
    (dict(node_size=0), ValueError, "node_size"),
    (dict(slack=-0.1), ValueError, "slack"),
    (dict(slack=float("nan")), ValueError, "slack"),
    (dict(slack=10**400), ValueError, "slack must be finite"),
    (dict(work_limit=-1), ValueError, "work_limit"),
    (dict(time_limit=0), ValueError, "time_limit"),
    (dict(seed=-1), ValueError, "seed"),
])
def test_bad_arguments(arguments, error, words):
    given_arguments = dict(lengths=[1, 2, 3, 4], n_ranks=2) | arguments
    with pytest.raises(error, match=words):
        balance(**given_arguments)


NUMBERS = st.one_of(st.integers(-3, 9), st.integers(-2**70, 2**70), st.floats(), st.none(),
                    st.booleans(), st.text(max_size=2))
ARRAYS = st.one_of(NUMBERS, st.lists(st.integers(-1, 6), max_size=6), st.lists(NUMBERS, max_size=6))


@settings(max_examples=300, deadline=None)
@given(ARRAYS, st.one_of(st.integers(1, 5), NUMBERS),
       st.dictionaries(st.sampled_from(["squares", "size", "capacity", "min_items", "max_items",
                                        "keep_together", "pinned", "base_load", "speed", "home",
                                        "group_size", "node_size", "slack", "seed"]),
                       ARRAYS, max_size=4))
def test_never_crashes(lengths, n_ranks, options):
    if isinstance(n_ranks, int) and n_ranks > 10**6:
        n_ranks = 10**6
    try:
        balance(lengths, n_ranks, work_limit=2000, **options).check()
    except (TypeError, ValueError, orchvlm.Error) as error:
        assert str(error)
        assert "own check" not in str(error)


def test_masked_arrays_are_refused():
    masked = np.ma.array([4, 3, 2], mask=[0, 1, 0])
    rows = np.ma.array([10], mask=[1])
    calls = {"lengths": lambda: balance(masked, 2),
             "squares": lambda: balance([1, 2, 3], 2, squares=masked),
             "capacity": lambda: balance([1, 2, 3], 2, size=[1, 1, 1], capacity=np.ma.array(9)),
             "Batch.text_tokens": lambda: orchvlm.Batch(masked, [1, 1, 1], [0, 0, 0]),
             "Items.squares": lambda: orchvlm.Items([0], [0], [1], [1], [1], rows),
             "n_rows": lambda: orchvlm.Route([0], [0], rows, [0], [0], [0], [0], 1),
             r"arrays\[0\]": lambda: orchvlm.Route([0], [0], [1], [0], [0], [0], [0], 1).apply(
                 [rows]),
             r"measurements\[0\]": lambda: orchvlm.fit([(masked, 1.0)]),
             r"batches\[0\]": lambda: orchvlm.simulate(masked, orchvlm.Cluster.preset("h100"), {})}
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name}.* masked array"):
            call()
