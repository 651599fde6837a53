"""Groups of more ranks than heads, whose rows pass keys and values around, against one rank."""
import os

import numpy as np
import pytest

import orchvlm
from model_cases import FIRST_TEXT, SANITIZED, grads_of
from orchvlm.sequence_executor import exchange_bytes
from orchvlm.sequence_parallel import SequenceGroup, SequenceGroups, row_ranks
from rank_cases import FAMILIES, compare, draw_case, joined
from test_sequence_parallel import Pass, SEED, in_pairs, made, planned, summed

DRAWS = int(os.environ.get("ORCHVLM_RING_DRAWS", 2 if SANITIZED else 6))
NAMES = list(FAMILIES)


def draw(rng, seed, family):
    """(config with one to three query heads, samples)"""
    config, samples = draw_case(seed, family)
    kv = int(rng.integers(1, 4))
    config["text_config"] |= {"num_key_value_heads": kv,
                              "num_attention_heads": kv * int(rng.integers(1, 3 // kv + 1))}
    return config, samples


def pack(rng, lengths):
    ids = rng.integers(FIRST_TEXT, 40, sum(lengths))
    return orchvlm.Inputs(input_ids=ids, cu_seqlens=np.cumsum([0, *lengths]), labels=ids)


def check(one, ranks, losses=1e-6):
    """Of float32: losses, hidden states, gradients of weights and of features."""
    loss, hidden, slopes, grads, counts = one.whole
    tokens, parts, states, features, gradients, routed = zip(*ranks)
    assert sum(tokens) == one.inputs.n_tokens and max(tokens) - min(tokens) <= 1
    assert abs(sum(parts) - loss) <= losses * max(1e-2, abs(loss))
    assert np.linalg.norm(np.concatenate(states) - hidden) <= 1e-5 * np.linalg.norm(hidden)
    compare((sum(parts), summed(gradients)), (loss, grads))
    if counts is not None:
        assert np.array_equal(sum(routed), counts)
    for i, wanted in enumerate(slopes or ()):
        if wanted is not None:
            got = np.concatenate([part[i] for part in features], axis=wanted.ndim - 2)
            assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted) + 1e-7


class RingPass(Pass):
    """With a limit on the ranks that share heads, and what each rank sent."""

    def limited(self, comm, head_ranks, checkpoint, device):
        model = made(self.seed, self.config, dtype=self.dtype, device=device)
        group = SequenceGroup(comm, head_ranks)
        out = self.run(model, group.shard(self.inputs), {}, checkpoint)
        return group.counts()["sent_bytes"], out


@pytest.mark.parametrize("turn", range(DRAWS))
def test_a_ring_is_one_rank(turn):
    """Every family with its pictures and sounds, any checkpoint, degrees to 8 with 1 to 3 heads."""
    seed = [SEED, 20, turn]
    rng = np.random.default_rng(seed)
    family, device = NAMES[(SEED + turn) % len(NAMES)], str(rng.choice(["cpu", "async"]))
    config, samples = draw(rng, seed, family)
    degree = int(rng.integers(config["text_config"]["num_attention_heads"] + 1, 9))
    checkpoint = ("none", "selective", "full")[turn % 3]
    print("seed", SEED, family, degree, device, checkpoint, config["text_config"])
    one = Pass(seed, config, joined(samples), "float32")
    check(one, orchvlm.comm.run_threads(degree, one.shared, checkpoint, device))


@pytest.mark.parametrize("turn", range(DRAWS))
def test_lengths_limits_and_bytes(turn):
    """Segments shorter than shards, across them and across rows; rows by choice; bytes as foretold,
    of float32 and bfloat16."""
    seed = [SEED, 21, turn]
    rng = np.random.default_rng(seed)
    config, _ = draw(rng, seed, ("qwen3_vl", "qwen3_vl_moe")[turn % 2])
    config["text_config"]["num_attention_heads"] *= 1 + turn % 2  # rows by choice, too
    degree, limit = int(rng.integers(2, 9)), int(rng.integers(1, 4)) if turn % 2 else None
    lengths = rng.choice([1, 2, 3, 9, 30], rng.integers(1, 12), p=[.3, .2, .2, .2, .1])
    dtype, checkpoint = ("float32", "bfloat16")[turn % 3 == 2], ("none", "full")[turn % 2]
    print("seed", SEED, degree, limit, lengths, dtype, checkpoint, config["text_config"])
    cost = orchvlm.SequenceCost(0.0, 1.0, comm={degree: 0.0})
    plan = orchvlm.plan_sequences(lengths, degree, cost, micro_batches=1)
    inputs = pack(rng, lengths)[plan.micro_batches[0].groups[0].items]
    one = RingPass(seed, config, inputs, dtype)
    sent, out = zip(*orchvlm.comm.run_threads(degree, one.limited, limit, checkpoint, "cpu"))
    model = made(seed, config)
    assert list(sent) == exchange_bytes(plan, model.config, dtype, checkpoint, limit).tolist()
    if dtype == "float32":
        check(one, [(len(state), loss, state, *rest) for loss, state, *rest in out])
        return
    # Each row's results are rounded to bfloat16 before they are merged.
    assert abs(sum(loss for loss, *_ in out) - one.whole[0]) <= 3e-3 * abs(one.whole[0])
    if not model.config.sparse:  # experts may be chosen anew where states are rounded otherwise
        got, wanted = summed([grads for *_, grads, _ in out]), one.whole[3]
        squares = sum(((got[name] - wanted[name]) ** 2).sum() for name in wanted)
        assert squares <= 5e-2 ** 2 * sum((g ** 2).sum() for g in wanted.values())


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 2, 0], [0, 1, 1, 1], [7, 0, 1]])
def test_fewer_tokens_than_ranks(lengths):
    """Ranks and rows without a token take part like any other."""
    rng = np.random.default_rng([SEED, 22, len(lengths)])
    config, _ = draw_case([SEED, 22], "qwen3_vl_moe")
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    one = Pass([SEED, 22], config, pack(rng, lengths), "float32")
    check(one, orchvlm.comm.run_threads(6, one.shared, "selective", "cpu"))


def test_log_probabilities():
    """A loss of one's own goes back around the ring, too."""
    seed = [SEED, 23]
    rng = np.random.default_rng(seed)
    config, _ = draw(rng, seed, "qwen3_vl")
    inputs = pack(rng, [19, 2, 5])
    slopes = rng.standard_normal(27).astype(np.float32)
    model = made(seed, config)
    wanted, _ = model.logprobs(inputs)
    model.zero_grad()
    model.backward(slopes[:26])

    def work(comm):
        mine, group = made(seed, config), SequenceGroup(comm, 1)
        first, end = group.cut(26)[comm.rank:comm.rank + 2]
        got, _ = mine.logprobs(group.shard(inputs), checkpoint="full")
        mine.zero_grad()
        padded = np.append(slopes[:26], np.float32(0))
        mine.backward(np.ascontiguousarray(padded[first:end + 1]))
        whole = np.zeros(27)
        whole[first:end + 1] = got
        return whole, grads_of(mine)

    logp, gradients = zip(*orchvlm.comm.run_threads(5, work))
    assert np.allclose(sum(logp)[:26], wanted, rtol=1e-5, atol=1e-5)
    compare((0.0, summed(gradients)), (0.0, grads_of(model)))


@pytest.mark.parametrize("n_gpus, mode", [(4, None), (6, "fsdp")])
def test_a_plan_with_rings_is_one_rank(n_gpus, mode):
    print("seed", SEED)
    seed = [SEED, 24, n_gpus]
    rng = np.random.default_rng(seed)
    config, _ = draw(rng, seed, "qwen3_vl_moe")
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    batch, plan = planned(rng, n_gpus, config)
    model = made(seed, config)
    counts = model.route(batch)
    model.zero_grad()
    whole = model.forward(batch, None, counts)
    model.backward()

    def work(comm):
        mine = made(seed, config)
        shard = None if mode is None else orchvlm.Shard(mine, comm, mode, 2)
        mine.zero_grad()
        run = orchvlm.SequenceExecutor(mine, comm).run(plan, batch, checkpoint="full")
        grads = grads_of(mine) if shard is None else shard.gradients()
        return run, {name: np.array(g, np.float64) for name, g in grads.items()}

    runs, gradients = zip(*orchvlm.comm.run_threads(n_gpus, work))
    grads = summed(gradients) if mode is None else gradients[0]
    compare((sum(run.loss for run in runs), grads), (whole.loss, grads_of(model)))
    assert [run.sent_bytes for run in runs] == exchange_bytes(
        plan, model.config, checkpoint="full").tolist()


def test_rows():
    for degree in range(1, 40):
        for heads in range(1, 12):
            for limit in (None, 1, 2, 5, 50):
                fit = [r for r in range(1, degree + 1) if degree % r == 0 and r <= heads and
                       r <= (limit or heads)]
                assert row_ranks(degree, heads, limit) == max(fit)


def test_rows_of_whole_nodes_are_the_plain_exchange():
    """A limit that does not bind changes no bit."""
    def work(comm, model, groups):
        part = SequenceGroup(comm.dup(), 2).shard(orchvlm.Inputs(input_ids=[9] * 9, labels=[9] * 9))
        wide = groups[0, 2].shard(orchvlm.Inputs(input_ids=[9] * 9, labels=[9] * 9))
        return model.forward(part, 1.0).loss == model.forward(wide, 1.0).loss

    assert in_pairs(work) == [True, True]


@pytest.mark.parametrize("limit", (0, -1, 2.5, "2", True))
def test_a_limit_of_a_wrong_kind(limit):
    def work(comm):
        for call in (lambda: SequenceGroups(comm, limit), lambda: SequenceGroup(comm, limit),
                     lambda: row_ranks(4, 2, limit)):
            with pytest.raises(ValueError, match="head_ranks must be"):
                call()
    orchvlm.comm.run_threads(1, work)
