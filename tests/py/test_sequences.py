"""plan_sequences: against brute force, against its own check, and against bad input."""
import dataclasses
import itertools
import math
import os
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import orchvlm
from orchvlm import SequenceCost, SequencePlan, plan_sequences

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**32))
POLICIES = ("static", "homogeneous", "chunked", "flex")
TOLERANCE = 1 + 1e-9


@pytest.fixture
def rng():
    print("ORCHVLM_TEST_SEED =", SEED)
    return np.random.default_rng(SEED)


def random_cost(rng, degrees):
    rising = np.cumsum(rng.random(len(degrees))) * 1e-4
    return SequenceCost(quadratic=rng.choice([0, 1e-8, 1e-6]), linear=1e-3 * rng.random(),
                        fixed=rng.choice([0, 0.1, 1.0]), comm=dict(zip(degrees, rising)),
                        memory_per_token=1.0, memory_limit=float(rng.integers(300, 1500)))


def group_times(lengths, subset, n_gpus, cost):
    """(degree, T without fixed) of the groups that could run these items."""
    tokens, squares = sum(lengths[i] for i in subset), sum(lengths[i]**2 for i in subset)
    for d, comm in cost.comm.items():
        if d <= n_gpus and cost.memory_per_token * tokens / d <= cost.memory_limit:
            yield d, (cost.quadratic * squares + (cost.linear + comm) * tokens) / d


def partitions(items):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for mates in itertools.chain.from_iterable(
            itertools.combinations(rest, k) for k in range(len(rest) + 1)):
        group = (first, *mates)
        for others in partitions([i for i in rest if i not in mates]):
            yield [group, *others]


def brute_force(lengths, n_gpus, cost, micro_batches=None):
    """The optimum by enumerating set partitions twice: into groups, and groups into micro-batches.
    Powers of two within a cluster that they divide can always be placed."""
    n = len(lengths)
    options = {s: list(group_times(lengths, s, n_gpus, cost))
               for k in range(1, n + 1) for s in itertools.combinations(range(n), k)}
    makespan = {}
    for subset in options:
        best = math.inf
        for groups in partitions(list(subset)):
            for choice in itertools.product(*(options[g] for g in groups)):
                if sum(d for d, _ in choice) <= n_gpus:
                    best = min(best, max(t for _, t in choice))
        makespan[subset] = best
    return min((sum(makespan[g] + cost.fixed for g in p) for p in partitions(list(range(n)))
                if micro_batches is None or len(p) <= micro_batches), default=math.inf)


def test_tiny_instances_against_brute_force(rng):
    equal = total = 0
    for _ in range(60):
        n_gpus = int(rng.choice([2, 4, 8]))
        cost = random_cost(rng, [d for d in (1, 2, 4, 8) if d <= n_gpus])
        longest = int(cost.memory_limit) * n_gpus
        lengths = rng.integers(1, min(longest, 1200) + 1, rng.integers(1, 6))
        best = brute_force(lengths.tolist(), n_gpus, cost)
        plan = plan_sequences(lengths, n_gpus, cost, work_limit=3000, time_limit=None,
                              gpus_per_node=int(rng.choice([4, 8])))
        assert plan.bound <= best * TOLERANCE <= plan.time * TOLERANCE**2, (lengths, n_gpus, cost)
        total += 1
        equal += plan.time <= best * TOLERANCE
    assert equal >= 0.95 * total, f"{equal} of {total} optimal"


def test_fixed_number_of_micro_batches(rng):
    for _ in range(25):
        cost = random_cost(rng, [1, 2, 4])
        lengths = rng.integers(1, min(int(cost.memory_limit) * 4, 900) + 1, rng.integers(2, 6))
        m = int(rng.integers(1, 4))
        best = brute_force(lengths.tolist(), 4, cost, m)
        try:
            plan = plan_sequences(lengths, 4, cost, micro_batches=m, work_limit=3000,
                                  time_limit=None)
        except ValueError as error:
            assert math.isinf(best) and "micro_batches" in str(error)
            continue
        except orchvlm.Error as error:
            assert math.isinf(best) and "undecided" in str(error)
            continue
        assert plan.bound <= best * TOLERANCE <= plan.time * TOLERANCE**2
        assert len(plan.micro_batches) == m


def long_tail(rng, n):
    lengths = np.exp(7.3 + 1.5 * rng.standard_normal(n)).astype(np.int64)
    return np.clip(lengths, 16, 190_000)


def test_policies_are_ordered(rng):
    for n, n_gpus in ((40, 64), (120, 64), (300, 64), (60, 16)):
        lengths = long_tail(rng, n) // (1 if n_gpus == 64 else 8)
        cost = SequenceCost.flexsp_gpt7b(n_gpus=n_gpus)
        plans = {p: plan_sequences(lengths, n_gpus, cost, policy=p, work_limit=20_000,
                                   time_limit=None) for p in POLICIES}
        for plan in plans.values():
            plan.check()
            assert plan.bound <= min(p.time for p in plans.values())
        assert plans["flex"].time == min(p.time for p in plans.values())
        assert plans["homogeneous"].time <= plans["static"].time * TOLERANCE
        assert plans["chunked"].time <= plans["homogeneous"].time * TOLERANCE
        degrees = {g.degree for b in plans["static"].micro_batches for g in b.groups}
        assert len(degrees) == 1
        for batch in plans["homogeneous"].micro_batches:
            assert len({g.degree for g in batch.groups}) == 1


def time_or_nothing(*arguments, **options):
    try:
        return plan_sequences(*arguments, **options, time_limit=None).time
    except (ValueError, orchvlm.Error):  # micro_batches is too few, or may be
        return math.inf


def test_flex_is_never_worse_than_another_policy(rng):
    """To the last bit, at every work limit: it begins with all that they do."""
    for round_ in range(30):
        if round_ % 3 == 0:
            n_gpus, shorter = [(64, 1), (16, 8)][rng.integers(2)]
            cost = SequenceCost.flexsp_gpt7b(n_gpus=n_gpus)
            lengths = long_tail(rng, int(rng.integers(2, 250))) // shorter
        else:
            n_gpus = int(rng.choice([4, 8, 16, 24]))
            degrees = [1, 2, 4, 8] if round_ % 3 == 1 else [1, 2, 3, 5, 6]
            cost = random_cost(rng, [d for d in degrees if d <= n_gpus])
            longest = int(0.6 * cost.memory_limit * max(cost.comm))
            lengths = rng.integers(1, longest + 1, rng.integers(2, 50))
        options = dict(micro_batches=int(rng.integers(1, 8)) if rng.random() < .3 else None,
                       seed=int(rng.integers(1000)), gpus_per_node=8)
        for work in (0, 50, 1000, 10_000):
            times = {policy: time_or_nothing(lengths, n_gpus, cost, policy=policy, work_limit=work,
                                             **options) for policy in POLICIES}
            assert times["flex"] == min(times.values()), (work, times, lengths, n_gpus, cost)


def test_more_work_never_makes_chunked_worse(rng):
    for n in (5, 40, 200):
        lengths = long_tail(rng, n)
        times = [plan_sequences(lengths, 64, SequenceCost.flexsp_gpt7b(n_gpus=64),
                                policy="chunked", work_limit=w, time_limit=None).time
                 for w in (0, 100, 5_000, 6_000, 50_000, 200_000)]
        assert times == sorted(times, reverse=True)


def many_alike(rng):
    """Few lengths, so that some degree packs badly: its best M is far above the fewest."""
    return rng.choice(rng.integers(2000, 40_000, 2), rng.integers(100, 700))


def test_static_is_the_best_degree_and_flex_no_worse_than_any(rng):
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    for draw in (lambda: np.full(700, 20_000), lambda: many_alike(rng),
                 lambda: long_tail(rng, 200)):
        lengths = draw()
        options = dict(work_limit=0, time_limit=None)
        alone = {d: time_or_nothing(lengths, 64, cost, policy="static", degrees=[d], work_limit=0)
                 for d in cost.comm if lengths.max() <= 5992 * d}
        times = {policy: plan_sequences(lengths, 64, cost, policy=policy, **options).time
                 for policy in POLICIES}
        assert times["static"] == min(alone.values()), (alone, times)
        assert times["homogeneous"] <= times["static"]
        assert times["flex"] == min(times.values())


@pytest.mark.parametrize("n, per_batch, degree", [(960, 16, 4), (301, 16, 4), (500, 18, 32)])
def test_equal_lengths_take_the_fewest_micro_batches(n, per_batch, degree):
    """Groups of degree d hold whole sequences of 20,000 only, so tokens alone ask for fewer."""
    plan = plan_sequences(np.full(n, 20_000), 64, SequenceCost.flexsp_gpt7b(n_gpus=64),
                          policy="static", degrees=[degree], work_limit=0, time_limit=None)
    assert len(plan.micro_batches) == -(-n // per_batch)


@pytest.mark.parametrize("policy", POLICIES)
def test_micro_batches_that_do_not_pay_stay_empty(policy, rng):
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    lengths = long_tail(rng, 150)
    options = dict(policy=policy, work_limit=0, time_limit=None)
    free = plan_sequences(lengths, 64, cost, **options)
    for asked in (len(free.micro_batches) + 20, 151, 2**20):
        plan = plan_sequences(lengths, 64, cost, micro_batches=asked, **options)
        plan.check()
        assert plan.time == free.time and len(plan.arrays()["micro_start"]) == asked + 1


def test_views_agree_with_the_inputs(rng):
    lengths = long_tail(rng, 100)
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    plan = plan_sequences(lengths, 64, cost, work_limit=2000, time_limit=None)
    seen = np.zeros(len(lengths), int)
    for batch in plan.micro_batches:
        assert sum(g.degree for g in batch.groups) <= 64
        for g in batch.groups:
            seen[g.items] += 1
            assert g.tokens == lengths[g.items].sum() < 5993 * g.degree
            assert g.first_gpu % g.degree == 0
            expected = cost.fixed + (cost.quadratic * (lengths[g.items].astype(float)**2).sum() + (
                cost.linear + cost.comm[g.degree]) * g.tokens) / g.degree
            assert g.time == pytest.approx(expected, rel=1e-12)
    assert (seen == 1).all()
    assert plan.time == pytest.approx(sum(b.time for b in plan.micro_batches))
    blocks = {(g.first_gpu, g.degree) for b in plan.micro_batches for g in b.groups}
    assert plan.communicators == sorted(blocks)
    assert plan._repr_html_().count("<tr><td>1</td>") == min(1, len(plan.micro_batches))
    assert "<tr><td>0</td>" not in plan._repr_html_()
    assert "micro-batch" in repr(plan) and plan._repr_html_().count("<tr>") == 1 + len(
        plan.micro_batches)
    with pytest.raises(ValueError, match="read-only"):
        plan.arrays()["item"][0] = 3


def test_degrees_that_are_no_powers_of_two(rng):
    cost = SequenceCost(quadratic=1e-8, linear=1e-3, fixed=0.1,
                        comm={d: 1e-5 * d for d in (1, 2, 3, 5, 6, 12)},
                        memory_per_token=1.0, memory_limit=1000)
    lengths = rng.integers(10, 9000, 60)
    for policy in POLICIES:
        plan = plan_sequences(lengths, 24, cost, gpus_per_node=6, policy=policy, work_limit=3000,
                              time_limit=None)
        plan.check()
        assert plan.bound <= plan.time


def test_padding_counts_as_memory():
    cost = SequenceCost(quadratic=0.0, linear=1e-3, comm={1: 0.0, 2: 0.0}, memory_per_token=1.0,
                        memory_limit=100)
    assert len(plan_sequences([50, 50, 50], 1, cost, degrees=[1]).micro_batches) == 2
    assert len(plan_sequences([50, 50, 50], 1, cost, degrees=[1], pad_to=64).micro_batches) == 3
    with pytest.raises(ValueError, match="fits no degree"):
        plan_sequences([129], 2, cost, pad_to=64)


def test_the_limit_that_a_long_sequence_is_told_is_enough():
    """In whole bytes, rounded up."""
    cost = SequenceCost(quadratic=0.0, linear=1e-3, comm={1: 0.0, 2: 0.0}, memory_per_token=0.3,
                        memory_limit=100)
    with pytest.raises(ValueError, match="memory_limit >= 151 bytes$"):
        plan_sequences([1001], 2, cost)
    assert plan_sequences([1001], 2, dataclasses.replace(cost, memory_limit=151)).time > 0


def test_deterministic_under_a_work_limit(rng):
    lengths = long_tail(rng, 150)
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    plans = [plan_sequences(lengths, 64, cost, work_limit=20_000, time_limit=None, seed=5,
                            threads=threads) for threads in (1, 1, 3)]
    assert plans[0].digest == plans[1].digest == plans[2].digest and not plans[0].cut_short
    shuffled = rng.permutation(len(lengths))
    again = plan_sequences(lengths[shuffled], 64, cost, work_limit=20_000, time_limit=None, seed=5)
    assert again.time == pytest.approx(plans[0].time, rel=1e-12)


def test_flex_searches_are_never_worse_than_construction(rng):
    """All that holds: of two searches with work above 0 the longer one may by chance be worse."""
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    for n in (5, 40, 120):
        lengths = long_tail(rng, n)
        first, *others = [plan_sequences(lengths, 64, cost, work_limit=w, time_limit=None).time
                          for w in (0, 100, 3_000, 30_000)]
        assert max(others) <= first


def test_the_bound_has_its_steps_whatever_the_search_takes(rng):
    """Starts and searches overrun small limits; the bound still is about that of its own share."""
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    overrun = long_tail(np.random.default_rng(8), 92)[12:]  # leaves less than no steps
    settling = long_tail(np.random.default_rng(658761359), 12)  # a search that could take all
    near = long_tail(np.random.default_rng(166), 92)[12:]  # giants that fit just below a cut
    for lengths, works in ((overrun, (200,)), (settling, (200,)), (near, (200, 2_000)),
                           (long_tail(rng, 12), (200, 2_000)),
                           (long_tail(rng, 80), (200, 2_000))):
        for work in works:
            plan = plan_sequences(lengths, 64, cost, work_limit=work, time_limit=None)
            alone = orchvlm.sequence_bound(lengths, 64, cost, work_limit=work // 20,
                                           time_limit=None)
            assert plan.bound >= 0.99 * min(alone, plan.time)


def test_nothing_to_plan():
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    for policy in POLICIES:
        plan = plan_sequences(np.zeros(0, np.int64), 64, cost, policy=policy)
        assert (plan.time, plan.bound, plan.gap, plan.status) == (0, 0, 0, "optimal")
        assert plan.micro_batches == () and plan.communicators == []
        assert SequencePlan.from_bytes(plan.to_bytes()) == plan
    plan = plan_sequences([5], 64, cost, micro_batches=3)
    assert [len(b.groups) for b in plan.micro_batches] == [1, 0, 0]
    assert [b.time for b in plan.micro_batches][1:] == [0, 0]


def test_warm_start(rng):
    cost = SequenceCost.flexsp_gpt7b(n_gpus=64)
    lengths = long_tail(rng, 200)
    old = plan_sequences(lengths, 64, cost, work_limit=20_000, time_limit=None)
    warm = plan_sequences(lengths + 1, 64, cost, work_limit=0, time_limit=None, warm_start=old)
    cold = plan_sequences(lengths + 1, 64, cost, work_limit=0, time_limit=None)
    assert warm.time <= cold.time * TOLERANCE
    other = plan_sequences([5000] * 9, 8, SequenceCost(0.0, 1e-3, comm={1: 0.0, 8: 0.0}),
                           warm_start=old, work_limit=500, time_limit=None)
    other.check()  # of another cluster: never its validity


BAD = [
    (dict(lengths=[0]), ValueError, "lengths"),
    (dict(lengths=[-5]), ValueError, "lengths"),
    (dict(lengths=[1.5]), TypeError, "lengths"),
    (dict(lengths=[[1]]), ValueError, "one-dimensional"),
    (dict(lengths=None), TypeError, "lengths"),
    (dict(lengths=[2**62, 2**62]), ValueError, "lengths"),
    (dict(lengths=[10**9]), ValueError, r"lengths\[0\] = 1000000000 fits no degree"),
    (dict(n_gpus=0), ValueError, "n_gpus"),
    (dict(n_gpus=2.0), TypeError, "n_gpus"),
    (dict(n_gpus=True), TypeError, "n_gpus"),
    (dict(n_gpus=2**70), ValueError, "n_gpus"),
    (dict(cost="a"), TypeError, "cost"),
    (dict(gpus_per_node=0), ValueError, "gpus_per_node"),
    (dict(degrees=[3]), ValueError, "no entry in cost.comm"),
    (dict(degrees=[]), ValueError, "degrees"),
    (dict(degrees=[1.0]), TypeError, "degrees"),
    (dict(n_gpus=4, degrees=[8]), ValueError, "degrees"),
    (dict(pad_to=0), ValueError, "pad_to"),
    (dict(pad_to="x"), TypeError, "pad_to"),
    (dict(micro_batches=0), ValueError, "micro_batches"),
    (dict(lengths=[40_000] * 12, n_gpus=8, micro_batches=2), ValueError, "micro_batches = 2"),
    (dict(policy="best"), ValueError, "policy"),
    (dict(policy=["flex"]), ValueError, "policy"),
    (dict(work_limit=-1), ValueError, "work_limit"),
    (dict(time_limit=0), ValueError, "time_limit"),
    (dict(time_limit=float("nan")), ValueError, "time_limit"),
    (dict(time_limit="x"), TypeError, "time_limit"),
    (dict(seed=-1), ValueError, "seed"),
    (dict(seed=2**64), ValueError, "seed"),
    (dict(threads=0), ValueError, "threads"),
    (dict(threads=2**40), ValueError, "threads"),
    (dict(warm_start=3), TypeError, "warm_start"),
]


@pytest.mark.parametrize("change, error, match", BAD)
def test_bad_input(change, error, match):
    arguments = dict(lengths=[1000, 2000], n_gpus=64, cost=SequenceCost.flexsp_gpt7b(n_gpus=64))
    with pytest.raises(error, match=match):
        plan_sequences(**{**arguments, **change})


# ---------------------------------------------------------------- check and serialisation ----


@pytest.fixture(scope="module")
def good():
    lengths = long_tail(np.random.default_rng(1), 60)
    return plan_sequences(lengths, 64, SequenceCost.flexsp_gpt7b(n_gpus=64), work_limit=1000,
                          time_limit=None)


def tampered(plan, **changes):
    fields = list(plan._fields())
    names = ["micro_start", "degree", "first_gpu", "group_start", "item", "group_time", "time",
             "bound"]
    for name, value in changes.items():
        fields[names.index(name)] = value
    return SequencePlan(plan._problem()[:3] + (plan.cost, plan.pad_to, 0), plan.policy,
                        [np.array(f) if isinstance(f, np.ndarray) else f for f in fields])


def edited(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def test_check_finds_each_kind_of_damage(good):
    a, t = good.arrays(), good._group_time
    first = a["first_gpu"]
    swapped = a["item"].copy()
    shortest, longest = np.argmin(good.lengths), np.argmax(good.lengths)
    swapped[[np.flatnonzero(a["item"] == i)[0] for i in (shortest, longest)]] = longest, shortest
    batch_of = np.repeat(np.arange(len(a["micro_start"]) - 1), np.diff(a["micro_start"]))
    twin = next((g, h) for g, h in itertools.combinations(range(len(first)), 2)
                if a["degree"][g] == a["degree"][h] and batch_of[g] == batch_of[h])
    damage = {
        "sequence": dict(item=edited(a["item"], 0, a["item"][1])),
        "sequence ": dict(item=edited(a["item"], 0, 60)),
        "sequence  ": dict(item=edited(a["item"], 0, -1)),
        "takes|holds": dict(item=swapped),
        "two groups": dict(first_gpu=edited(first, twin[1], first[twin[0]])),
        "leaves the cluster": dict(first_gpu=edited(first, 0, 64)),
        "leaves the cluster ": dict(first_gpu=edited(first, 0, -1)),
        "not aligned": dict(first_gpu=edited(first, 0, 1)),
        "not a permitted": dict(degree=edited(a["degree"], 0, 3)),
        "micro_start": dict(micro_start=edited(a["micro_start"], -1, 1)),
        "group_start": dict(group_start=edited(a["group_start"], 1, 10**12)),
        "empty": dict(group_start=edited(a["group_start"], 1, 0)),
        "group 0 takes": dict(group_time=edited(t, 0, t[0] * 1.001)),
        "step takes": dict(time=good.time * 0.999),
        "bound": dict(bound=good.time * 1.01),
        "bound ": dict(bound=math.nan),
    }
    for match, change in damage.items():
        with pytest.raises(ValueError, match=match.strip()):
            tampered(good, **change).check()


@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.too_slow])  # a slow machine is no failure
@given(st.data())
def test_check_survives_random_damage(good, data):
    """Any change to any array is found, unless it only renames equal things."""
    name = data.draw(st.sampled_from(["micro_start", "degree", "first_gpu", "group_start", "item"]))
    array = good.arrays()[name].copy()
    where = data.draw(st.integers(0, len(array) - 1))
    array[where] = data.draw(st.integers(-3, 70) | st.integers(-2**63, 2**63 - 1))
    damaged = tampered(good, **{name: array})
    if np.array_equal(array, good.arrays()[name]):
        damaged.check()
    elif name == "first_gpu":  # another free aligned block is as good
        try:
            damaged.check()
        except ValueError:
            pass
    else:
        with pytest.raises(ValueError):
            damaged.check()


def test_round_trip(good):
    data = good.to_bytes()
    again = SequencePlan.from_bytes(data)
    assert again == good and again.to_bytes() == data and again.digest == good.digest
    assert [g.items.tolist() for b in again.micro_batches for g in b.groups] == [
        g.items.tolist() for b in good.micro_batches for g in b.groups]
    assert again.gap == good.gap and again.policy == "flex" and repr(again) == repr(good)


@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.too_slow])  # a slow machine is no failure
@given(st.data())
def test_from_bytes_refuses_changed_bytes(good, data):
    bytes_ = bytearray(good.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(bytes_) - 1))
        bytes_[at] ^= data.draw(st.integers(0, 255))
    if bytes(bytes_) == good.to_bytes():
        assert SequencePlan.from_bytes(bytes_) == good
        return
    with pytest.raises(ValueError):
        SequencePlan.from_bytes(bytes_)


@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.too_slow])  # a slow machine is no failure
@given(st.data())
def test_from_bytes_refuses_well_signed_nonsense(good, data):
    """The container is right, what it says is not."""
    from orchvlm import _bytes
    arrays, header = _bytes.unpack("orchvlm.sequence_plan", good.to_bytes())
    junk = st.none() | st.integers() | st.text(max_size=3) | st.booleans() | st.lists(
        st.integers(), max_size=2)
    if data.draw(st.booleans()):
        header[data.draw(st.sampled_from(sorted(header)))] = data.draw(junk)
    else:
        name = data.draw(st.sampled_from(sorted(arrays)))
        new = data.draw(st.lists(st.integers(-2**63, 2**63 - 1), max_size=70))
        dtype = data.draw(st.sampled_from([np.int64, np.float64]))
        arrays[name] = np.array(new).astype(dtype)
        if data.draw(st.booleans()):
            del arrays[name]
    try:
        plan = SequencePlan.from_bytes(_bytes.pack("orchvlm.sequence_plan", arrays, header))
    except ValueError:
        return
    plan.check()


# ---------------------------------------------------------------- FlexSP's DPs ---------------


def cuts(n, parts):
    for inner in itertools.combinations(range(1, n), parts - 1):
        yield list(zip((0, *inner), (*inner, n)))


def test_bucketing_against_brute_force(rng):
    for _ in range(60):
        lengths = rng.integers(0, rng.choice([5, 1000]), rng.integers(1, 9))
        q = int(rng.integers(1, 11))
        bucket, longest = orchvlm.bucket_lengths(lengths, q)
        parts = min(q, len(lengths))
        assert len(longest) == parts and set(bucket) == set(range(parts))
        assert all(longest[b] == lengths[bucket == b].max() for b in range(parts))
        ordered = np.sort(lengths)
        best = min(sum((ordered[b - 1] - ordered[a:b]).sum() for a, b in c)
                   for c in cuts(len(lengths), parts))
        assert (longest[bucket] - lengths).sum() == best


def test_blaster_against_brute_force(rng):
    for _ in range(60):
        lengths = rng.integers(0, rng.choice([5, 1000]), rng.integers(1, 9))
        m = int(rng.integers(1, 11))
        micro = orchvlm.blast_lengths(lengths, m)
        parts = min(m, len(lengths))
        assert set(micro) == set(range(parts))
        assert (np.diff(micro[np.argsort(lengths, kind="stable")]) >= 0).all() or len(
            set(lengths)) < len(lengths)
        ordered = np.sort(lengths)
        best = min(max(ordered[a:b].sum() for a, b in c) for c in cuts(len(lengths), parts))
        assert max(lengths[micro == i].sum() for i in range(parts)) == best


def test_dps_refuse_bad_input():
    for function in (orchvlm.bucket_lengths, orchvlm.blast_lengths):
        with pytest.raises(ValueError, match="lengths"):
            function([-1], 2)
        with pytest.raises(ValueError, match="too large"):
            function([2**61, 2**61], 2)
        with pytest.raises(TypeError, match="lengths"):
            function([1.5], 2)
        with pytest.raises(ValueError, match="must be >= 1"):
            function([1], 0)
        with pytest.raises(TypeError, match="integer"):
            function([1], 1.0)
    assert orchvlm.bucket_lengths([], 3)[0].shape == (0,)
    assert orchvlm.blast_lengths(np.zeros(0, np.int64), 3).shape == (0,)


def test_a_large_gap_that_the_clock_left_gets_advice():
    """The bound alone is turned down, as a machine of any speed would leave it."""
    plan = orchvlm.plan_sequences([30, 20, 10], 4, orchvlm.SequenceCost(0.0, 1e-3))
    assert plan.advice == ""
    plan.cut_short, plan.bound = True, plan.time / 1.63
    assert "63 %" in plan.advice and "time_limit" in plan.advice
    assert plan.advice in plan._repr_html_() and "cut short" in repr(plan)
    plan.bound = plan.time
    assert plan.advice == ""
