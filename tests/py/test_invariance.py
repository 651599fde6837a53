"""The law: loss and every gradient are the same for any number of ranks, any plan, any
micro-batches, wherever samples were read."""
import os
import secrets

import numpy as np
import pytest

from orchvlm.orchestrator import Orchestrator
from rank_cases import FAMILIES, compare, draw_case, on_one_rank, on_ranks

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
DRAWS = int(os.environ.get("ORCHVLM_PLAN_DRAWS", 40))  # of each family; 10,000 by hand


@pytest.mark.parametrize("family", FAMILIES)
def test_random_plans(family):
    print("seed", SEED)
    for draw in range(DRAWS):
        seed = [SEED, draw]
        rng = np.random.default_rng(seed)
        config, samples = draw_case(seed, family)
        n = int(rng.choice([1, 2, 3, 4, 8]))
        checkpoint = str(rng.choice(["none", "selective", "full"]))
        try:
            compare(on_ranks(seed, config, samples, n, checkpoint=checkpoint),
                    on_one_rank(seed, config, samples))
        except AssertionError as error:
            raise AssertionError(f"draw {draw}, {n} ranks, {checkpoint}: {error}") from error


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [2, 3])
def test_balanced_plans(family, n):
    print("seed", SEED)
    config, samples = draw_case([SEED, n], family)
    compare(on_ranks([SEED, n], config, samples, n, Orchestrator),
            on_one_rank([SEED, n], config, samples))
