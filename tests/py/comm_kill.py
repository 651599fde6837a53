"""Kills ranks at random moments and looks that all others hear of it in time.

test_comm.py does a few; by hand, as many as one likes:

    python tests/py/comm_kill.py 1000
"""
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from orchvlm import CommError, comm


def call_until_failure(group, seed, folder):
    """Calls of all kinds, the same on all ranks, until one fails; what it says goes to a file."""
    Path(folder, f"process {group.rank}").write_text(str(os.getpid()))
    rng = np.random.default_rng(seed)
    try:
        while True:
            kind = rng.integers(5)
            n = int(rng.integers(0, 60000))
            if kind == 0:
                group.all_reduce(np.ones(n, np.float32))
            elif kind == 1:
                group.all_to_all(np.ones(group.size * 10), np.full(group.size, 10))
            elif kind == 2:
                group.all_reduce_start(np.ones(n)).wait()
            elif kind == 3:
                with group.split(group.rank % 2) as half:
                    half.barrier()
            else:
                time.sleep(float(rng.random()) * 0.01)
    except CommError as error:
        heard = Path(folder, f"writing {group.rank}")
        heard.write_text(str(error))
        heard.rename(Path(folder, f"heard {group.rank}"))


def wait_for(paths, limit_s):
    deadline = time.monotonic() + limit_s
    while not all(path.exists() and path.stat().st_size for path in paths):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def strike(folder, n, victim, delay_s, number, limit_s, late_s):
    """Strikes the victim when all run; seconds until all others had heard."""
    wait_for([folder / f"process {r}" for r in range(n)], 60)
    time.sleep(delay_s)
    process = int((folder / f"process {victim}").read_text())
    start = time.monotonic()
    os.kill(process, number)
    if wait_for([folder / f"heard {r}" for r in range(n) if r != victim], limit_s):
        late_s.append(time.monotonic() - start)
    if number != signal.SIGKILL:
        os.kill(process, signal.SIGKILL)


def one_kill(rng, number=signal.SIGKILL, silent_s=5.0):
    """One job of 2 to 5 ranks, of which one is struck; seconds until all others knew."""
    n = rng.randint(2, 5)
    victim, late_s = rng.randrange(n), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        thread = threading.Thread(target=strike, args=(
            folder, n, victim, rng.random() * 0.3, number, silent_s + 20, late_s))
        thread.start()
        try:
            comm.run_processes(n, call_until_failure, rng.randrange(2**31), name, start="fork",
                               silent_s=silent_s)
        except CommError:
            pass
        thread.join()
        heard = {int(path.name[6:]): path.read_text() for path in folder.glob("heard *")}
    assert sorted(heard) == [r for r in range(n) if r != victim], (
        f"rank {victim} of {n} was struck; {heard} heard of it")
    assert all(f"rank {victim} " in message for message in heard.values()), heard
    return late_s[0]


def main(many, seed=None):
    seed = int(seed) if seed is not None else random.randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    late_s = []
    for i in range(int(many)):
        late_s.append(one_kill(rng))
        if (i + 1) % 50 == 0:
            print(f"{i + 1} kills, {max(late_s):.2f} s at most until all knew", flush=True)
    print(f"{many} kills, no hang; until all knew: median {np.median(late_s):.2f} s, at most "
          f"{max(late_s):.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
