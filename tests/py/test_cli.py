"""The command line through subprocesses: good files, broken files, JSON, plots, Ctrl-C."""
import gzip
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import orchvlm
from orchvlm import demo
from orchvlm.cli import Progress, main, make_parser
from orchvlm.reading import FileError, read_lengths

SMALL = ["--nodes", "1", "--gpus-per-node", "8"]


#: Subprocesses find the package that is tested, installed or not.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(
    [str(Path(orchvlm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "orchvlm", *map(str, arguments)],
                          capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def refuse(capsys):
    """Runs the command in this process; the one line of its refusal."""
    def call(*arguments):
        assert main(list(map(str, arguments))) == 2
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        assert out == "" and len(lines) == 1 and lines[0].startswith("orchvlm: "), err
        return lines[0]

    return call


@pytest.fixture
def lengths(tmp_path):
    """The same lengths in every kind of file."""
    values = np.random.default_rng(3).integers(10, 4000, 64)
    (tmp_path / "a.csv").write_text("tokens\n" + "\n".join(map(str, values)) + "\n")
    (tmp_path / "bare.csv").write_text("\n".join(map(str, values)) + "\n")
    (tmp_path / "two.csv").write_text("id,tokens\r\n" + "".join(
        f"x{i},{v}\r\n" for i, v in enumerate(values)))
    (tmp_path / "a.tsv").write_text("id\ttokens\n" + "".join(
        f"x{i}\t{v}\n" for i, v in enumerate(values)))
    (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {v}, "s": "x"}}\n' for v in values))
    (tmp_path / "bare.jsonl").write_text("\n".join(map(str, values)))
    np.save(tmp_path / "a.npy", values.astype(np.int32))
    for name in ("a.csv", "a.jsonl", "a.npy"):
        with gzip.open(tmp_path / f"{name}.gz", "wb") as stream:
            stream.write((tmp_path / name).read_bytes())
    return tmp_path, values


def test_every_kind_of_file(lengths):
    folder, values = lengths
    (folder / "one.jsonl").write_text("".join(f'{{"n": {v}}}\n' for v in values))
    for name, how in {"a.csv": {}, "bare.csv": {}, "two.csv": dict(column="tokens"),
                      "a.tsv": dict(column="tokens"), "a.jsonl": dict(field="n"),
                      "bare.jsonl": {}, "one.jsonl": {}, "a.npy": {}, "a.csv.gz": {},
                      "a.npy.gz": {}, "a.jsonl.gz": dict(field="n")}.items():
        found = read_lengths(folder / name, **how)
        assert (found.tokens == values).all() and found.left_out == "", name
        assert found.row.tolist() == list(range(64)), name


def test_units_and_empty_cells(tmp_path):
    path = tmp_path / "sound.csv"
    path.write_text("id,seconds\na,0.5\nb,\nc,0.01\nd,0\n\n")
    found = read_lengths(path, column="seconds", per_unit=25)
    assert found.tokens.tolist() == [13, 1] and found.row.tolist() == [0, 2]
    assert found.left_out == (f"{path}: left out 2 rows: 1 without a length (line 3) and 1 of "
                              "length 0 (line 5)")
    with pytest.raises(FileError, match="whole numbers"):
        read_lengths(path, column="seconds")


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("name, content, word", [
    ("a.csv", b"", "empty"),
    ("a.csv", b"a,b\n1,2\n", "columns: a, b"),
    ("a.csv", b"a\n1\nx\n", "line 3"),
    ("a.csv", b"a\n-1\n", "finite and >= 0"),
    ("a.csv", b"a\nnan\n", "finite and >= 0"),
    ("a.csv", b"a\n1e999\n", "finite and >= 0"),
    ("a.csv", b"a\n1e300\n", r"2\^40"),
    ("a.csv", b"a\n1,2\n", "2 cells"),
    ("a.csv", b"a\n\"1\n", "cannot be read"),
    ("a.csv", b"a\n" + b"9" * 200_000 + b"\n", "cannot be read"),
    ("a.csv", b"\xff\xfe\x00a\n", "UTF-8"),
    ("a.csv", b"a\n1\x00\n", "csv"),
    ("a.csv.gz", b"a\n1\n", "gzip"),
    ("a.csv.gz", gzip.compress(b"a\n" + b"1\n" * 999)[:20], "gzip"),
    ("a.csv.gz", gzip.compress(os.urandom(999))[:-9] + b"x" * 9, "csv"),
    ("two.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 99)[:30], "broken gzip file after line"),
    ("a.jsonl", b"{\"n\": 1, \"m\": 2}\n", "fields: n, m"),
    ("a.jsonl", b"{\"n\": 1, \"m\": 2}\n{\"n\": 3", "line 2: not JSON"),
    ("a.jsonl", b"{\"n\": 1}\n{\"m\": 2}\n", "line 2: no field 'n'"),
    ("a.jsonl", b"{\"n\": {}}\n", "not a number"),
    ("a.jsonl", b"1\n{\n", "line 2"),
    ("a.jsonl", b"[1]\n", "not a number"),
    ("a.jsonl", b"true\n", "not a number"),
    ("a.jsonl", b"1" * 5000 + b"\n", "line 1"),
    ("a.jsonl", nested(100_000).encode(), "not JSON"),
    ("a.csv", b"a;b\n1;2\n", "separated by ';'"),
    ("a.csv", b"a\tb\n1\t2\n", r"separated by '\\t'"),
    ("a.jsonl", b"{\"n\": 1\n", r"line 1: not JSON \(Expecting ',' delimiter\)"),
    ("a.npy", b"", "not a .npy file"),
    ("a.npy", b"1, 2, 3", "not a .npy file"),
    ("a.npy", b"\x93NUMPY\x01\x00\xff\xff{", "cannot be read"),
    ("a.npy", b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, "
              b"'shape': (99999999999999,), }\n", "cannot be read"),
    ("a.parquet", b"x", "unknown kind"),
    ("plain", b"1\n", "unknown kind"),
])
def test_broken_files_give_one_line(tmp_path, name, content, word):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FileError, match=word) as caught:
        read_lengths(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-7.0, np.nan, np.inf])
def test_a_bad_value_of_an_array_is_named(tmp_path, value):
    np.save(tmp_path / "a.npy", np.array([1.0, 2.0, value, value]))
    with pytest.raises(FileError, match=f"index 2: .*got {value}"):
        read_lengths(tmp_path / "a.npy")


def test_reading_stops_when_it_has_enough(tmp_path):
    """What follows is not looked at, so it may even be broken."""
    (tmp_path / "a.csv").write_text("tokens\n5\n0\n6\nbroken\n")
    (tmp_path / "a.jsonl").write_text('{"n": 5}\n{"n": 0}\n{"n": 6}\nbroken\n')
    np.save(tmp_path / "a.npy", [5, 0, 6, 7])
    for name in ("a.csv", "a.jsonl", "a.npy"):
        found = read_lengths(tmp_path / name, most=2)
        assert found.tokens.tolist() == [5, 6] and found.row.tolist() == [0, 2]
        assert "left out 1 row: 1 of length 0" in found.left_out


def test_pickles_and_tables_are_refused(tmp_path):
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "table.npy", np.ones((2, 2)))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    for name in ("object", "table", "text"):
        with pytest.raises(FileError, match=f"{name}.npy"):
            read_lengths(tmp_path / f"{name}.npy")


def test_left_out_rows_are_told_and_the_others_keep_their_numbers(tmp_path):
    """A blank line in a file of one column is an empty cell, at its end it is nothing."""
    (tmp_path / "a.csv").write_text("tokens\n50\n\n0\n60\n0\n70\n\n\n")
    (tmp_path / "a.jsonl").write_text('{"n": 50, "m": 1}\n{"m": 0}\n{"n": 0}\n\n{"n": 60}\n'
                                      '{"n": 0}\n{"n": 70}\n')
    np.save(tmp_path / "a.npy", [50, 0, 0, 60, 0, 70])
    for name, more, empty, zero in (("a.csv", [], "line 3", "line 4"),
                                    ("a.jsonl", ["--field", "n"], "line 2", "line 3"),
                                    ("a.npy", [], None, "index 1")):
        common = ["plan", tmp_path / name, *more, *SMALL, "--work-limit", "50"]
        done = run(*common, "--json")
        groups = [g for m in json.loads(done.stdout)["micro_batches"] for g in m]
        assert sorted(i for g in groups for i in g["items"]) == [0, 3, 5], name
        part = run(*common, "--items", "--json")
        assert json.loads(part.stdout)["row"] == [0, 3, 5]
        for said in (done.stderr, part.stderr, run(*common).stdout):
            assert "left out 3 rows" in said and f"first: {zero})" in said, said
            assert empty is None or f"1 without a length ({empty})" in said, said
    (tmp_path / "none.csv").write_text("tokens\n0\n0\n")
    assert "no lengths above 0" in run("plan", tmp_path / "none.csv").stderr


def test_options_without_effect_are_refused(lengths, refuse):
    folder, _ = lengths
    assert "--column" in refuse("plan", folder / "a.npy", "--column", "x")
    assert "--field" in refuse("plan", folder / "a.npy", "--field", "x")
    assert "--field" in refuse("plan", folder / "a.csv", "--field", "tokens")
    assert "--column" in refuse("plan", folder / "a.jsonl", "--column", "n")
    assert "--samples-per-rank" in refuse("simulate", folder / "a.npy", "--samples-per-rank", "4")
    for command in ("plan", "simulate"):
        assert "--model" in refuse(command, "--demo", "--model", "gpt13b")
    assert "--context" in refuse("simulate", "--demo", "--context", "9000")
    assert "--context" in refuse("simulate", folder / "a.npy", "--policies", "sp_flex",
                                 "--context", "9000")


def test_policies_are_named_as_the_command_line_has_them(lengths, refuse):
    folder, _ = lengths
    assert "'' is unknown" in refuse("simulate", folder / "a.npy", "--policies", "")
    assert "'' is unknown" in refuse("simulate", "--demo", "--policies", "sampled,,orchvlm")
    assert "mean sp_flex?" in refuse("simulate", folder / "a.npy", "--policies", "flex")
    assert "mean sampled?" in refuse("simulate", "--demo", "--policies", "sample")
    assert "'orchvlm' is for --demo" in refuse("simulate", folder / "a.npy", "--policies",
                                               "orchvlm")
    assert "'sp_flex' is for a FILE" in refuse("simulate", "--demo", "--policies", "sp_flex")


def test_plots_that_cannot_be_written_are_refused_before_any_work(lengths, refuse):
    folder, _ = lengths
    for command in ("plan", "simulate"):
        assert f"{folder / 'no'}: there is no such folder" in refuse(
            command, folder / "a.csv", "--plot", folder / "no" / "x.png")
        assert f"{folder}: is a folder" in refuse(command, folder / "a.csv", "--plot", folder)
        assert "must end in .png" in refuse(command, folder / "a.csv", "--plot", folder / "x.pdf")


def test_a_files_simulation_tells_flops_utilisation(lengths):
    folder, _ = lengths
    common = ["simulate", folder / "a.npy", "--work-limit", "200", "--policies", "sp_flex"]
    assert "MFU" in run(*common).stdout
    for preset in ("a100_40g", "h100"):
        found = json.loads(run(*common, "--json", "--preset", preset).stdout)
        assert 0 < found["policies"]["sp_flex"]["mfu"] < 0.7


def test_refusals_are_one_line(lengths, refuse):
    folder, _ = lengths
    assert "either a FILE" in refuse("plan")
    assert "either a FILE" in refuse("plan", folder / "a.csv", "--demo")
    assert "No such file" in refuse("plan", folder / "none.csv")
    (folder / "folder.csv").mkdir()
    assert "is a directory" in refuse("plan", folder / "folder.csv", "--items")
    assert "is a directory" in refuse("plan", folder)
    assert "id, tokens" in refuse("plan", folder / "two.csv")
    assert "no column 'x'" in refuse("plan", folder / "two.csv", "--column", "x")
    assert "fields: n, s" in refuse("plan", folder / "a.jsonl")
    assert "nowhere" in refuse("plan", folder / "a.csv", "--preset", "nowhere")
    for option in (["--policy", "chunked"], ["--model", "gpt7b"], ["--preset", "h100"]):
        assert "--items" in refuse("plan", folder / "a.csv", "--items", *option)
    assert "--demo" in refuse("plan", "--demo", "--items")
    assert "--colum " in refuse("plan", folder / "two.csv", "--colum", "tokens")
    assert "known models" in refuse("plan", folder / "a.csv", "--model", "gpt9")
    assert "--nodes" in refuse("plan", folder / "a.csv", "--nodes", "0")
    assert "--time-limit" in refuse("plan", folder / "a.csv", "--time-limit", "-1")
    assert "not allowed with" in refuse("plan", folder / "a.csv", "--chars-per-token", "4",
                                        "--pixels-per-token", "784")
    assert "magic" in refuse("simulate", folder / "a.csv", "--policies", "magic")
    assert "invalid choice" in refuse("dance")
    (folder / "long.csv").write_text("tokens\n10\n9000000\n")
    assert "9000000" in refuse("plan", folder / "long.csv", *SMALL)


def test_plan_groups(lengths):
    pytest.importorskip("matplotlib", reason="plots are optional")
    folder, values = lengths
    picture = folder / "plan.png"
    done = run("plan", folder / "two.csv", "--column", "tokens", "--work-limit", "2000",
               "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert "64 sequences" in done.stdout and "no plan takes less" in done.stdout
    assert "(degree x count)" in done.stdout
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plan = json.loads(run("plan", folder / "a.npy", "--work-limit", "2000", "--json").stdout)
    items = [i for m in plan["micro_batches"] for g in m for i in g["items"]]
    assert sorted(items) == list(range(64)) and plan["bound"] <= plan["time"]
    tokens = sum(g["tokens"] for m in plan["micro_batches"] for g in m)
    assert tokens == values.sum()


def test_plan_items(lengths):
    folder, values = lengths
    done = run("plan", folder / "a.csv", "--items", *SMALL)
    assert done.returncode == 0 and "8 ranks" in done.stdout, done.stderr
    plan = json.loads(run("plan", folder / "a.csv", "--items", "--json", *SMALL).stdout)
    loads = np.bincount(plan["rank"], weights=values, minlength=8)
    assert loads.tolist() == plan["loads"]
    (folder / "one.csv").write_text("100\n")
    done = run("plan", folder / "one.csv", "--items", *SMALL)
    assert "1 item on" in done.stdout and "Optimal: no plan is better." in done.stdout
    assert "1 sequence, " in run("plan", folder / "one.csv", *SMALL).stdout


def test_batch_size_takes_the_first(lengths):
    folder, values = lengths
    plan = json.loads(run("plan", folder / "a.csv", "--items", "--json", "--batch-size", "5",
                          *SMALL).stdout)
    assert sum(plan["loads"]) == values[:5].sum()


def test_a_large_file_is_planned_in_part(tmp_path):
    np.save(tmp_path / "a.npy", np.full(600, 100))
    common = ["plan", tmp_path / "a.npy", "--work-limit", "500"]
    done = run(*common)
    assert "first 512 of 600 lengths; --batch-size N" in done.stdout, done.stderr
    assert "512 sequences" in done.stdout
    done = run(*common, "--json")
    assert "first 512" in done.stderr and json.loads(done.stdout)
    for more in (["--batch-size", "600"], ["--items"]):
        done = run(*common, *more)
        assert "600 " in done.stdout and "first" not in done.stdout + done.stderr


def test_a_preset_needs_no_model(lengths):
    folder, _ = lengths
    times = [json.loads(run("plan", folder / "a.csv", "--preset", preset, "--work-limit", "500",
                            "--json").stdout)["time"] for preset in ("a100_80g", "b200")]
    assert times[0] > times[1] > 0


def test_counted_model(lengths, refuse):
    folder, _ = lengths
    config = dict(hidden_size=1024, num_hidden_layers=4, num_attention_heads=16,
                  num_key_value_heads=4, intermediate_size=4096, vocab_size=32000)
    (folder / "config.json").write_text(json.dumps(config))
    done = run("plan", folder / "a.csv", "--model", folder / "config.json", "--preset", "h100",
               "--work-limit", "500", *SMALL)
    assert done.returncode == 0, done.stderr
    (folder / "config.json").write_text("{")
    assert "not JSON" in refuse("plan", folder / "a.csv", "--model", folder / "config.json")


def test_demos(tmp_path):
    pytest.importorskip("matplotlib", reason="plots are optional")
    done = run("plan", "--demo", "--nodes", "2", "--work-limit", "2000", "--plot",
               tmp_path / "demo.png")
    assert done.returncode == 0, done.stderr
    for word in ("vision", "audio", "llm", "no plan takes less"):
        assert word in done.stdout
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    done = run("simulate", "--demo", "--nodes", "2", "--samples-per-rank", "4", "--steps", "1",
               "--work-limit", "1000")
    assert done.returncode == 0, done.stderr
    assert "as sampled" in done.stdout and "1.00x" in done.stdout


@pytest.mark.parametrize("command", ["plan", "simulate"])
@pytest.mark.parametrize("option, value", [
    ("--column", "x"), ("--field", "x"), ("--batch-size", 4), ("--chars-per-token", 4),
    ("--seconds-to-tokens", 25), ("--pixels-per-token", 784)])
def test_demo_refuses_what_is_for_files(refuse, command, option, value):
    assert option in refuse(command, "--demo", option, value)


def test_simulate_file(lengths):
    pytest.importorskip("matplotlib", reason="plots are optional")
    folder, _ = lengths
    done = run("simulate", folder / "a.csv", "--batch-size", "32", "--json", "--work-limit", "500",
               "--plot", folder / "sim.png")
    assert done.returncode == 0, done.stderr
    policies = json.loads(done.stdout)["policies"]
    assert len(policies["sp_flex"]["step_s"]) == 2
    assert (folder / "sim.png").exists()


def test_nothing_is_left_half_written(lengths, refuse):
    folder, _ = lengths
    before = sorted(folder.iterdir())
    refuse("plan", folder / "a.csv", "--items", *SMALL, "--plot", folder / "no" / "x.png")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("option", ["--work-limit", "--seed"])
def test_counts_are_refused_before_the_file_is_read(refuse, option):
    for value, word in (("-1", "at least 0"), (str(2**63), "2^63"), ("1.5", "invalid integer")):
        assert word in refuse("plan", "none.csv", option, value)


def test_a_refusal_of_the_process(tmp_path):
    done = run("plan", tmp_path / "none.csv")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"orchvlm: {tmp_path / 'none.csv'}: No such file or directory\n"


def test_doctor():
    done = run("doctor")
    assert done.returncode in (0, 1)
    for part in ("orchvlm", "core", "numpy", "cuda backend", "nvcc", "gpu",
                 "matplotlib", "pillow", "tokenizers", "jinja2", "av", "scipy"):
        assert part in done.stdout


def test_help_shows_examples(capsys):
    assert main(["--help"]) == 0 and "orchvlm plan --demo" in capsys.readouterr().out
    for command in ("plan", "simulate"):
        assert main([command, "--help"]) == 0
        assert f"examples:\n  orchvlm {command}" in capsys.readouterr().out
    assert main(["--version"]) == 0


def test_examples_of_the_help_parse():
    for line in make_parser().epilog.splitlines()[1:]:
        words = line.split("   ")[0].strip() if "   " in line.strip() else line.strip()
        make_parser().parse_args(shlex.split(words)[1:])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(monkeypatch, terminal):
    """One line that is rewritten and wiped on a terminal, a line of its own in a log."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("thinking"):
        while "thinking" not in stream.getvalue():
            time.sleep(0.02)
    said = stream.getvalue()
    assert ("\n" in said) != terminal and said.endswith("\r\x1b[K") == terminal


def test_closed_pipe():
    command = f"{sys.executable} -m orchvlm plan --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True,
                          text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.parametrize("command", [
    ["simulate", "--demo", "--nodes", "64", "--steps", "200"],
    ["plan", "lengths.npy", "--batch-size", "8192", "--nodes", "128", "--time-limit", "10"],
], ids=["simulate", "plan"])
def test_interrupt(tmp_path, command):
    """Ctrl-C during a long search: exit 130, one line, no file."""
    np.save(tmp_path / "lengths.npy", demo.wikipedia_lengths(8192))
    command = [str(tmp_path / word) if word.endswith(".npy") else word for word in command]
    plot = ["--plot", str(tmp_path / "x.png")] if find_spec("matplotlib") else []
    process = subprocess.Popen(
        [sys.executable, "-m", "orchvlm", *command, *plot],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # nohup, CI ignore it
    try:
        line = process.stderr.readline()  # progress says that it runs
        assert line.startswith("orchvlm: "), line
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == "" and err.strip().endswith("interrupted") and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["lengths.npy"]
