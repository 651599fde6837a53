"""The drop-in for verl: its guarantees, and never above Karmarkar-Karp."""
import heapq
import os
import time

import numpy as np
import pytest

from orchvlm.compat import get_seqlen_balanced_partitions

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**32))


def karmarkar_karp(lengths, k, equal_size):
    """The differencing method from its textbook description; the largest sum."""
    items = sorted(lengths, reverse=True)
    width = k if equal_size else 1
    heap = []
    for i in range(0, len(items), width):
        sums = items[i:i + width] + [0] * (k - width)
        heapq.heappush(heap, (sums[-1] - sums[0], i, sums))
    age = len(items)
    while len(heap) > 1:
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        sums = sorted((x + y for x, y in zip(a, reversed(b))), reverse=True)
        heapq.heappush(heap, (sums[-1] - sums[0], age, sums))
        age += 1
    return max(heap[0][2])


@pytest.mark.parametrize("equal_size", [False, True])
def test_guarantees(equal_size):
    print(f"ORCHVLM_TEST_SEED={SEED}")
    rng = np.random.default_rng(SEED)
    for _ in range(60):
        k = int(rng.integers(1, 20))
        n = k * int(rng.integers(1, 12)) + (0 if equal_size else int(rng.integers(0, k)))
        lengths = np.exp(6 + rng.standard_normal(n)).astype(int).tolist()
        parts = get_seqlen_balanced_partitions(lengths, k, equal_size)
        assert len(parts) == k and sorted(i for part in parts for i in part) == list(range(n))
        assert all(part and part == sorted(part) for part in parts)
        assert not equal_size or {len(part) for part in parts} == {n // k}
        assert parts == get_seqlen_balanced_partitions(lengths, k, equal_size)
        largest = max(sum(lengths[i] for i in part) for part in parts)
        assert largest <= karmarkar_karp(lengths, k, equal_size)


def test_zero_lengths_leave_no_partition_empty():
    parts = get_seqlen_balanced_partitions([5, 0, 0, 0], 4, False)
    assert sorted(map(len, parts)) == [1, 1, 1, 1]


def test_narrow_integers():
    lengths = np.arange(1, 31, dtype=np.int8)
    assert (get_seqlen_balanced_partitions(lengths, np.int8(3), np.True_)
            == get_seqlen_balanced_partitions(lengths.tolist(), 3, True))


@pytest.mark.parametrize("arguments, error", [
    (([1, 2], 3, False), ValueError), (([1, 2, 3], 2, True), ValueError),
    (([1, 2], 0, False), ValueError), (([1, -2], 1, False), ValueError),
    (([1.5, 2.0], 1, False), TypeError), (([1, 2], "2", False), TypeError),
])
def test_bad_arguments(arguments, error):
    with pytest.raises(error):
        get_seqlen_balanced_partitions(*arguments)
