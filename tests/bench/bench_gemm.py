"""The CPU backend's matrix products beside NumPy's OpenBLAS and, where it is found, oneDNN.

    make -C tests/c build/plain/bench_gemm
    python tests/bench/bench_gemm.py [threads ...]        (default: 1)

Float32, the shapes of two models' training steps: nn and nt are forward and input gradients, tn the
gradients of weights, grouped the experts of a mixture (rows, columns and K of one expert; the peers
multiply expert by expert).  GFLOP/s, the best of several calls, all in one run; one thread is timed
by the processor time that it got, several by the wall.  oneDNN is the
library at ORCHVLM_ONEDNN (libdnnl.so), through dnnl_sgemm.
"""
import ctypes
import math
import os
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "c" / "build" / "plain" / "bench_gemm"
SECONDS = 0.12

# kind, m, n, k, groups
SHAPES = [
    ("nn", 512, 512, 512, 1), ("nn", 1024, 1024, 1024, 1), ("nt", 1024, 1024, 1024, 1),
    # hidden 256, MLP 1024, 2,048 tokens
    ("nt", 2048, 256, 256, 1), ("nt", 2048, 768, 256, 1), ("nt", 2048, 1024, 256, 1),
    ("nt", 2048, 256, 1024, 1), ("nn", 2048, 256, 256, 1), ("nn", 2048, 256, 1024, 1),
    ("nn", 2048, 1024, 256, 1), ("tn", 256, 256, 2048, 1), ("tn", 1024, 256, 2048, 1),
    ("tn", 256, 1024, 2048, 1), ("nt", 2048, 512, 256, 1), ("nt", 512, 8192, 256, 1),
    ("nn", 512, 256, 8192, 1), ("tn", 8192, 256, 512, 1), ("nt", 128, 32768, 256, 1),
    # hidden 640 and 768, 4,096 tokens
    ("nt", 4096, 640, 640, 1), ("nt", 4096, 768, 768, 1), ("nt", 4096, 2560, 640, 1),
    ("nn", 4096, 640, 2560, 1), ("tn", 640, 640, 4096, 1), ("tn", 2560, 640, 4096, 1),
    # skinny
    ("nn", 64, 1024, 512, 1), ("nn", 16, 1024, 512, 1), ("nt", 16, 1024, 512, 1),
    ("nn", 32, 256, 256, 1), ("nt", 32, 256, 256, 1), ("nt", 8192, 64, 64, 1),
    ("nt", 1, 1024, 1024, 1), ("nt", 4, 768, 768, 1),
    # experts
    ("grouped", 32, 256, 256, 64), ("grouped", 64, 512, 512, 64), ("grouped", 128, 512, 1024, 16),
    ("grouped", 256, 256, 256, 8),
]


class Numpy:
    def __init__(self):
        import numpy
        self.numpy = numpy

    def prepare(self, kind, m, n, k, groups):
        np = self.numpy
        rng = np.random.default_rng(0)
        a = rng.random((groups, k, m) if kind == "tn" else (groups, m, k), "f4")
        b = rng.random((groups, n, k) if kind in ("nt", "grouped") else (groups, k, n), "f4")
        out = np.empty((groups, m, n), "f4")
        a = a.swapaxes(1, 2) if kind == "tn" else a
        b = b.swapaxes(1, 2) if kind in ("nt", "grouped") else b

        def call():
            for g in range(groups):
                np.matmul(a[g], b[g], out=out[g])
        return call


class Onednn:
    def __init__(self):
        self.lib = ctypes.CDLL(os.environ["ORCHVLM_ONEDNN"])
        size, one, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
        self.lib.dnnl_sgemm.argtypes = [ctypes.c_char, ctypes.c_char, size, size, size, one,
                                        pointer, size, pointer, size, one, pointer, size]
        self.numpy = Numpy().numpy

    def prepare(self, kind, m, n, k, groups):
        rng = self.numpy.random.default_rng(0)
        a = rng.random(groups * m * k, "f4")
        b = rng.random(groups * n * k, "f4")
        out = self.numpy.empty(groups * m * n, "f4")
        turn_a = b"T" if kind == "tn" else b"N"
        turn_b = b"T" if kind in ("nt", "grouped") else b"N"
        lda, ldb = (m if kind == "tn" else k), (n if turn_b == b"N" else k)
        at = [(a.ctypes.data + 4 * g * m * k, b.ctypes.data + 4 * g * n * k,
               out.ctypes.data + 4 * g * m * n) for g in range(groups)]
        sgemm = self.lib.dnnl_sgemm

        def call(keep=(a, b, out)):
            for pa, pb, pc in at:
                sgemm(turn_a, turn_b, m, n, k, 1.0, pa, lda, pb, ldb, 0.0, pc, n)
        return call


def serve(peer):
    """Answers lines of the same protocol as the C program."""
    library = {"numpy": Numpy, "onednn": Onednn}[peer]()
    for line in sys.stdin:
        kind, *sizes = line.split()
        m, n, k, groups, threads = map(int, sizes)
        now = time.process_time if threads == 1 else time.perf_counter
        call = library.prepare(kind, m, n, k, groups)
        best, total, calls = float("inf"), 0.0, 0
        while calls < 5 or total < SECONDS and calls < 2000:
            start = now()
            call()
            took = now() - start
            best, total, calls = min(best, took), total + took, calls + 1
        print(f"{2e-9 * m * n * k * groups / best:.4f}", flush=True)


def start(command, threads):
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    env |= {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=env, text=True, bufsize=1, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)


def ask(server, kind, m, n, k, groups, threads):
    print(kind, m, n, k, groups, threads, file=server.stdin, flush=True)
    return float(server.stdout.readline())


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def table(threads, shapes):
    peers = ["numpy"] + ["onednn"] * ("ORCHVLM_ONEDNN" in os.environ)
    servers = [start([str(PROGRAM)], threads)]
    servers += [start([sys.executable, __file__, "serve", peer], threads) for peer in peers]
    peak = max(ask(servers[0], "peak", 1, 1, 1, 1, threads) for _ in range(5)) * threads
    print(f"\n{threads} thread(s); peak of multiply-adds {peak:.1f} GFLOP/s (0: not measured)\n")
    head = ["shape m,n,k", "own", "% of peak"]
    for peer in peers:
        head += [peer, "ratio"]
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    ratios = {peer: [] for peer in peers}
    for shape in shapes:
        own, *others = [ask(server, *shape, threads) for server in servers]
        kind, m, n, k, groups = shape
        cells = [f"{kind} {m},{n},{k}" + (f" x{groups}" if groups > 1 else ""), f"{own:.1f}",
                 f"{100 * own / peak:.0f}" if peak else "-"]
        for peer, other in zip(peers, others):
            ratios[peer].append(own / other)
            cells += [f"{other:.1f}", f"{own / other:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    for peer in peers:
        print(f"geometric mean of own / {peer}: {geometric_mean(ratios[peer]):.3f}")
    for server in servers:
        server.stdin.close()
        server.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    else:
        for count in [int(word) for word in sys.argv[1:]] or [1]:
            table(count, SHAPES)
