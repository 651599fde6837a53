"""The published program against the certificates and the planner."""
import os

import numpy as np
import pytest

import instances
import orchvlm

pytest.importorskip("scipy", minversion="1.11")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", np.random.SeedSequence().entropy % 2**32))


def test_optimum_lies_between_bound_and_plan():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    solved = 0
    for _ in range(25):
        lengths = rng.integers(50, 3000, rng.integers(1, 8))
        n_gpus = int(rng.choice([2, 4, 6]))
        cost = orchvlm.SequenceCost(
            quadratic=rng.uniform(0, 2e-7), linear=1e-4, fixed=rng.choice([0, .2]),
            comm={d: rng.uniform(0, 3e-5) * d for d in (1, 2, 3, 4) if d <= n_gpus},
            memory_per_token=1.0, memory_limit=1 + lengths.max() / 2 * rng.choice([1.01, 1.6, 9]),
            heads=int(rng.choice([0, 8])))
        milp = orchvlm.plan_sequences_milp(lengths, n_gpus, cost, symmetry=bool(rng.integers(2)),
                                           time_limit=5)
        bound = orchvlm.sequence_bound(lengths, n_gpus, cost, micro_batches=1, time_limit=None,
                                       work_limit=20_000)
        if milp.status == "optimal":
            solved += 1
            assert milp.time == pytest.approx(milp.objective, rel=1e-5)
            assert bound <= milp.time * (1 + 1e-9)
            assert sorted(np.concatenate(milp.items)) == list(range(len(lengths)))
            assert milp.degrees.sum() <= n_gpus
    assert solved > 5


def test_buckets_round_up_and_symmetry_changes_nothing():
    lengths = np.array([700, 690, 400, 380, 390, 100])
    cost = orchvlm.SequenceCost(quadratic=1e-7, linear=1e-4, comm={1: 0, 2: 1e-5},
                                memory_per_token=1.0, memory_limit=1200)
    exact = orchvlm.plan_sequences_milp(lengths, 4, cost)
    broken = orchvlm.plan_sequences_milp(lengths, 4, cost, symmetry=True)
    rounded = orchvlm.plan_sequences_milp(lengths, 4, cost, n_buckets=2)
    assert broken.objective == pytest.approx(exact.objective, rel=1e-6)
    assert rounded.objective >= exact.objective - 1e-9
    assert rounded.time <= rounded.objective + 1e-9


def test_infeasible_and_bad_input():
    cost = orchvlm.SequenceCost(quadratic=0, linear=1e-3, memory_per_token=1.0, memory_limit=100)
    assert orchvlm.plan_sequences_milp([90, 90, 90], 2, cost).status == "infeasible"
    with pytest.raises(TypeError, match="lengths"):
        orchvlm.plan_sequences_milp([1.5], 2, cost)
    with pytest.raises(ValueError, match="lengths"):
        orchvlm.plan_sequences_milp(np.zeros(0, np.int64), 2, cost)


def test_a_real_micro_batch_is_bounded():
    chunk = instances.sorted_chunks(instances.lognormal_lengths(128, 1), 3)[0]
    cost = instances.profile("A")
    milp = orchvlm.plan_sequences_milp(chunk, 64, cost, symmetry=True, time_limit=10)
    assert milp.status in ("optimal", "feasible")
    assert orchvlm.sequence_bound(chunk, 64, cost, micro_batches=1) <= milp.time
