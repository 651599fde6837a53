"""What a run is told: every key once, from file, options and --set; refused with the way out."""
import copy
import json
import os
import re
import secrets
import shutil
import sys
import types
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from test_cli_model import FEW, refuse  # noqa: F401 (a fixture)

import orchvlm
from orchvlm.cli import main, make_parser
from orchvlm.commands_model import told_by
from orchvlm.run_config import RUN_FILE, RunConfig, nested, override, read_toml
from orchvlm.run_keys import BY_NAME, KEYS, SECTIONS, reference, toml, tomllib
from orchvlm.training import checkpoints, read_metrics

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))

# Values of every kind, drawn; what is of no kind.
DRAWN = (
    lambda rng: int(rng.integers(1, 2**40)), lambda rng: int(rng.integers(56, 2049)),
    lambda rng: float(10.0 ** rng.uniform(-8, -0.3)), lambda rng: bool(rng.integers(2)),
    lambda rng: [float(v) for v in rng.uniform(0, 0.99, 2)],
    lambda rng: [letters(rng) for _ in range(rng.integers(0, 3))], lambda rng: letters(rng),
    lambda rng: [{"match": letters(rng), "lr": float(rng.uniform(0, 2))}],
    lambda rng: {letters(rng): "zero1", "*": "fsdp"})
JUNK = (None, -1.5, {"a": {}}, [[]], float("nan"), float("inf"), "", [1], {"*": 3}, b"a", "\ud800")


def letters(rng):
    return "".join(map(chr, rng.choice([9, 10, 34, 92, 127, 233, 35, 61, 128512], 6)))


def drawn(key, rng):
    """A value that the key takes."""
    made = [make(rng) for make in DRAWN]
    made += [word.rstrip(",") for word in key.kind.words.split() if word != "patterns"]
    fitting = [value for value in made if key.kind.holds(value)]
    return fitting[rng.integers(len(fitting))]


def test_every_field_of_a_training_has_a_key():
    assert sorted(key.field for key in KEYS if key.field) == sorted(
        field.name for field in fields(orchvlm.TrainingConfig))
    assert len(BY_NAME) == len(KEYS) and {key.section for key in KEYS} == set(SECTIONS)


def test_what_is_written_reads_the_same():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(30):
        said = {key.name: drawn(key, rng) for key in KEYS if rng.random() < 0.7}
        said.pop(*rng.choice(["model.preset", "model.folder"], 1), None)
        said["evaluation.every"] = 7  # what patience counts
        if "model.folder" in said:
            said.pop("model.std", None)
        if "data.weights" in said:  # one for each
            said["data.files"] = [letters(rng) for _ in said["data.weights"]]
        if said.get("data.files"):  # nothing is drawn
            said.pop("data.difficulty", None), said.pop("data.max_side", None)
        config = RunConfig(nested(said))
        assert {name: config[name] for name in said} == {
            name: BY_NAME[name].kind.read(value) for name, value in said.items()}
        again = RunConfig(tomllib().loads(config.to_toml()))
        assert again.values == config.values
        assert again.training() == config.training() and isinstance(
            config.training(), orchvlm.TrainingConfig)


def test_every_key_refuses_junk_by_name():
    for key in KEYS:
        for value in JUNK:
            if (key.name, value) in (("training.groups", ""), ("data.weights", [1])):
                continue
            with pytest.raises(ValueError, match=rf"a\.toml: {key.name} must be .*; got "):
                RunConfig(("a.toml", nested({key.name: value or {}})) if value is None
                          else ("a.toml", {key.section: {key.short: value}}))


@pytest.mark.parametrize("table, words", [
    ({"trainin": {"steps": 1}}, r"no section \[trainin\]; the nearest is \[training\]"),
    ({"training": {"stesp": 1}}, "no training.stesp; the nearest is training.steps"),
    ({"training": {"save_every": 1}}, "no training.save_every; the nearest is output.save_every"),
    ({"steps": 4}, "no steps; the nearest is training.steps"),
    ({"qqqq": {}}, "no qqqq; `orchvlm train --keys` lists"),
    ({"ranks": 2}, r"write \[ranks\] and its keys below; got ranks = 2"),
    ({"model": {"preset": "tiny", "folder": "x"}}, "keep one of them"),
    ({"model": {"folder": "x", "std": 0.1}}, "leave one of them out"),
    ({"data": {"files": ["a.jsonl"], "difficulty": 0.5}}, "data.difficulty = 0.5 is of drawn"),
    ({"data": {"files": ["a.jsonl"], "max_side": 99}}, "data.max_side = 99 is of drawn tasks"),
    ({"data": {"files": ["a.jsonl"], "weights": [1, 2]}}, "2 numbers for 1 entries of data.files"),
    ({"data": {"weights": [1, 0]}}, r"data.weights must be a list of numbers above 0; got \[1, 0"),
    ({"evaluation": {"patience": 2}}, "set evaluation.every"),
    ({"training": {"groups": [{"lr": 1.0}]}}, "training.groups must be a list of tables"),
    ({"training": {"schedule": "cubic"}}, "one of cosine, linear, constant; got 'cubic'")])
def test_refusals(table, words):
    with pytest.raises(ValueError, match=f"^file.toml: .*{words}"):
        RunConfig(("file.toml", table))


@pytest.mark.parametrize("layer", [3, None, "a.toml", (1, 2, 3), ("a", 3), {3: {}}, {None: {}},
                                   {"data": {3: 4}}])
def test_layers_that_are_none(layer):
    with pytest.raises(TypeError, match="must be a dict|are texts"):
        RunConfig(layer)


def test_layers():
    """Later ones win, and take back what would contradict them."""
    base = RunConfig({"training": {"minutes": 3}})
    assert base["training.steps"] is None and base.training().steps == 1_000_000
    whole = nested(base.values)
    assert RunConfig(whole, {"training": {"steps": 4}})["training.minutes"] is None
    both = RunConfig({"training": {"steps": 4}}, {"training": {"minutes": 1}})
    assert both["training.steps"] == 4 and both["training.minutes"] == 1
    moved = RunConfig(whole, {"model": {"folder": "m"}, "data": {"files": ["a.zip"]}})
    assert moved["model.preset"] is None and moved["data.kinds"] is None
    both = RunConfig(("one", {"training": {"lr": 1.0}}), ("two", {"training": {"lr": 2}}))
    assert both["training.lr"] == 2.0 and both.origins["training.lr"] == "two"
    assert both.origins["data.tokens"] == "preset tiny"
    assert both.origins["ranks.shard"] == "default"
    first, second = RunConfig(), RunConfig()
    first["data.kinds"].append("x")  # nobody's default changes with it
    assert RunConfig().values == second.values == copy.deepcopy(second.values)


@pytest.mark.parametrize("text, value", [
    ("training.lr=1e-3", 1e-3), ("training.lr=.5", 0.5), ("training.schedule=linear", "linear"),
    ('training.schedule="linear"', "linear"), ("data.kinds=count,shape", ["count", "shape"]),
    ('data.kinds=["count"]', ["count"]), ("output.folder=12", "12"), ("lora.rslora=true", True),
    ('ranks.shard={"*" = "fsdp"}', {"*": "fsdp"}), ("output.folder=a=b\nc=d", "a=b\nc=d")])
def test_overrides(text, value):
    assert override(text) == (text.partition("=")[0], value)


@pytest.mark.parametrize("text, words", [
    ("training.lr", "--set takes section.key=value"), ("lr=1", "the nearest is training.lr"),
    ("rank.tokens=9", "the nearest is ranks.tokens"), ("dat.token=9", "the nearest is data.tokens"),
    ("training.steps=1e3", "training.steps must be a whole number"),
    ("training.steps=many", "got many")])
def test_overrides_that_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        override(text)


@pytest.mark.parametrize("content", [b"a = ", b"\xff", b"[a]\n[a]", b"x = " + b"[" * 100_000])
def test_files_that_are_no_toml(tmp_path, content):
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(ValueError, match="a.toml: not TOML"):
        read_toml(tmp_path / "a.toml")


def test_the_reference_is_the_one_in_the_docs(capsys):
    assert main(["train", "--keys"]) == 0
    printed = capsys.readouterr().out
    assert printed == reference() and all(f"`{key.short}`" in printed for key in KEYS)
    docs = (ROOT / "docs" / "training.md").read_text()
    assert docs.partition("## Keys\n\n")[2] == printed


def test_the_callback_of_the_docs(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(),
                          re.DOTALL | re.MULTILINE)
    seen, board = [], types.ModuleType("wandb")
    board.init = lambda project, config: seen.append(config["data.tokens"])
    board.log = lambda row, step: seen.append((step, row["step"]))
    monkeypatch.setitem(sys.modules, "wandb", board)
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("[data]\ntokens = 100\n[training]\nsteps = 2\n")
    exec(compile(block, "training.md", "exec"), {"__name__": "docs"})
    assert seen == [100, (1, 1), (2, 2)]


# ---------------------------------------------------------------- the command

def test_the_file_of_the_readme(tmp_path):
    """Read as it stands, and trained with in two steps."""
    pytest.importorskip("PIL")
    (block,) = re.findall(r"^```toml\n(.*?)^```", (ROOT / "README.md").read_text(),
                          re.DOTALL | re.MULTILINE)
    (tmp_path / "run.toml").write_text(block)
    config = RunConfig.load(tmp_path / "run.toml")
    assert len(block.splitlines()) <= 12 and config["output.folder"] == "run-run"
    assert config["evaluation.patience"] == 3 and config.training().steps == 900
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "run.toml"), "--steps", "2", "--out", str(out),
                 *FEW, "--set", "evaluation.every=1"]) == 0
    rows = read_metrics(out / "metrics.jsonl")
    assert all(row["eval_loss"] > 0 for row in rows) and len(rows) == 2


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, run) of a run from a file, with options and --set."""
    pytest.importorskip("PIL")
    folder = tmp_path_factory.mktemp("ran")
    (folder / "few.toml").write_text(
        '[data]\ntokens = 150\nkinds = ["count"]\n[training]\nsteps = 9\nlr = 2e-3\nema = 0.5\n'
        'groups = [{match = "model.visual.*", lr = 1e-4}]\n[lora]\nr = 2\n'
        f'[output]\nfolder = "{folder / "run"}"\n')
    assert main(["train", str(folder / "few.toml"), "--steps", "2", *FEW[2:], "--set",
                 "training.betas=[0.8, 0.9]", "--set", "training.ema=0.6"]) == 0
    return folder, folder / "run"


def test_the_file_of_a_run_says_all_of_it(ran):
    config = RunConfig.load(ran[1] / RUN_FILE)
    told = {"data.tokens": 150, "training.steps": 2, "training.lr": 2e-3, "lora.r": 2,
            "training.ema": 0.6, "training.betas": [0.8, 0.9], "ranks.n": 1, "ranks.threads": 1,
            "training.groups": [{"match": "model.visual.*", "lr": 1e-4}], "evaluation.samples": 2}
    assert {name: config[name] for name in told} == told
    assert (checkpoints(ran[1])[-1][1] / "adapter_config.json").exists()


def test_the_file_of_a_run_repeats_it(ran, capsys):
    folder, run = ran
    assert main(["train", str(run / RUN_FILE)]) == 0
    assert "run-2/" in capsys.readouterr().out
    first, second = (read_metrics(place / "metrics.jsonl") for place in (run, folder / "run-2"))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]  # bit for bit
    assert len(first) == 2
    a, b = (RunConfig.load(place / RUN_FILE) for place in (run, folder / "run-2"))
    assert {**a.values, "output.folder": None} == {**b.values, "output.folder": None}
    seen = json.loads((run / "evaluation.json").read_text())
    assert set(seen) == {"count", "all"}
    assert main(["eval", str(run), "--samples", "1", "--json"]) == 0  # with its adapter
    assert set(json.loads(capsys.readouterr().out)) == {"count", "all"}


def test_resumed_as_it_was_told(ran):
    _, run = ran
    assert main(["train", "--resume", "--out", str(run), "--set", "training.steps=3"]) == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    config = RunConfig.load(run / RUN_FILE)
    assert config["training.steps"] == 3 and config["training.betas"] == [0.8, 0.9]


@pytest.mark.parametrize("how", ["auto", "", "DIR"])
def test_resumed_with_a_file_besides(ran, tmp_path, how):
    """It wins over what the run was told, options over it; the file of a run that was moved says
    nothing new."""
    _, run = ran
    shutil.copytree(run, tmp_path / "run")
    run = tmp_path / "run"
    checkpoint = checkpoints(run)[-1][1]
    resume = ["--resume", str(checkpoint)] if how == "DIR" else ["--resume", how, "--out", str(run)]
    (tmp_path / "more.toml").write_text("[training]\nlr = 1e-4\nema = 0.7\n")
    for file, told in ((tmp_path / "more.toml", (1e-4, 0.8)), (run / RUN_FILE, (2e-3, 0.8))):
        config, out = told_by(make_parser().parse_args(
            ["train", str(file), *filter(None, resume), "--set", "training.ema=0.8"]))
        assert (config["training.lr"], config["training.ema"]) == told
        assert config["data.tokens"] == 150 and out == run
    (tmp_path / "more.toml").write_text(f'[output]\nfolder = "{tmp_path / "other"}"\n')
    if how == "DIR":  # a run that branches off
        assert told_by(make_parser().parse_args(
            ["train", str(tmp_path / "more.toml"), *resume]))[1] == tmp_path / "other"


def test_the_command_refuses_in_one_line(refuse, tmp_path):  # noqa: F811
    assert "No such file" in refuse("train", tmp_path / "no.toml")
    (tmp_path / "a.toml").write_text("[training]\nlearning_rate = 1\n")
    for more in ((), ("--explain",), ("--set", "lora.r=2")):  # else all of it would be trained
        assert "training.freeze: 'model.vison.*' matches no parameter" in refuse(
            "train", "--set", 'training.freeze=["model.vison.*"]', "--out", tmp_path / "x",
            "--ranks", "1", *more)
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert "--kinds count: picks among" in refuse("train", "--kinds", "count", "--data",
                                                  tmp_path / "a.jsonl", "--out", tmp_path / "x")
    (tmp_path / "a.jsonl").unlink()
    said = refuse("train", tmp_path / "a.toml")
    assert "a.toml: there is no training.learning_rate; the nearest is" in said
    assert "--set: training.lr must be a number" in refuse("train", "--set", "training.lr=fast")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.toml"]


def test_in_python(tmp_path):
    pytest.importorskip("PIL")
    config = {"data": {"tokens": 100}, "training": {"steps": 2},
              "output": {"folder": str(tmp_path / "run")}, "ranks": {"threads": 1}}
    rows = orchvlm.Trainer.from_config(config).fit()
    assert [row["step"] for row in rows] == [1, 2]
    assert RunConfig.load(tmp_path / "run" / RUN_FILE)["ranks.n"] == 1
    many = {**config, "output": {"folder": str(tmp_path / "many")}, "ranks": {"shard": "fsdp"}}
    losses = orchvlm.comm.run_threads(2, lambda comm: [
        row["loss"] for row in orchvlm.Trainer.from_config(many, comm).fit()])
    assert losses[0] == losses[1] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    assert RunConfig.load(tmp_path / "many" / RUN_FILE)["ranks.n"] == 2


def test_toml_of_values():
    for value in (True, 3, 1e-5, 1e22, "a\"b\\c\n\x7f\U0001f600", [1, "b"], {"a b": [{}]}):
        assert tomllib().loads(f"v = {toml(value)}")["v"] == value
