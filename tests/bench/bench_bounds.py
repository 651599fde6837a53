"""How strong the certificates are, and what of the gap is theirs.

    python tests/bench/bench_bounds.py

Single micro-batches (sorted chunks of profile A): quick bound (work_limit=0) and bounds after 25 ms
and 1 s beside a plan of 1 s.  Whole steps: the same after 5 ms, 100 ms and 1 s beside a plan of
3 s.
Times are wall milliseconds on one core; gaps are without `fixed` for single micro-batches.
"""
import time

import instances
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


def main():
    head = "bound s    gap      ms"
    print(f"one micro-batch  K    plan s | " + " | ".join([head] * 3))
    for n_gpus, n_items, chunks in ((64, 512, 7), (256, 2048, 8), (1024, 8192, 7)):
        cost = instances.profile("A", n_gpus)
        cut = instances.sorted_chunks(instances.lognormal_lengths(n_items, 1), chunks)
        for i, chunk in enumerate(cut):
            row(f"A{n_gpus} {i}/{chunks}", chunk, n_gpus, cost, (0, .025, 1), 1, cost.fixed,
                micro_batches=1)
    print(f"\nwhole step       K    plan s | " + " | ".join([head] * 3))
    for n_gpus, n_items in ((64, 512), (1024, 8192)):
        for seed in (1, 2, 3):
            row(f"A{n_gpus} seed {seed}", instances.lognormal_lengths(n_items, seed), n_gpus,
                instances.profile("A", n_gpus), (.005, .1, 1), 3, 0)


if __name__ == "__main__":
    main()
