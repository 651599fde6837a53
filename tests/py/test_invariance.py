"""The law: loss and every gradient are the same for any number of ranks, any plan, any
micro-batches, wherever samples were read and however weights are kept; over threads and over
processes.  test_comm_mpi.py runs the same draws over MPI."""
import os
import secrets

import numpy as np
import pytest

import orchvlm
from model_cases import SANITIZED
from orchvlm.orchestrator import Orchestrator
from rank_cases import FAMILIES, PlannedGroups, RandomGroups, law, laws

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
DRAWS = int(os.environ.get("ORCHVLM_PLAN_DRAWS", 40))  # of each family; more in rank_cases.py
GROUP_DRAWS = int(os.environ.get("ORCHVLM_GROUP_DRAWS", 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_plans(family):
    print("seed", SEED)
    for draw in range(DRAWS):
        seed = [SEED, draw]
        n = int(np.random.default_rng(seed).choice([1, 2, 3, 4, 8]))
        orchvlm.comm.run_threads(n, law, seed, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_groups(family):
    """Any mix of groups, in the middle of pictures and sounds."""
    print("seed", SEED)
    for draw in range(GROUP_DRAWS):
        seed = [SEED, 1, draw]
        n = int(np.random.default_rng(seed).choice([2, 3, 4]))
        orchvlm.comm.run_threads(n, law, seed, family, RandomGroups)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n, make", [(2, Orchestrator), (3, Orchestrator), (3, PlannedGroups),
                                     (4, PlannedGroups)])
def test_plans(family, n, make):
    print("seed", SEED)
    orchvlm.comm.run_threads(n, law, [SEED, n], family, make)


@pytest.mark.skipif(SANITIZED, reason="the launcher's children do not load the sanitizer")
@pytest.mark.parametrize("n", [2, 4])
def test_over_processes(n):
    print("seed", SEED)
    orchvlm.comm.run_processes(n, laws, SEED + n, 4)


@pytest.mark.skipif(SANITIZED, reason="the launcher's children do not load the sanitizer")
def test_groups_over_processes():
    print("seed", SEED)
    orchvlm.comm.run_processes(3, laws, SEED + 5, 1, RandomGroups)
