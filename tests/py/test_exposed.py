"""What lines of metrics say about communication that nothing hid."""
import time

import numpy as np
import pytest

import orchvlm
from orchvlm import data
from orchvlm.orchestrator import Orchestrator
from orchvlm.passes import Ran
from orchvlm.sharding import MODES
from orchvlm.training_report import write_report

pytest.importorskip("PIL")


def made(comm, mode="ddp"):
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    orchvlm.Shard(model, comm, mode, 2)
    return Orchestrator(model, comm)


def test_the_least_wait_of_any_rank_counts():
    """Seconds, by rank: of two sums, of two transfers, in the shard.  One rank is late to each."""
    sums = np.array([[9.0, 0.25], [0.5, 7.0]])
    transfers = np.array([[1.0, 30.0], [20.0, 2.0]])
    shard = np.array([64.0, 16.0])

    def work(comm):
        ranks = made(comm)
        ran = Ran([], ranks.model)
        first, second = transfers[comm.rank]
        ran.events = [("vision", 0.0, 500.0), ("vision->llm", 500.0, 500.0 + first),
                      ("llm", 600.0, 700.0), ("llm->vision", 700.0, 700.0 + second)]
        ranks._sums_s, ranks._waited_s = sums[comm.rank].tolist(), 1.0
        ranks.shard.waited_s = lambda: 1.0 + shard[comm.rank]
        return ranks._exposed_s(ran)
    wanted = sums.min(axis=0).sum() + transfers.min(axis=0).sum() + shard.min()
    assert orchvlm.comm.run_threads(2, work) == [wanted, wanted]


@pytest.mark.parametrize("mode", MODES)
def test_the_shard_counts_its_waits(mode):
    def work(comm):
        ranks = made(comm, mode)
        inputs = orchvlm.Inputs(input_ids=[72, 105, 33], labels=[72, 105, 33])
        seen, start = [ranks.shard.waited_s()], time.perf_counter()
        ranks.model.zero_grad()
        ranks.model.forward(inputs, normalizer=4)
        seen.append(ranks.shard.waited_s())
        ranks.model.backward()
        ranks.reduce_gradients()
        return [*seen, ranks.shard.waited_s(), time.perf_counter() - start]
    for before, forward, after, passed in orchvlm.comm.run_threads(2, work):
        assert before == 0 <= forward < after <= passed
        assert (forward > 0) == (mode in ("fsdp", "hybrid"))  # weights were gathered


def test_rows_of_a_run(tmp_path):
    def work(comm):
        model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
        processor = data.Processor.from_config(model.config.values, min_pixels=56 * 56,
                                               max_pixels=56 * 56)
        loader = data.RankLoader(data.Mixture([data.Tasks(seed=2, kinds=["colour"], max_side=56)]),
                                 processor, 300, comm)
        trainer = orchvlm.Trainer(model, loader, orchvlm.TrainingConfig(steps=2), tmp_path, comm)
        batches, make = [], trainer.passes.make

        def kept(loader):
            batches.append(make(loader))
            return batches[-1]
        trainer.passes.make = kept
        rows = trainer.fit()
        return rows, [len(one.inputs.pixels) if one.inputs.pixels is not None else 0
                      for one in batches[:2]]
    results = orchvlm.comm.run_threads(2, work)
    rows, _ = results[0]
    for step, row in enumerate(rows):
        patches = sum(counts[step] for _, counts in results)
        assert patches and row["patches_per_s"] * row["seconds"] == pytest.approx(patches)
        assert row["exposed_comm_ms"] > 0
        assert row["exposed_comm_share"] == pytest.approx(
            row["exposed_comm_ms"] / 1e3 / row["seconds"])
    write_report(tmp_path / "report.html", rows)
    text = (tmp_path / "report.html").read_text()
    assert "patches per second" in text and "exposed communication" in text
