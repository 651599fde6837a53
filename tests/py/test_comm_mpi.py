"""Ranks under mpirun, where an MPI library is installed."""
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_restarts import CHATS, wait

from orchvlm.training import checkpoints, read_metrics

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", random.randrange(2**31)))
HERE = Path(__file__).parent


def launcher():
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


MPIRUN = launcher()
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun is installed")


def run(n, *what, limit_s=120):
    """The calls on n ranks."""
    return launch(n, "comm_cases.py", str(SEED), *what, limit_s=limit_s)


def launch(n, script, *arguments, limit_s=120):
    """A script of this folder on n ranks."""
    command, environment = launched(n, sys.executable, str(HERE / script), *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)


def launched(n, *command):
    """(command line, environment) of a command on n ranks."""
    version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout
    options = ["--oversubscribe", "--allow-run-as-root"] if "Open MPI" in version else []
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI", "PMI"))}
    environment["PYTHONPATH"] = ":".join(p for p in sys.path if p)
    print("seed", SEED)
    return [MPIRUN, *options, "-n", str(n), *command], environment


@pytest.mark.parametrize("n", [1, 2, 4])
def test_calls(n):
    out = run(n)
    assert out.returncode == 0, out.stdout + out.stderr
    for rank in range(n):
        assert f"rank {rank} of {n} over mpi: fine" in out.stdout


@pytest.mark.parametrize("call", ["disagree", "all_gather", "reduce_scatter"])
def test_counts_that_disagree(call):
    out = run(3, call, limit_s=30)
    assert out.returncode == 0 and out.stdout.count("fine") == 3, out.stdout + out.stderr


def test_counts_that_one_rank_alone_finds_wrong():
    """MPI still holds that rank's buffers, and the others wait: the job ends."""
    out = run(3, "unseen", limit_s=30)
    assert out.returncode != 0 and "fine" not in out.stdout
    assert "rank 0 sends 2 bytes to rank 1, which expects 3" in out.stderr, out.stderr


def test_a_forked_child_is_no_rank():
    out = run(2, "fork")
    assert out.returncode == 0 and out.stdout.count("fine") == 2, out.stdout + out.stderr


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_law(n):
    """The draws of test_invariance.py."""
    out = launch(n, "rank_cases.py", "3", str(SEED))
    assert out.returncode == 0 and out.stdout.count("over mpi: fine") == n, out.stdout + out.stderr


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="no mpi4py is installed")
def test_over_mpi4py():
    out = run(3, "mpi4py")
    assert out.returncode == 0 and out.stdout.count("fine") == 3, out.stdout + out.stderr


def test_a_rank_that_raises_ends_the_job():
    out = run(4, "fail", limit_s=60)
    assert out.returncode != 0 and "fine" not in out.stdout
    assert "rank 3 failed: ValueError: the sea is too wet" in out.stderr, out.stderr
    assert "raise ValueError" in out.stderr


def test_a_signal_to_a_rank_ends_all_with_its_status(tmp_path):
    """As Slurm gives it; whoever started the job sees 143, and puts it into the queue again."""
    pytest.importorskip("PIL")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    run = tmp_path / "run"
    lines = run / "metrics.jsonl"
    rank = (f'echo $$ > {tmp_path}/task.$$; exec "{sys.executable}" -m orchvlm train --preset tiny '
            f"--data {tmp_path}/chats.jsonl --tokens 40 --steps 9999 --threads 1 --samples 1 "
            f"--out {run}")
    command, environment = launched(2, "sh", "-c", rank)
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait(lambda: lines.exists() and lines.read_text().count("\n") > 5, job)
        tasks = [int(path.read_text()) for path in tmp_path.glob("task.*")]
        os.kill(random.choice(tasks), signal.SIGTERM)
        said = job.communicate(timeout=60)[1]
    finally:
        job.kill()
    assert job.returncode == 143 and "MPI_ABORT" not in said, said
    (step, _), = checkpoints(run)
    assert len(tasks) == 2 and len(read_metrics(lines)) == step > 5
