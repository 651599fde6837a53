"""Certificates from Python: never above a plan, stronger with work, loud on bad input."""
import os

import numpy as np
import pytest

import instances
import orchvlm

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", np.random.SeedSequence().entropy % 2**32))


@pytest.fixture(autouse=True)
def _print_seed():
    print("seed", SEED)


def _draw(rng):
    n_gpus = int(rng.choice([4, 12, 16, 32, 64]))
    odd = rng.random() < .3
    degrees = [d for d in ((1, 2, 3, 5, 6, 12) if odd else (1, 2, 4, 8, 16, 32)) if d <= n_gpus]
    lengths = np.exp(rng.normal(6.5, rng.uniform(.2, 1.6), rng.integers(1, 150))).astype(int) + 1
    cost = orchvlm.SequenceCost(
        quadratic=rng.uniform(0, 3e-8), linear=rng.uniform(1e-6, 1e-4),
        fixed=rng.choice([0, .1, 2]),
        comm={d: rng.uniform(0, 4e-5) * d**.5 for d in degrees}, memory_per_token=1.0,
        memory_limit=max(lengths.max() / degrees[-1], 1) * rng.choice([1.05, 1.4, 3, 50]) + 1)
    return lengths, n_gpus, cost


def test_no_plan_is_below_the_bound():
    rng = np.random.default_rng(SEED)
    for _ in range(25):
        lengths, n_gpus, cost = _draw(rng)
        plan = orchvlm.plan_sequences(lengths, n_gpus, cost, work_limit=20_000, time_limit=None)
        bound = orchvlm.sequence_bound(lengths, n_gpus, cost, work_limit=20_000, time_limit=None)
        assert bound <= plan.time
        exact = orchvlm.sequence_bound(lengths, n_gpus, cost, micro_batches=len(plan.micro_batches),
                                       work_limit=20_000, time_limit=None)
        assert exact <= plan.time
        assert bound * 3 > plan.time or plan.time == 0


def test_no_single_micro_batch_is_below_its_bound():
    rng = np.random.default_rng(SEED)
    for _ in range(25):
        lengths, n_gpus, cost = _draw(rng)
        try:
            plan = orchvlm.plan_sequences(lengths, n_gpus, cost, micro_batches=1,
                                          work_limit=20_000, time_limit=None)
        except (ValueError, orchvlm.Error):
            continue
        assert orchvlm.sequence_bound(lengths, n_gpus, cost, micro_batches=1, work_limit=50_000,
                                      time_limit=None) <= plan.time


def test_more_work_is_never_weaker_and_reproducible():
    lengths = instances.lognormal_lengths(512, 1)
    for n_micro in (None, 8):
        def bound(work):
            return orchvlm.sequence_bound(lengths, 64, instances.profile("A"), work_limit=work,
                                          micro_batches=n_micro, time_limit=None)
        bounds = [bound(work) for work in (0, 10, 1000, 20000)]
        assert bounds == sorted(bounds) and bounds[-1] > bounds[0]
        assert bounds[2] == bound(1000)


def test_too_few_micro_batches_is_infinite():
    lengths = instances.lognormal_lengths(512, 1)
    assert orchvlm.sequence_bound(lengths, 64, instances.profile("A"), micro_batches=2) == np.inf


def test_nothing_costs_nothing():
    assert orchvlm.sequence_bound(np.zeros(0, np.int64), 8, instances.profile("A", 8)) == 0


@pytest.mark.parametrize("change, error, word", [
    (dict(lengths=[1.5]), TypeError, "lengths"), (dict(lengths=[0]), ValueError, "lengths"),
    (dict(lengths=[10**9]), ValueError, "fits no degree"),
    (dict(degrees=[3]), ValueError, "degrees"),
    (dict(degrees=[]), ValueError, "degrees"), (dict(time_limit=-1), ValueError, "time_limit"),
    (dict(work_limit=-1), ValueError, "work_limit"), (dict(pad_to=0), ValueError, "pad_to"),
    (dict(micro_batches=0), ValueError, "micro_batches"),
    (dict(n_gpus="8"), TypeError, "n_gpus"), (dict(cost=None), TypeError, "cost")])
def test_bad_input(change, error, word):
    arguments = dict(lengths=[100, 200], n_gpus=8, cost=instances.profile("A", 8)) | change
    with pytest.raises(error, match=word):
        orchvlm.sequence_bound(**arguments)
