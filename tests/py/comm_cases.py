"""What every communicator must do, whatever carries it; each rank of a job calls these.

Run alone under a launcher, it takes the communicator of its environment:

    mpirun -n 4 --oversubscribe python tests/py/comm_cases.py SEED
"""
import os
import sys

import numpy as np

from orchvlm import CommError, comm

TYPES = ("float32", "float64", "int64", "int32", "bfloat16")


def rows_of(seed, rank, n, dtype="int64"):
    """Rows of a rank, which every rank can make."""
    numbers = np.random.default_rng([seed, rank]).integers(-1000, 1000, (n, 3))
    if dtype == "bfloat16":
        return ((numbers / 3).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return (numbers / 7).astype(dtype) if dtype.startswith("f") else numbers.astype(dtype)


def widen(array, dtype):
    """bfloat16 as float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array


def narrow(array, dtype):
    """Float32 as bfloat16, to nearest even."""
    if dtype != "bfloat16":
        return array
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def counts_of(rng, n, most=40):
    counts = rng.integers(0, most, n) * rng.integers(0, 2, n)
    if rng.random() < 0.3:
        counts[rng.integers(n)] = 30 * most
    return counts


def check_gather(group, rng, seed):
    counts = counts_of(rng, group.size)
    want = np.concatenate([rows_of(seed, r, c) for r, c in enumerate(counts)])
    mine = rows_of(seed, group.rank, counts[group.rank])
    np.testing.assert_array_equal(group.all_gather(mine), want)
    np.testing.assert_array_equal(group.all_gather_start(mine, counts).wait(), want)
    root = int(rng.integers(group.size))
    data = rows_of(seed, group.rank, 5)
    assert group.broadcast(data, root) is data
    np.testing.assert_array_equal(data, rows_of(seed, root, 5))


def check_exchange(group, rng, seed):
    matrix = np.stack([counts_of(rng, group.size) for _ in range(group.size)])
    parts = [[rows_of(seed + 100 * to, r, matrix[r, to]) for to in range(group.size)]
             for r in range(group.size)]
    mine = np.concatenate(parts[group.rank])
    want = np.concatenate([row[group.rank] for row in parts])
    sends, receives = matrix[group.rank], matrix[:, group.rank]
    np.testing.assert_array_equal(group.all_to_all(mine, sends), want)
    pending = group.all_to_all_start(mine, sends, receives)
    group.barrier()
    np.testing.assert_array_equal(pending.wait(), want)


def check_reductions(group, rng, seed):
    for dtype in TYPES:
        n = int(rng.integers(0, 50)) if rng.random() < 0.7 else 40000
        arrays = [widen(rows_of(seed, r, n, dtype), dtype) for r in range(group.size)]
        mine = rows_of(seed, group.rank, n, dtype)
        sums = arrays[0].copy()
        for array in arrays[1:]:  # in the order of the ranks
            sums += array
        sums = narrow(sums, dtype)
        name = dtype if dtype == "bfloat16" else None
        np.testing.assert_array_equal(group.all_reduce(mine, dtype=name), sums)
        largest = narrow(np.max(arrays, 0), dtype)
        np.testing.assert_array_equal(group.all_reduce_start(mine, "max", name).wait(), largest)
        counts = rng.multinomial(n, np.full(group.size, 1 / group.size))
        start = int(counts[:group.rank].sum())
        np.testing.assert_array_equal(group.reduce_scatter(mine, counts, dtype=name),
                                      sums[start:start + counts[group.rank]])


def check_groups(group, rng, seed):
    colors = rng.integers(0, 2, group.size)
    keys = rng.integers(-3, 3, group.size)
    color = int(colors[group.rank])
    half = group.split(None if color == 1 and group.size > 2 else color, int(keys[group.rank]))
    if half is None:
        return
    members = sorted((keys[r], r) for r in range(group.size) if colors[r] == color)
    assert (half.rank, half.size) == (
        [r for _, r in members].index(group.rank), len(members))
    got = half.all_gather(np.array([group.rank]))
    np.testing.assert_array_equal(got, [r for _, r in members])
    check_exchange(half, np.random.default_rng([seed, color]), seed)
    with half.dup() as twin:
        check_reductions(twin, np.random.default_rng([seed, color]), seed)
    half.close()


def check_all(group, seed):
    """Everything; the same seed on all ranks."""
    rng = np.random.default_rng(seed)
    for check in (check_gather, check_exchange, check_reductions, check_groups, check_exchange):
        check(group, rng, seed)
    group.barrier()
    return True


def disagree(group):
    """Rank 0 sends two rows to rank 1, which expects three: the error names both."""
    send = np.where(np.arange(group.size) == 1, 2, 0) if group.rank == 0 else (
        np.zeros(group.size, int))
    receive = np.where(np.arange(group.size) == 0, 3, 0) if group.rank == 1 else (
        np.zeros(group.size, int))
    try:
        group.all_to_all(np.zeros((int(send.sum()), 1), np.uint8), send, receive)
    except CommError as error:
        assert "rank 0 sends 2 bytes to rank 1, which expects 3" in str(error), error
        return True
    raise AssertionError("nobody noticed")


def forked(group):
    """A forked child is refused, whatever it calls, and its end harms nobody."""
    child = os.fork()
    if child == 0:
        said = []
        for call in (group.barrier, lambda: group.all_reduce_start(np.ones(3)), group.dup):
            try:
                call()
            except CommError as error:
                said.append("a forked process is no rank" in str(error))
        group.abort("a child is no rank")
        group.close()
        os._exit(0 if said == [True] * 3 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert group.all_reduce(np.ones(1))[0] == group.size
    return True


def disagree_unseen(group):
    """The same without comparing, where only rank 1 finds out, and goes on."""
    group.set_debug(False)
    try:
        disagree(group)
    except AssertionError:
        group.barrier()


def disagree_of_all(group, call):
    """Rank 1 has other counts than the rest, with the same sum: the error names it."""
    counts = np.full(group.size, 2)
    if group.rank == 1:
        counts[:2] = 3, 1
    rows = counts[group.rank] if call == "all_gather" else counts.sum()
    try:
        getattr(group, call)(np.zeros((int(rows), 4), np.float32), counts)
    except CommError as error:
        assert "disagree" in str(error) and "rank 1" in str(error), error
        return True
    raise AssertionError("nobody noticed")


def main(seed, *what):
    with comm.init(silent_s=5) as group:
        check_all(group, int(seed))
        if "disagree" in what:
            disagree(group)
        if "unseen" in what:
            disagree_unseen(group)
        for call in {"all_gather", "reduce_scatter"} & set(what):
            disagree_of_all(group, call)
        if "fork" in what:
            forked(group)
        if "fail" in what and group.rank == group.size - 1:
            raise ValueError("the sea is too wet")
        if "fail" in what:
            group.barrier()
        if "mpi4py" in what:
            from mpi4py import MPI

            with comm.from_mpi4py(MPI.COMM_WORLD) as other:
                check_all(other, int(seed) + 1)
    print(f"rank {group.rank} of {group.size} over {group.engine}: fine", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
