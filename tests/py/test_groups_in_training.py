"""Groups in a run over ranks: who chooses them, what lines of metrics and reports say of them."""
import logging
import os
import secrets
from dataclasses import replace

import numpy as np
import pytest

import orchvlm
from orchvlm import data
from orchvlm.choosing import (LANGUAGE, batch_cost, counted_costs, group_cost, language_s,
                              one_node, planned)
from orchvlm.cli import main
from orchvlm.group_metrics import Seen
from orchvlm.ranks_report import timeline_of, timeline_svg, trace_of
from orchvlm.refit import Refit
from orchvlm.routing import Balance
from orchvlm.sequence_phase import groups_of
from orchvlm.sequences import SequencePlan
from test_rank_training import run as plain_run
from test_training import CONFIG

pytest.importorskip("PIL")
SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
CLUSTER = one_node(4)
COST = orchvlm.SequenceCost(1e-6, 1e-4, 1e-3, comm={1: 0.0, 2: 1e-5, 4: 2e-5}, heads=4)


def batch_of(lengths):
    return orchvlm.Batch(lengths, lengths, np.arange(len(lengths)) % 4)


def plan(lengths, language, limits=None, tokens=None, cost=COST):
    return planned(batch_of(lengths), CLUSTER, {"llm": cost}, limits or {}, language, tokens)


# ---------------------------------------------------------------- choice


def test_auto_takes_what_the_cost_says_is_faster():
    """Against the definition: seconds of both plans by one cost, the lesser is chosen."""
    print("seed", SEED)
    rng, chosen = np.random.default_rng(SEED), []
    drawn = [np.maximum(1, rng.lognormal(4, 1.5, 12).astype(int)) for _ in range(4)]
    for lengths in (np.full(12, 50), np.append(1000, np.full(11, 20)), *drawn):
        whole, groups, auto = (plan(lengths, kind) for kind in LANGUAGE)
        assert isinstance(groups.llm, SequencePlan) and not isinstance(whole.llm, SequencePlan)
        taken = [np.flatnonzero(whole.llm.rank == rank) for rank in range(4)]
        alone_s = max(COST(lengths[items], 1) for items in taken)
        assert language_s(whole, COST) == pytest.approx(alone_s)
        shared = any(degree > 1 for _, degree in groups.llm.communicators)
        wanted = groups if groups.llm.time < alone_s * (1 if shared else 0.998) else whole
        assert auto.digest == wanted.digest
        chosen.append(wanted is groups)
        assert auto.digest == plan(lengths, "auto").digest  # on every rank and in every run
    assert chosen[:2] == [False, True]


@pytest.mark.parametrize("limits, tokens", [({"llm": 100}, None), ({}, 100), ({"llm": 300}, 100)])
def test_only_groups_hold_what_is_longer_than_a_rank(limits, tokens):
    """Also where they would take longer."""
    dear = replace(COST, comm={1: 0.0, 4: 1.0})
    found = plan([180, 20, 20, 20], "auto", limits, tokens, dear)
    shards = [-(-int(found.batch.language_lengths[items].sum()) // degree)
              for groups in groups_of(found) for _, degree, items in groups]
    assert isinstance(found.llm, SequencePlan) and max(shards) <= 100
    assert not isinstance(plan([99, 20, 20, 20], "auto", limits, tokens, dear).llm, SequencePlan)


def test_the_memory_that_a_cost_names_is_a_limit():
    cost = replace(COST, comm={1: 0.0, 4: 1.0}, memory_per_token=2.0, memory_limit=200.0)
    assert isinstance(plan([180, 20, 20, 20], "auto", cost=cost).llm, SequencePlan)
    assert not isinstance(plan([99, 20, 20, 20], "auto", cost=cost).llm, SequencePlan)


def test_what_is_longer_than_all_ranks_has_them_all():
    found = plan([1000, 20, 20], "auto", {"llm": 50})
    assert (4, 0) in [(group.degree, group.first_gpu) for micro in found.llm.micro_batches
                      for group in micro.groups]


def test_without_a_plan_it_is_balanced_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, "orchvlm.choosing"):
        found = plan([30, 0, 20], "sequence_parallel")  # groups have no place for no tokens
    assert not isinstance(found.llm, SequencePlan)
    assert "whole samples on ranks" in caplog.text and "lengths" in caplog.text


def test_costs_of_groups_are_those_of_ranks():
    config = orchvlm.preset("tiny")
    whole = counted_costs(config, one_node(3))["llm"]
    cost = counted_costs(config, one_node(3), "auto")["llm"]
    assert list(cost.comm) == [1, 2, 3] and cost.heads == 6 and cost.comm[1] == 0
    assert 0 < cost.comm[2] < cost.comm[3]
    assert batch_cost(cost) == whole and batch_cost(whole) is whole
    assert cost([300, 20], 1) == pytest.approx(whole([300, 20]))
    assert group_cost(cost, config, one_node(3)) is cost
    assert list(counted_costs(config, one_node(8), "auto")["llm"].comm) == [1, 2, 4]  # of 6 heads


def test_a_fit_finds_what_the_times_of_groups_were_made_of():
    """The degree that was not seen costs as much beside a token as before."""
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    truth = replace(COST, quadratic=3e-7, linear=4e-4, fixed=2e-3, comm={1: 0.0, 2: 5e-5, 4: 8e-5})
    refit, seen = Refit({"llm": COST}), set()
    for step in range(12):
        lengths = np.maximum(1, rng.lognormal(4, 1.2, 10).astype(int))
        one = plan(lengths, "sequence_parallel", cost=replace(COST, comm={1: 0.0, 2: 1e-6}))
        micros = groups_of(one)
        seen |= {degree for groups in micros for _, degree, _ in groups}
        busy = np.zeros((len(micros), 4))
        for m, groups in enumerate(micros):
            for first, degree, items in groups:  # one rank of a group is the slowest
                busy[m, first:first + degree] = 0.5 * truth(lengths[items], degree)
                busy[m, first + step % degree] *= 2
        refit.note([one], "llm", busy.sum(0), Seen([one], None, busy, 0 * busy))
    (errors,), cost = refit.fit().values(), refit.costs["llm"]
    assert errors[1] < 1e-6 < errors[0]
    for degree in seen:  # exchanges of the least degree may be in what a token takes
        lengths = rng.integers(1, 900, 7)
        assert cost(lengths, degree) == pytest.approx(truth(lengths, degree), rel=1e-3)
    assert cost.comm[4] == pytest.approx(COST.comm[4] * cost.linear / COST.linear)


def test_groups_fit_into_the_memory():
    """A sample that no rank holds by itself; the arenas hold no more than was said."""
    print("seed", SEED)
    config = orchvlm.ModelConfig(CONFIG)
    ids = np.random.default_rng(SEED).integers(10, 200, 700)
    inputs = orchvlm.Inputs(input_ids=ids, labels=ids, cu_seqlens=[0, 600, 650, 700])

    def work(comm, language, room=None):
        model = orchvlm.Model.from_config(config, seed=0, threads=1)
        orchvlm.Shard(model, comm)
        held = sum(orchvlm.Shard.predict(model, comm.size).values())
        ranks = orchvlm.Orchestrator(model, comm, language=language,
                                     memory_bytes=room and room + held)
        prepared = ranks.prepare(inputs if comm.rank == 0 else inputs[np.zeros(0, int)])
        model.zero_grad()
        ran = ranks.run(prepared, Balance(model, "exact", 0.0, ranks.total))
        own = model.memory()
        return float(ranks.total(np.array([ran.loss]))[0]), own["activations"] + own["workspace"]
    whole = orchvlm.comm.run_threads(2, lambda comm: work(comm, "balance"))
    room = max(took for _, took in whole) * 3 // 4
    with pytest.raises(orchvlm.CommError, match="too little for one sample"):
        orchvlm.comm.run_threads(2, lambda comm: work(comm, "balance", room))
    for loss, took in orchvlm.comm.run_threads(2, lambda comm: work(comm, "auto", room)):
        assert loss == pytest.approx(whole[0][0], rel=1e-6) and took <= 1.05 * room + 4096


# ---------------------------------------------------------------- runs


def test_exposed_is_the_last_to_come_of_each_group():
    one = plan([400, 300, 10, 10], "sequence_parallel", {"llm": 210})
    waited = np.arange(4.0) + 10 * np.ones((len(groups_of(one)), 1))
    wanted = sum(max(waited[m, first] for first, _, _ in groups)
                 for m, groups in enumerate(groups_of(one)))
    assert Seen([one], None, waited, waited).exposed_s() == wanted


def run(comm, folder, **settings):
    model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1)
    source = data.Mixture([data.Tasks(seed=2, kinds=["colour", "count"], max_side=112)])
    loader = data.Loader(source, data.Processor.from_config(CONFIG), 400) if comm is None else \
        data.RankLoader(source, data.Processor.from_config(CONFIG), 400, comm)
    config = orchvlm.TrainingConfig(steps=4, lr=3e-3, warmup=2, **settings)
    trainer = orchvlm.Trainer(model, loader, config, folder, comm)
    rows = trainer.fit()
    return rows, trainer.passes.timeline


def test_a_run_in_groups_is_that_of_one_rank(tmp_path):
    alone, _ = run(None, tmp_path / "one")
    rows, timeline = orchvlm.comm.run_threads(
        3, lambda comm: run(comm, tmp_path / "groups", rank_language="auto", rank_tokens=40))[0]
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in alone],
                               rtol=1e-6)
    marked = [row for row in rows if "sp_degrees" in row]
    assert marked and all(row["sp_time"] > 0 and row["sp_gap"] >= 0 for row in marked)
    assert any("2" in row["sp_degrees"] or "3" in row["sp_degrees"] for row in marked)
    assert orchvlm.training.read_metrics(tmp_path / "groups" / "metrics.jsonl") == rows
    if "sp_degrees" in rows[-1]:
        check_timeline(timeline, rows[-1]["sp_degrees"])


def test_a_resumed_run_repeats_its_groups(tmp_path):
    """Bit for bit, as the choice goes by limits of work."""
    told = {"rank_language": "auto", "rank_tokens": 40}
    whole = orchvlm.comm.run_threads(2, lambda comm: plain_run(
        comm, tmp_path / "whole", 4, **told))[0]
    orchvlm.comm.run_threads(2, lambda comm: plain_run(comm, tmp_path / "parts", 2, **told))
    later = orchvlm.comm.run_threads(2, lambda comm: plain_run(
        comm, tmp_path / "parts", 4, True, **told))[0]
    assert [row["sp_degrees"] for row in later[2]] == [row["sp_degrees"] for row in whole[2][2:]]
    assert later[0] == whole[0][2:]
    assert all((later[1][name] == value).all() for name, value in whole[1].items())


def check_timeline(timeline, degrees):
    """Every rank's micro-batches have the group that the line of metrics says."""
    names = [[name for name, *_ in rank if name.partition(" ")[0] == "llm"] for rank in timeline]
    assert len({len(rank) for rank in names}) == 1
    for m, wanted in enumerate(degrees.split("; ")):
        found = {rank[m] for rank in names if " " in rank[m]}
        assert sorted(int(name.partition("+")[2]) for name in found) == sorted(
            int(degree) for degree in wanted.split("+"))
    again = timeline_of(trace_of(timeline))
    assert [[event[0] for event in rank] for rank in again] == [
        [event[0] for event in rank] for rank in timeline]
    svg = timeline_svg(timeline)
    group = next(name for rank in names for name in rank if not name.endswith("+1"))
    first, degree = group.removeprefix("llm ").split("+")
    assert f"llm, group of {degree} from rank {first} on: " in svg


def test_the_preset_for_long_samples(tmp_path, capsys):
    """What it says by itself, and a short run of it."""
    told = orchvlm.RunConfig({"model": {"preset": "long"}, "ranks": {"tokens": 900}})
    assert (told["ranks.n"], told["ranks.language"], told["ranks.tokens"]) == (4, "auto", 900)
    assert told["data.kinds"] == ["album", "frames", "story"]
    assert told.origins["ranks.language"] == "preset long"
    files = orchvlm.RunConfig({"model": {"preset": "long"}, "data": {"files": ["a.jsonl"]}})
    assert files["data.kinds"] is None and files["data.difficulty"] is None
    assert main(["train", "--preset", "long", "--explain", "--tokens", "1500", "--threads", "1",
                 "--set", "ranks.tokens=400"]) == 0
    assert "Language phase: groups of " in capsys.readouterr().out
    out = tmp_path / "run"
    assert main(["train", "--preset", "long", "--steps", "2", "--samples", "1", "--tokens", "700",
                 "--ranks", "2", "--threads", "1", "--out", str(out), "--set",
                 "ranks.language=sequence_parallel", "--set", "ranks.tokens=200"]) == 0
    rows = orchvlm.training.read_metrics(out / "metrics.jsonl")
    assert len(rows) == 2 and all("2" in row["sp_degrees"] for row in rows)
    page = (out / "report.html").read_text()
    assert "group of 2 from rank 0 on" in page and ">0+2</text>" in page


def test_refusals():
    model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
    with pytest.raises(ValueError, match="rank_language must be one of balance"):
        orchvlm.TrainingConfig(rank_language="groups")

    def work(comm):
        with pytest.raises(ValueError, match="language must be one of balance, .* got 'auto '"):
            orchvlm.Orchestrator(model, comm, language="auto ")
        wide = replace(COST, comm={1: 0.0, 7: 0.0}, heads=0)
        with pytest.raises(ValueError, match="groups of 7; the model has 6 query heads"):
            orchvlm.Orchestrator(model, comm, language="auto", costs={"llm": wide})
    orchvlm.comm.run_threads(1, work)
