"""The scheduler that Megatron-Core calls: the shapes it relies on, and times beside its rule."""
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest

import orchvlm
from orchvlm.compat import get_groups_and_subsamples

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
print(f"seed {SEED}")


def check(groups, ids, samples, n_gpus, limit):
    length = dict(samples)
    assert len(groups) == len(ids)
    seen = []
    for lengths_of, ids_of in zip(groups, ids):
        assert len(lengths_of) == len(ids_of) == n_gpus
        assert lengths_of == [[length[i] for i in mine] for mine in ids_of]
        gpu = 0
        while gpu < n_gpus:
            mine = ids_of[gpu]
            assert mine, f"GPU {gpu} has nothing to do"
            degree = 1
            while gpu + degree < n_gpus and ids_of[gpu + degree] == mine:
                degree += 1
            assert degree & (degree - 1) == 0 or degree == n_gpus
            assert gpu % degree == 0
            assert sum(length[i] for i in mine) <= limit * degree
            assert not set(mine) & {i for other in ids_of[gpu + degree:] for i in other}
            seen += mine
            gpu += degree
    assert sorted(seen) == sorted(length)


@pytest.mark.parametrize("n_gpus", [1, 2, 8, 12, 64, 96])
@pytest.mark.parametrize("round_", range(4))
def test_shapes(n_gpus, round_):
    rng = np.random.default_rng([SEED, n_gpus, round_])
    n = int(rng.integers(1, 6 * n_gpus + 2))
    limit = 4096
    lengths = np.minimum(np.exp(rng.normal(7, 1.5, n)).astype(int) + 1,
                         limit * (n_gpus if round_ % 2 else 1))
    samples = list(zip(rng.permutation(10 * n)[:n].tolist(), lengths.tolist()))
    scheduler = SimpleNamespace(total_hdp_gpus=n_gpus, max_seq_len_per_rank=limit)
    groups, ids = get_groups_and_subsamples(scheduler, samples, None, work_limit=2000,
                                            time_limit=None)
    check(groups, ids, samples, n_gpus, limit)
    again = get_groups_and_subsamples(scheduler, samples, None, work_limit=2000, time_limit=None)
    assert again == (groups, ids)


def seconds(ids, length, cost):
    """Sum over micro-batches of the slowest group."""
    total = 0.0
    for ids_of in ids:
        times = []
        for mine in {tuple(mine) for mine in ids_of}:
            degree = ids_of.count(list(mine))
            s = np.array([length[i] for i in mine], float)
            times.append((cost.quadratic * s**2 + (cost.linear + cost.comm[degree]) * s).sum()
                         / degree)
        total += max(times)
    return total


def least_degrees(samples, n_gpus, limit):
    """Degrees at their minimum, longest first onto the least work: one micro-batch at a time."""
    left = sorted(samples, key=lambda pair: -pair[1])
    micro = []
    while left:
        free, used, rest = n_gpus, [], []
        for sample, length in left:
            degree = max(1, 2**math.ceil(math.log2(length / limit)))
            fits = [g for g in used if g[0] == degree and g[2] + length <= degree * limit]
            if degree <= free:
                used.append([degree, [sample], length])
                free -= degree
            elif fits:
                group = min(fits, key=lambda g: g[2])
                group[1].append(sample)
                group[2] += length
            else:
                rest.append((sample, length))
        micro.append([items for degree, items, _ in used for _ in range(degree)])
        left = rest
    return micro


def test_degrees_above_the_minimum_where_that_pays():
    rng = np.random.default_rng(SEED)
    n_gpus, limit = 16, 8192
    lengths = [60_000, *np.exp(rng.normal(7, 1, 60)).astype(int).tolist()]
    samples = list(enumerate(lengths))
    scheduler = SimpleNamespace(total_hdp_gpus=n_gpus, max_seq_len_per_rank=limit)
    cost = orchvlm.SequenceCost(5e-9, 2e-4, 0.0, {1: 0.0, 2: 1e-5, 4: 1e-5, 8: 1e-5, 16: 1e-4},
                                memory_per_token=1.0, memory_limit=limit)
    _, ids = get_groups_and_subsamples(scheduler, samples, None, cost=cost)
    ours = seconds(ids, dict(samples), cost)
    theirs = seconds(least_degrees(samples, n_gpus, limit), dict(samples), cost)
    assert ours <= theirs * (1 + 1e-9)


def test_nothing_to_do():
    scheduler = SimpleNamespace(total_hdp_gpus=4, max_seq_len_per_rank=10)
    assert get_groups_and_subsamples(scheduler, [], None) == ([], [])


@pytest.mark.parametrize("samples, options, message", [
    ([(1, 5), (1, 6)], {}, "appears twice"),
    ([(1, 0)], {}, "sample 1 has length 0"),
    ([(1, 41)], {}, "41"),
    ([(1, 5)], {"cost": orchvlm.SequenceCost(1.0, 0.0, comm={3: 0.0})}, "degree 3"),
])
def test_bad_input(samples, options, message):
    scheduler = SimpleNamespace(total_hdp_gpus=4, max_seq_len_per_rank=10)
    with pytest.raises(ValueError, match=message):
        get_groups_and_subsamples(scheduler, samples, None, **options)
    with pytest.raises(ValueError, match="max_seq_len_per_rank"):
        get_groups_and_subsamples(SimpleNamespace(total_hdp_gpus=4, max_seq_len_per_rank=0),
                                  [(1, 5)])


def test_installs_as_a_method():
    class Scheduler:
        total_hdp_gpus, max_seq_len_per_rank = 2, 100

    Scheduler.get_groups_and_subsamples = get_groups_and_subsamples
    groups, ids = Scheduler().get_groups_and_subsamples([(3, 90), (4, 80)], None)
    check(groups, ids, [(3, 90), (4, 80)], 2, 100)
