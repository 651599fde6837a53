"""Packing and unpacking rows for a route, beside memcpy.

    make -C tests/c build/plain/bench_dispatch
    python tests/bench/bench_dispatch.py [threads ...]        (default: 1)

One rank of a step, over a communicator that moves nothing.  Items of a batch leave for ranks drawn
at random and others' items arrive.  GB/s, the bytes of a copy counted once, the best of several
calls, all in one run; one thread is timed by the processor time that it got, several by the wall.
"all" is a whole apply: packed, what stays kept, unpacked.  "in place": nothing is packed, as the
rows for each rank lie together.
"""
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "c" / "build" / "plain" / "bench_dispatch"

# what, ranks, items per rank, mean rows of an item, bytes of a row, loads that travel together
CASES = [
    ("features, bfloat16 x 2,048", 8, 64, 120, 4096, 1),
    ("with 3 DeepStack features", 8, 64, 120, 4096, 4),
    ("features of small pictures", 64, 256, 16, 1536, 1),
    ("patches, float32 x 588", 8, 64, 480, 2352, 1),
    ("patches, uint8 x 588", 64, 256, 256, 588, 1),
    ("mel frames, float32 x 128", 8, 64, 1500, 512, 1),
    ("text, int64", 8, 512, 200, 8, 1),
    ("text, int32, short", 64, 4096, 24, 4, 1),
    ("one row per piece", 64, 4096, 1, 4096, 1),
    ("bytes of compressed pictures", 8, 128, 60_000, 1, 1),
    ("2,560 ranks", 2560, 64, 120, 1024, 1),
]


def table(threads):
    print(f"\n{threads} thread(s)\n")
    head = ["rows", "MB sent", "memcpy", "pack", "unpack", "all", "pack/memcpy", "unpack/memcpy",
            "prepare, us"]
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    lines = "".join(f"{' '.join(map(str, sizes))} {threads}\n" for _, *sizes in CASES)
    done = subprocess.run([PROGRAM], input=lines, text=True, check=True, stdout=subprocess.PIPE)
    for (name, *_), line in zip(CASES, done.stdout.splitlines(), strict=True):
        sent, plain, pack, unpack, both, prepared = map(float, line.split())
        both *= pack + unpack > 0  # nothing was copied
        speeds = [f"{x:.1f}" if x else "in place" for x in (plain, pack, unpack, both)]
        ratios = [f"{x / plain:.2f}" if x else "-" for x in (pack, unpack)]
        cells = [name, f"{sent:.1f}", *speeds, *ratios, f"{prepared:.0f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    for count in [int(word) for word in sys.argv[1:]] or [1]:
        table(count)
