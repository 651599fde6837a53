"""Communicators over torch.distributed's gloo: ranks on what looks like several hosts."""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", random.randrange(2**31)))

# A subgroup of torch's own, whose ranks are not the first ones, and splits of it.
SUBGROUP = """
import sys
import torch.distributed as dist
from orchvlm import comm
import comm_cases
dist.init_process_group("gloo")
try:
    comm.from_torch(dist.new_group([0]) if dist.get_rank() else dist.new_group([0]))
except ValueError as error:
    assert dist.get_rank() and "not in the group" in str(error)
group = dist.new_group([1, 3])
if dist.get_rank() in (1, 3):
    with comm.from_torch(group) as ours:
        assert ours.rank == (dist.get_rank() - 1) // 2 and ours.engine == "python"
        comm_cases.check_all(ours, int(sys.argv[1]))
dist.barrier()
print("fine", flush=True)
"""


def ranks(n, port, command):
    """n processes as torchrun starts them, each on a host of its own as far as it knows."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI", "PMI", "SLURM"))}
    clean["PYTHONPATH"] = ":".join(p for p in (str(Path(__file__).parent), *sys.path) if p)
    print("seed", SEED)
    started = [subprocess.Popen(
        [sys.executable, *command, str(SEED)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean | {"RANK": str(r), "WORLD_SIZE": str(n), "LOCAL_RANK": "0",
                     "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}) for r in range(n)]
    for process in started:
        out = process.communicate(timeout=120)[0]
        assert process.returncode == 0 and "fine" in out, out


@pytest.mark.parametrize("n", [2, 4])
def test_calls_over_gloo(n):
    ranks(n, 30000 + (os.getpid() + n) % 10000, [Path(__file__).with_name("comm_cases.py")])


def test_a_group_of_torchs():
    ranks(4, 30000 + (os.getpid() + 7) % 10000, ["-c", SUBGROUP])
