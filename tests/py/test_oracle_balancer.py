"""orchvlm.torch: rows and gradients over gloo groups of 1 to 4 processes."""
import doctest
import importlib
import inspect
import os
import time

import pytest

torch = pytest.importorskip("torch", reason="the oracle needs torch and transformers")

import orchvlm.torch  # noqa: E402
from balancer_ranks import run  # noqa: E402
from test_docs import complaints, documented, modules  # noqa: E402

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))
CHECKS = ("there_and_back", "any_rows", "composed", "gradients_as_unbalanced",
          "straight_to_the_language_ranks", "anchored", "without_anchor",
          "everywhere_the_same_error", "loads_and_bytes", "costs_of_all_kinds",
          "nobody_comes")


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


TOWERS = ("towers", "in_data_parallel", "whole_models", "whole_models_that_fail",
          "whole_models_in_data_parallel", "whole_models_sharded")


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


def test_veomni_calls_what_the_recipe_has():
    balance = pytest.importorskip(
        "veomni.utils.data_balance.data_balance",
        reason="VeOmni is not installed; its recipe is documented, not run")
    hook = next(kind for name, kind in vars(balance).items() if name.endswith("EncoderDataBalance"))
    assert list(inspect.signature(hook.balance_data).parameters) == [
        "self", "pixel_values", "grid_thw", "data_type"]
    assert list(inspect.signature(hook.data_bridge).parameters) == [
        "self", "hidden_state", "deepstack_feature_lists", "require_grad"]


# ---------------------------------------------------------------- one rank, in this process

@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0,
                                         world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_by_finite_differences(alone):
    torch.manual_seed(SEED)
    print("seed", SEED)
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).double()
    balancer = orchvlm.torch.Balancer(encoder)
    balancer.plan([3, 0, 2, 1], out_lengths=[3, 0, 2, 1])
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def there_and_back(x, weight):
        encoder[0].weight = weight
        y, twice = balancer.restore([encoder(balancer.apply(x)), balancer.apply(2 * x)])
        further = balancer.forward_to(twice)
        return balancer.anchor(y * torch.arange(1, 7)[:, None]), further
    # The weight is an argument here: finite differences want to move it.
    del encoder[0].weight
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(there_and_back, (x, weight))


def test_anchor_changes_nothing(alone):
    balancer = orchvlm.torch.Balancer(torch.nn.Linear(2, 2))
    loss = torch.ones(3)
    assert balancer.anchor(loss) is loss  # nothing was exchanged
    balancer.plan([1])
    balancer.restore(balancer.module(balancer.apply(torch.ones(1, 2))))
    anchored = balancer.anchor(loss)
    assert anchored.requires_grad and torch.equal(anchored, loss)
    anchored *= 2  # as the Trainer does
    anchored.sum().backward()
    assert torch.equal(balancer.module.weight.grad, torch.zeros(2, 2))
    assert torch.equal(loss, torch.ones(3))
    with pytest.raises(TypeError, match="tensor of floats; got Tensor of torch.int64"):
        balancer.anchor(torch.ones(3, dtype=torch.int64))


def test_graphs_are_let_go(alone):
    """Nothing keeps a step's graph once its loss is gone."""
    import gc
    import weakref
    balancer = orchvlm.torch.Balancer(torch.nn.Linear(2, 2))
    for anchored in (True, False):
        balancer.plan([1])
        y = balancer.restore(balancer.module(balancer.apply(torch.ones(1, 2))))
        node = weakref.ref(y.grad_fn)
        loss = balancer.anchor(y.sum()) if anchored else y.sum()
        loss.backward()
        del y, loss
        gc.collect()
        assert node() is None


def test_without_a_group():
    with pytest.raises(orchvlm.CommError, match="init_process_group"):
        orchvlm.torch.Balancer(None)


def test_models_without_a_tower(alone):
    with pytest.raises(TypeError, match="visual"):
        orchvlm.torch.balance_tower(torch.nn.Linear(1, 1))


def test_docstrings():
    wrong = [f"orchvlm.{full}: {text}" for full, value in documented("torch")
             for text in complaints(full, value)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("orchvlm.torch")])
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
