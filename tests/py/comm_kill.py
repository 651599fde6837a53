"""Kills ranks at random moments and looks that all others hear of it in time.

test_comm.py does a few; by hand, as many as one likes:

    python tests/py/comm_kill.py 1000
"""
import os
import random
import signal
import sys
import threading
import time

import numpy as np

from orchvlm import CommError, comm


def call_until_failure(group, seed, folder, path_of_pid):
    """Calls of all kinds, the same on all ranks; returns what a failure says, and when."""
    with open(os.path.join(folder, path_of_pid.format(group.rank)), "w") as file:
        file.write(str(os.getpid()))
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
        return str(error), time.time()


def one_kill(rng, number=signal.SIGKILL, silent_s=5.0):
    """One job of 2 to 5 ranks, of which one is killed; its message and seconds until all knew."""
    import tempfile

    n = rng.randint(2, 5)
    victim, delay = rng.randrange(n), rng.random() * 0.3
    with tempfile.TemporaryDirectory() as folder:
        struck = []

        def strike():
            files = [os.path.join(folder, str(r)) for r in range(n)]
            while not all(os.path.exists(f) and os.path.getsize(f) for f in files):
                time.sleep(0.002)
            time.sleep(delay)
            with open(files[victim]) as file:
                pid = int(file.read())
            struck.append(time.time())
            os.kill(pid, number)

        thread = threading.Thread(target=strike)
        thread.start()
        heard = collect(n, rng.randrange(2**31), folder, silent_s)
        thread.join()
    others = [r for r in range(n) if r != victim]
    assert sorted(heard) == others, f"rank {victim} of {n} was struck; {heard} heard of it"
    for message, _ in heard.values():
        assert f"rank {victim} " in message, message
    late = max(when for _, when in heard.values()) - struck[0]
    assert late < 5 + silent_s, f"it took {late:.1f} s"
    return late


def collect(n, seed, folder, silent_s):
    """What the ranks return, by rank; the struck one returns nothing."""
    from orchvlm import _comm_run

    seen = {}
    hear = _comm_run._Ranks.hear

    class Ranks(_comm_run._Ranks):
        def hear(self, pipe):
            hear(self, pipe)
            seen.update(self.results)
            if len(self.results) == n - 1:
                self.send(signal.SIGKILL)  # a stopped one

    original, _comm_run._Ranks = _comm_run._Ranks, Ranks
    try:
        comm.run_processes(n, call_until_failure, seed, folder, "{}", start="fork",
                           silent_s=silent_s)
    except CommError:
        pass
    finally:
        _comm_run._Ranks = original
    return seen


def main(many, seed=None):
    seed = int(seed) if seed is not None else random.randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    late = []
    for i in range(int(many)):
        late.append(one_kill(rng))
        if (i + 1) % 50 == 0:
            print(f"{i + 1} kills, {max(late):.2f} s at most until all knew", flush=True)
    print(f"{many} kills, no hang; until all knew: median {np.median(late):.2f} s, at most "
          f"{max(late):.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
