"""How strong the certificates are, and what of the gap is theirs.

    python tests/bench/bench_bounds.py [--steps [--plan SECONDS]]

Single micro-batches (sorted chunks of profile A): quick bound (work_limit=0) and bounds after 25 ms
and 1 s beside a plan of 1 s.  Whole steps at N = 64, 256 and 1,024: the same after 5 ms, 100 ms and
1 s beside a plan of 3 s (or of --plan seconds), with the plan's number of micro-batches, the least
that memory alone allows, and the waste: the share of the plan's GPU time, without `fixed`, beyond
every sequence's least GPU-seconds.  --steps prints these alone.
Times are wall milliseconds on one core; gaps are without `fixed` for single micro-batches.
"""
import argparse
import math
import time

import instances
import numpy as np
import orchvlm


def bound(lengths, n_gpus, cost, limit, **more):
    start = time.perf_counter()
    budget = dict(work_limit=0, time_limit=None) if limit == 0 else dict(time_limit=limit)
    value = orchvlm.sequence_bound(lengths, n_gpus, cost, **budget, **more)
    return value, 1e3 * (time.perf_counter() - start)


def row(name, lengths, n_gpus, cost, limits, plan_limit, fixed, **more):
    plan = orchvlm.plan_sequences(lengths, n_gpus, cost, time_limit=plan_limit, **more)
    cells = []
    for limit in limits:
        value, ms = bound(lengths, n_gpus, cost, limit, **more)
        gap = (plan.time - fixed) / (value - fixed) - 1
        cells.append(f"{value - fixed:9.4f} {100 * gap:6.2f}% {ms:7.1f}")
    print(f"{name:12s} {len(lengths):5d} {plan.time - fixed:9.4f} | " + " | ".join(cells),
          flush=True)


def least_work(lengths, n_gpus, cost):
    """GPU-seconds of every sequence on its best degree, over N; and the fill of memory."""
    s = np.sort(lengths).astype(float)
    room = (cost.memory_limit - cost.memory_fixed) / cost.memory_per_token
    best = np.full(len(s), np.inf)
    for d, comm in cost.comm.items():
        if d <= n_gpus and (not cost.heads or d <= cost.heads):
            share = math.ceil(cost.heads / d) / cost.heads if cost.heads else 1 / d
            work = d * share * cost.quadratic * s * s + (cost.linear + comm) * s
            best = np.where(s <= room * d, np.minimum(best, work), best)
    return best.sum() / n_gpus, s.sum() / (room * n_gpus)


def step_row(n_gpus, n_items, seed, limits, plan_limit):
    lengths, cost = instances.lognormal_lengths(n_items, seed), instances.profile("A", n_gpus)
    plan = orchvlm.plan_sequences(lengths, n_gpus, cost, time_limit=plan_limit)
    work, fill = least_work(lengths, n_gpus, cost)
    many = len(plan.micro_batches)
    waste = 1 - work / (plan.time - many * cost.fixed)
    cells = []
    for limit in limits:
        value, ms = bound(lengths, n_gpus, cost, limit)
        cells.append(f"{value:9.4f} {100 * (plan.time / value - 1):6.2f}% {ms:7.1f}")
    print(f"A{n_gpus} seed {seed}".ljust(12), f"{n_items:5d} {plan.time:9.4f} "
          f"{many:2d}/{math.ceil(fill):d} {100 * waste:4.1f}% | " + " | ".join(cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", action="store_true", help="whole steps alone")
    parser.add_argument("--plan", type=float, default=3, help="seconds for each step's plan")
    options = parser.parse_args()
    head = "bound s    gap      ms"
    if not options.steps:
        micro_batches(head)
    print("whole step       K    plan s  M/min waste | " + " | ".join([head] * 3))
    for n_gpus, n_items in ((64, 512), (256, 2048), (1024, 8192)):
        for seed in (1, 2, 3):
            step_row(n_gpus, n_items, seed, (.005, .1, 1), options.plan)


def micro_batches(head):
    print("one micro-batch  K    plan s | " + " | ".join([head] * 3))
    for n_gpus, n_items, chunks in ((64, 512, 7), (256, 2048, 8), (1024, 8192, 7)):
        cost = instances.profile("A", n_gpus)
        cut = instances.sorted_chunks(instances.lognormal_lengths(n_items, 1), chunks)
        for i, chunk in enumerate(cut):
            row(f"A{n_gpus} {i}/{chunks}", chunk, n_gpus, cost, (0, .025, 1), 1, cost.fixed,
                micro_batches=1)
    print()


if __name__ == "__main__":
    main()
