"""Steps in rounds: the numbers of one call, within the memory that was said."""
import os
import secrets
from fnmatch import fnmatchcase
from types import SimpleNamespace

import numpy as np
import pytest

import orchvlm
from durable_cases import made
from orchvlm.arenas import numbers, of_model, parts_of
from orchvlm.choosing import counted_costs, media_of, one_node, planned
from orchvlm.explain import foretell
from orchvlm.orchestrator import Orchestrator
from orchvlm.rounds import Rounds, dealt, fewest, share_of, step_bytes, taken
from orchvlm.routing import Balance
from orchvlm.sounds import sound_tokens
from orchvlm.training import read_metrics
from rank_cases import (FAMILIES, RandomGroups, RandomPlans, draw_case, joined, law,
                        made_model)

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
DRAWS = int(os.environ.get("ORCHVLM_ROUND_DRAWS", 1))


class Random(RandomPlans):
    """In as many rounds as the seed says, under a plan of its own for each."""

    def rounds(self, batch, sizes, media, beside=False):
        rng = np.random.default_rng(self.seed)
        n, place = int(rng.integers(1, 1 + max(1, len(batch)))), rng.permutation(len(batch))
        parts = [np.sort(part) for part in np.array_split(place, n)]
        return [taken(batch, sizes, part, self.plan) for part in parts]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_rounds(family):
    print("seed", SEED)
    for draw in range(4):
        orchvlm.comm.run_threads(1 + draw % 3, law, [SEED, 100 + draw], family, Random)


class RandomInGroups(Random, RandomGroups):
    """The same, with groups of its own in each round."""


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_groups_in_rounds(family):
    print("seed", SEED)
    orchvlm.comm.run_threads(3, law, [SEED, 200], family, RandomInGroups)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_fit(family):
    """Least memory for which a batch still can be taken, and what the arenas then hold."""
    print("seed", SEED)
    config, samples = draw_case([SEED, 7], family)
    samples = samples * 2

    def work(comm, memory_bytes=None, checkpoint="none"):
        model = made_model([SEED, 7], config)
        orchvlm.Shard(model, comm)
        ranks = Orchestrator(model, comm, memory_bytes=memory_bytes)
        held = sum(orchvlm.Shard.predict(model, 2).values())
        prepared = ranks.prepare(joined(samples[comm.rank::2]))
        if memory_bytes is not None:
            model.zero_grad()
            ranks.run(prepared, Balance(model, "exact", 0.0, ranks.total), checkpoint)
            ranks.reduce_gradients()
        own = model.memory()
        return len(prepared.rounds), own["activations"] + own["workspace"], held
    (rounds, _, held), _ = orchvlm.comm.run_threads(2, work)
    assert rounds == 1
    room, seen = 1 << 30, []
    while True:  # ever less room, until a sample has no place any more
        try:
            results = orchvlm.comm.run_threads(2, work, held + room)
        except orchvlm.CommError as error:
            assert "is too little for one sample of rank" in str(error), error
            break
        seen.append(results[0][0])
        assert all(took <= room for _, took, _ in results), (room, results)
        room = min(room, max(took for _, took, _ in results)) * 3 // 4
    print("rounds", seen)
    assert seen[0] == 1 and seen == sorted(seen)


FROZEN = {"nothing": (), "language": ("model.language_model.*", "lm_head*"),
          "towers": ("model.visual.*", "model.audio_tower.*")}


class InRounds(Orchestrator):
    """In so many rounds, whatever they take."""

    n = 1

    def rounds(self, batch, sizes, media, beside=False):
        self.made = [taken(batch, sizes, part, self.plan)
                     for part in dealt(batch, min(self.n, len(batch)))]
        return self.made


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_rank_takes_more_than_it_was_foretold(family, frozen):
    """Of each arena: features of others' pictures, and what a frozen part keeps, among it."""
    print("seed", SEED)
    for draw in range(DRAWS):
        key = [SEED, 90 + draw]
        rng = np.random.default_rng(key)
        config, samples = draw_case(key, family)
        samples = samples * int(rng.integers(1, 4))
        ranks, n = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        checkpoint = str(rng.choice(["none", "selective", "full"]))
        mode, dtype = str(rng.choice(["ddp", "zero1", "fsdp"])), str(
            rng.choice(["float32", "bfloat16"]))

        def work(comm):
            model = orchvlm.Model(config, threads=1, dtype=dtype)
            for pattern in FROZEN[frozen]:
                if any(fnmatchcase(row[0], pattern) for row in model._core.parameters()):
                    model.freeze(pattern)
            orchvlm.Shard(model, comm, mode)
            passes = InRounds(model, comm, max_tokens=40)
            passes.n = n
            prepared = passes.prepare(joined(samples[comm.rank::ranks]))
            model.zero_grad()
            passes.run(prepared, Balance(model, "exact", 0.0, passes.total), checkpoint)
            passes.reduce_gradients()
            shares = [share for one in passes.made
                      for share in share_of(one, comm.rank, np.zeros(0, np.float32))]
            foretold = step_bytes(model.config, shares, model._core.parameters(), dtype, checkpoint,
                                  counts=True, encoded=len(passes.made) == 1)
            taken_ = model.memory()
            return [(arena, taken_[arena], foretold[arena]) for arena in foretold]
        for rows in orchvlm.comm.run_threads(ranks, work):
            for arena, took, foretold in rows:
                assert took <= foretold <= 1.02 * took + 4096, (draw, mode, dtype, arena)


def asked_all(config, rounds, ranks, rows, dtype, checkpoint, chunk, pixels):
    """What Rounds.bytes is, of every rank and every round, block by block."""
    def ran(share, training=True, **without):
        share = SimpleNamespace(**{**vars(share), **without})
        return parts_of(config, share, rows, dtype, training, checkpoint if training else "none",
                        chunk)
    found, none = [], {"grid_thw": None, "mel_lengths": None}
    for rank in range(ranks):
        shares = [share for one in rounds for share in share_of(one, rank, pixels)]
        seen = [ran(share) for share in shares]
        activations = sum(max(parts[name] for parts, _ in seen) for name in seen[0][0])
        if config.sparse and config.text.get("router_aux_loss_coef", 0.001) > 0:
            seen += [ran(share, False, **(none if len(rounds) == 1 else {})) for share in shares]
        found.append(activations + max(work for _, work in seen))
    return max(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_that_take_most_are_those_of_all_ranks(family):
    """Most ranks and rounds are not asked, and the bytes are the same."""
    print("seed", SEED)
    for draw in range(12):
        rng = np.random.default_rng([SEED, 30 + draw])
        model = orchvlm.Model(FAMILIES[family](rng), threads=1,
                              dtype=str(rng.choice(["float32", "bfloat16"])))
        config = model.config
        if draw % 3 == 1:
            model.freeze("model.language_model.*")
        elif draw % 3 == 2:
            model.freeze("model.visual.*")
        rows, ranks, n = model._core.parameters(), int(rng.integers(1, 9)), int(rng.integers(1, 30))
        chunk = None if rng.random() < 0.5 else int(rng.integers(1, 4000))
        checkpoint = str(rng.choice(["none", "selective", "full"]))
        batch, sizes = drawn_batch(rng, config, n)

        def plan(batch):
            return planned(batch, one_node(ranks), counted_costs(config, one_node(ranks)),
                           {} if draw % 2 else {"llm": 600})
        rounds = [taken(batch, sizes, part, plan)
                  for part in dealt(batch, int(rng.integers(1, 1 + min(n, 5))))]
        pixels = np.zeros(0, rng.choice([np.uint8, np.float32]))
        cut = Rounds(config, rows, model.dtype, ranks, 0, 1, checkpoint, chunk)
        assert cut.bytes(rounds, pixels.dtype) == asked_all(
            config, rounds, ranks, rows, model.dtype, checkpoint, chunk, pixels), draw


def drawn_batch(rng, config, n):
    """(Batch, sizes) of n samples, some of them with an item of each medium."""
    text, phases, sizes = rng.integers(1, 3000, n), {}, {}
    for name in media_of(config):
        sample = np.sort(rng.permutation(n)[:rng.integers(0, n + 1)])
        size = np.zeros((len(sample), 3), np.int64)
        if name == "vision":
            merge = config.vision["spatial_merge_size"]
            size[:, 0], size[:, 1:] = 1, merge * rng.integers(1, 12, (len(sample), 2))
            length = size.prod(axis=1)
            tokens = length // merge ** 2
        else:
            size[:, 0] = length = rng.integers(1, 2000, len(sample))
            tokens = sound_tokens(length)
        # Behind the text come a picture, then a sound.
        before = sum((np.bincount(one.sample, one.out_tokens, n) for one in phases.values()),
                     text).astype(np.int64)
        phases[name] = orchvlm.Items(sample, before[sample], length, tokens, length)
        sizes[name] = size
    return orchvlm.Batch(text, text, np.zeros(n, np.int64), phases), sizes


def test_no_byte_is_less_where_no_number_is():
    """Of packs around the sizes at which norms and experts are cut into other chunks."""
    print("seed", SEED)
    rng, seen = np.random.default_rng([SEED, 60]), 0
    model = orchvlm.Model(FAMILIES["qwen3_omni"](rng), threads=1)
    config, rows = model.config, model._core.parameters()
    tokens = [*range(2046, 2052), *range(2110, 2116), *rng.integers(1, 5000, 20).tolist()]
    chunk = 2048 * config.text.get("num_experts_per_tok", 1)
    found = []
    for n in tokens:
        share = SimpleNamespace(
            cu_seqlens=np.array([0, n]), mel_lengths=rng.integers(1, 300, 2), pixels=None,
            grid_thw=np.array([[1, 2, 2 * n]]) if n % 2 else None)
        found.append((np.array(numbers(config, share, chunk)),
                      of_model(config, share, rows, "bfloat16", True, "selective", chunk)))
    for few, less in found:
        for many, more in found:
            if (few <= many).all():
                seen += 1
                assert all(less[name] <= more[name] for name in less), (few, many)
    assert seen > len(found)


def test_too_little_is_refused():
    config, samples = draw_case([SEED, 8], "qwen3_vl")

    def work(comm, more):
        model = made_model([SEED, 8], config)
        orchvlm.Shard(model, comm)
        held = sum(orchvlm.Shard.predict(model, 1).values())
        Orchestrator(model, comm, memory_bytes=held + more).prepare(joined(samples))
    with pytest.raises(orchvlm.CommError, match="weights, gradients and optimizer state of a rank"):
        orchvlm.comm.run_threads(1, work, -1)
    with pytest.raises(orchvlm.CommError, match=r"one sample of rank 0: [\d,]+ tokens.* take"):
        orchvlm.comm.run_threads(1, work, 1)


class Limited(Orchestrator):
    """Under limits for the encoders, as few rounds as that takes."""

    def __init__(self, model, comm):
        self.most = 12
        super().__init__(model, comm, max_patches=self.most, max_frames=self.most)

    def rounds(self, batch, sizes, media, beside=False):
        rounds = super().rounds(batch, sizes, media)
        for one in rounds:
            for name, items in one.batch.phases.items():
                plan, longest = one.plan.phases[name], items.length.max(initial=0)
                held = np.bincount(plan.rank, items.length, self.size)
                assert len(one.samples) == 1 or held.max() <= max(self.most, longest), name
        SEEN.append(len(rounds))
        return rounds


SEEN = []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_takes_no_more_than_its_limit(family):
    """In a round; losses and gradients are those of one call."""
    print("seed", SEED)
    SEEN.clear()
    for draw in range(4):
        orchvlm.comm.run_threads(1 + draw % 3, law, [SEED, 200 + draw], family, Limited)
    assert max(SEEN) > 1


def test_limits_and_memory_together():
    """More rounds of the two; without limits a batch is one round."""
    print("seed", SEED)
    rng = np.random.default_rng([SEED, 70])
    model = orchvlm.Model(FAMILIES["qwen3_vl"](rng), threads=1)
    config, rows, node = model.config, model._core.parameters(), one_node(3)
    most = whole = 1
    while whole < 10 * most:  # enough pictures beside the longest one
        batch, sizes = drawn_batch(rng, config, 40)
        whole, most = (int(f(batch.phases["vision"].length, initial=1)) for f in (np.sum, np.max))

    def plan(batch):
        return planned(batch, node, counted_costs(config, node), {"vision": most})
    plain = fewest(batch, sizes, plan)
    limited = fewest(batch, sizes, plan, ["vision"])
    assert len(plain) == 1 < len(limited)
    assert all(one.plan.phases["vision"].micro_batches == 1 for one in limited)
    cut = Rounds(config, rows, model.dtype, 3, 0, 1)
    needed = cut.bytes(limited, np.float32)
    alone = cut.bytes([taken(batch, sizes, part, plan) for part in dealt(batch, 40)], np.float32)
    for room, least in ((needed, len(limited)), ((needed + alone) // 2, len(limited) + 1)):
        cut._room = room
        both = cut.of(batch, sizes, np.float32, plan, ["vision"])
        assert len(both) >= least and cut.bytes(both, np.float32) <= cut._room
        assert all(one.plan.phases["vision"].micro_batches == 1 for one in both)


def test_samples_are_dealt_out_evenly():
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(50):
        n = int(rng.integers(1, 30))
        batch = orchvlm.Batch(rng.integers(0, 50, n), np.zeros(n, int), np.zeros(n, int))
        ways = int(rng.integers(1, n + 1))
        parts = dealt(batch, ways)
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))
        assert all(len(part) for part in parts)
        sums = [batch.text_tokens[part].sum() for part in parts]
        assert max(sums) - min(sums) <= batch.text_tokens.max()


def test_a_run_in_rounds(tmp_path):
    pytest.importorskip("PIL")
    told = {"data": {"tokens": 500}, "training": {"steps": 2, "ema": 0.9},
            "ranks": {"threads": 1}, "output": {"folder": str(tmp_path / "run")}}
    whole = foretell(orchvlm.RunConfig(told, {"ranks": {"n": 2}}))
    assert whole.rounds == 1
    few = foretell(orchvlm.RunConfig(told, {"ranks": {"n": 2, "patches": 20}}))
    assert few.rounds > 1
    most = max(sum(rank.values()) for rank in whole.memory)
    step = max(rank["activations"] + rank["workspace"] for rank in whole.memory)
    told["ranks"]["memory_bytes"] = int(most - step // 3)
    seen = foretell(orchvlm.RunConfig(told, {"ranks": {"n": 2}}))
    assert seen.rounds > 1
    assert max(sum(rank.values()) for rank in seen.memory) <= told["ranks"]["memory_bytes"]

    def work(comm):
        return orchvlm.Trainer.from_config(told, comm).fit()
    rows, _ = orchvlm.comm.run_threads(2, work)
    assert rows[0]["rounds"] == seen.rounds
    assert rows[0]["vision_planned"] == seen.imbalance["vision"]
    del told["ranks"]["memory_bytes"]
    told["output"]["folder"] = str(tmp_path / "whole")
    again, _ = orchvlm.comm.run_threads(2, work)
    assert again[0]["rounds"] == 1
    for one, other in zip(rows, again):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert [row["rounds"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")] == [1, 1]


def test_memory_of_a_whole_machine_is_a_limit(tmp_path):
    """What a file may say, and docs/training.md does, a trainer takes."""
    told = orchvlm.RunConfig({"model": {"preset": "tiny"},
                              "ranks": {"memory_bytes": 8_000_000_000}})

    def work(comm):
        trainer = made(comm, tmp_path, rank_memory_bytes=told.training().rank_memory_bytes)
        return trainer.passes._rounds is not None

    assert orchvlm.comm.run_threads(2, work) == [True, True]


def test_micro_batches_hold_their_limit_or_the_longest_sample():
    print("seed", SEED)
    rng, costs = np.random.default_rng([SEED, 77]), counted_costs(orchvlm.preset("tiny"),
                                                                  one_node(2))
    for _ in range(10):
        most, n = int(rng.integers(20, 60)), int(rng.integers(1, 30))
        lengths = rng.integers(1, 100, n)
        batch = orchvlm.Batch(lengths, lengths, rng.integers(0, 2, n), {})
        plan = planned(batch, one_node(2), {"llm": costs["llm"]}, {"llm": most})
        held = np.zeros((plan.llm.micro_batches, 2))
        np.add.at(held, (plan.llm.micro_batch, plan.llm.rank), lengths)
        assert held.max() <= max(most, lengths.max())


def test_an_mpi_for_one_thread_is_refused():
    """Batches are moved by a thread of their own."""
    def work(comm):
        assert comm._any_thread and comm.dup()._any_thread
        comm.engine, comm._any_thread = "mpi", False
        model = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1)
        with pytest.raises(ValueError, match="one thread at a time.* MPI.THREAD_MULTIPLE"):
            Orchestrator(model, comm)
        comm.engine = "local"

    orchvlm.comm.run_threads(2, work)
