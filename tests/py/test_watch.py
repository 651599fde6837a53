"""Held-out samples while a run trains: the same figures on all ranks, the best remembered, the end
in time; callbacks that fail end the run everywhere."""
import errno
import io
import json
import math

import numpy as np
import pytest
from test_rank_training import loader_of
from test_training import CONFIG

import orchvlm
from orchvlm import data
from orchvlm.cli import main
from orchvlm.orchestrator import Orchestrator
from orchvlm.passes import OneRank
from orchvlm.training import checkpoints, read_metrics
from orchvlm.watch import cut_rows, write_row

pytest.importorskip("PIL")
KINDS = {"kinds": ["colour", "count"], "max_side": 112}


def held(n=5):
    tasks = data.Tasks(seed=1, split="val", **KINDS)
    return [tasks[k] for k in range(n)]


def made(comm, folder, steps=4, every=2, figure="loss", patience=0, callbacks=(), n=5, **settings):
    model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1)
    processor = data.Processor.from_config(CONFIG)
    settings = {"lr": 3e-3, "warmup": 0, **settings}
    watch = orchvlm.Watch(held(n), processor, every, figure, patience)
    return orchvlm.Trainer(model, loader_of(comm, data.Mixture([data.Tasks(seed=2, **KINDS)]), 300),
                           orchvlm.TrainingConfig(steps=steps, **settings), folder, comm,
                           watch=watch, callbacks=callbacks)


def looks(rows):
    return [(row["step"], {k: v for k, v in row.items() if k.startswith("eval_")
                           and k != "eval_seconds"}) for row in rows if "eval_loss" in row]


def test_the_loss_is_that_of_the_samples(tmp_path):
    """Against the forward's own loss, sample by sample."""
    trainer = made(None, tmp_path)
    rows = trainer.fit()
    assert [step for step, _ in looks(rows)] == [2, 4]
    whole = weight = 0.0
    for sample in held():
        out = trainer.model.forward(trainer.watch.processor.one(sample), normalizer=1.0,
                                    training=False)
        whole, weight = whole + out.loss, weight + out.weight_sum
    assert rows[-1]["eval_loss"] == pytest.approx(whole / weight, rel=1e-6)
    stored = read_metrics(tmp_path / "metrics.jsonl")  # each once, with its look
    assert [row["step"] for row in stored] == [1, 2, 3, 4] and looks(stored) == looks(rows)


@pytest.mark.parametrize("shard, figure", [("ddp", "score"), ("fsdp", "loss")])
def test_all_ranks_see_what_one_sees(tmp_path, shard, figure):
    wanted = looks(made(None, tmp_path / "one", figure=figure, steps=2).fit())
    assert ("eval_score" in wanted[0][1]) == (figure == "score")
    found = orchvlm.comm.run_threads(3, lambda comm: looks(made(
        comm, tmp_path / "many", figure=figure, steps=2, shard=shard).fit()))
    assert found[0] == found[1] == found[2]
    for (step, got), (same, want) in zip(found[0], wanted):
        assert step == same and got == {key: pytest.approx(value, rel=1e-5)
                                        for key, value in want.items()}


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_fewer_samples_than_ranks(tmp_path, shard):
    found = orchvlm.comm.run_threads(3, lambda comm: looks(made(
        comm, tmp_path, steps=1, every=1, n=1, shard=shard).fit()))
    assert found[0] == found[1] == found[2] and found[0][0][1]["eval_loss"] > 0


@pytest.mark.parametrize("preset", ["tiny", "tiny-omni"])
def test_ranks_whose_samples_have_no_pictures(preset):
    """Encoders' weights are in shards: whoever has nothing to encode gathers them, too."""
    words = {"messages": [{"role": "user", "content": "Well?"},
                          {"role": "assistant", "content": "Yes."}], "answer": "Yes."}
    config = orchvlm.preset(preset)
    processor = data.Processor.from_config(config.values)

    def work(comm):
        model = orchvlm.Model.from_config(config, seed=0, threads=1)
        orchvlm.Shard(model, comm, "fsdp")
        watch = orchvlm.Watch([*held(1), words], processor, 1)
        return watch.look(model, Orchestrator(model, comm), 1)["eval_loss"]
    (wanted,) = orchvlm.comm.run_threads(1, work)
    assert orchvlm.comm.run_threads(2, work) == [pytest.approx(wanted, rel=1e-5)] * 2


def never_better(monkeypatch, first=2.0):
    """Losses that fall once and then rise."""
    values = iter([first, first / 2, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    original = orchvlm.Watch._note
    monkeypatch.setattr(orchvlm.Watch, "_note",
                        lambda self, step, value: original(self, step, next(values)))


def test_patience(tmp_path, monkeypatch):
    """The run ends, the best checkpoint stays, a resumed run knows."""
    never_better(monkeypatch)
    trainer = made(None, tmp_path, steps=20, every=1, patience=2, save_every=1, keep=1)
    rows = trainer.fit()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["eval_best"] == 1.0 and rows[-1]["eval_best_step"] == 2
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]
    assert trainer.fit() == []


def test_ranks_end_behind_the_same_step(tmp_path):
    """A rate of 0: nothing gets better after the first look."""
    def work(comm):
        return [row["step"] for row in made(comm, tmp_path, steps=20, every=1, patience=2,
                                            lr=0.0, min_lr=0.0).fit()]
    assert orchvlm.comm.run_threads(2, work) == [[1, 2, 3]] * 2


def test_resumed_looks(tmp_path):
    """What was best is read from the rows, of the steps that count."""
    whole = looks(made(None, tmp_path / "whole", every=1).fit())
    first = made(None, tmp_path / "parts", every=1, save_every=2)
    for row in first.run():
        if row["step"] == 3:
            break
    second = made(None, tmp_path / "parts", every=1)
    second.resume(tmp_path / "parts" / "checkpoint-2")
    assert looks(second.fit()) == whole[2:]
    assert looks(read_metrics(tmp_path / "parts" / "metrics.jsonl")) == whole


def test_what_is_no_number_is_never_best():
    watch = orchvlm.Watch(held(1), data.Processor.from_config(CONFIG), 1, "score", 2)
    for step, value in enumerate((math.nan, 0.5, math.nan, 0.5), 1):
        assert not watch.over
        watch._note(step, value)
    assert watch.over and (watch.best, watch.best_step) == (0.5, 2)


def test_ctrl_c_in_a_look_leaves_the_row(tmp_path, monkeypatch):
    trainer = made(None, tmp_path)
    monkeypatch.setattr(trainer.watch, "look", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [step for step, _ in checkpoints(tmp_path)] == [2]


# ---------------------------------------------------------------- callbacks

def test_callbacks_get_copies_in_order(tmp_path):
    seen = []

    def spoil(row):
        seen.append(row["step"])
        row.clear()
    rows = made(None, tmp_path, callbacks=[spoil, lambda row: seen.append(row["loss"])]).fit()
    assert seen == [value for row in rows for value in (row["step"], row["loss"])]


@pytest.mark.parametrize("at", [1, 3])  # 3 is the last step: no rank ends well
def test_a_callback_that_fails_is_an_error_on_all_ranks(tmp_path, at):
    said = {}

    def work(comm):
        def board(row):
            if row["step"] == at:
                raise ValueError("no such project")
        try:
            made(comm, tmp_path, steps=3, every=9, callbacks=[board]).fit()
        except Exception as error:
            said[comm.rank] = type(error), str(error)
            raise
    with pytest.raises(orchvlm.CommError):
        orchvlm.comm.run_threads(2, work, silent_s=5)
    words = f"callback board failed behind step {at}: ValueError: no such project"
    assert said[0] == (orchvlm.Error, words)
    assert said[1][0] is orchvlm.CommError and words in said[1][1] and "rank 0" in said[1][1]
    assert [step for step, _ in checkpoints(tmp_path)] == [at]


def test_refusals(tmp_path):
    processor = data.Processor.from_config(CONFIG)
    for arguments, words in ((([], processor, 1), "nothing to look at"),
                             ((held(1), processor, 0), "every"),
                             ((held(1), processor, 1, "luck"), "figure must be one of"),
                             ((held(1), processor, 1, "loss", -1), "patience")):
        with pytest.raises(ValueError, match=words):
            orchvlm.Watch(*arguments)
    with pytest.raises(TypeError, match="processor"):
        orchvlm.Watch(held(1), None, 1)
    model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1)
    for wrong in ({"watch": 3}, {"callbacks": [3]}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            orchvlm.Trainer(model, loader_of(None, data.Mixture([data.Tasks()]), 99),
                            orchvlm.TrainingConfig(), tmp_path, **wrong)

    def work(comm):
        with pytest.raises(ValueError, match="gives no answers"):
            made(comm, tmp_path, figure="exact", shard="fsdp")
    orchvlm.comm.run_threads(2, work)


def test_recall_without_a_file(tmp_path):
    watch = orchvlm.Watch(held(1), data.Processor.from_config(CONFIG), 1)
    watch.recall(tmp_path / "none", 3, OneRank(None, 1))
    assert (watch.best, watch.best_step, watch.since) == (None, None, 0)
    assert np.isfinite(watch.every)


def test_the_average_is_looked_at(tmp_path):
    trainer = made(None, tmp_path, ema=0.5)
    rows = trainer.fit()
    own = trainer.watch.look(trainer.model, trainer.passes, 5)["eval_loss"]
    with trainer.ema.swap():
        average = trainer.watch.look(trainer.model, trainer.passes, 6)["eval_loss"]
    assert rows[-1]["eval_loss"] == average != own


# ---------------------------------------------------------------- files that are named for it


def chat(said, **more):
    return {"messages": [{"role": "user", "content": "1 + 1?"},
                         {"role": "assistant", "content": said}], **more}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def own(tmp_path):
    """``run(valid, *more)`` trains on lines of one's own; exit status."""
    def run(valid, *more):
        return main(["train", "--data", lines(tmp_path / "a.jsonl", *[chat("2")] * 9), "--tokens",
                     "64", "--steps", "6", "--ranks", "1", "--threads", "1", "--out",
                     str(tmp_path / "run"), "--set", f"data.held_out=[{valid!r}]", *more])
    return run


def test_the_loss_of_ones_own_lines(tmp_path, own, capsys, monkeypatch):
    """Watched to an early end, which is said; the best is what is asked afterwards."""
    never_better(monkeypatch)
    valid = lines(tmp_path / "valid.jsonl", chat("3"), chat("2", answer="2", check="exact"))
    assert own(valid, "--set", "evaluation.every=1", "--set", "evaluation.patience=2") == 0
    run = tmp_path / "run"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["eval_loss"] > 0] == [1, 2, 3, 4]
    out = capsys.readouterr().out
    assert f"stopped early, at step 4: the best loss of held-out samples, 1, is of step 2, " \
        f"{run / 'checkpoint-2'}, which" in out
    assert json.loads((run / "evaluation.json").read_text())["all"]["samples"] == 1
    assert json.loads((run / "answers.json").read_text())["step"] == 2
    assert "loss of held-out samples" in (run / "report.html").read_text()
    for folder, words in ((run, f"takes {run / 'checkpoint-2'}, the best"),
                          (run / "checkpoint-4", "")):
        assert main(["generate", str(folder), "1 + 1?", "--max-new-tokens", "1"]) == 0
        err = capsys.readouterr().err
        assert words in err and ("takes" in err) == bool(words)


@pytest.mark.parametrize("rows, more, words", [
    ([chat("3")], [], "set evaluation.every"),
    ([chat("3")], ["--set", "evaluation.every=1", "--set", "evaluation.figure=exact"],
     "evaluation.figure = exact: no sample of data.held_out has an answer and a check"),
    ([chat("3"), {"messages": 7}], ["--set", "evaluation.every=1"], "valid.jsonl, line 2"),
    ([], ["--set", "evaluation.every=1"], "no samples in these files")])
def test_held_out_lines_that_do_not_serve(tmp_path, own, capsys, rows, more, words):
    assert own(lines(tmp_path / "valid.jsonl", *rows), *more) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- rows that are written down


class Narrow(io.BytesIO):
    """Takes so many bytes at a time, until it is full."""

    def __init__(self, at_once, most):
        super().__init__()
        self.at_once, self.most = at_once, most

    def write(self, line):
        return super().write(line[:min(self.at_once, self.most - self.tell())])


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_a_row_is_written_to_its_end_or_not_at_all(at_once):
    rows = [{"step": k, "loss": 1 / k, "of": "x" * k} for k in range(1, 30)]
    wanted = [(json.dumps(row) + "\n").encode() for row in rows]
    log = Narrow(at_once, sum(map(len, wanted[:20])) + 5)
    for row in rows[:20]:
        write_row(log, row)
    with pytest.raises(OSError) as error:
        write_row(log, rows[20])
    assert error.value.errno == errno.ENOSPC and log.getvalue() == b"".join(wanted[:20])
    log.most += 1000  # there is room again
    write_row(log, rows[20])
    assert log.getvalue() == b"".join(wanted[:21])


@pytest.mark.parametrize("bad", [
    b'{"step": 2, "lo', b'{"step": 2, "lo{"step": 3}', b"", b"\xff\xfe", b"\0\0\0", b"3", b"[1]",
    b"{}", b'{"step": null}', b"[" * 99999])
def test_rows_behind_a_damaged_line_are_read(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 4}\n{"step": 5}\n' + bad)
    assert [row["step"] for row in read_metrics(path)] == [1, 4, 5]
    cut_rows(path, 4)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 4}\n'
