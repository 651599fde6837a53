"""Seeded instances that the benchmarks and tests share: cost profiles and length generators."""
import csv
import gzip
from pathlib import Path

import numpy as np

from orchvlm import SequenceCost

#: Real lengths, outside the repository; None where they are absent.
DATA = next((p for p in (Path(__file__).parents[3] / "shared/data/lengths",) if p.is_dir()), None)

_B_TOTAL_MS = {1: .330, 2: .338, 4: .342, 8: .344, 16: .448, 32: .452, 64: .454}


def profile(name, n_gpus=64):
    """A: FlexSP's published GPT-7B on A100-40GB.  B: full recomputation on 80 GB, 45,000 tokens
    per GPU.  B2: B with memory to spare, 90,000 tokens per GPU."""
    if name == "A":
        return SequenceCost.flexsp_gpt7b(n_gpus=n_gpus)
    capacity = {"B": 45_000, "B2": 90_000}[name]
    return SequenceCost(quadratic=6.72e-9, linear=.330e-3, fixed=.3,
                        comm={d: 1e-3 * (v - .330) for d, v in _B_TOTAL_MS.items()},
                        memory_per_token=1.0, memory_limit=capacity, heads=64)


def lognormal_lengths(n, seed, longest=192 * 1024, median=1536, sigma=1.508):
    """Long-tailed lengths: median 1,536, p99 about 50K, redrawn above `longest`."""
    rng = np.random.default_rng(seed)
    lengths = np.zeros(0, np.int64)
    while len(lengths) < n:
        drawn = np.exp(np.log(median) + sigma * rng.standard_normal(n)).astype(np.int64)
        lengths = np.concatenate([lengths, drawn[(drawn >= 16) & (drawn <= longest)]])
    return lengths[:n]


def sorted_chunks(lengths, n_chunks):
    """FlexSP's blaster in spirit: sorted, cut into chunks of nearly equal tokens."""
    ordered = np.sort(lengths)[::-1]
    ends = np.searchsorted(np.cumsum(ordered), np.arange(1, n_chunks) * ordered.sum() / n_chunks)
    return [chunk for chunk in np.split(ordered, ends) if len(chunk)]


def column(file, name):
    """One numeric column of a real length file, empty cells dropped."""
    opener = gzip.open if file.endswith(".gz") else open
    with opener(DATA / file, "rt", newline="") as stream:
        return np.array([float(row[name]) for row in csv.DictReader(stream) if row[name]])
