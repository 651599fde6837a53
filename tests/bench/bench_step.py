"""Times plan_step at the published scale: 2,560 ranks of 64 samples, three phases, one core.

The least of the repeats is what the work takes, the median what a busy machine makes of it; CPU is
the median of the processor time. The first call of a kind, whose memory is new, stands apart.

    python tests/bench/bench_step.py [--ranks 2560] [--samples 64] [--repeat 7]
"""
import argparse
import time

import numpy as np

import orchvlm


def batch_of(n_ranks, per_rank, seed=0):
    """Samples with an image or two, a sound in half of them, text up to 8K tokens."""
    rng = np.random.default_rng(seed)
    n = n_ranks * per_rank

    def lengths(k, median, longest, sigma=1.0):
        drawn = np.exp(np.log(median) + sigma * rng.standard_normal(k))
        return np.clip(drawn, 16, longest).astype(np.int64)

    text = lengths(n, 600, 8192)
    images = np.sort(rng.integers(0, n, n))
    sounds = np.sort(rng.choice(n, n // 2, replace=False))
    # images follow each other from token 1 on, the sound comes behind them
    patches = 4 * lengths(n, 400, 4096)
    before = np.concatenate([[0], np.cumsum(patches // 4)])[:-1]
    first = np.searchsorted(images, images)
    start = 1 + before - before[first]
    behind = np.bincount(images, patches // 4, minlength=n).astype(np.int64) + 1
    frames = 2 * lengths(n // 2, 500, 3000)
    vision = orchvlm.Items(images, start, patches, patches // 4, patches * 1176,
                           out_bytes_per_token=16384)
    audio = orchvlm.Items(sounds, behind[sounds], frames, frames // 2, frames * 256,
                          out_bytes_per_token=16384)
    return orchvlm.Batch(text, text, np.repeat(np.arange(n_ranks), per_rank),
                         {"vision": vision, "audio": audio})


COSTS = {"vision": orchvlm.BatchCost(linear=2e-6, quadratic=1e-10),
         "audio": orchvlm.BatchCost(linear=1e-6, quadratic=1e-10),
         "llm": orchvlm.BatchCost(linear=5e-5, quadratic=1e-9)}


def main():
    """Prints one line per way of naming mini-batches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2560)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    cluster = orchvlm.Cluster(arguments.ranks // 8, 8, 80e9, 989e12, 450e9, 50e9)
    batch = batch_of(arguments.ranks, arguments.samples)
    print(f"{batch} on {cluster.n_gpus} ranks, nodes of 8, one core")
    print(f"{'homes':>6} {'relabel':>8} {'first':>7} {'min ms':>7} {'median':>7} {'CPU ms':>7} "
          f"{'gap %':>7} {'crossing before':>16} {'after':>10} "
          f"{'worst before':>13} {'after':>10} {'gap %':>7}  exposed ms")
    for slack in (0.002, None):
        for relabel in (None, "sum", "minmax"):
            wall_ms, cpu_ms = [], []
            for _ in range(1 + arguments.repeat):
                began, began_cpu = time.perf_counter(), time.process_time()
                step = orchvlm.plan_step(batch, cluster, COSTS, relabel=relabel, slack=slack,
                                         time_limit=None)
                wall_ms.append(1e3 * (time.perf_counter() - began))
                cpu_ms.append(1e3 * (time.process_time() - began_cpu))
            exposed = [step.traffic["vision->llm"], step.traffic["audio->llm"]]
            crossing = [sum(pair[i].cross_bytes for pair in exposed) for i in (0, 1)]
            worst = [max(pair[i].worst_bytes for pair in exposed) for i in (0, 1)]
            names = max([r.gap for r in step.relabelling.values()], default=0)
            print(f"{'no' if slack is None else 'yes':>6} {str(relabel):>8} "
                  f"{wall_ms[0]:7.0f} {min(wall_ms[1:]):7.0f} {np.median(wall_ms[1:]):7.0f} "
                  f"{np.median(cpu_ms[1:]):7.0f} "
                  f"{100 * step.gap:7.3f} {crossing[0] / 1e9:13.1f} GB {crossing[1] / 1e9:7.1f} GB "
                  f"{worst[0] / 1e6:10.1f} MB {worst[1] / 1e6:7.1f} MB {100 * names:7.2f}  "
                  f"{1e3 * step.exposed:.2f}")
    print()
    print(step.report())


if __name__ == "__main__":
    main()
