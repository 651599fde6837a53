"""Runs that go on where they stopped, whatever stopped them: to the bit, nothing told twice."""
import json
import signal

import numpy as np
import pytest

import orchvlm
from orchvlm import data
from orchvlm.training import checkpoints, latest_checkpoint, read_metrics

pytest.importorskip("PIL")
CONFIG = orchvlm.preset("tiny").values
CONFIG["vision_config"] |= {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
                            "out_hidden_size": 32, "adapter_hidden_size": 32}
CONFIG["text_config"] |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
                          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def made(folder, steps=6, *, loader=None, **settings):
    model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1)
    if loader is None:
        tasks = data.Tasks(seed=2, kinds=["colour", "count"], max_side=56)
        loader = data.Loader(data.Mixture([tasks]), data.Processor.from_config(CONFIG),
                             max_tokens=150)
    config = orchvlm.TrainingConfig(steps=steps, lr=3e-3, warmup=2, **settings)
    return orchvlm.Trainer(model, loader, config, folder)


def losses(rows):
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts: (trainer, its rows)."""
    trainer = made(tmp_path_factory.mktemp("whole"))
    return trainer, list(trainer.run())


def same_as(whole, trainer, rows):
    reference, all_rows = whole
    assert losses(rows) == losses(all_rows[-len(rows):])  # bit for bit
    for name, values in reference.model.state_dict().items():
        assert (trainer.model.parameters[name] == values).all(), name
    assert [row["step"] for row in read_metrics(trainer.folder / "metrics.jsonl")] == [
        1, 2, 3, 4, 5, 6]


def test_resumed_is_uninterrupted(whole, tmp_path):
    first = made(tmp_path, save_every=3)
    for row in first.run():
        if row["step"] == 3:
            break  # the loop is left: a checkpoint is written all the same
    assert [step for step, _ in checkpoints(tmp_path)] == [3]
    second = made(tmp_path)
    assert second.resume() == 3
    same_as(whole, second, list(second.run()))


def test_no_second_model_is_made(whole, tmp_path, monkeypatch):
    for row in made(tmp_path, save_every=3).run():
        if row["step"] == 3:
            break
    second = made(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("another model")
    monkeypatch.setattr(orchvlm.Model, "__init__", refuse)
    assert second.resume() == 3
    same_as(whole, second, list(second.run()))


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"intermediate_size": 40}])
def test_another_model_is_refused_before_anything_is_written(whole, tmp_path, change):
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], **change}}
    assert config != CONFIG
    model = orchvlm.Model.from_config(orchvlm.ModelConfig(config), seed=7, threads=1)
    before = model.state_dict()
    other = orchvlm.Trainer(model, made(tmp_path).loader, orchvlm.TrainingConfig(steps=6), tmp_path)
    with pytest.raises(ValueError, match="missing|shape"):
        other.resume(whole[0].folder / "checkpoint-6")
    for name, values in model.state_dict().items():
        assert (values == before[name]).all(), name


def test_steps_behind_the_checkpoint_are_taken_and_told_again(whole, tmp_path):
    first = made(tmp_path, save_every=2)
    for row in first.run():
        if row["step"] == 5:
            break
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4, 5]
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "lo')  # the machine went down in the middle of a line
    second = made(tmp_path)
    assert second.resume(tmp_path / "checkpoint-4") == 4
    same_as(whole, second, list(second.run()))


def test_the_same_trainer_goes_on(whole, tmp_path):
    trainer = made(tmp_path)
    for row in trainer.run():
        if row["step"] == 2:
            break
    same_as(whole, trainer, list(trainer.run()))


@pytest.mark.parametrize("where", ["forward", "optimizer", "saving"])
def test_ctrl_c(whole, tmp_path, monkeypatch, where):
    trainer = made(tmp_path, save_every=3)
    owner, name = {"forward": (trainer.model, "forward"), "optimizer": (trainer.optimizer, "step"),
                   "saving": (trainer.optimizer, "state_dict")}[where]
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(1)
        done = original(*arguments, **options)
        if len(calls) == (1 if where == "saving" else 3):
            signal.raise_signal(signal.SIGINT)
        return done
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in trainer.run():
            pass
    at = {"forward": 2, "optimizer": 3, "saving": 3}[where]
    assert trainer.step == at and trainer.optimizer.step_count == at
    assert [step for step, _ in checkpoints(tmp_path)] == [at]
    assert not list(tmp_path.glob(".checkpoint-*"))
    second = made(tmp_path)
    assert second.resume() == at
    same_as(whole, second, list(second.run()))


class Packs:
    """A loader of given packs."""

    def __init__(self, packs, end=StopIteration):
        self.packs, self.end, self.at = packs, end, 0

    def __next__(self):
        if self.at == len(self.packs):
            raise self.end
        self.at += 1
        return self.packs[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 256, rng.integers(3, 30)).astype(np.int32) for _ in range(n)]
    return [orchvlm.Inputs(input_ids=i, labels=i) for i in ids]


def test_an_error_of_the_loader_reaches_the_caller(tmp_path):
    trainer = made(tmp_path, loader=Packs(texts(2), ZeroDivisionError("a broken sample")))
    for _ in range(2):  # and again, when it is asked again
        with pytest.raises(ZeroDivisionError, match="a broken sample"):
            list(trainer.run())
        assert trainer.step == 2 and latest_checkpoint(tmp_path).name == "checkpoint-2"


def test_the_end_of_the_data_ends_the_run(tmp_path):
    trainer = made(tmp_path, loader=Packs(texts(3)))
    assert len(list(trainer.run())) == 3
    assert latest_checkpoint(tmp_path).name == "checkpoint-3"


def test_micro_batches_are_one_batch(tmp_path):
    packs = texts(4)
    parts = made(tmp_path / "a", 2, loader=Packs(packs), micro_batches=2)
    once = made(tmp_path / "b", 2, loader=Packs(
        [orchvlm.Inputs.concatenate(packs[i:i + 2]) for i in (0, 2)]))
    a, b = list(parts.run()), list(once.run())
    assert losses(a) == pytest.approx(losses(b), rel=1e-6)
    assert [row["grad_norm"] for row in a] == pytest.approx([row["grad_norm"] for row in b],
                                                            rel=1e-5)
    assert [row["targets"] for row in a] == [row["targets"] for row in b]


def test_minutes_end_a_run(tmp_path):
    trainer = made(tmp_path, 1000, minutes=1e-9)
    assert len(list(trainer.run())) == 1 and trainer.done == 1


def test_old_checkpoints_go(tmp_path):
    trainer = made(tmp_path, save_every=2, keep=2)
    list(trainer.run())
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6]
    before = (tmp_path / "checkpoint-6" / "model.safetensors").read_bytes()
    assert trainer.save() == tmp_path / "checkpoint-6"  # over the one that is there
    assert (tmp_path / "checkpoint-6" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "checkpoint-6" / "before").exists()


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    trainer = made(tmp_path, 3)

    def full(*_, **__):
        raise OSError("no space left")
    for row in trainer.run():
        if row["step"] == 2:
            trainer.save()
        if row["step"] == 3:
            with monkeypatch.context() as patch:
                patch.setattr(orchvlm.saving, "sealed", full)
                with pytest.raises(OSError, match=r"model.safetensors: no space left; .*2 is w"):
                    trainer.save()
            assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["checkpoint-2"]
    assert made(tmp_path, 3).resume() == 3


def test_a_loss_that_is_no_number(tmp_path):
    trainer = made(tmp_path, 1)
    trainer.model.parameters["model.language_model.norm.weight"][0] = np.nan
    with pytest.warns(RuntimeWarning, match=r"step 1 changes nothing.* loss .*datasets\[0\]\[0\]"):
        (row,) = trainer.run()
    assert row["skipped"]
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    stored = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert stored["loss"] is None


@pytest.mark.parametrize("stage, length, batch, tokens", (
    ("stage0", 32_768, 8.4e6, 16e9), ("stage1", 32_768, 71e6, 3e12),
    ("stage2", 131_072, 71e6, 240e9), ("sft", 131_072, 16 * 131_072, None)))
def test_recipes_have_the_report_s_sequences_and_batches(stage, length, batch, tokens):
    made = orchvlm.recipe(stage)
    assert isinstance(made, orchvlm.TrainingConfig) and made.sequence_length == length
    assert made.batch_tokens == pytest.approx(batch, rel=0.01)
    if tokens:
        assert made.steps * made.batch_tokens == pytest.approx(tokens, rel=1e-3)


def test_recipes_freeze_what_they_name(tmp_path):
    stage = orchvlm.recipe("stage0")
    assert (stage.steps, stage.lr, stage.min_lr) == (1907, 2.52e-4, 4.5e-5)
    model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), threads=1)
    orchvlm.Trainer(model, Packs([]), stage, tmp_path)
    assert {name for name in model.parameters if model.trainable(name)} == {
        f"model.visual.merger.linear_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    with pytest.raises(ValueError, match="stage"):
        orchvlm.recipe("stage9")


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1.5}, {"micro_batches": 0},
                                   {"minutes": 0.0}, {"minutes": float("inf")},
                                   {"save_every": -1}, {"keep": True}, {"warmup": -1}])
def test_settings_that_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        orchvlm.TrainingConfig(**wrong)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        made(tmp_path).resume()
