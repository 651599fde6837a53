"""Step plans as bytes; bad input; and any input at all."""
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_step import SEED, draw_problem

import orchvlm
from orchvlm import _bytes

CLUSTER = orchvlm.Cluster(1, 2, 1000.0, 1e12, 1e6, 1e5)
LINEAR = orchvlm.BatchCost(linear=1.0)


def items(**changed):
    return orchvlm.Items(**{**dict(sample=[0, 1], position=[2, 0], length=[4, 8],
                                   out_tokens=[2, 3], bytes=[10, 20]), **changed})


def batch(vision=None, **changed):
    return orchvlm.Batch(**{**dict(text_tokens=[5, 6], target_tokens=[1, 2], source_rank=[0, 1],
                                   phases={"vision": vision or items()}), **changed})


def plan(batch_=None, cluster=CLUSTER, costs=None, **options):
    costs = costs or {"vision": LINEAR, "llm": LINEAR}
    return orchvlm.plan_step(batch_ or batch(), cluster, costs, **options)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("round_", range(12))
def test_round_trip(round_, groups):
    rng = np.random.default_rng([SEED, 7, round_, groups])
    batch_, cluster, costs, options = draw_problem(rng, groups)
    step = orchvlm.plan_step(batch_, cluster, costs, **options)
    data = step.to_bytes()
    again = orchvlm.StepPlan.from_bytes(data)
    assert again.to_bytes() == data and again.digest == step.digest
    assert str(again.report()) == str(step.report())
    assert again.routes == step.routes and again.traffic == step.traffic
    assert (again.time, again.bound, again.exposed) == (step.time, step.bound, step.exposed)
    assert again.memory == step.memory and again.costs == step.costs
    again.check()


def test_bytes_hold_no_routes():
    step = plan()
    arrays, _ = _bytes.unpack("orchvlm.step_plan", step.to_bytes())
    assert not any("route" in name or "place" in name for name in arrays)


def changed_bytes(step, change):
    arrays, header = _bytes.unpack("orchvlm.step_plan", step.to_bytes())
    change(arrays, header)
    return _bytes.pack("orchvlm.step_plan", arrays, header)


@pytest.mark.parametrize("change", [
    lambda a, h: a.update({"plan0.rank": np.array([0, 2])}),
    lambda a, h: a.update({"plan0.micro": np.array([0, 1])}),
    lambda a, h: a.update({"plan0.n_micro": np.array([2**62])}),
    lambda a, h: a.update({"plan0.n_micro": np.array([0])}),
    lambda a, h: a.update({"plan0.bound": np.array([1e9])}),
    lambda a, h: a.update({"plan0.bound": np.array([np.nan])}),
    lambda a, h: a.update({"plan1.rank": np.array([0])}),
    lambda a, h: a.update({"phase0.position": np.array([2, 99])}),
    lambda a, h: a.update({"phase0.sample": np.array([2, 0])}),
    lambda a, h: a.update({"batch.source_rank": np.array([0, 7])}),
    lambda a, h: a.update({"scalars": np.array([1.0])}),
    lambda a, h: a.update({"extra": np.array([1.0])}),
    lambda a, h: a.pop("traffic"),
    lambda a, h: h.update(relabel="all"),
    lambda a, h: h.update(relabel=[1]),
    lambda a, h: h.update(nodes=0),
    lambda a, h: h.update(nodes=2**70),
    lambda a, h: h.update(seed=-1),
    lambda a, h: h.update(phases=["llm"]),
    lambda a, h: h.update(phases=["vision", "vision"]),
    lambda a, h: h.update(groups=True),
    lambda a, h: h.pop("cut_short"),
])
def test_changed_decisions_are_refused(change):
    with pytest.raises((ValueError, TypeError)):
        orchvlm.StepPlan.from_bytes(changed_bytes(plan(), change))


def test_a_plan_that_breaks_memory_is_refused():
    step = plan(memory={"vision": (100.0, 0.0)})
    both = np.zeros(2, np.int64)
    data = changed_bytes(step, lambda a, h: a.update({"plan0.rank": both, "plan0.bound":
                                                      np.array([0.0])}))
    with pytest.raises(ValueError, match="holds more than 10"):
        orchvlm.StepPlan.from_bytes(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_bytes_crash(data):
    good = bytearray(plan().to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    with pytest.raises(ValueError):
        orchvlm.StepPlan.from_bytes(bytes(good[:cut]))


def test_check_finds_changes():
    step = plan()
    step.check()
    step.time *= 2
    with pytest.raises(ValueError, match="seconds"):
        step.check()
    step = plan()
    step.routes["vision"] = step.routes["vision->llm"]
    with pytest.raises(ValueError, match="route 'vision'"):
        step.check()
    step = plan()
    share = step.phases["vision"]
    step.phases["vision"] = dataclasses.replace(share, rank=1 - share.rank)
    with pytest.raises(ValueError, match="differ"):
        step.check()


@pytest.mark.parametrize("make, message", [
    (lambda: items(sample=[0]), "Items.position must have 1 elements; got 2"),
    (lambda: items(squares=[1.0]), "Items.squares must be 2 finite values"),
    (lambda: items(squares=[1.0, np.nan]), "Items.squares must be 2 finite values"),
    (lambda: items(out_bytes_per_token=-1), "out_bytes_per_token must be finite"),
    (lambda: items(length=[[4, 8]]), "one-dimensional"),
    (lambda: items(bytes=np.array([2**63, 1], np.uint64)), "above 2\\^63-1"),
    (lambda: batch(target_tokens=[-1, 0]), "target_tokens must be >= 0"),
    (lambda: batch(phases={"llm": items()}), "not a name for a phase"),
    (lambda: batch(phases={"a->b": items()}), "not a name for a phase"),
    (lambda: batch(text_bytes_per_token=np.inf), "text_bytes_per_token must be finite"),
    (lambda: plan(batch(items(sample=[0, 2]))), r"vision.sample\[1\] must be in \[0, 2\)"),
    (lambda: plan(batch(items(length=[-4, 8]))), r"vision.length\[0\] must be >= 0; got -4"),
    (lambda: plan(batch(items(position=[6, 0]))), "ends at token 8 of sample 0, which has 7"),
    (lambda: plan(batch(items(sample=[1, 1]))), "overlaps another item of sample 1"),
    (lambda: plan(batch(items(out_tokens=[2**61, 3]))), "more than 2\\^61"),
    (lambda: plan(batch(items(bytes=[2**62, 2**62]))), "vision.bytes sums to more"),
    (lambda: plan(batch(source_rank=[0, 2])), r"source_rank\[1\] must be in \[0, 2\); got 2"),
    (lambda: plan(batch(text_tokens=[-1, 2])), r"text_tokens\[0\] must be >= 0"),
    (lambda: plan(costs={"vision": LINEAR}), "phase 'llm' has no cost"),
    (lambda: plan(costs={"vision": LINEAR, "llm": LINEAR, "x": LINEAR}), "no phase 'x'"),
    (lambda: plan(memory={"x": (1, 1)}), "no phase 'x'"),
    (lambda: plan(memory={"vision": (-1, 0)}), "bytes_per_token must be finite"),
    (lambda: plan(memory={"vision": (1, 2000)}), "2000 fixed bytes exceed the 1000"),
    (lambda: plan(memory={"vision": (200, 0)}), "item 1 has length 8, but one GPU holds 5"),
    (lambda: plan(relabel="most"), "relabel must be"),
    (lambda: plan(llm="groups"), "llm must be one of"),
    (lambda: plan(slack=-1), "slack must be finite and >= 0"),
    (lambda: plan(seed=-1), "seed must be in"),
    (lambda: plan(work_limit=-1), "work_limit must be >= 0"),
    (lambda: plan(time_limit=0), "time_limit must be positive"),
    (lambda: plan(llm="sequence_parallel", memory={"llm": (1, 1)}, costs={
        "vision": LINEAR, "llm": orchvlm.SequenceCost(0.0, 1.0)}), "leave it out"),
    (lambda: plan(llm="sequence_parallel", pad_to=0, costs={
        "vision": LINEAR, "llm": orchvlm.SequenceCost(0.0, 1.0)}), "pad_to must be >= 1"),
    (lambda: plan(pad_to=0), "pad_to must be >= 1"),
    (lambda: plan(slack=10**400), "slack must be finite"),
    (lambda: items(out_bytes_per_token=10**400), "out_bytes_per_token must be finite"),
    (lambda: items(squares=10**400), "Items.squares must be finite"),
])
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make, message", [
    (lambda: items(length=[1.5, 2.0]), "Items.length must hold integers; got dtype float64"),
    (lambda: items(out_bytes_per_token="8"), "must be a number"),
    (lambda: items(squares=["1", "2"]), "Items.squares must hold numbers"),
    (lambda: items(squares=[1j, 2]), "Items.squares must hold numbers"),
    (lambda: batch(phases={"vision": 3}), "must be {name: Items}"),
    (lambda: orchvlm.plan_step({}, CLUSTER, {"llm": LINEAR}), "batch must be a Batch"),
    (lambda: plan(cluster=8), "cluster must be a Cluster"),
    (lambda: plan(costs=[LINEAR]), "costs must be a dict"),
    (lambda: plan(costs={"vision": LINEAR, "llm": orchvlm.SequenceCost(0.0, 1.0)}),
     "must be a BatchCost with llm='balance'"),
    (lambda: plan(llm="sequence_parallel"), "must be a SequenceCost"),
    (lambda: plan(memory={"vision": 5}), "must be \\(bytes_per_token, fixed_bytes\\)"),
    (lambda: plan(memory=[("vision", (1, 1))]), "memory must be a dict"),
    (lambda: plan(pad_to=np.inf), "pad_to must be an integer"),
    (lambda: plan(warm_start=5), "warm_start must be a StepPlan"),
    (lambda: orchvlm.StepPlan.from_bytes("text"), "bytes-like"),
])
def test_bad_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()


NUMBER = st.one_of(st.integers(-1, 12), st.sampled_from([2**31, 2**61, 2**62, 2**63 - 1, -2**63]))
COLUMN = st.lists(NUMBER, min_size=0, max_size=3)


@settings(max_examples=250, deadline=None)
@given(text=COLUMN, source=COLUMN, columns=st.lists(COLUMN, min_size=5, max_size=5),
       memory=st.none() | st.tuples(st.floats(0, 2000), st.floats(0, 2000)),
       cost=st.lists(st.sampled_from([0.0, 1.0, 1e-300, 1e300]), min_size=6, max_size=6),
       groups=st.booleans(), out=st.sampled_from([0.0, 1.0, 1e300]))
def test_any_batch_is_planned_or_refused(text, source, columns, memory, cost, groups, out):
    n = min(len(text), len(source))
    k = min(len(column) for column in columns)
    try:
        vision = orchvlm.Items(*(column[:k] for column in columns), out_bytes_per_token=out)
        batch_ = orchvlm.Batch(text[:n], [0] * n, source[:n], {"vision": vision})
        costs = {"vision": orchvlm.BatchCost(*cost), "llm": orchvlm.BatchCost(*cost)}
        if groups:
            costs["llm"] = orchvlm.SequenceCost(cost[0], cost[1], cost[2], {1: 0.0, 2: cost[3]})
        step = plan(batch_, costs=costs, memory=memory and {"vision": memory}, work_limit=100,
                    llm="sequence_parallel" if groups else "balance")
    except (ValueError, orchvlm.Error):
        return
    step.check()
    assert orchvlm.StepPlan.from_bytes(step.to_bytes()).digest == step.digest
