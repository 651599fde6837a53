"""orchvlm.torch: rows and gradients over gloo groups of 1 to 4 processes."""
import os
import time

import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch and transformers")

from balancer_ranks import run  # noqa: E402

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
CHECKS = ("there_and_back", "any_rows", "composed", "gradients_as_unbalanced",
          "straight_to_the_language_ranks", "anchored", "without_anchor",
          "everywhere_the_same_error", "loads_and_bytes", "costs_of_all_kinds")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of each number of ranks, once: {name: what went wrong}."""
    kept = {}

    def of(size, module, names):
        if (size, module) not in kept:
            kept[size, module] = run(size, tmp_path_factory.mktemp("ranks"), module, names, SEED)
        return kept[size, module]
    return of


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("size", (1, 2, 3, 4))
def test_over_ranks(answers, size, name):
    print("seed", SEED)
    wrong = answers(size, "balancer_checks", CHECKS)[name]
    assert not wrong, f"{name} on {size} ranks\n{wrong}"


TOWERS = ("towers", "in_data_parallel", "whole_models", "whole_models_in_data_parallel",
          "whole_models_sharded")


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("size", (2, 3, 4))
def test_towers_over_ranks(answers, size, name):
    pytest.importorskip("transformers", reason="the oracle needs torch and transformers")
    print("seed", SEED)
    wrong = answers(size, "balancer_towers", TOWERS)[name]
    assert not wrong, f"{name} on {size} ranks\n{wrong}"


def test_in_a_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    print("seed", SEED)
    wrong = run(2, tmp_path, "balancer_trainer", ["in_a_trainer"], SEED)["in_a_trainer"]
    assert not wrong, wrong
