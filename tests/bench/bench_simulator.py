"""Time of the simulator, engine and whole, at growing scale.

    python tests/bench/bench_simulator.py
"""
import time

import numpy as np

import orchvlm
from orchvlm import _core, demo
from orchvlm.tables import text_table


def seconds(call, repeat=3):
    """Best of a few runs."""
    best = np.inf
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def engine_row(ranks, stages):
    """Stages of one task per rank, each behind a barrier: the densest graph that steps make."""
    n = stages * (ranks + 1)
    rng = np.random.default_rng(0)
    duration = np.where(np.arange(n) % (ranks + 1) == ranks, 0.0, rng.random(n))
    before, use = [], []
    for t in range(n):
        stage, place = divmod(t, ranks + 1)
        barrier = stage * (ranks + 1) - 1
        before.append(np.arange(t - ranks, t) if place == ranks
                      else np.array([barrier] if stage else [], np.int64))
        use.append([] if place == ranks else [place])
    start, use_start = (np.cumsum([0, *map(len, lists)]) for lists in (before, use))
    before = np.concatenate(before)
    use = np.array([r for one in use for r in one], np.int64)
    best = seconds(lambda: _core.simulate(duration, start, before, use_start, use, ranks))
    return [f"{ranks} ranks x {stages} stages", n, f"{1e3 * best:.1f} ms",
            f"{1e9 * best / n:.0f} ns"]


def step_row(nodes, policy):
    cluster = orchvlm.Cluster.preset("h100", nodes=nodes)
    model = demo.recomputed(orchvlm.from_model(demo.MODEL_84B, cluster), demo.MODEL_84B)
    batch = demo.batch(cluster.n_gpus, 16)
    best = seconds(lambda: orchvlm.simulate(batch, cluster, model.costs, memory=model.memory,
                                            parameters=model.parameters, policies=(policy,)))
    return [policy, cluster.n_gpus, len(batch.text_tokens), f"{1e3 * best:.0f} ms"]


def main():
    print(text_table(["engine", "tasks", "time", "per task"],
                     [engine_row(64, 20), engine_row(2560, 20), engine_row(2560, 200)]))
    print()
    print(text_table(["placement and step", "GPUs", "samples", "time"],
                     [step_row(n, p) for n in (8, 320) for p in ("sampled", "orchmllm",
                                                                 "orchvlm")]))


if __name__ == "__main__":
    main()
