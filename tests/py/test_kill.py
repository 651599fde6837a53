"""Runs over ranks that are killed at random moments, also while a checkpoint is written: the last
one always loads, and the run goes on.

A few here; by hand, as many as one likes:

    ORCHVLM_KILLS=100 pytest -s tests/py/test_kill.py
"""
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

import orchvlm
from comm_kill import wait_for
from durable_cases import made
from orchvlm._comm_run import shared_folder
from orchvlm.run_folder import checkpoints, verify
from orchvlm.sharding import MODES
from orchvlm.training import read_metrics

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", random.randrange(2**31)))
KILLS = int(os.environ.get("ORCHVLM_KILLS", 4))
ENDLESS = {"steps": 100_000, "schedule": "constant", "keep": 2}


def train(comm, folder, signs, mode, every):
    """Goes on where there is something to go on with, and does not end."""
    trainer = made(comm, folder, shard=mode, node_size=1, save_every=every, **ENDLESS)
    if checkpoints(folder):
        trainer.resume()
    for row in trainer.run():
        (signs / f"process {comm.rank}").write_text(str(os.getpid()))


def strike(signs, n, victims, delay_s):
    wait_for([signs / f"process {rank}" for rank in range(n)], 60)
    time.sleep(delay_s)
    for rank in victims:
        os.kill(int((signs / f"process {rank}").read_text()), signal.SIGKILL)


def one_kill(rng, folder):
    """Whether it came while a checkpoint was written."""
    n, mode = rng.randint(2, 3), rng.choice(MODES)
    victims = range(n) if rng.random() < 0.5 else [rng.randrange(n)]
    with tempfile.TemporaryDirectory(dir=shared_folder()) as signs:
        thread = threading.Thread(target=strike, args=(
            Path(signs), n, victims, 0.3 * rng.random(), ))
        thread.start()
        with pytest.raises(orchvlm.CommError):
            orchvlm.comm.run_processes(n, train, folder, Path(signs), mode, rng.randint(1, 2),
                                       start="fork", silent_s=5.0)
        thread.join()
    return bool(list(folder.glob(".checkpoint-*")))


def test_killed_at_random_moments():
    print("seed", SEED)
    rng, before, amid = random.Random(SEED), 0, 0
    with tempfile.TemporaryDirectory(dir=shared_folder()) as name:
        folder = Path(name)
        for k in range(KILLS):
            amid += one_kill(rng, folder)
            for _, path in checkpoints(folder):
                verify(path)  # what bears the name is whole
            trainer = made(None, folder, **ENDLESS)
            if checkpoints(folder):
                assert trainer.resume() >= before
            for _ in trainer.run():
                break
            before = trainer.step
            if k % 10 == 9:
                print(f"{k + 1} kills, {amid} amid writing; step {before}", flush=True)
        print(f"{KILLS} kills, {amid} of them while a checkpoint was written; step {before}")
        rows = read_metrics(folder / "metrics.jsonl")
        wanted = []
        for row in made(None, folder / "whole", **ENDLESS).run():
            wanted.append(row)
            if len(wanted) == before:
                break
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in wanted]
    for row, other in zip(rows[:50], wanted):  # rounding grows with every step
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
