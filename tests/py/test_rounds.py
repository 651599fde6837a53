"""Steps in rounds: the numbers of one call, within the memory that was said."""
import os
import secrets

import numpy as np
import pytest

import orchvlm
from orchvlm.explain import foretell
from orchvlm.orchestrator import Orchestrator
from orchvlm.rounds import dealt, taken
from orchvlm.routing import Balance
from orchvlm.training import read_metrics
from rank_cases import FAMILIES, RandomPlans, draw_case, joined, law, made_model

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))


class Random(RandomPlans):
    """In as many rounds as the seed says, under a plan of its own for each."""

    def rounds(self, batch, sizes, media):
        rng = np.random.default_rng(self.seed)
        n, place = int(rng.integers(1, 1 + max(1, len(batch)))), rng.permutation(len(batch))
        parts = [np.sort(part) for part in np.array_split(place, n)]
        return [taken(batch, sizes, part, self.plan) for part in parts]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_rounds(family):
    print("seed", SEED)
    for draw in range(4):
        orchvlm.comm.run_threads(1 + draw % 3, law, [SEED, 100 + draw], family, Random)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_fit(family):
    """Least memory for which a batch still can be taken, and what the arenas then hold."""
    print("seed", SEED)
    config, samples = draw_case([SEED, 7], family)
    samples = samples * 2

    def work(comm, memory_bytes=None, checkpoint="none"):
        model = made_model([SEED, 7], config)
        orchvlm.Shard(model, comm)
        ranks = Orchestrator(model, comm, memory_bytes=memory_bytes)
        held = sum(orchvlm.Shard.predict(model, 2).values())
        prepared = ranks.prepare(joined(samples[comm.rank::2]))
        if memory_bytes is not None:
            model.zero_grad()
            ranks.run(prepared, Balance(model, "exact", 0.0, ranks.total), checkpoint)
            ranks.reduce_gradients()
        own = model.memory()
        return len(prepared.rounds), own["activations"] + own["workspace"], held
    (rounds, _, held), _ = orchvlm.comm.run_threads(2, work)
    assert rounds == 1
    room, seen = 1 << 30, []
    while True:  # ever less room, until a sample has no place any more
        try:
            results = orchvlm.comm.run_threads(2, work, held + room)
        except orchvlm.CommError as error:
            assert "is too little for one sample of rank" in str(error), error
            break
        seen.append(results[0][0])
        assert all(took <= 1.05 * room + 4096 for _, took, _ in results), (room, results)
        room = min(room, max(took for _, took, _ in results)) * 3 // 4
    print("rounds", seen)
    assert seen[0] == 1 and seen == sorted(seen)


def test_too_little_is_refused():
    config, samples = draw_case([SEED, 8], "qwen3_vl")

    def work(comm, more):
        model = made_model([SEED, 8], config)
        orchvlm.Shard(model, comm)
        held = sum(orchvlm.Shard.predict(model, 1).values())
        Orchestrator(model, comm, memory_bytes=held + more).prepare(joined(samples))
    with pytest.raises(orchvlm.CommError, match="weights, gradients and optimizer state of a rank"):
        orchvlm.comm.run_threads(1, work, -1)
    with pytest.raises(orchvlm.CommError, match=r"one sample of rank 0: [\d,]+ tokens.* take"):
        orchvlm.comm.run_threads(1, work, 1)


def test_samples_are_dealt_out_evenly():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(50):
        n = int(rng.integers(1, 30))
        batch = orchvlm.Batch(rng.integers(0, 50, n), np.zeros(n, int), np.zeros(n, int))
        ways = int(rng.integers(1, n + 1))
        parts = dealt(batch, ways)
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))
        assert all(len(part) for part in parts)
        sums = [batch.text_tokens[part].sum() for part in parts]
        assert max(sums) - min(sums) <= batch.text_tokens.max()


def test_a_run_in_rounds(tmp_path):
    pytest.importorskip("PIL")
    told = {"data": {"tokens": 500}, "training": {"steps": 2, "ema": 0.9},
            "ranks": {"threads": 1}, "output": {"folder": str(tmp_path / "run")}}
    whole = foretell(orchvlm.RunConfig(told, {"ranks": {"n": 2}}))
    assert whole.rounds == 1
    most = max(sum(rank.values()) for rank in whole.memory)
    step = max(rank["activations"] + rank["workspace"] for rank in whole.memory)
    told["ranks"]["memory_bytes"] = int(most - step // 3)
    seen = foretell(orchvlm.RunConfig(told, {"ranks": {"n": 2}}))
    assert seen.rounds > 1
    assert max(sum(rank.values()) for rank in seen.memory) <= told["ranks"]["memory_bytes"]

    def work(comm):
        return orchvlm.Trainer.from_config(told, comm).fit()
    rows, _ = orchvlm.comm.run_threads(2, work)
    assert rows[0]["rounds"] == seen.rounds
    assert rows[0]["vision_planned"] == seen.imbalance["vision"]
    del told["ranks"]["memory_bytes"]
    told["output"]["folder"] = str(tmp_path / "whole")
    again, _ = orchvlm.comm.run_threads(2, work)
    assert again[0]["rounds"] == 1
    for one, other in zip(rows, again):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert [row["rounds"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")] == [1, 1]
