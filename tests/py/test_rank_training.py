"""Runs over ranks: the batches, losses and weights of one rank, and runs that go on with another
number of them."""
import os
import secrets
import shutil

import numpy as np
import pytest

import orchvlm
from orchvlm import data
from orchvlm.training import checkpoints, read_metrics
from test_training import CONFIG

pytest.importorskip("PIL")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))


class Odd:
    """Samples of which some cannot be used, and that end."""

    def __init__(self, seed, n=60, bad=()):
        self.tasks, self.n, self.bad = data.Tasks(seed=seed, max_side=112), n, bad

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        return {"messages": "nonsense"} if k in self.bad else self.tasks[k]


def loader_of(comm, source, tokens, **options):
    processor = data.Processor.from_config(CONFIG)
    if comm is None:
        return data.Loader(source, processor, tokens, **options)
    return data.RankLoader(source, processor, tokens, comm, **options)


def read(comm, seed, batches, state=None, **options):
    """[(samples as (ids, pixels) of this rank) of each batch], the state behind them, how many
    were skipped"""
    source = data.Mixture([Odd(seed, bad=(3, 11)), Odd(seed + 1)], weights=[1, 2], seed=seed)
    loader = loader_of(comm, source, 300, too_long="skip", **options)
    if state is not None:
        loader.load_state_dict(state)
    seen = []
    for _ in range(batches):
        pack = next(loader)
        seen.append([(one.input_ids.tolist(), one.pixels.sum(dtype=np.int64))
                     for one in (pack[i] for i in range(len(pack)))])
    return seen, loader.state_dict(), loader.skipped


def joined(parts):
    """The batches of all ranks, each as a sorted list."""
    return [sorted(sum(some, [])) for some in zip(*parts)]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ranks_cut_the_batches_of_one(n):
    print("seed", SEED)
    seed = SEED % 1000
    wanted = read(None, seed, 12)[0]
    results = orchvlm.comm.run_threads(n, read, seed, 9)
    assert joined([seen for seen, _, _ in results]) == joined([wanted[:9]])
    assert all(result[1:] == results[0][1:] for result in results)
    assert read(None, seed, 3, results[0][1])[0] == wanted[9:]  # one rank goes on
    wanted = wanted[:9]
    first = orchvlm.comm.run_threads(n, read, seed, 4)
    other = 1 + (n + 1) % 4
    again = orchvlm.comm.run_threads(other, read, seed, 5, first[0][1])
    assert joined([seen for seen, _, _ in again]) == joined([wanted[4:]])


def test_what_one_rank_cannot_use_all_refuse():
    def work(comm):
        source = data.Mixture([Odd(1, bad=(2,))], shuffle=False)
        loader = loader_of(comm, source, 300)
        with pytest.raises(data.DataError, match="messages") as error:
            next(loader)
        return str(error.value)
    said = orchvlm.comm.run_threads(3, work)  # sample 2 is rank 2's
    assert said[0] == said[1] == f"rank 2: {said[2]}"


def test_streams_end_for_all():
    def work(comm):
        source = data.Mixture([iter([data.Tasks(seed=1)[k] for k in range(11)])])
        loader, seen = loader_of(comm, source, 100), 0
        for pack in loader:
            seen += len(pack)
        with pytest.raises(StopIteration):
            next(loader)
        return seen
    assert sum(orchvlm.comm.run_threads(3, work)) == 11


# ---------------------------------------------------------------- runs


def run(comm, folder, steps, resume=False, **settings):
    """(losses, weights) of a run's steps."""
    model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1)
    source = data.Mixture([data.Tasks(seed=2, kinds=["colour", "count"], max_side=112)])
    config = orchvlm.TrainingConfig(steps=steps, lr=3e-3, warmup=2, save_every=2, **settings)
    trainer = orchvlm.Trainer(model, loader_of(comm, source, 400), config, folder, comm)
    if resume:
        trainer.resume()
    rows = list(trainer.run())
    return [row["loss"] for row in rows], {name: np.array(weight) for name, weight
                                           in model.parameters.items()}, rows


def near(weights, wanted, share=1e-3):
    """Equal but for a share of what ten steps moved."""
    start = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1).parameters
    moved = np.sqrt(sum(((wanted[name] - start[name]) ** 2).sum() for name in wanted))
    apart = np.sqrt(sum(((weights[name] - wanted[name]) ** 2).sum() for name in wanted))
    assert apart <= share * moved, (apart, moved)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_ten_steps_over_ranks_are_those_of_one(n, tmp_path):
    losses, weights, _ = run(None, tmp_path / "one", 10)
    results = orchvlm.comm.run_threads(n, run, tmp_path / "many", 10)
    for got, values, _ in results:
        np.testing.assert_allclose(got, losses, rtol=1e-6)
        near(values, weights)
        assert all((values[name] == results[0][1][name]).all() for name in values)
    rows = read_metrics(tmp_path / "many" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert all(row["vision_planned"] <= row["vision_sampled"] + 1e-9 for row in rows)


@pytest.mark.parametrize("before, after", [(2, 2), (2, 3), (3, 1), (1, 2)])
def test_resumed_on_any_number_of_ranks(before, after, tmp_path):
    def start(n, folder, steps, resume):
        if n == 1:
            return [run(None, folder, steps, resume)]
        return orchvlm.comm.run_threads(n, run, folder, steps, resume)

    whole, weights, _ = start(before, tmp_path / "whole", 6, False)[0]

    folder = tmp_path / "parts"  # as a run leaves it that is killed behind step 4
    start(before, folder, 6, False)
    shutil.rmtree(folder / "checkpoint-6")
    losses, values, _ = start(after, folder, 6, True)[0]
    if before == after:  # bit for bit
        assert losses == whole[4:]
        assert all((values[name] == weights[name]).all() for name in weights)
    np.testing.assert_allclose(losses, whole[4:], rtol=1e-6)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_rank_that_fails_ends_the_run_and_leaves_a_checkpoint(tmp_path):
    def work(comm):
        model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1)
        source = data.Mixture([data.Tasks(seed=2, max_side=112)])
        trainer = orchvlm.Trainer(model, loader_of(comm, source, 400),
                                  orchvlm.TrainingConfig(steps=50), tmp_path, comm)
        for row in trainer.run():
            if row["step"] == 3 and comm.rank == 1:
                raise ValueError("the dog ate it")
    with pytest.raises(orchvlm.CommError, match="rank 1 failed: ValueError: the dog ate it"):
        orchvlm.comm.run_threads(3, work, silent_s=5)
    assert [step for step, _ in checkpoints(tmp_path)] in ([3], [4])
