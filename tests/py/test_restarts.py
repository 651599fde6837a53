"""The batch script of the documentation, with stand-ins for what a cluster has."""
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import orchvlm
from orchvlm.training import checkpoints, read_metrics

ROOT = Path(__file__).parents[2]
SOURCE = str(Path(orchvlm.__file__).parents[1])
STEPS = 80  # enough that the signal finds the run under way
CHATS = [{"messages": [{"role": "user", "content": "ab" * (k % 7 + 1)},
                       {"role": "assistant", "content": "c" * (k % 5 + 1)}]} for k in range(30)]
PROGRAMS = {
    # As a job step: its tasks get the signal, and their status is the step's.
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done\n"$@" &\necho $! > "$SEEN/task"\nwait $!\n',
    "scontrol": 'echo "$@" >> "$SEEN/scontrol"\n',
    "orchvlm": f'exec "{sys.executable}" -m orchvlm "$@"\n'}


def script():
    """The batch script, as documented."""
    path = ROOT / "docs" / "training.md"
    if not path.exists():
        pytest.skip("no documentation here")
    found, = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```", path.read_text(),
                        re.DOTALL | re.MULTILINE)
    return found


def started(folder, text):
    """The script as a job, in a folder where data lie and programs are found first."""
    (folder / "job.sh").write_text(text)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI"))}
    return subprocess.Popen(["bash", "job.sh"], cwd=folder, stdout=subprocess.DEVNULL, env={
        **clean, "PATH": path, "PYTHONPATH": SOURCE, "SEEN": str(folder), "SLURM_JOB_ID": "17"})


def wait(condition, job, seconds=300):
    for _ in range(seconds * 100):
        if condition():
            return
        assert job.poll() is None, "the job ended by itself"
        time.sleep(0.01)
    raise AssertionError("this took too long")


def test_the_batch_script_is_one():
    assert subprocess.run(["bash", "-n"], input=script(), text=True).returncode == 0
    options = re.findall(r"--[a-z-]+", "".join(
        line for line in script().splitlines() if line.startswith("#SBATCH")))
    assert {"--requeue", "--signal", "--open-mode"} <= set(options)


def test_a_job_that_is_told_to_end_is_queued_again(tmp_path):
    """The run is that of a job with time enough."""
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{text}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    small = (f"--preset tiny --data chats.jsonl --tokens 40 --steps {STEPS} --ranks 2 --threads 1 "
             "--samples 1 --set output.save_every=100 --out run")
    text, n = re.subn(r"--preset small --data shards/ --out run-small", small, script())
    assert n == 1
    job, run = started(tmp_path, text), tmp_path / "run"
    lines = run / "metrics.jsonl"
    wait(lambda: lines.exists() and lines.read_text().count("\n") > 5, job)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM)
    assert job.wait(300) == 143
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    ended, _ = checkpoints(run)[-1]
    assert 5 <= ended < STEPS and len(read_metrics(lines)) == ended
    again = started(tmp_path, text)
    assert again.wait(300) == 0  # what ended well is not queued again
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    whole = started(tmp_path, text.replace("--out run", "--out whole"))
    assert whole.wait(300) == 0
    seen, wanted = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    assert [row["step"] for row in seen] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in seen] == [row["loss"] for row in wanted]
