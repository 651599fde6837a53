"""Balancing beside its peers: plan quality and time, one core.

    PYTHONPATH=python:tests/bench python tests/bench/bench_balance.py [table ...]

Tables: scale, triplets, small, equal, home, forms (default: all). Gap is max/bound - 1 against the
certified bound (triplets: against the known optimum). Times are the best of a few calls and include
the sort, the bound and the Python layer.
"""
import heapq
import importlib.util
import sys
import time

import numpy as np

from orchvlm import BatchCost, balance
from orchvlm.compat import get_seqlen_balanced_partitions


def timed(call, repeat=1):
    """(best seconds, result)"""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def row(*cells):
    print("| " + " | ".join(str(c) for c in cells) + " |")


def head(title, *cells):
    print(f"\n{title}")
    row(*cells)
    row(*["---"] * len(cells))


def as_drawn(lengths, n_ranks):
    return np.bincount(np.arange(len(lengths)) * n_ranks // len(lengths), lengths).max()


def longest_first(lengths, n_ranks):
    heap = [(0, r) for r in range(n_ranks)]
    for x in sorted(lengths, reverse=True):
        load, r = heap[0]
        heapq.heapreplace(heap, (load + x, r))
    return max(heap)[0]


def karmarkar_karp(lengths, k, equal_size=False):
    """Differencing over k sets, from its textbook description; returns the largest sum."""
    items = sorted(lengths, reverse=True)
    width = k if equal_size else 1
    heap = [(min(s) - max(s), i, s) for i in range(0, len(items), width)
            for s in [items[i:i + width] + [0] * (k - width)]]
    heapq.heapify(heap)
    age = len(items)
    while len(heap) > 1:
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        sums = sorted((x + y for x, y in zip(a, reversed(b))), reverse=True)
        heapq.heappush(heap, (sums[-1] - sums[0], age, sums))
        age += 1
    return max(heap[0][2])


def milp(lengths, k, seconds):
    """HiGHS on the assignment model, the k sets ordered by load against symmetry."""
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as solve
    from scipy.sparse import coo_matrix
    n = len(lengths)
    item, rank = np.divmod(np.arange(n * k), k)
    once = coo_matrix((np.ones(n * k), (item, np.arange(n * k))), (n, n * k + 1)).tocsr()
    load = coo_matrix((np.r_[np.asarray(lengths, float)[item], -np.ones(k)],
                       (np.r_[rank, np.arange(k)], np.r_[np.arange(n * k), np.full(k, n * k)])),
                      (k, n * k + 1)).tocsr()
    result = solve(np.r_[np.zeros(n * k), 1.0], integrality=np.r_[np.ones(n * k), 0],
                   bounds=Bounds(0, np.r_[np.ones(n * k), np.inf]),
                   constraints=[LinearConstraint(once, 1, 1),
                                LinearConstraint(load, -np.inf, 0)],
                   options=dict(time_limit=seconds))
    return result.fun if result.x is not None else float("nan")


def modality_mix(n, seed, median=900, sigma=1.0, longest=8192):
    """The <=8K mix: lognormal lengths of median 0.9K, redrawn above 8K."""
    rng = np.random.default_rng(seed)
    lengths = np.zeros(0, np.int64)
    while len(lengths) < n:
        drawn = np.exp(np.log(median) + sigma * rng.standard_normal(n)).astype(np.int64)
        lengths = np.concatenate([lengths, drawn[(drawn >= 1) & (drawn <= longest)]])
    return lengths[:n]


def triplets(m, total, seed):
    """3m items in triples that sum to `total`, each strictly between total/4 and total/2."""
    rng = np.random.default_rng(seed)
    items = []
    while len(items) < 3 * m:
        a, b = rng.integers(total // 4 + 1, total // 2, 2)
        if total // 4 < total - a - b < total // 2:
            items += [a, b, total - a - b]
    return rng.permutation(np.array(items, np.int64))


def table_scale():
    n_ranks, each = 2560, 64
    lengths = modality_mix(n_ranks * each, 0)
    mean = lengths.sum() / n_ranks
    head("163,840 items on 2,560 ranks, <=8K mix", "method", "ms", "max/mean")
    row("as drawn", "-", f"{as_drawn(lengths, n_ranks) / mean:.4f}")
    values = lengths.tolist()
    seconds, most = timed(lambda: longest_first(values, n_ranks))
    row("longest-first, heapq", f"{1e3 * seconds:.0f}", f"{most / mean:.6f}")
    seconds, most = timed(lambda: karmarkar_karp(values, n_ranks, True))
    row("Karmarkar-Karp, equal counts", f"{1e3 * seconds:.0f}", f"{most / mean:.6f}")
    for work in (0, None):
        seconds, p = timed(lambda: balance(lengths, n_ranks, work_limit=work), 25)
        row(f"balance, work_limit={work}", f"{1e3 * seconds:.1f}",
            f"{p.imbalance:.6f} (gap {p.gap:.1e}, {p.status})")


def table_triplets():
    head("Triplets: mean gap to the known optimum over 5 instances (worst), ms each", "total", "m",
         "LPT heapq", "Karmarkar-Karp", "balance, default", "balance, 25M steps", "100M steps")
    for total in (1000, 10**6):
        for m in (20, 40, 83, 120, 170):
            cells = []
            methods = [lambda x: longest_first(x.tolist(), m),
                       lambda x: karmarkar_karp(x.tolist(), m)]
            methods += [lambda x, w=w: balance(x, m, work_limit=w).loads.max()
                        for w in (None, 25_000_000, 100_000_000)]
            for method in methods:
                seconds, gaps = [], []
                for seed in range(5):
                    t, most = timed(lambda: method(triplets(m, total, seed)))
                    seconds.append(t)
                    gaps.append(100 * (most / total - 1))
                cells.append(f"{np.mean(gaps):.3f} % ({max(gaps):.3f}), "
                             f"{1e3 * np.mean(seconds):.0f}")
            row(total, m, *cells)


def table_small(seconds=10):
    prtpy = importlib.util.find_spec("prtpy") is not None
    head(f"Small: gap to balance's bound; HiGHS has {seconds} s", "k, n", "LPT heapq",
         "Karmarkar-Karp", "scipy.optimize.milp", "prtpy multifit", "balance", "balance ms")
    for k, n in ((4, 24), (8, 64)):
        lengths = modality_mix(n, 1)
        t, p = timed(lambda: balance(lengths, k))
        other = "not installed"
        if prtpy:
            import prtpy
            sums = prtpy.partition(prtpy.partitioning.multifit, k, lengths.tolist(),
                                   outputtype=prtpy.out.Sums)
            other = f"{100 * (max(sums) / p.bound - 1):.3f} %"
        most = [longest_first(lengths.tolist(), k), karmarkar_karp(lengths.tolist(), k),
                milp(lengths, k, seconds)]
        row(f"{k}, {n}", *(f"{100 * (x / p.bound - 1):.3f} %" for x in most), other,
            f"{100 * p.gap:.3f} % {p.status}", f"{1e3 * t:.1f}")


def table_equal():
    head("verl drop-in: gap to the bound, ms", "costs", "k, n", "KK equal", "ours equal", "KK free",
         "ours free")
    for name in ("linear", "24576*L + L^2"):
        for k, n in ((8, 64), (64, 512), (64, 1024), (256, 2048), (1024, 4096)):
            rng = np.random.default_rng(0)
            if name == "linear":
                lengths = np.clip(np.exp(6.5 + rng.standard_normal(n)), 16, 16384).astype(np.int64)
            else:
                lengths = np.clip(np.exp(7.3 + 1.2 * rng.standard_normal(n)), 32, 131072)
                lengths = (24576 * lengths + lengths**2).astype(np.int64)
            cells, values = [], lengths.tolist()
            for equal in (True, False):
                each = n // k if equal else None
                bound = balance(lengths, k, min_items=each or 1, max_items=each).bound
                if equal or n * k <= 2**20:
                    t, most = timed(lambda: karmarkar_karp(values, k, equal))
                    cells.append(f"{100 * (most / bound - 1):.3f} %, {1e3 * t:.0f}")
                else:
                    cells.append("not run")
                t, parts = timed(lambda: get_seqlen_balanced_partitions(values, k, equal), 5)
                most = max(int(lengths[part].sum()) for part in parts)
                cells.append(f"{100 * (most / bound - 1):.3f} %, {1e3 * t:.1f}")
            row(name, f"{k}, {n}", *cells)


def table_home():
    n_ranks, each, node = 2560, 64, 8
    lengths = modality_mix(n_ranks * each, 0)
    home = np.repeat(np.arange(n_ranks), each)
    total = lengths.sum()
    head("Few bytes moved: 2,560 ranks of 64, <=8K mix, nodes of 8", "method", "ms", "max/mean",
         "bytes across nodes", "bytes across ranks")

    def line(name, seconds, p):
        row(name, f"{1e3 * seconds:.0f}", f"{p.imbalance:.4f}",
            f"{lengths[p.rank // node != home // node].sum() / total:.2%}",
            f"{lengths[p.rank != home].sum() / total:.2%}")

    line("without home", *timed(lambda: balance(lengths, n_ranks)))
    for slack in (0.0, 0.001, 0.005, 0.02):
        line(f"home, slack={slack}", *timed(lambda: balance(
            lengths, n_ranks, home=home, node_size=node, slack=slack)))


def table_forms():
    head("Cost forms: gap to the bound, ms (8,192 items on 256 ranks, <=8K mix)", "cost",
         "work_limit=0", "default", "10x default")
    lengths = modality_mix(8192, 3)
    forms = {"linear": BatchCost(linear=1.0), "attention": BatchCost(linear=1.0, quadratic=1e-3),
             "padded": BatchCost(padded_linear=1.0),
             "padded + attention": BatchCost(padded_linear=1.0, padded_quadratic=1e-3),
             "convolution + transformer": BatchCost(padded_linear=0.5, linear=1.0, quadratic=1e-4)}
    for name, cost in forms.items():
        cells = []
        for work in (0, None, 60_000_000):
            t, p = timed(lambda: balance(lengths, 256, cost, work_limit=work))
            cells.append(f"{100 * p.gap:.3f} %, {1e3 * t:.1f}")
        row(name, *cells)


def table_default():
    head("Default work: ms (least of 3), steps (<=8K mix, linear + attention)", "instance", "ms",
         "steps", "gap")
    for n, n_ranks in ((2048, 256), (16_384, 256), (163_840, 2560), (1_000_000, 4096)):
        lengths = modality_mix(n, 5)
        for home in (None, np.arange(n) * n_ranks // n):
            t, p = timed(lambda: balance(lengths, n_ranks, BatchCost(1.0, 1e-3), home=home), 3)
            row(f"{n:,} on {n_ranks:,}{', home' * (home is not None)}", f"{1e3 * t:.1f}",
                f"{p.work:,}", f"{p.gap:.4%}")


if __name__ == "__main__":
    tables = {name[6:]: call for name, call in globals().items() if name.startswith("table_")}
    unknown = sorted(set(sys.argv[1:]) - set(tables))
    if unknown:
        sys.exit(f"no table {', '.join(unknown)}; there are {', '.join(tables)}")
    for wanted in sys.argv[1:] or tables:
        tables[wanted]()
