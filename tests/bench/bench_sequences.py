"""Sequence-parallel groups: gaps proved within a time limit, beside other policies and HiGHS.

    python tests/bench/bench_sequences.py [single] [step] [policies] [real] [--milp] [--quick]

Times are of one core and include sorting, the bound and the plan; gaps are proved ones, with
``fixed`` as the plan reports them and without it.  ``--milp`` adds 60 s of HiGHS on FlexSP's
published MILP per instance of one micro-batch, as published and with symmetry broken.
"""
import argparse
import statistics
import time

import numpy as np

import instances
import orchvlm


def solve(lengths, n_gpus, cost, limit, **options):
    """(plan, wall seconds)"""
    start = time.perf_counter()
    plan = orchvlm.plan_sequences(lengths, n_gpus, cost, time_limit=limit, **options)
    return plan, time.perf_counter() - start


def gap_without_fixed(plan, cost):
    """Of the time beyond ``fixed``: every plan pays it once per micro-batch, so the bound's part of
    it is at most that of this plan."""
    fixed = cost.fixed * sum(1 for batch in plan.micro_batches if batch.groups)
    rest = plan.bound - fixed
    return (plan.time - fixed) / rest - 1 if rest > 0 else float("inf")


def percent(values):
    return " ".join(f"{100 * v:6.2f}" for v in values)


# ---------------------------------------------------------------- one micro-batch -------------


def single_instances(quick):
    """(name, lengths, n_gpus, cost, limits in ms): chunks of A, whole batches of B and B2."""
    for n_gpus, n, chunks, limits in ((64, 512, 7, (5, 25, 100)), (256, 2048, 8, (25, 100, 300)),
                                      (1024, 8192, 7, (100, 300, 1000))):
        if quick and n_gpus > 64:
            break
        cost = instances.profile("A", n_gpus)
        parts = instances.sorted_chunks(instances.lognormal_lengths(n, 0), chunks)
        for i, part in enumerate(parts):
            yield f"A N={n_gpus} chunk {i}", part, n_gpus, cost, limits
        for profile, longest in (("B", 384 * 1024), ("B2", 192 * 1024)):
            for seed in range(3):
                lengths = instances.lognormal_lengths(n, seed, longest)
                yield f"{profile} N={n_gpus} seed {seed}", lengths, n_gpus, instances.profile(
                    profile), limits


def single(quick):
    print("\nOne micro-batch (micro_batches=1): proved gap in % at each limit, then without fixed "
          "at the last")
    print(f"{'instance':24} {'n':>5} {'fill':>5}  {'limits (ms)':>14}  gap at each limit        "
          "without fixed   ms")
    rows = {}
    for name, lengths, n_gpus, cost, limits in single_instances(quick):
        fill = lengths.sum() * cost.memory_per_token / (
            n_gpus * (cost.memory_limit - cost.memory_fixed))
        gaps, wall = [], 0
        for limit in limits:
            plan, wall = solve(lengths, n_gpus, cost, limit / 1000, micro_batches=1)
            gaps.append(plan.gap)
        rows.setdefault((name.split()[0] if "B2" in name else "A, B", n_gpus, limits),
                        []).append(gaps)
        print(f"{name:24} {len(lengths):5d} {fill:5.2f}  {str(limits):>14}  {percent(gaps)}   "
              f"{percent([gap_without_fixed(plan, cost)])}   {1e3 * wall:6.1f}", flush=True)
    for (profile, n_gpus, limits), gaps in rows.items():
        medians = [statistics.median(column) for column in zip(*gaps)]
        print(f"median of {profile:5} N={n_gpus:<5} at {str(limits):>14} ms: {percent(medians)} %")


def milp_instances():
    """(name, lengths, cost) for 64 GPUs: sorted chunks of A and whole batches."""
    a, b = instances.profile("A"), instances.profile("B")
    yield "A K32", instances.lognormal_lengths(32, 0), a
    for n, chunks in ((128, 3), (512, 7)):
        parts = instances.sorted_chunks(instances.lognormal_lengths(n, 0), chunks)
        for i, part in enumerate(parts):
            yield f"A K{n} chunk {i} of {chunks}", part, a
    for n in (32, 128, 512):
        yield f"B K{n}", instances.lognormal_lengths(n, 0, 384 * 1024), b


def milp(quick, seconds=60):
    """HiGHS on the published MILP, as published and with symmetry broken, beside us."""
    print(f"\nHiGHS ({seconds} s, Q = 16) on the published MILP, N = 64: time of the plan (s) with "
          "the true lengths")
    print(f"{'instance':24} {'n':>5} {'HiGHS':>9} {'wall s':>7} {'ordered':>9} {'wall s':>7} "
          f"{'ours 5 ms':>10} {'30 ms':>9}   30 ms no worse")
    for name, lengths, cost in milp_instances():
        row = []
        for symmetry in (False, True):
            start = time.perf_counter()
            other = orchvlm.plan_sequences_milp(lengths, 64, cost, n_buckets=16,
                                                symmetry=symmetry, time_limit=seconds)
            row += [other.time, time.perf_counter() - start]
        ours = [solve(lengths, 64, cost, limit, micro_batches=1)[0].time for limit in (.005, .03)]
        no_worse = ours[1] <= min(row[0], row[2]) * (1 + 1e-9)
        print(f"{name:24} {len(lengths):5d} {row[0]:9.4f} {row[1]:7.2f} {row[2]:9.4f} "
              f"{row[3]:7.2f} {ours[0]:10.4f} {ours[1]:9.4f}   {'yes' if no_worse else 'NO'}",
              flush=True)
        if quick:
            break


# ---------------------------------------------------------------- whole step ------------------


def step(quick):
    print("\nWhole step, profile A: proved gap in %, with and without fixed")
    print(f"{'instance':24} {'limit s':>8} {'wall s':>7} {'M':>3} {'time s':>8} {'bound s':>8} "
          f"{'gap':>6} {'without':>8}")
    for n_gpus, n, seeds, limits in ((64, 512, 7, (.2, 2)), (1024, 8192, 3, (1, 5))):
        if quick and n_gpus > 64:
            break
        cost = instances.profile("A", n_gpus)
        for limit in limits:
            gaps = []
            for seed in range(1, 2 if quick else 1 + seeds):
                lengths = instances.lognormal_lengths(n, seed)
                plan, wall = solve(lengths, n_gpus, cost, limit)
                gaps.append(plan.gap)
                print(f"A N={n_gpus} n={n} seed {seed:<6} {limit:8.1f} {wall:7.2f} "
                      f"{len(plan.micro_batches):3d} {plan.time:8.3f} {plan.bound:8.3f} "
                      f"{percent([plan.gap])} {percent([gap_without_fixed(plan, cost)]):>8}",
                      flush=True)
            print(f"  median gap at {limit} s: {100 * statistics.median(gaps):.2f} %")


def policies(quick):
    print("\nPolicies, profile A, N = 64, 512 sequences, 200 ms each: step time (s), flex saves")
    print(f"{'seed':>4} {'static':>8} {'homog.':>8} {'chunked':>8} {'flex':>8} {'bound':>8}   "
          "saves against each")
    cost, saved = instances.profile("A"), []
    for seed in range(1, 3 if quick else 16):
        lengths = instances.lognormal_lengths(512, seed)
        plans = [solve(lengths, 64, cost, .2, policy=p)[0]
                 for p in ("static", "homogeneous", "chunked", "flex")]
        saves = [100 * (p.time / plans[3].time - 1) for p in plans[:3]]
        saved.append(saves)
        times = " ".join(f"{p.time:8.3f}" for p in plans)
        print(f"{seed:4d} {times} {max(p.bound for p in plans):8.3f}   "
              + " ".join(f"{s:6.1f}" for s in saves), flush=True)
    columns = list(zip(*saved))
    print("median saved: " + " ".join(f"{statistics.median(c):.1f} %" for c in columns)
          + "; least: " + " ".join(f"{min(c):.1f} %" for c in columns))


# ---------------------------------------------------------------- real lengths ----------------

#: File, column, tokens per unit of it (4 bytes of code or text to a token).
REAL = (("wikipedia_flexsp.csv.gz", "text_tokens", 1),
        ("github_source_files.csv", "text_bytes", .25),
        ("spec_documents.csv", "text_bytes", .25), ("wikitext2_articles.csv", "n_words", 1.3))


def real(quick):
    if instances.DATA is None:
        print("\nReal lengths: not on this machine")
        return
    print("\nReal lengths, profile A, N = 64, 512 sequences of up to 192K tokens, 200 ms: "
          "step time (s) and proved gap")
    print(f"{'file':44} {'tokens':>10} {'homog.':>8} {'chunked':>8} {'flex':>8} {'gap %':>7}")
    cost = instances.profile("A")
    rng = np.random.default_rng(0)
    for file, name, lengths in real_lengths():
        drawn = rng.choice(lengths[(lengths >= 1) & (lengths <= 192 * 1024)].astype(np.int64), 512)
        plans = [solve(drawn, 64, cost, .2, policy=p)[0]
                 for p in ("homogeneous", "chunked", "flex")]
        print(f"{file + ' ' + name:44} {drawn.sum():10,} "
              + " ".join(f"{p.time:8.3f}" for p in plans) + f" {percent([plans[2].gap])}",
              flush=True)
        if quick:
            break


def real_lengths():
    """(file, column, tokens) of the files that are there."""
    for file, name, scale in REAL:
        if (instances.DATA / file).exists():
            yield file, name, np.ceil(scale * instances.column(file, name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=[[], "single", "step", "policies", "real"])
    parser.add_argument("--milp", action="store_true", help="also 60 s of HiGHS per instance")
    parser.add_argument("--quick", action="store_true", help="few instances")
    arguments = parser.parse_args()
    for table in arguments.tables or ["single", "step", "policies", "real"]:
        {"single": single, "step": step, "policies": policies, "real": real}[table](
            arguments.quick)
    if arguments.milp:
        milp(arguments.quick)
