"""The planner's thread: order, look-ahead, exceptions, and never a hang."""
import gc
import threading
import time
import weakref

import pytest

import orchvlm

CLUSTER = orchvlm.Cluster(1, 4, 80e9, 1e15, 3e11, 5e10)
COSTS = {"llm": orchvlm.BatchCost(linear=1e-3)}
JOIN_S = 20


def batches(n):
    return [orchvlm.Batch([10 + k, 20, 30], [1, 1, 1], [0, 0, 1]) for k in range(n)]


def planner(source, **options):
    return orchvlm.Planner(source, CLUSTER, COSTS, **options)


def running():
    return [thread for thread in threading.enumerate() if thread.name == "orchvlm-planner"]


@pytest.mark.parametrize("lookahead", [1, 2, 7])
@pytest.mark.parametrize("warm_start", [False, True])
def test_plans_every_batch_in_order(lookahead, warm_start):
    given = batches(9)
    with planner(given, lookahead=lookahead, warm_start=warm_start, time_limit=None) as plans:
        answers = list(plans)
    assert [batch for batch, _ in answers] == given
    for batch, step in answers:
        assert step.batch is batch
        step.check()
        alone = orchvlm.plan_step(batch, CLUSTER, COSTS, time_limit=None)
        assert warm_start or alone.digest == step.digest


def test_groups_with_warm_start():
    cost = orchvlm.SequenceCost(1e-3, 1e-2, 0.1, {1: 0.0, 2: 1e-3, 4: 2e-3}, memory_per_token=1.0,
                                memory_limit=40.0)
    with orchvlm.Planner(batches(4), CLUSTER, {"llm": cost}, llm="sequence_parallel",
                         work_limit=500, time_limit=None) as plans:
        for _, step in plans:
            step.check()


def test_looks_ahead_and_no_further():
    fetched = []

    def source():
        for batch in batches(20):
            fetched.append(batch)
            yield batch

    with planner(source(), lookahead=2) as plans:
        next(plans)
        for _ in range(100):
            if len(fetched) >= 4:
                break
            time.sleep(0.02)
        time.sleep(0.1)
        # one returned, two waiting, one planned and without a place
        assert len(fetched) == 4


def test_planning_errors_arrive_in_place():
    given = batches(5)
    given[2] = orchvlm.Batch([1], [1], [99])
    with planner(given) as plans:
        assert next(plans)[0] is given[0] and next(plans)[0] is given[1]
        with pytest.raises(ValueError, match=r"source_rank\[0\]"):
            next(plans)
        with pytest.raises(StopIteration):
            next(plans)


def test_source_errors_arrive():
    def source():
        yield batches(1)[0]
        raise OSError("the disk is gone")

    with planner(source()) as plans:
        next(plans)
        with pytest.raises(OSError, match="the disk is gone"):
            next(plans)


def test_wrong_options():
    with pytest.raises(ValueError, match="relabel"):
        planner(batches(1), relabel="most")
    with pytest.raises(TypeError, match="no option 'relabels'"):
        planner(batches(1), relabels="sum")
    with planner(batches(1), pad_to=0) as plans, pytest.raises(ValueError, match="pad_to"):
        next(plans)
    with pytest.raises(ValueError, match="lookahead must be >= 1"):
        planner([], lookahead=0)
    with pytest.raises(TypeError, match="lookahead must be an integer"):
        planner([], lookahead=1.5)
    with pytest.raises(TypeError):
        planner(5)


def test_no_batches():
    with planner([]) as plans:
        assert list(plans) == [] and list(plans) == []


def test_leaving_early_stops_the_thread():
    def endless():
        while True:
            yield from batches(1)

    with planner(endless()) as plans:
        next(plans)
    assert list(plans) == []
    with pytest.raises(KeyError), planner(endless()) as plans:
        raise KeyError
    dropped = planner(endless())
    next(dropped)
    alive, reference = running(), weakref.ref(dropped)
    del dropped
    gc.collect()
    assert reference() is None
    for thread in alive:
        thread.join(JOIN_S)
        assert not thread.is_alive()
    assert running() == []
