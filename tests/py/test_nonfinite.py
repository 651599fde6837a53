"""Steps whose loss or gradient is no number: skipped, named, and taken again on one rank."""
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest

import orchvlm
from durable_cases import CONFIG, losses, made, over, samples
from orchvlm import data
from orchvlm.run_folder import checkpoints
from orchvlm.training import read_metrics

pytest.importorskip("PIL")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", random.randrange(2**31)))


class Glaring(data.Processor):
    """Pictures with questions that end in "!" have colours beyond all bounds."""

    def one(self, sample):
        inputs = super().one(sample)
        question = sample["messages"][0]["content"]
        if inputs.pixels is None:
            return inputs
        factor = 3e38 if question[1]["text"].endswith("!") else 1 / 255
        return orchvlm.Inputs(**{**vars(inputs), "pixels": np.minimum(
            inputs.pixels.astype(np.float64) * factor, 3e38).astype(np.float32)})


def pictures(ends):
    """A picture with a question for each ending."""
    rng = np.random.default_rng(0)
    return [{"messages": [
        {"role": "user", "content": [
            {"type": "image", "image": rng.integers(1, 256, (56, 56, 3), dtype=np.uint8)},
            {"type": "text", "text": f"What{end}"}]},
        {"role": "assistant", "content": "No."}]} for end in ends]


def options(ends, shuffle=False):
    """Words and pictures in turns; a batch has some of both."""
    return {"source": data.Mixture([samples(), pictures(ends)], weights=[1, 1], seed=4,
                                   shuffle=shuffle),
            "processor": Glaring.from_config(CONFIG), "tokens": 120}


def bad_names(ends, shuffle, n=40):
    """Names of the pictures that are beyond bounds among the first samples, found in the test's own
    way: by looking which picture was drawn."""
    made_of = options(ends, shuffle)["source"]
    sets = [samples(), pictures(ends)]
    texts = [[repr(one) for one in some] for some in sets]
    found = []
    for _ in range(n):
        drawn = next(made_of)
        part = int(isinstance(drawn["messages"][0]["content"], list))
        place = texts[part].index(repr(drawn))
        found.append((f"datasets[{part}][{place}]",
                      part == 1 and drawn["messages"][0]["content"][1]["text"].endswith("!")))
    return found


@pytest.mark.parametrize("n", [None, 2, 3])
def test_a_step_is_skipped_and_its_samples_named(n, tmp_path):
    print("seed", SEED)
    ends = "???!" * 3

    def work(comm):
        trainer, rows = made(comm, tmp_path, **options(ends, shuffle=True)), []
        weights = [trainer.model.state_dict()]
        for row in trainer.run():
            rows.append(row)
            weights.append(trainer.model.state_dict())
        return rows, weights
    with pytest.warns(RuntimeWarning, match=r"step \d changes nothing: its loss is no number; it "
                                            r"was of datasets\[\d\]"):
        rows, weights = over(n, work)
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert 0 < len(skipped) < 6 and rows[-1]["skipped_steps"] == len(skipped)
    for row, before, after in zip(rows, weights, weights[1:]):
        same = all((before[name] == after[name]).all() for name in before)
        assert same == row["skipped"] != math.isfinite(row["loss"])
    told = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == skipped
    named = {name for line in told for name in line["samples"]}
    order = bad_names(ends, shuffle=True)
    assert {name for name, bad in order if bad} & named
    for line in told:  # a stretch of the mixture, a bad one in it
        n = len(line["samples"])
        stretches = [order[i:i + n] for i in range(len(order) - n)
                     if [name for name, _ in order[i:i + n]] == line["samples"]]
        assert any(bad for stretch in stretches for _, bad in stretch)


@pytest.mark.parametrize("n, mode", [(None, "ddp"), (2, "ddp"), (3, "fsdp")])
def test_several_in_a_row_end_the_run_and_are_taken_again(n, mode, tmp_path):
    def work(comm):
        trainer = made(comm, tmp_path, steps=20, shard=mode, most_skipped=3, **options("!"))
        with pytest.raises(orchvlm.NonFiniteError, match="3 steps in a row.*orchvlm.replay"):
            list(trainer.run())
        return trainer.step
    with pytest.warns(RuntimeWarning, match="changes nothing"):
        step = over(n, work)
    assert [number for number, _ in checkpoints(tmp_path)] == [step]
    seen = orchvlm.replay(tmp_path / f"nonfinite-{step}", threads=1)
    told = json.loads((tmp_path / "skipped.jsonl").read_text().splitlines()[-1])
    assert seen["step"] == step and not math.isfinite(seen["loss"]) and seen["gradients"]
    assert [one["name"] for one in seen["samples"]] == sorted(
        (name for name in told["samples"] if name.startswith("datasets[1]")))
    assert all(one["gradients"] and not math.isfinite(one["loss"]) for one in seen["samples"])
    with open(tmp_path / f"nonfinite-{step}" / "nonfinite.json", "a") as stream:
        stream.write(" ")
    with pytest.raises(ValueError, match="nonfinite.json.*altered"):
        orchvlm.replay(tmp_path / f"nonfinite-{step}")


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(self, step, loss, names):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("orchvlm.nonfinite.Skipped.tell", full)
    with pytest.raises(OSError, match=r"skipped\.jsonl: No space left on device"):
        list(made(None, tmp_path, **options("!!!!!!"), most_skipped=50).run())


def test_a_gradient_alone(tmp_path, monkeypatch):
    """The loss is fine; counts go on where a run is resumed."""
    def run(steps, resume):
        trainer = made(None, tmp_path, steps=steps, most_skipped=3)
        if resume:
            trainer.resume()
        original, name = trainer.passes.reduce_gradients, "model.language_model.norm.weight"

        def spoilt():
            original()
            trainer.model.grads[name][0] = np.inf
        monkeypatch.setattr(trainer.passes, "reduce_gradients", spoilt)
        return list(trainer.run())
    with pytest.warns(RuntimeWarning, match="its gradient is no number"):
        rows = run(2, False)
    assert [row["skipped"] for row in rows] == [True, True] and math.isfinite(rows[0]["loss"])
    with pytest.warns(RuntimeWarning), pytest.raises(orchvlm.NonFiniteError):
        run(5, True)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    again = orchvlm.replay(tmp_path / "nonfinite-3", threads=1)  # which the test, not the step, did
    assert again["loss"] == pytest.approx(read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"],
                                          rel=1e-6)
    assert again["gradients"] == [] and again["samples"] == []


def ruined(comm, folder, at, **settings):
    """A trainer whose norm is no number from a step on, and how its run ends."""
    trainer = made(comm, folder, steps=9, save_every=1, keep=2, most_skipped=3, **settings)
    weights = trainer.model.state_dict()
    weights["model.language_model.norm.weight"][1] = np.nan
    with pytest.raises(orchvlm.NonFiniteError):
        for row in trainer.run():
            if row["step"] == at:
                trainer.model._check_finite = lambda *_: None
                trainer.model.load_state_dict(weights)
    return trainer


@pytest.mark.parametrize("dtype, mode, n", [("float32", "ddp", None), ("bfloat16", "zero1", 2)])
def test_weights_that_are_ruined(dtype, mode, n, tmp_path):
    """The step before it is what the run goes on from, and the dump says which weights they are."""
    with pytest.warns(RuntimeWarning, match="changes nothing"):
        over(n, lambda comm: ruined(comm, tmp_path, 3, dtype=dtype, shard=mode) and None)
    # Step 3's weights were ruined before they were written, which was done behind a step that was
    # skipped, so that none went; two steps wrote nothing, and the end wrote one.
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2, 3, 6]
    seen = orchvlm.replay(tmp_path / "nonfinite-6", threads=1)
    assert seen["weights"] == ["model.language_model.norm.weight"]
    assert not math.isfinite(seen["loss"]) and seen["gradients"]
    trainer = made(None, tmp_path, dtype=dtype, keep=2)
    with pytest.warns(RuntimeWarning, match=r"checkpoint-\d/model.safetensors: "
                                            r"model.language_model.norm.weight is not finite; "
                                            "going on from .*checkpoint-2"):
        assert trainer.resume() == 2
    assert all(math.isfinite(row["loss"]) for row in trainer.run())
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 6]


def test_an_adapter_that_is_ruined(tmp_path):
    trainer = made(None, tmp_path, most_skipped=1)
    trainer.model.add_lora(2)
    odd = next(name for name in trainer.model.parameters if ".lora_A" in name)
    trainer = orchvlm.Trainer(trainer.model, trainer.loader, trainer.config, tmp_path)
    weights = trainer.model.state_dict()
    weights[odd][0] = np.inf
    trainer.model._check_finite = lambda *_: None
    trainer.model.load_state_dict(weights)
    with pytest.warns(RuntimeWarning), pytest.raises(orchvlm.NonFiniteError):
        list(trainer.run())
    assert orchvlm.replay(tmp_path / "nonfinite-1", threads=1)["weights"] == [odd]


def test_what_is_refused(tmp_path):
    for most in (0, 1.5, True):
        with pytest.raises(ValueError, match="most_skipped"):
            orchvlm.TrainingConfig(most_skipped=most)
    losses(None, tmp_path, steps=1)
    with pytest.raises(FileNotFoundError, match="nonfinite.json"):
        orchvlm.replay(Path(tmp_path) / "checkpoint-1")
