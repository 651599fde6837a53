"""Experts over ranks: a rank holds its own, and what it makes of tokens is what one rank makes;
with groups that share tokens, in trainers, in checkpoints."""
import os
import secrets

import numpy as np
import pytest

import orchvlm
from model_cases import SANITIZED, draw_config, fill, grads_of
from omni_cases import draw_any, pack_any
from orchvlm.comm import run_threads
from orchvlm.sequence_parallel import SequenceGroups
from rank_cases import compare, draw_case, joined, made_model
from test_sequence_parallel import draw, features_of, part_of

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
DRAWS = int(os.environ.get("ORCHVLM_EXPERT_DRAWS", 4))
FAMILIES = ("qwen3_vl_moe", "seed1_5_vl_moe", "qwen3_omni")


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
        model.forward(packs[comm.rank], normalizer=9)
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
            assert abs(held[name] / expected - 1) < 0.1, (mode, rank, name, held, expected)


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
