"""Checkpoints: what lies in the folder, what a damaged one does, who goes on with it, and what a
disk that is full or a signal leaves."""
import json
import os
import re
import resource
import secrets
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import orchvlm
from comm_kill import wait_for
from durable_cases import losses, made, over
from orchvlm import saving
from orchvlm._comm_run import shared_folder
from orchvlm._unread import unread
from orchvlm.run_folder import best_checkpoint, checkpoints, last_good, verify
from orchvlm.saving import SaveError
from orchvlm.training import read_metrics

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
MODES = ("ddp", "zero1", "fsdp", "hybrid")


@pytest.fixture
def tmp_path():
    """In memory: what is put onto a disk waits for all that others write there."""
    with tempfile.TemporaryDirectory(dir=shared_folder()) as folder:
        yield Path(folder)


def header(path):
    """(header, bytes of the data) of a safetensors file, by the format's description."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8:8 + length]), raw[8 + length:]


# ---------------------------------------------------------------- what lies there


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_files_of_a_step(mode, dtype, tmp_path):
    """On three ranks those of one, but for the optimizer's, which make up the same arrays."""
    def work(comm, folder):
        trainer = made(comm, folder, steps=2, shard=mode, node_size=1, dtype=dtype)
        list(trainer.run())
        trainer.model.save_pretrained(folder / "model")
        return [trainer.optimizer.state_dict()]
    over(None, work, tmp_path / "one")
    over(3, work, tmp_path / "many")
    writers = 1 if mode == "ddp" else 3
    folder = tmp_path / "many" / "checkpoint-2"
    optimizers = [f"optimizer-{r + 1}-of-{writers}.safetensors" for r in range(writers)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", "manifest.json", "model.safetensors", "preprocessor_config.json",
             "trainer.json", *optimizers])
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (
            tmp_path / "many" / "model" / name).read_bytes()
    assert verify(folder)["step"] == 2
    whole, data = header(tmp_path / "one" / "checkpoint-2" / "optimizer-1-of-1.safetensors")
    weights, _ = header(folder / "model.safetensors")
    seen = {}
    for name in optimizers:
        part, raw = header(folder / name)
        about = part.pop("__metadata__")
        assert about["step"] == "2"
        for key, entry in part.items():
            place = json.loads(about["pieces"])[key.rpartition(".")[0]]
            first, last = entry["data_offsets"]
            flat = seen.setdefault(key, np.full(int(np.prod(place["shape"])), np.nan, np.float32))
            flat[place["offset"]:place["offset"] + (last - first) // 4] = np.frombuffer(
                raw[first:last], "<f4")
            assert place["shape"] == weights[key.rpartition(".")[0]]["shape"]
    whole.pop("__metadata__")
    assert seen.keys() == whole.keys()
    for key, entry in whole.items():
        wanted = np.frombuffer(data[slice(*entry["data_offsets"])], "<f4")
        np.testing.assert_allclose(seen[key], wanted, rtol=1e-3, atol=1e-6, err_msg=key)


def test_big_models_are_written_in_shards_by_all(tmp_path, monkeypatch):
    original = saving.in_files
    monkeypatch.setattr(saving, "in_files", lambda tensors, dtype: original(tensors, dtype, 4000))
    over(3, losses, tmp_path, steps=1, shard="fsdp")
    folder = tmp_path / "checkpoint-1"
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    trainer = made(None, tmp_path)
    assert trainer.resume() == 1
    stored = orchvlm.Model.from_pretrained(folder, threads=1).state_dict()
    assert all((trainer.model.parameters[name] == array).all() for name, array in stored.items())


# ---------------------------------------------------------------- what is damaged


def damaged(path, kind):
    if kind == "is missing":
        path.unlink()
    elif kind == "cut off":
        os.truncate(path, path.stat().st_size - 1)
    else:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with checkpoints of the steps 2 and 4, over two ranks."""
    folder = tmp_path_factory.mktemp("two")
    over(2, losses, folder, steps=4, shard="zero1", save_every=2)
    return folder


@pytest.mark.parametrize("kind", ["is missing", "cut off", "altered"])
def test_a_damaged_file_is_named_and_the_one_before_taken(two, tmp_path, kind):
    names = sorted(path.name for path in (two / "checkpoint-4").iterdir())
    assert len(names) == 7
    for name in names:
        folder = tmp_path / name
        shutil.copytree(two, folder)
        damaged(folder / "checkpoint-4" / name, kind)
        if name == "manifest.json" and kind != "is missing":
            words = "manifest.json|altered|not what|is missing"
        else:
            words = f"{name}.*{kind}"
        with pytest.raises(ValueError, match=words):
            verify(folder / "checkpoint-4")
        with pytest.raises(ValueError, match=words):
            made(None, folder).resume(folder / "checkpoint-4")
        trainer = made(None, folder)
        with pytest.warns(RuntimeWarning, match=words):
            assert trainer.resume() == 2
        damaged(folder / "checkpoint-2" / "trainer.json", "is missing")
        with pytest.raises(FileNotFoundError, match="no checkpoint to resume from.*trainer.json"):
            made(None, folder).resume()


def test_ranks_take_the_same_one(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    damaged(tmp_path / "run" / "checkpoint-4" / "model.safetensors", "cut off")

    def work(comm):
        trainer = made(comm, tmp_path / "run")
        return trainer.resume()
    with pytest.warns(RuntimeWarning, match="cut off"):
        assert orchvlm.comm.run_threads(3, work) == [2, 2, 2]
    damaged(tmp_path / "run" / "checkpoint-2" / "model.safetensors", "altered")
    with pytest.raises(orchvlm.CommError, match="no checkpoint to resume from"):
        orchvlm.comm.run_threads(3, work)


def test_a_manifest_names_files_of_its_folder_alone(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-4" / "manifest.json"
    good = json.loads(path.read_text())
    for bad in ({}, {**good, "format": "x"}, {**good, "files": []}, {**good, "step": "4"},
                {**good, "files": {"../x": {}}}, {**good, "files": {"config.json": 3}},
                {**good, "files": {"config.json": {}}}):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="manifest|config.json"):
            verify(path.parent)
    assert last_good(tmp_path / "run")[0].name == "checkpoint-2"


# ---------------------------------------------------------------- who goes on


@pytest.mark.parametrize("mode", MODES)
def test_resumed_on_as_many_ranks_and_on_others(mode, tmp_path):
    """As many: every bit.  Others: the same samples and losses."""
    print("seed", SEED)
    options = {"shard": mode, "node_size": 1, "dtype": "bfloat16" if SEED % 2 else "float32"}
    wanted, weights = over(2, losses, tmp_path / "whole", **options)
    part = tmp_path / "part"
    over(2, losses, part, until=3, **options)
    for n in (2, 1 + 2 * (SEED % 2)):  # 1 or 3
        folder = tmp_path / f"on {n}"
        shutil.copytree(part, folder)
        got, values = over(None if n == 1 else n, losses, folder, resume=True, **options)
        if n == 2:
            assert got == wanted[3:]
            assert all((values[name] == weights[name]).all() for name in weights)
        np.testing.assert_allclose(got, wanted[3:], rtol=1e-5 if SEED % 2 == 0 else 1e-2)
        rows = read_metrics(folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row["tokens"] for row in rows] == [
            row["tokens"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")]


# ---------------------------------------------------------------- beside the steps


def test_it_is_written_while_steps_run(tmp_path, monkeypatch):
    """What is written is the state of the step that it bears, however late it is written."""
    gate, original = threading.Event(), saving.sealed

    def slow(path):
        assert gate.wait(60)
        return original(path)
    monkeypatch.setattr(saving, "sealed", slow)
    trainer, states = made(None, tmp_path, save_every=3), {}
    for row in trainer.run():
        states[row["step"]] = trainer.model.state_dict()
        if row["step"] == 5:
            wait_for([tmp_path / ".checkpoint-3"], 60)  # its thread has begun
            assert checkpoints(tmp_path) == []
            gate.set()
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 6]
    for step, path in checkpoints(tmp_path):
        stored = orchvlm.Model.from_pretrained(path, threads=1).state_dict()
        assert all((array == states[step][name]).all() for name, array in stored.items())


def test_the_last_and_the_best_stay(tmp_path):
    trainer = made(None, tmp_path, steps=7, save_every=1, keep=2)
    for row in trainer.run():
        trainer.judge({2: 0.9, 3: 0.4}.get(row["step"], float("nan")))
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 6, 7]
    assert best_checkpoint(tmp_path).name == "checkpoint-2"


def test_going_back_leaves_no_later_one(tmp_path):
    list(made(None, tmp_path, save_every=2).run())
    again = made(None, tmp_path, keep=1)
    again.resume(tmp_path / "checkpoint-2")
    for row in again.run():
        break
    assert [step for step, _ in checkpoints(tmp_path)] == [3]


def test_a_step_that_was_taken_is_in_the_metrics(tmp_path, monkeypatch):
    """Other ranks may be gone when rank 0 asks them for figures."""
    trainer = made(None, tmp_path, save_every=1)

    def figures(ran):
        if trainer.step == 3:
            raise orchvlm.CommError("rank 1 is gone")
        return {}

    monkeypatch.setattr(trainer.passes, "metrics", figures)
    with pytest.raises(orchvlm.CommError):
        list(trainer.run())
    again = made(None, tmp_path)
    assert again.resume() == 3
    list(again.run())
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_a_killed_run_left_half_done_goes(tmp_path):
    (tmp_path / ".checkpoint-3").mkdir(parents=True)
    (tmp_path / ".checkpoint-3" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    list(made(None, tmp_path, steps=1).run())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "metrics.jsonl"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


# ---------------------------------------------------------------- a full disk


def on_a_full_disk(comm, folder, mode, victim, most):
    """From step 3 on the victim's files may have no more than so many bytes."""
    every = 100 if (victim, most) == (0, 20) else 4  # that alone stops the log of metrics
    trainer = made(comm, folder, steps=9, save_every=every, shard=mode)
    try:
        for row in trainer.run():
            if row["step"] == 2:
                trainer.save()
            if row["step"] == 3 and comm.rank == victim:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    except SaveError as error:
        return str(error), trainer.step
    return None


@pytest.mark.parametrize("mode, victim, most", [("ddp", 0, 20_000), ("fsdp", 1, 20),
                                                ("zero1", 0, 20_000), ("ddp", 0, 20)])
def test_a_full_disk_ends_all_ranks_and_loses_nothing(mode, victim, most, tmp_path):
    said = orchvlm.comm.run_processes(2, on_a_full_disk, tmp_path, mode, victim, most, start="fork")
    assert said[0] == said[1] and said[0][1] in range(4, 10), said
    file = "metrics.jsonl" if (victim, most) == (0, 20) else "checkpoint-[489].*safetensors"
    assert re.fullmatch(f"rank {victim}: {tmp_path}.*{file}: File too large; the checkpoint of "
                        "step 2 is whole", said[0][0]), said
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert made(None, tmp_path).resume() == 2


# ---------------------------------------------------------------- signals


def until_a_signal(comm, folder, mode):
    trainer = made(comm, folder, steps=100000, shard=mode)
    for row in trainer.run():
        if row["step"] == 3:
            (folder / f"ready {comm.rank}").touch()


@pytest.mark.parametrize("number, ending", [(signal.SIGTERM, SystemExit),
                                            (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_leaves_a_checkpoint_of_all_ranks(number, ending, tmp_path):
    def strike():
        while len(list(tmp_path.glob("ready *"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
    threading.Thread(target=strike, daemon=True).start()
    with pytest.raises(ending):
        orchvlm.comm.run_processes(2, until_a_signal, tmp_path, "fsdp", start="fork")
    (step, _), = checkpoints(tmp_path)
    assert made(None, tmp_path).resume() == step >= 3
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == step


def test_sigterm_on_one_rank(tmp_path):
    trainer = made(None, tmp_path)
    with pytest.raises(SystemExit) as ended:
        for row in trainer.run():
            if row["step"] == 2:
                signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143 and [step for step, _ in checkpoints(tmp_path)] == [3]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---------------------------------------------------------------- loops that are left


def left_by(comm, folder, mode, ranks):
    """Steps taken; some ranks leave behind the second one."""
    trainer = made(comm, folder, steps=50, shard=mode)
    steps = trainer.run()
    for row in steps:
        if row["step"] == 2 and comm.rank in ranks:
            steps.close()
            break
    return trainer.step


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_leaves_alone_ends_the_others(mode, rank, tmp_path):
    with pytest.raises(orchvlm.CommError, match="1 of 2 ranks left their loops .* behind step 2"):
        orchvlm.comm.run_threads(2, left_by, tmp_path, mode, [rank], silent_s=5)
    assert [step for step, _ in checkpoints(tmp_path)] == ([2] if mode == "ddp" else [])


@pytest.mark.parametrize("mode", ["ddp", "zero1", "fsdp"])
def test_ranks_that_leave_together_write_together(mode, tmp_path):
    assert orchvlm.comm.run_threads(2, left_by, tmp_path, mode, [0, 1]) == [2, 2]
    assert [step for step, _ in checkpoints(tmp_path)] == [2]


def test_a_loop_that_fails_on_one_rank_ends_all(tmp_path):
    def work(comm):
        for row in made(comm, tmp_path, steps=50, shard="fsdp").run():
            if row["step"] == 3 and comm.rank == 0:
                raise BrokenPipeError("nobody reads this")

    with pytest.raises(orchvlm.CommError, match="rank 0 failed: BrokenPipeError: nobody reads"):
        orchvlm.comm.run_threads(2, work, silent_s=5)


def test_a_run_whose_output_nobody_reads_ends_well(monkeypatch):
    ends = os.pipe()
    os.close(ends[0])
    with os.fdopen(ends[1], "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with unread():
            print("gone", flush=True)
            print("x" * 100_000, end="")
        assert sys.stdout is stream
        with open(os.devnull, "wb") as null:
            assert os.path.samestat(os.fstat(stream.fileno()), os.fstat(null.fileno()))
