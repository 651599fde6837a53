"""torchrun's restarts: a rank that is killed, and a run that ends as if nothing had been."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import orchvlm  # noqa: E402
from orchvlm.training import read_metrics  # noqa: E402
from test_restarts import CHATS, SOURCE  # noqa: E402

# Imported by every Python that is started: the second rank of the first start has a thread that
# kills it, once there is something to go on from.
KILLER = """
import os, signal, threading, time
from pathlib import Path

def strike():
    while not Path("run/checkpoint-10").exists() or len(Path(
            "run/metrics.jsonl").read_text().splitlines()) < 13:
        time.sleep(0.002)
    Path("killed").write_text(os.environ["RANK"])
    os.kill(os.getpid(), signal.SIGKILL)

if (os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")) == ("1", "0"):
    threading.Thread(target=strike, daemon=True).start()
"""
STEPS = 60


def test_a_killed_rank_costs_nothing(tmp_path):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(KILLER)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI", "PMI", "SLURM"))}
    command = ["-m", "orchvlm", "train", "--preset", "tiny", "--resume", "auto", "--data",
               "chats.jsonl", "--tokens", "40", "--steps", str(STEPS), "--threads", "1",
               "--samples", "1", "--set", "output.save_every=10"]

    def ran(python, folder, paths, *more):
        done = subprocess.run(
            [sys.executable, *python, *command, "--out", folder, *more], cwd=tmp_path, text=True,
            capture_output=True, timeout=600,
            env={**clean, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        rows = read_metrics(tmp_path / folder / "metrics.jsonl")
        return done.stderr, [row["loss"] for row in rows]
    port = str(20000 + os.getpid() % 10000)
    said, losses = ran(["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts",
                        "3", "--master-port", port], "run", [str(tmp_path / "first"), SOURCE])
    assert (tmp_path / "killed").read_text() == "1" and "exitcode: -9" in said, said
    _, wanted = ran([], "whole", [SOURCE], "--ranks", "2")
    assert len(losses) == STEPS and losses == wanted
