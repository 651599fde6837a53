"""A run's folder while things go wrong: ranks that share none, runs that go back and are killed,
files that cannot be written, a checkpoint that is written over."""
import shutil

import pytest

import orchvlm
from durable_cases import made
from orchvlm import run_folder
from orchvlm.run_folder import checkpoints, clean, verify
from orchvlm.saving import SaveError
from orchvlm.training import read_metrics


def steps_of(folder):
    return [step for step, _ in checkpoints(folder)]


def begun(trainer, until):
    """A run that takes some steps and is killed: nothing behind them is done."""
    steps = trainer.run()
    for row in steps:
        if row["step"] == until:
            return steps  # who holds it keeps it from ending
    raise AssertionError("it has ended before")


# ---------------------------------------------------------------- ranks without a shared folder


@pytest.mark.parametrize("mode", ["zero1", "fsdp"])
def test_ranks_that_share_no_folder_hear_of_it(mode, tmp_path):
    """And what was there before stays, though one is to be kept only."""
    list(made(None, tmp_path / "host 0", steps=1).run())
    shutil.copytree(tmp_path / "host 0", tmp_path / "host 1")

    def work(comm):
        trainer = made(comm, tmp_path / f"host {comm.rank}", shard=mode, keep=1, save_every=2)
        assert trainer.resume() == 1
        with pytest.raises(SaveError) as error:
            list(trainer.run())
        return str(error.value)
    said = orchvlm.comm.run_threads(2, work)
    assert said[0] == said[1]
    for words in ("optimizer-2-of-2", "one folder that they share", "step 1 is whole"):
        assert words in said[0]
    assert steps_of(tmp_path / "host 0") == [1]
    verify(tmp_path / "host 0" / "checkpoint-1")


# ---------------------------------------------------------------- runs that go back


def test_a_run_that_went_back_and_is_killed_goes_on_from_there(tmp_path):
    list(made(None, tmp_path, save_every=2).run())
    assert steps_of(tmp_path) == [2, 4, 6]
    first = made(None, tmp_path)
    first.resume(tmp_path / "checkpoint-2")
    assert steps_of(tmp_path) == [2, 4, 6]  # who only looks changes nothing
    killed = [begun(first, 3)]
    for _ in range(2):
        again = made(None, tmp_path)
        assert again.resume() == 2
        killed.append(begun(again, 4))
    aside = sorted(path.name for path in tmp_path.glob(".later-*"))
    assert aside == [".later-checkpoint-4", ".later-checkpoint-6"]  # nothing newer is there
    for name in aside:
        verify(tmp_path / name)
    last = made(None, tmp_path, save_every=5)
    last.resume()
    for row in last.run():
        if row["step"] == 6:  # the one of step 5 may be being written
            last.save()
            assert steps_of(tmp_path) == [2, 5, 6] and not list(tmp_path.glob(".*"))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    for run in killed:
        with pytest.MonkeyPatch.context() as patch:  # they have been dead for long
            patch.setattr(orchvlm.Trainer, "_last", lambda *_: None)
            run.close()


def test_a_folder_by_another_way_is_the_same(tmp_path, monkeypatch):
    list(made(None, tmp_path / "run", save_every=2, steps=4).run())
    monkeypatch.chdir(tmp_path)
    trainer = made(None, "run", steps=3)
    trainer.resume(tmp_path / "run" / "checkpoint-2")
    list(trainer.run())
    assert steps_of("run") == [2, 3]


# ---------------------------------------------------------------- another file fails


@pytest.mark.parametrize("n", [1, 2])
def test_what_was_begun_is_finished_though_another_file_fails(n, tmp_path):
    """Also the one of the last step, behind which no signs are exchanged."""
    for at in (2, 6):
        folder = tmp_path / f"at {at}"

        def work(comm):
            trainer, said = made(comm, folder, save_every=2), None
            try:
                for row in trainer.run():
                    if row["step"] == at and trainer.passes.rank == 0:
                        trainer._saver.note(folder / "metrics.jsonl", OSError(28, "No space left"))
            except SaveError as error:
                said = str(error)
            return said
        said = [work(None)] if n == 1 else orchvlm.comm.run_threads(n, work)
        assert said == [f"rank 0: {folder}/metrics.jsonl: No space left; the checkpoint of step "
                        f"{at} is whole"] * n
        for _, path in checkpoints(folder):
            verify(path)
        assert not list(folder.glob(".checkpoint-*"))


# ---------------------------------------------------------------- one that is written over


def test_a_step_that_is_saved_is_not_written_again(tmp_path, monkeypatch):
    trainer = made(None, tmp_path, steps=2)
    list(trainer.run())
    file = tmp_path / "checkpoint-2" / "trainer.json"
    before = file.stat().st_ino
    assert trainer.save() == file.parent and file.stat().st_ino == before
    again = made(None, tmp_path, steps=2)
    again.resume()
    again.save()
    assert file.stat().st_ino == before
    file.write_text("{}")  # damaged: it is written again
    again.save()
    verify(file.parent)


@pytest.mark.parametrize("killed", [False, True])
def test_what_is_written_over_stays_until_the_new_one_is_there(killed, tmp_path, monkeypatch):
    list(made(None, tmp_path, steps=2).run())
    verify(tmp_path / "checkpoint-2")
    another, original = made(None, tmp_path, steps=2), run_folder.os.replace

    class Killed(BaseException):
        pass

    def fails(source, target):
        if target == tmp_path / "checkpoint-2" and source.name == ".checkpoint-2":
            raise Killed if killed else OSError("the disk is gone")
        return original(source, target)
    monkeypatch.setattr(run_folder.os, "replace", fails)
    with pytest.raises(Killed if killed else SaveError):
        list(another.run())
    monkeypatch.undo()
    assert steps_of(tmp_path) == ([] if killed else [2])
    clean(tmp_path)
    assert steps_of(tmp_path) == [2] and not list(tmp_path.glob(".*"))
    verify(tmp_path / "checkpoint-2")
