"""Prints how long communicators of this host take: microseconds per call, ranks as processes.

    python tests/bench/bench_comm.py            the local engine
    mpirun -n 4 python tests/bench/bench_comm.py    whatever the launcher gives
"""
import time

import numpy as np

from orchvlm import comm

PEER_BYTES = (64, 4096, 262144)
REDUCE_BYTES = (64, 65536, 4 << 20)


def seconds(group, call, most=200, limit_s=0.4):
    """Median of calls, over a time that rank 0 chooses."""
    times = []
    start = time.perf_counter()
    while len(times) < most:
        group.barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        over = np.array([time.perf_counter() - start > limit_s], np.int64)
        if group.broadcast(over)[0]:
            break
    return float(np.median(times))


def measure(group):
    row = []
    for size in PEER_BYTES:
        counts = np.full(group.size, size)
        data = np.zeros(size * group.size, np.uint8)
        row.append(seconds(group, lambda: group.all_to_all(data, counts, counts)))
    for size in REDUCE_BYTES:
        data = np.ones(size // 4, np.float32)
        row.append(seconds(group, lambda: group.all_reduce(data, out=data)))
    return row


def show(n, engine, row):
    print(f"{engine:8} {n:3} ranks  all_to_all " + " ".join(
        f"{size:>7} B/peer {1e6 * t:8.0f} us" for size, t in zip(PEER_BYTES, row)) +
        "  all_reduce " + " ".join(f"{size:>8} B {1e6 * t:8.0f} us" for size, t in zip(
            REDUCE_BYTES, row[len(PEER_BYTES):])), flush=True)


def main():
    with comm.init() as group:
        if group.size > 1:
            row = measure(group)
            if group.rank == 0:
                show(group.size, group.engine, row)
            return
    for n in (2, 4, 8):
        show(n, "local", comm.run_processes(n, measure, start="fork")[0])


if __name__ == "__main__":
    main()
