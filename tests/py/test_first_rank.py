"""What rank 0 decides for all: also where other ranks look at other folders."""
import contextlib
import threading

import pytest

import orchvlm
from orchvlm import commands_model
from orchvlm.cli import make_parser
from orchvlm.first_rank import first_rank_says


def said(n, decide, given=lambda rank: "same", path=lambda rank: None):
    """By rank (what was said, its error)."""
    return orchvlm.comm.run_threads(n, lambda comm: first_rank_says(
        comm, lambda: decide(comm.rank), given(comm.rank), path(comm.rank)), silent_s=5)


def test_rank_0_decides():
    assert said(3, lambda rank: {"resume": rank == 0}) == [({"resume": True}, None)] * 3
    assert said(1, lambda rank: rank + 5) == [(5, None)]


def test_an_error_of_rank_0_is_every_rank_s():
    def refuse(rank):
        raise LookupError(f"no run at {rank}")

    for n in (1, 3):
        (nothing, own), *others = said(n, refuse)
        assert nothing is None and isinstance(own, LookupError)
        assert [str(error) for _, error in others] == [
            "rank 0 has refused: LookupError: no run at 0"] * (n - 1)


def test_ranks_that_are_told_other_things_are_named(tmp_path):
    refused = said(3, lambda rank: 1, given=lambda rank: rank // 2)
    assert [str(error) for _, error in refused] == [
        "rank 2 was given other options than rank 0: give all ranks the same"] * 3
    for rank, text in enumerate(("[data]", "[data]", "[model]")):
        (tmp_path / f"{rank}.toml").write_text(text)
    path = [tmp_path / f"{rank}.toml" for rank in range(4)]  # the last one has no such file
    assert said(2, lambda rank: 1, path=path.__getitem__) == [(1, None)] * 2
    refused = said(4, lambda rank: 1, path=path.__getitem__)
    assert all("on rank 2 is not the file of rank 0" in str(error) for _, error in refused)


def test_ranks_with_folders_of_their_own_take_the_same_way(tmp_path, monkeypatch):
    """``--resume auto`` where only rank 0 sees the run's checkpoints."""
    pytest.importorskip("PIL", reason="the preset's pictures are drawn with Pillow")
    here, seen = threading.local(), []

    def look(arguments):
        assert here.comm.rank == 0
        arguments.resume = "/there/checkpoint-4"
        return orchvlm.RunConfig({"model": {"preset": "tiny"}}), tmp_path

    def work(comm):
        here.comm = comm
        return commands_model.train(make_parser().parse_args(["train", "--resume", "auto"]))

    monkeypatch.setattr("orchvlm.comm.init", lambda: contextlib.nullcontext(here.comm))
    monkeypatch.setattr(commands_model, "told_by", look)
    monkeypatch.setattr(commands_model, "_train_rank", lambda comm, arguments, out, config:
                        seen.append((arguments.resume, out, config["ranks.n"])) or 0)
    assert orchvlm.comm.run_threads(2, work, silent_s=5) == [0, 0]
    assert seen == [("/there/checkpoint-4", tmp_path, 2)] * 2
