"""Experts over ranks: a rank holds its own, and what it makes of tokens is what one rank makes;
with groups that share tokens, in trainers, in checkpoints."""
import os
import secrets

import numpy as np
import pytest

import orchvlm
from durable_cases import CONFIG, losses, over
from model_cases import draw_config, fill, grads_of
from omni_cases import draw_any, pack_any
from orchvlm.comm import run_threads
from orchvlm.sequence_parallel import SequenceGroups
from orchvlm.training import read_metrics
from rank_cases import compare, joined, same_on_all
from test_sequence_parallel import draw, made, only_text

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
DRAWS = int(os.environ.get("ORCHVLM_EXPERT_DRAWS", 6))  # on up to 4 ranks; of more, up to 8
FAMILIES = ("qwen3_vl_moe", "seed1_5_vl_moe", "qwen3_omni")
SPARSE = orchvlm.preset("tiny-moe").values
SPARSE["vision_config"] |= {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16,
                            "out_hidden_size": 16, "deepstack_visual_indexes": []}
SPARSE["text_config"] |= {**CONFIG["text_config"], "num_experts": 6, "moe_intermediate_size": 12}


@pytest.fixture(autouse=True)
def seed(request):
    """Printed by a failing test; ORCHVLM_TEST_SEED repeats it."""
    print(f"ORCHVLM_TEST_SEED={SEED}")


def sparse_model(number, experts=8, **options):
    """A model of so many experts, and samples for it."""
    rng = np.random.default_rng([SEED, number])
    config = draw_config(rng, True)
    config["text_config"] |= {"num_experts": experts, "num_experts_per_tok": min(3, experts)}
    inputs = [pack_any(draw_any(rng, config, 2)) for _ in range(8)]
    return config, inputs, lambda: fill(orchvlm.Model(config, threads=1, **options),
                                        np.random.default_rng([SEED, number]))


# ---------------------------------------------------------------- memory

@pytest.mark.parametrize("mode", ("ddp", "zero1", "fsdp"))
def test_a_rank_holds_its_own_experts(mode):
    experts = 6
    config, packs, make = sparse_model(1, experts)
    whole = make()
    per_expert = sum(np.prod(shape) for name, _, shape, _ in whole._list
                     if ".experts." in name) * 4 / experts
    others = 4 * whole.n_parameters - experts * per_expert

    def work(comm):
        model = make()
        shard = orchvlm.Shard(model, comm, mode, experts=4)
        optimizer = orchvlm.AdamW(model, lr=1e-3)
        model.zero_grad()
        model.forward(only_text(packs[comm.rank]), normalizer=9)
        model.backward()
        optimizer.step()
        held = shard.memory()
        assert held == orchvlm.Shard.predict(whole, 4, mode, rank=comm.rank, experts=4)
        assert held == orchvlm.Shard.predict(model, 4, mode, rank=comm.rank, experts=4)
        return held
    for rank, held in enumerate(run_threads(4, work)):
        mine = experts * (rank + 1) // 4 - experts * rank // 4
        copies = {"ddp": (1, 3), "zero1": (1, 1.5), "fsdp": (0.25, 0.75)}[mode]  # of the others
        for name, share, times in zip(("weights", "training"), copies, (1, 3)):
            expected = share * others + times * mine * per_expert
            filled = times * 256 * len(whole._list)  # up to where the next one may begin
            assert 0.9 * expected <= held[name] <= 1.01 * expected + filled, (
                mode, rank, name, held, expected)


def test_activations_are_foretold():
    config, packs, make = sparse_model(2)
    pack = orchvlm.Inputs.concatenate(packs * 3)

    def work(comm, checkpoint, chunk):
        model = make()
        orchvlm.Shard(model, comm, "ddp", experts=comm.size)
        model.moe_chunk_rows = chunk
        foretold = model.memory(pack, checkpoint=checkpoint)
        model.forward(pack, checkpoint=checkpoint)
        model.backward()
        return foretold, model.memory()
    for checkpoint, chunk in (("none", None), ("selective", None), ("full", None), ("none", 200)):
        for foretold, held in run_threads(2, work, checkpoint, chunk):
            for arena in ("activations", "workspace"):
                assert abs(foretold[arena] / held[arena] - 1) < 0.03, (checkpoint, arena, foretold,
                                                                      held)


# ---------------------------------------------------------------- groups that share tokens

def cut(rng, n):
    """Blocks (first rank, degree) of n ranks."""
    blocks, first = [], 0
    while first < n:
        degree = int(rng.integers(1, n - first + 1))
        blocks.append((first, degree))
        first += degree
    return blocks


def shared(comm, seed, config, blocks, packs, counts, options):
    """(loss, gradients) of this rank: its part of its group's sequences, on its experts."""
    model = made(seed, config)
    groups = SequenceGroups(comm)
    groups.open(blocks)
    own, = (i for i, (first, n) in enumerate(blocks) if first <= comm.rank < first + n)
    model.moe_chunk_rows = options["rows"]
    shard = orchvlm.Shard(model, comm, options["mode"], experts=options["experts"])
    model.zero_grad()
    loss = model.forward(groups[blocks[own]].shard(packs[own]), 3.5, counts,
                         checkpoint=options["checkpoint"]).loss
    model.backward()
    gradients = {name: np.array(g, np.float64) for name, g in shard.gradients().items()}
    assert same_on_all(comm, gradients)
    assert options["experts"] == 1 or shard.expert_exchanges()["exchanges"] > 0
    return loss, gradients


@pytest.mark.parametrize("number", range(DRAWS))
def test_with_groups_that_share_tokens(number):
    """Loss and gradients are those of one rank that has everything."""
    rng = np.random.default_rng([SEED, number])
    n = int(rng.integers(2, 5 if DRAWS <= 6 else 9))
    config, samples = draw([SEED, number], FAMILIES[number % len(FAMILIES)], n)
    most = config["text_config"]["num_experts"]
    options = {"experts": int(rng.choice([e for e in range(1, n + 1) if n % e == 0 and e <= most])),
               "mode": str(rng.choice(["ddp", "zero1", "fsdp"])),
               "checkpoint": str(rng.choice(["none", "selective", "full"])),
               "rows": int(rng.integers(1, 80)) if rng.random() < 0.5 else None}
    blocks = cut(rng, n)
    packs = [joined([only_text(one) for k, one in enumerate(samples)
                     if k % len(blocks) == i]) for i in range(len(blocks))]
    alone, whole = made([SEED, number], config), joined(packs)
    counts = alone.route(whole)
    alone.zero_grad()
    wanted = alone.forward(whole, 3.5, counts).loss
    alone.backward()
    parts = run_threads(n, shared, [SEED, number], config, blocks, packs, counts, options)
    try:
        compare((sum(loss for loss, _ in parts), parts[0][1]), (wanted, grads_of(alone)))
    except AssertionError as error:
        raise AssertionError(f"{options}, {blocks}: {error}") from error


# ---------------------------------------------------------------- trainers

@pytest.mark.parametrize("mode, dtype", (("ddp", "float32"), ("zero1", "bfloat16"),
                                         ("fsdp", "float32")))
def test_runs_go_on_with_other_ranks_and_degrees(mode, dtype, tmp_path):
    """Losses are those of one rank, whoever has which experts; as many ranks, every bit."""
    options = {"values": SPARSE, "shard": mode, "dtype": dtype}
    near = {"rtol": 1e-5 if dtype == "float32" else 2e-2}
    wanted, _ = over(None, losses, tmp_path / "one", values=SPARSE, dtype=dtype)
    whole, weights = over(4, losses, tmp_path / "four", rank_experts=2, **options)
    np.testing.assert_allclose(whole, wanted, **near)
    rows = read_metrics(tmp_path / "four" / "metrics.jsonl")
    assert all(1 <= row["expert_rank_load"] <= 2 for row in rows)
    assert "expert_rank_load" not in read_metrics(tmp_path / "one" / "metrics.jsonl")[0]
    saved = orchvlm.Model.from_pretrained(tmp_path / "four" / "checkpoint-6", dtype=dtype)
    for name, values in saved.state_dict().items():
        np.testing.assert_array_equal(values, weights[name], err_msg=name)

    part = tmp_path / "part"
    over(4, losses, part, until=2, rank_experts=2, **options)
    again, values = over(4, losses, part, until=4, resume=True, rank_experts=2, **options)
    assert again == whole[2:4]
    got, _ = over(3, losses, part, until=5, resume=True, rank_experts=3, **options)
    np.testing.assert_allclose(got, wanted[4:5], **near)
    got, _ = over(None, losses, part, resume=True, values=SPARSE, dtype=dtype)
    np.testing.assert_allclose(got, wanted[5:], **near)


# ---------------------------------------------------------------- what is refused

def test_refusals():
    config, packs, make = sparse_model(3, 3)

    def work(comm):
        for options, match in (({"experts": 3}, "experts must divide the 4 ranks"),
                               ({"experts": 4}, "4 ranks cannot share the model's 3 experts"),
                               ({"experts": 0}, "experts must be a whole number in"),
                               ({"experts": 5}, "experts must be a whole number in"),
                               ({"mode": "hybrid", "node_size": 2, "experts": 2}, "is hybrid"),
                               ({"experts": 1 + comm.rank % 2}, "ranks disagree")):
            with pytest.raises(ValueError, match=match):
                orchvlm.Shard(make(), comm, **options)
        model = make()
        model.add_lora(r=2)
        with pytest.raises(ValueError, match="a model with adapters"):
            orchvlm.Shard(model, comm, experts=2)
        model = make()
        before = model.state_dict()
        shard = orchvlm.Shard(model, comm, experts=2)
        name = next(name for name in before if ".experts." in name)
        with pytest.raises(ValueError, match="lies on several ranks"):
            model.parameters[name]
        with pytest.raises(ValueError, match="other ranks hold some"):
            np.from_dlpack(model.tensor(name))
        with pytest.raises(ValueError, match="continues no prompt"):
            model.generate(packs[0])
        with pytest.raises(ValueError, match="all experts on every rank"):
            orchvlm.EMA(model)
        shard.undo()
        for name, values in before.items():
            np.testing.assert_array_equal(model.parameters[name], values, err_msg=name)
        return True
    assert run_threads(4, work) == [True] * 4
    with pytest.raises(ValueError, match="rank_experts = 2"):
        over(None, losses, "nowhere", values=SPARSE, rank_experts=2)


def test_a_closed_shard_leaves_no_model():
    config, packs, make = sparse_model(4)

    def work(comm):
        model = make()
        shard = orchvlm.Shard(model, comm, experts=2)
        shard._core.close()
        with pytest.raises(ValueError, match="was closed"):
            model.forward(packs[0])
        return True
    assert run_threads(2, work) == [True] * 2
