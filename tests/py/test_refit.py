"""Costs of phases that are fitted to what phases took while a run goes on."""
import os
import time

import numpy as np
import pytest

import orchvlm
from orchvlm import BatchCost, data
from orchvlm.refit import Refit

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", time.time_ns() % 2**31))


@pytest.fixture(autouse=True)
def seed():
    print(f"ORCHVLM_TEST_SEED={SEED}")


def drawn_plan(rng, ranks):
    """A plan of a batch with pictures."""
    n = int(rng.integers(ranks, 4 * ranks))
    tokens, patches = rng.integers(4, 200, n), 4 * rng.integers(4, 100, n)
    text = rng.integers(1, 400, n)
    frames = rng.integers(1, 4, n)  # that attend one by one
    batch = orchvlm.Batch(text, text, np.sort(rng.integers(0, ranks, n)), {"vision": orchvlm.Items(
        np.arange(n), np.zeros(n, int), patches, tokens, patches, out_bytes_per_token=4.0,
        squares=patches**2 / frames)})
    return orchvlm.plan_step(batch, orchvlm.Cluster.preset("h100", 1, ranks),
                             {"vision": BatchCost(linear=1.0), "llm": BatchCost(linear=1.0)},
                             work_limit=100, time_limit=None)


def test_a_fit_finds_what_the_times_were_made_of():
    rng = np.random.default_rng(SEED)
    truth = {"vision": BatchCost(linear=3e-5, quadratic=2e-8, per_item=4e-4, fixed=2e-3),
             "llm": BatchCost(linear=2e-4, quadratic=5e-9, per_item=1e-5, fixed=1e-3)}
    costs = {"vision": BatchCost(linear=1e-9), "llm": BatchCost(linear=1e-9)}
    refit = Refit(costs)
    for _ in range(20):
        plan = drawn_plan(rng, 3)
        for name, cost in truth.items():
            share = plan.llm if name == "llm" else plan.phases[name]
            length = (plan.batch.language_lengths if name == "llm"
                      else plan.batch.phases[name].length)
            square = length**2. if name == "llm" else plan.batch.phases[name].squares
            refit.note([plan], name, np.array([
                cost(length[share.rank == r], squares=square[share.rank == r])
                for r in range(3)]))
    errors = refit.fit()
    assert set(errors) == set(truth)
    for name, (before, after) in errors.items():
        assert after < 1e-6 < before, name
        for term in ("linear", "quadratic", "per_item", "fixed"):
            got, wanted = getattr(refit.costs[name], term), getattr(truth[name], term)
            assert got == pytest.approx(wanted, rel=1e-3), (name, term)
    assert costs["llm"] == BatchCost(linear=1e-9)  # the caller's stays


def test_too_little_is_not_fitted():
    refit = Refit({"llm": BatchCost(linear=1.0)})
    plan = drawn_plan(np.random.default_rng(SEED), 2)
    refit.note([plan], "llm", np.array([1.0, 0.0]))  # a rank without time tells nothing
    assert refit.fit() == {} and refit.costs == {"llm": BatchCost(linear=1.0)}


def test_a_run_over_ranks_plans_by_what_it_saw(tmp_path):
    """All ranks take the new costs with the same batch; the loss is that of a run without."""
    pytest.importorskip("PIL", reason="pictures are drawn with Pillow")

    def work(comm, refit=0):
        model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
        processor = data.Processor.from_config(model.config.values)
        loader = data.RankLoader(data.Mixture([data.Tasks(seed=SEED)], seed=0), processor, 256,
                                 comm)
        config = orchvlm.TrainingConfig(steps=13, lr=1e-4, rank_refit=refit)
        run = orchvlm.Trainer(model, loader, config, tmp_path / f"run-{refit}", comm)
        rows = list(run.run())
        assert len(run.passes._coming) <= 2  # of what is behind nothing is kept
        return rows, run.passes.costs
    fitted = orchvlm.comm.run_threads(3, lambda comm: work(comm, 4))
    plain = orchvlm.comm.run_threads(3, work)
    costs = [costs for _, costs in fitted]
    assert costs[0] == costs[1] == costs[2] != plain[0][1]
    marked = [i for i, row in enumerate(fitted[0][0]) if "llm_cost_error" in row]
    assert marked == [3, 7, 11]
    for row, wanted in zip(fitted[0][0], plain[0][0]):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


@pytest.mark.parametrize("value", (-1, 1.5, True, "often"))
def test_refused(value):
    with pytest.raises(ValueError, match="rank_refit must be"):
        orchvlm.TrainingConfig(rank_refit=value)
