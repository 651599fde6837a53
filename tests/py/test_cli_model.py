"""``orchvlm train``, ``generate``, ``eval``, ``inspect``: what they write and what they refuse."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
import wave
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from model_cases import draw_config

import orchvlm
from orchvlm import data
from orchvlm.building import open_model
from orchvlm.cli import main
from orchvlm.commands_model import _Line, take_steps
from orchvlm.parts import count_parameters, sample_flops
from orchvlm.training import checkpoints, read_metrics
from orchvlm.training_report import smoothed, svg_curve, write_report

pytest.importorskip("PIL")
SOURCE = str(Path(orchvlm.__file__).parents[1])
FEW = ["--tokens", "200", "--samples", "2", "--threads", "1", "--ranks", "1"]


@pytest.fixture
def refuse(capsys):
    """Runs the command; the one line of its refusal."""
    def call(*arguments):
        assert main(list(map(str, arguments))) == 2
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        assert out == "" and len(lines) == 1 and lines[0].startswith("orchvlm: "), err
        return lines[0]

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--preset", "tiny", "--steps", "3", "--out", str(folder), *FEW]) == 0
    return folder


class Page(HTMLParser):
    """Tags and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]


def test_train_without_pillow_says_what_to_install_and_leaves_nothing(
        tmp_path, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    said = refuse("train", "--preset", "tiny", "--steps", "1", "--out", tmp_path / "run", *FEW)
    assert "pillow" in said and "orchvlm[data]" in said
    assert list(tmp_path.iterdir()) == []


def test_train_leaves_a_model_and_a_report(trained):
    assert [step for step, _ in checkpoints(trained)] == [3]
    assert [row["step"] for row in read_metrics(trained / "metrics.jsonl")] == [1, 2, 3]
    table = json.loads((trained / "evaluation.json").read_text())
    assert table["colour"]["samples"] == 2
    assert set(table) == {"colour", "shape", "count", "describe", "all"}
    text = (trained / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 5 and page.tags.count("figure") == 8
    assert page.sources and all(s.startswith("data:image/png") for s in page.sources)
    assert f"orchvlm train {trained / 'config.toml'}" in text
    if sys.modules.get("matplotlib"):
        assert (trained / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_report_that_is_written_again_is_the_same(trained, tmp_path):
    """Table, pictures and facts among the rest; without what was kept, the curves alone."""
    first = (trained / "report.html").read_text()
    assert main(["report", str(trained), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == first
    assert re.search(r"<td>held-out samples</td><td[^>]*>after step 3<", first)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(trained / "metrics.jsonl", run)
    assert main(["report", str(run)]) == 0
    less = (run / "report.html").read_text()
    assert less.count("<svg") == first.count("<svg") and "What it says" not in less


def test_ranks_by_default(tmp_path):
    """Two processes, whose first one talks; the report shows them, and is made again."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "orchvlm"]
    out = subprocess.run([*command, "train", "--steps", "2", *FEW[:4], "--out", run], text=True,
                         capture_output=True, env={**os.environ, "PYTHONPATH": SOURCE})
    assert out.returncode == 0 and out.stdout.count("2 ranks;") == 1, out.stderr
    text = (run / "report.html").read_text()
    assert "<h2>Over the ranks</h2>" in text and ">rank 1</text>" in text
    trace = json.loads((run / "timeline.json").read_text())["traceEvents"]
    assert {event["tid"] for event in trace} == {0, 1}
    assert {"vision", "llm", "vision->llm", "llm->vision"} == {event["name"] for event in trace}
    assert main(["report", str(run), "--out", str(tmp_path / "again.html")]) == 0
    again = (tmp_path / "again.html").read_text()
    assert again == text


def test_resume(trained, capsys):
    assert main(["train", "--resume", "--out", str(trained), "--steps", "5", *FEW[2:]]) == 0
    out, err = capsys.readouterr()
    assert "5 steps" in out and re.search(
        r"^step 5 +100 %  loss [\d.]+ \(mean of last 2\)  [\d,]+ tokens/s  [\d,]+ GFLOP/s  "
        r"MFU \d+ %  0:00 left", err,
        re.MULTILINE)
    rows = read_metrics(trained / "metrics.jsonl")
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tflops"] * rows[0]["mfu"] / rows[0]["tflops"])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["tokens"] <= 200 for row in rows)  # as the run began


def test_the_line_shows_the_losses_of_late(capsys):
    """The mean with the weights written out; what is no number does not stay."""
    seed = np.random.SeedSequence().entropy % 2**32
    print("seed", seed)
    rng, losses = np.random.default_rng(seed), []
    trainer = types.SimpleNamespace(done=0.5)
    row = {"elapsed_s": 1.0, "tokens_per_s": 1.0, "tflops": 0.0, "mfu": 0.0}
    line = _Line(trainer, wait_s=0.0)
    for step in range(1, 60):
        loss = rng.choice([rng.uniform(0, 9), np.nan, np.inf], p=[0.8, 0.1, 0.1])
        losses += [loss] if np.isfinite(loss) else []
        line.show({**row, "step": step, "loss": loss})
        said = capsys.readouterr().err
        if not losses:
            assert "  loss is no number  " in said
            continue
        mean = np.average(losses, weights=0.95 ** np.arange(len(losses))[::-1])
        shown, n = re.search(r"  loss ([\d.]+) \(mean of last (\S+)\)  ", said).groups()
        assert float(shown) == pytest.approx(mean, abs=6e-4)
        assert n == (str(len(losses)) if len(losses) < 20 else "~20")


def test_what_stops_before_the_first_step_promises_nothing(tmp_path, trained, capsys):
    def run():
        raise KeyboardInterrupt
        yield
    trainer = types.SimpleNamespace(step=0, done=0.0, run=run)
    for folder, words in ((tmp_path / "none", "step 0; nothing was saved yet"),
                          (trained, f"step 0; {trained} holds it, --resume goes on")):
        with pytest.raises(KeyboardInterrupt):
            take_steps(trainer, folder)
        assert words in capsys.readouterr().err


def test_resume_auto_begins_and_goes_on(tmp_path, capsys, refuse):
    """The same command each time, as jobs that are restarted give it; and a checkpoint by name."""
    run = tmp_path / "run"
    command = ["train", "--resume", "auto", "--out", str(run), "--steps"]
    assert main([*command, "1", *FEW]) == 0
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-4")
    os.truncate(run / "checkpoint-4" / "model.safetensors", 1000)
    capsys.readouterr()
    assert main([*command, "2", *FEW]) == 0
    assert re.search(r"^orchvlm: .*checkpoint-4/model.safetensors has 1000 bytes of \d+; it is cut "
                     r"off; going on from .*checkpoint-1$", capsys.readouterr().err, re.MULTILINE)
    assert [step for step, _ in checkpoints(run)] == [1, 2]
    assert main(["train", "--resume", str(run / "checkpoint-1"), "--steps", "3", *FEW[2:]]) == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert [step for step, _ in checkpoints(run)] == [1, 3]
    capsys.readouterr()
    assert "no checkpoint-N" in refuse("train", "--resume", tmp_path / "none", "--steps", "5")
    (run / "checkpoint-3" / "trainer.json").unlink()
    assert "trainer.json is missing" in refuse("train", "--resume", run / "checkpoint-3", *FEW)


def test_eval_and_generate(trained, tmp_path, capsys):
    assert main(["eval", str(trained), "--samples", "2", "--kinds", "screen,count", "--json",
                 "--report", str(tmp_path / "seen.html")]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert {kind: row["samples"] for kind, row in seen.items()} == {"screen": 2, "count": 2,
                                                                    "all": 4}
    assert "<figure>" in (tmp_path / "seen.html").read_text()
    # A report that cannot be written costs the report, not the answers.
    assert main(["eval", str(trained), "--samples", "1", "--kinds", "count", "--json", "--report",
                 str(tmp_path / "none" / "seen.html")]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["all"]["samples"] == 1 and "there is no such folder" in err
    from PIL import Image
    Image.new("RGB", (70, 50), (200, 30, 30)).save(tmp_path / "red.png")
    command = ["generate", str(trained), "What colour?", "--image", str(tmp_path / "red.png"),
               "--max-new-tokens", "3", "--temperature", "5", "--seed", "7"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0 and capsys.readouterr().out == first


def test_the_average_is_asked(trained, tmp_path, refuse, monkeypatch):
    """Where a run keeps one, by `eval` and `generate`; what was trained when told so."""
    assert "no average of the weights" in refuse("eval", trained, "--weights", "average")
    run, seen = str(tmp_path / "run"), []
    assert main(["train", "--preset", "tiny", "--steps", "3", "--out", run, *FEW[:2], "--samples",
                 "1", *FEW[4:], "--set", "training.ema=0.5"]) == 0
    monkeypatch.setattr(orchvlm.Model, "generate", lambda model, inputs, *_, **__: seen.append(
        model.state_dict()) or [[5]] * len(inputs))
    few = ["--samples", "1", "--kinds", "count", "--threads", "1"]
    for weights in ([], ["--weights", "average"], ["--weights", "trained"]):
        assert main(["eval", run, *few, *weights]) == 0
        assert main(["generate", run, "What?", "--threads", "1", *weights]) == 0
    for average, states in ((True, seen[:4]), (False, seen[4:])):
        wanted = open_model(orchvlm.training.latest_checkpoint(run), average).state_dict()
        for state in states:
            assert all((state[name] == wanted[name]).all() for name in wanted)
    assert any((seen[0][name] != seen[4][name]).any() for name in seen[0])


def test_data_from_files(tmp_path, capsys):
    rows = [{"split": split, "messages": [{"role": "user", "content": "1 + 1?"},
                                          {"role": "assistant", "content": "2"}],
             "answer": "2", "check": "exact"} for split in ("train", "train", "val")]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with zipfile.ZipFile(folder / "b.zip", "w") as pack:
        pack.writestr("records.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert main(["train", "--data", str(folder), "--steps", "2", "--out", str(tmp_path / "run"),
                 *FEW]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--split", "val", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all"]["samples"] == 1
    assert main(["train", "--model", str(tmp_path / "run"), "--steps", "1", "--data",
                 str(folder / "a.jsonl"), "--out", str(tmp_path / "more"), *FEW]) == 0
    assert not (tmp_path / "more" / "evaluation.json").exists()  # nothing was held out


def spoken(path, tmp_path):
    """A zip like the pack of spoken digits, beside another pack."""
    rng, rows = np.random.default_rng(0), []
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("nlvr/records.jsonl", json.dumps({"image": "none.png", "split": "train"}))
        for i, split in enumerate(("train", "train", "test")):
            body = io.BytesIO()
            with wave.open(body, "wb") as out:
                out.setparams((1, 2, 8000, 0, "NONE", ""))
                out.writeframes(rng.integers(-999, 999, 1500 + 700 * i).astype("<i2").tobytes())
            pack.writestr(f"fsdd/{i}.wav", body.getvalue())
            rows.append({"audio": f"{i}.wav", "text": "nine", "split": split})
        pack.writestr("fsdd/records.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "nine.wav").write_bytes(body.getvalue())


def test_spoken_digits(refuse, tmp_path, capsys):
    """One of a zip's packs, by --kinds; a sound that is asked about."""
    spoken(tmp_path / "a.zip", tmp_path)
    run = str(tmp_path / "run")
    command = ["train", "--preset", "tiny-omni", "--data", str(tmp_path / "a.zip")]
    assert main([*command, "--kinds", "digits", "--steps", "2", "--out", run, *FEW]) == 0
    assert "qwen3_omni_moe" in capsys.readouterr().out
    assert 'kinds = ["digits"]' in (tmp_path / "run" / "config.toml").read_text()
    assert main(["eval", run, "--json", "--report", str(tmp_path / "seen.html")]) == 0
    assert json.loads(capsys.readouterr().out)["digit"]["samples"] == 1
    assert main(["generate", run, "Which digit?", "--audio", str(tmp_path / "nine.wav"),
                 "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert "no such file" in refuse("generate", run, "What?", "--audio", tmp_path / "no.wav")
    other = [*command, "--steps", "2", "--out", tmp_path / "x"]
    assert "captions" in refuse(*other, "--kinds", "captions")
    assert "kind must be one of" in refuse(*other, "--kinds", "songs")


def test_refusals(refuse, trained, tmp_path):
    assert "holds a run" in refuse("train", "--out", trained)
    assert "no run to resume" in refuse("train", "--resume", "--out", tmp_path / "none")
    assert "no such file" in refuse("train", "--data", tmp_path / "no.jsonl", "--out",
                                    tmp_path / "x")
    (tmp_path / "a.txt").write_text("words")
    assert ".jsonl" in refuse("train", "--data", tmp_path / "a.txt", "--out", tmp_path / "x")
    (tmp_path / "a.zip").write_text("words")
    assert "a.zip" in refuse("train", "--data", tmp_path / "a.zip", "--out", tmp_path / "x")
    assert "--preset: must be one of" in refuse("train", "--preset", "huge")
    assert "kinds must be" in refuse("train", "--kinds", "dance", "--out", tmp_path / "x")
    assert "--lr" in refuse("train", "--lr", "-1")
    assert "--difficulty" in refuse("train", "--difficulty", "2")
    assert "neither a model" in refuse("generate", tmp_path, "What?")
    assert "no such file" in refuse("generate", trained, "What?", "--image", tmp_path / "no.png")
    assert "no such folder" in refuse("inspect", "nothing")
    assert "WIDTHxHEIGHT" in refuse("inspect", "tiny", "--image", "12")
    assert "ratio is above 200" in refuse("inspect", "tiny", "--image", "10x2001")
    assert not (tmp_path / "x").exists()


def test_tensorboard_gets_the_curves(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, tag, value, step):
            seen.append((tag, step))

        def close(self):
            seen.append("closed")
    module = types.ModuleType("tensorboard.summary")
    module.Writer = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "tensorboard.summary", module)
    assert main(["train", "--steps", "1", "--out", str(tmp_path / "run"), *FEW]) == 0
    assert ("loss", 1) in seen and seen[-1] == "closed"


# ---------------------------------------------------------------- inspect


def test_inspect_counts_without_making(capsys):
    assert main(["inspect", "seed1.5-vl", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "vision tower 532,046,080" in out and "199,964,414,208" in out
    assert main(["inspect", "tiny", "--tokens", "9000", "--checkpoint", "full"]) == 0
    out = capsys.readouterr().out
    for words in ("packs of 9,000 tokens", "activations", "workspace", "keys and values"):
        assert words in out


def made_parameters(config):
    model = orchvlm.Model(config, threads=1)
    return model.n_parameters


@pytest.mark.parametrize("sparse", [False, True])
def test_parameters_are_those_of_the_model(sparse):
    seed = np.random.SeedSequence().entropy % 2**32
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        config = orchvlm.ModelConfig(draw_config(rng, sparse))
        counted = sum(count for count, _ in count_parameters(config).values())
        assert counted == made_parameters(config), config.values


@pytest.mark.parametrize("change", [{}, {"num_experts": 4, "num_experts_per_tok": 2,
                                         "moe_intermediate_size": 24, "decoder_sparse_step": 2},
                                    {"num_experts": 4, "num_experts_per_tok": 1,
                                     "moe_intermediate_size": 24, "scoring_func": "sigmoid",
                                     "shared_expert_intermediate_size": 40,
                                     "first_k_dense_replace": 1}])
def test_parameters_of_the_seed_family(change):
    values = orchvlm.preset("tiny").values
    values["text_config"] |= change
    for tied in (False, True):
        config = orchvlm.ModelConfig({**values, "tie_word_embeddings": tied})
        counted = sum(count for count, _ in count_parameters(config).values())
        assert counted == made_parameters(config)


def test_flops_of_a_sample_are_those_of_the_batch():
    config = orchvlm.preset("tiny")
    picture = np.zeros((112, 84, 3), np.uint8)
    sample = {"messages": [{"role": "user", "content": [{"type": "image", "image": picture}]},
                           {"role": "assistant", "content": "yes"}]}
    inputs = data.Processor.from_config(config.values).one(sample)
    text = inputs.n_tokens - 12
    tokens, flops = sample_flops(config, (112, 84), text)
    head = 6 * (text - inputs.n_target_tokens) * config.text["hidden_size"] * 512
    assert tokens == inputs.n_tokens
    assert flops - head == pytest.approx(orchvlm.model_flops(config, inputs))


# ---------------------------------------------------------------- report


def test_curves():
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    rows = [{"step": k, "loss": None if k == 3 else 5.0 / k} for k in range(1, 40)]
    curve = svg_curve(rows, "loss", "a < b", smooth=True)
    assert curve.count("<polyline") == 2 and "a &lt; b" in curve
    points = re.search(r'points="([^"]+)"', curve)[1].split()
    assert len(points) == 38 and not re.search("nan|inf", curve)
    assert svg_curve(rows, "lr", "rate") == ""
    assert "<svg" in svg_curve([{"step": 1, "lr": 0.0}], "lr", "rate")


def test_a_report_escapes_what_it_shows(tmp_path):
    evil = "<script>alert(1)</script>"
    sample = {"kind": evil, "answer": evil, "check": "exact",  # as data from elsewhere may be
              "messages": [{"role": "user", "content": evil},
                           {"role": "assistant", "content": evil}]}
    write_report(tmp_path / "r.html", [], orchvlm.Evaluation([(sample, evil, 0.0)]), title=evil,
                 facts=[(evil, evil)], command=evil)
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text and text.count("&lt;script&gt;") >= 7


def test_what_the_blind_reach():
    rows = [({"kind": "count", "check": "number", "answer": answer}, "2", 0.0)
            for answer in ("1", "1", "1", "2")]
    rows += [({"kind": "point", "check": "point", "answer": answer, "region": region}, "", 0.0)
             for answer, region in (("100 100", [0, 0, 200, 200]), ("450 450", [0, 0, 600, 600]),
                                    ("600 600", [400, 400, 800, 800]))]
    seen = orchvlm.Evaluation(rows)
    assert seen.blind() == pytest.approx({"count": 3 / 4, "point": 2 / 3, "all": 5 / 7})
    assert "blind %" in str(seen) and repr(seen) == str(seen)  # and never the pictures
    assert "<table>" in seen._repr_html_() and "blind %" in seen._repr_html_()


@pytest.mark.parametrize("kinds", (None, ["emoji"]))
def test_a_broken_file_is_no_empty_split(tmp_path, kinds):
    from orchvlm.cli import CommandError
    from orchvlm.data import DataError
    from orchvlm.sources import held_out
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    with pytest.raises((CommandError, DataError), match="broken.zip"):
        held_out({"files": [str(tmp_path / "broken.zip")], "kinds": kinds, "frame": None}, "val", 3)
