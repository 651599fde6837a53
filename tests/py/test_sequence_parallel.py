"""Groups of ranks that share the tokens of a pass, against the same pass on one rank."""
import os
import secrets
from dataclasses import replace

import numpy as np
import pytest

import orchvlm
from model_cases import FIRST_TEXT, SANITIZED, fill, grads_of
from orchvlm.sequence_executor import exchange_bytes
from orchvlm.sequence_parallel import SequenceGroups, TokenShard
from rank_cases import (FAMILIES, compare, draw_case, joined, more_heads, only_text,
                        same_on_all)

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
DEGREES = (1, 2, 3, 4, 5, 6, 8)
NAMES = list(FAMILIES)


def draw(seed, family, degree):
    """(config, samples) of a model with at least so many heads, few of them for keys or many."""
    config, samples = draw_case(seed, family)
    more_heads(np.random.default_rng([*seed, 1]), config, degree)
    return config, samples


def made(seed, config, **options):
    return fill(orchvlm.Model(config, threads=1, **options), np.random.default_rng(seed))


def features_of(model, inputs):
    """What stands for the images and sounds, as forward takes it."""
    given = {}
    if inputs.grid_thw is not None:
        features, extra = model.encode("vision", inputs, training=False)
        given = {"features": features} | ({} if extra is None else {"extra": extra})
    if inputs.mel is not None:
        given["sounds"] = model.encode("audio", inputs, training=False)[0]
    return given


def part_of(group, model, inputs, given):
    """The rows of given features that stand in this rank's shard."""
    images = group.feature_rows(inputs, model.config.visual_tokens)
    rows = {"features": images, "extra": (slice(None), images),
            "sounds": group.feature_rows(inputs, model.config.sound_tokens or ())}
    return {name: value[rows[name]] for name, value in given.items()}


def spread(pieces, parts, n):
    """Rows of labels from all shards to those of the whole: each tells what it predicts."""
    whole, at = np.zeros(n + 1, np.float32), 0
    for piece, tokens in zip(pieces, parts):
        whole[at:at + tokens + 1] += piece
        at += tokens
    assert at == n and whole[n] == 0
    return whole[:n]


def summed(gradients):
    return {name: sum(one[name] for one in gradients) for name in gradients[0]}


def assert_close(got, wanted, dtype):
    if dtype == "float32":
        compare(got, wanted)
        return
    # Where ranks share a key/value head, each rounds its part of the gradient to bfloat16.
    assert abs(got[0] - wanted[0]) <= 1e-5 * max(1e-2, abs(wanted[0]))
    whole = np.sqrt(sum((g ** 2).sum() for g in wanted[1].values()))
    for name, gradient in wanted[1].items():
        error = np.linalg.norm(got[1][name] - gradient)
        assert error <= 5e-2 * np.linalg.norm(gradient) + 5e-3 * whole, (name, error)


class Pass:
    """A forward and a backward of a batch, on one rank or on those of a group."""

    def __init__(self, seed, config, inputs, dtype):
        self.seed, self.config, self.inputs, self.dtype = seed, config, inputs, dtype
        model = made(seed, config, dtype=dtype)
        self.given, self.depth = features_of(model, inputs), config["text_config"][
            "num_hidden_layers"]
        self.normalizer = 3.5
        self.counts = None
        if model.config.sparse and inputs.n_tokens:
            self.counts = model.route(inputs, **self.given)
        self.whole = self.run(model, inputs, self.given, "none")

    def run(self, model, inputs, given, checkpoint):
        model.zero_grad()
        out = model.forward(inputs, self.normalizer, self.counts, checkpoint=checkpoint,
                            taps=[self.depth], **given)
        slopes = model.backward()
        return out.loss, out.hidden_states[self.depth], slopes, grads_of(model), out.router_counts

    def shared(self, comm, checkpoint, device):
        model = made(self.seed, self.config, dtype=self.dtype, device=device)
        groups = SequenceGroups(comm)
        groups.open([(0, comm.size)])
        group = groups[0, comm.size]
        part = group.shard(self.inputs)
        given = part_of(group, model, self.inputs, self.given)
        return part.n_tokens, *self.run(model, part, given, checkpoint)


@pytest.mark.parametrize("degree, turn", [(d, t) for d in DEGREES for t in (0, 1)
                                          if not SANITIZED or (d + t) % 3 == 0])
def test_a_group_is_one_rank(degree, turn):
    """Loss, gradients, hidden states and gradients of features, of every family in turn."""
    seed = [SEED, degree, turn]
    rng = np.random.default_rng([*seed, 2])
    family = NAMES[(SEED + 2 * DEGREES.index(degree) + turn) % len(NAMES)]
    dtype, device = str(rng.choice(["float32", "bfloat16"])), str(rng.choice(["cpu", "async"]))
    checkpoint = str(rng.choice(["none", "selective", "full"]))
    print("seed", SEED, family, dtype, device, checkpoint)
    config, samples = draw(seed, family, degree)
    one = Pass(seed, config, joined(samples), dtype)
    loss, hidden, slopes, grads, counts = one.whole
    ranks = orchvlm.comm.run_threads(degree, one.shared, checkpoint, device)
    tokens, losses, states, parts, gradients, routed = zip(*ranks)
    assert sum(tokens) == one.inputs.n_tokens and max(tokens) - min(tokens) <= 1
    assert np.array_equal(np.concatenate(states), hidden)  # bit for bit
    if counts is not None:
        assert np.array_equal(sum(routed), counts)
    assert_close((sum(losses), summed(gradients)), (loss, grads), dtype)
    for i, wanted in enumerate(slopes or ()):
        if wanted is not None:  # features of images and of sounds have their rows in axis 0
            got = np.concatenate([part[i] for part in parts], axis=wanted.ndim - 2)
            scale = 1e-5 if dtype == "float32" else 5e-2
            assert np.linalg.norm(got - wanted) <= scale * np.linalg.norm(wanted) + 1e-7


@pytest.mark.parametrize("degree", DEGREES)
def test_log_probabilities_and_their_slopes(degree):
    """Bit for bit those of one rank; a loss of one's own goes back through them."""
    print("seed", SEED)
    seed = [SEED, 3, degree]
    rng = np.random.default_rng(seed)
    config, samples = draw(seed, NAMES[degree % 4], degree)
    if "router_aux_loss_coef" in config["text_config"]:  # it would go by the shard's own counts
        config["text_config"]["router_aux_loss_coef"] = 0.0
    inputs = only_text(joined(samples))
    n, slopes = inputs.n_tokens, rng.standard_normal((2, inputs.n_tokens)).astype(np.float32)
    model = made(seed, config)
    wanted = model.logprobs(inputs, entropy=True)
    model.zero_grad()
    model.backward(*slopes)

    def work(comm):
        mine = made(seed, config)
        groups = SequenceGroups(comm)
        groups.open([(0, degree)])
        group = groups[0, degree]
        part = group.shard(inputs)
        given = mine.logprobs(part, entropy=True, checkpoint="full")
        mine.zero_grad()
        first = group.cut(n)[group.rank]
        padded = np.append(slopes, np.zeros((2, 1), np.float32), axis=1)
        mine.backward(*np.ascontiguousarray(padded[:, first:first + part.n_tokens + 1]))
        return part.n_tokens, *given, grads_of(mine)

    tokens, logp, entropy, gradients = zip(*orchvlm.comm.run_threads(degree, work))
    for got, whole in ((logp, wanted[0]), (entropy, wanted[1])):
        assert np.array_equal(spread(got, tokens, n), whole)
    compare((0.0, summed(gradients)), (0.0, grads_of(model)))


@pytest.mark.parametrize("lengths", [[], [0], [1], [2, 0, 0], [0, 1, 1, 1], [7, 0, 1]])
def test_fewer_tokens_than_ranks(lengths):
    """Ranks without a token take part like any other."""
    seed = [SEED, 4, len(lengths)]
    rng = np.random.default_rng(seed)
    config, _ = draw(seed, "qwen3_vl_moe", 5)
    ids = rng.integers(FIRST_TEXT, 40, sum(lengths))
    inputs = orchvlm.Inputs(input_ids=ids, cu_seqlens=np.cumsum([0, *lengths]), labels=ids)
    one = Pass(seed, config, inputs, "float32")
    ranks = orchvlm.comm.run_threads(5, one.shared, "selective", "cpu")
    tokens, losses, states, _, gradients, _ = zip(*ranks)
    assert min(tokens) == 0 or sum(lengths) >= 5
    assert np.array_equal(np.concatenate(states), one.whole[1])
    compare((sum(losses), summed(gradients)), (one.whole[0], one.whole[3]))


def test_a_loss_of_hidden_states():
    seed = [SEED, 5]
    config, samples = draw(seed, "seed1_5_vl", 3)
    inputs = only_text(joined(samples))
    model = made(seed, config)
    wanted = model.decode(inputs)
    model.zero_grad()
    model.backward(dhidden=2 * wanted)

    def work(comm):
        mine = made(seed, config)
        groups = SequenceGroups(comm)
        groups.open([(0, 3)])
        hidden = mine.decode(groups[0, 3].shard(inputs))
        mine.zero_grad()
        mine.backward(dhidden=2 * hidden)
        return hidden, grads_of(mine)

    hidden, gradients = zip(*orchvlm.comm.run_threads(3, work))
    assert np.array_equal(np.concatenate(hidden), wanted)
    compare((0.0, summed(gradients)), (0.0, grads_of(model)))


# ---------------------------------------------------------------- several groups


BATCHES = ([(0, 2), (2, 1), (3, 1)], [(0, 1), (1, 3)], [(0, 4)], [(0, 2), (2, 2)])


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "zero1", "hybrid"])
def test_groups_change_while_weights_are_sharded(mode):
    """Other groups in each micro-batch; ranks of different groups meet in the weights alone."""
    print("seed", SEED)
    seed = [SEED, 6, len(mode)]
    config, _ = draw(seed, "qwen3_vl_moe", 4)
    rng = np.random.default_rng(seed)
    packs = []
    for blocks in BATCHES:
        for _ in blocks:
            ids = rng.integers(FIRST_TEXT, 40, rng.integers(1, 30))
            packs.append(orchvlm.Inputs(input_ids=ids, labels=ids))
    model = made(seed, config)
    counts = model.route(joined(packs))
    model.zero_grad()
    loss = model.forward(joined(packs), 9.0, counts).loss
    model.backward()

    def work(comm):
        mine = made(seed, config)
        shard = orchvlm.Shard(mine, comm, mode, 2)
        groups = SequenceGroups(comm)
        assert groups.open(block for blocks in BATCHES for block in blocks) == 7
        assert groups.open(BATCHES[0]) == 0 and len(groups) == 7
        left, total = iter(packs), 0.0
        mine.zero_grad()
        for blocks in BATCHES:
            for (first, degree), pack in zip(blocks, left, strict=False):
                if first <= comm.rank < first + degree:
                    part = groups[first, degree].shard(pack)
            total += mine.forward(part, 9.0, counts, checkpoint="full").loss
            mine.backward()
        shard.reduce_gradients()
        gradients = {name: np.array(g, np.float64) for name, g in shard.gradients().items()}
        assert same_on_all(comm, gradients)
        groups.close()
        return float(comm.all_reduce(np.array([total]))[0]), gradients

    compare(orchvlm.comm.run_threads(4, work)[0], (loss, grads_of(model)))


def test_adapters():
    """Weights with adapters go the same way."""
    seed = [SEED, 7]
    config, samples = draw(seed, "qwen3_vl", 3)
    inputs = only_text(joined(samples))

    def adapted():
        model = made(seed, config)
        model.add_lora(r=2, match=["model.language_model.layers.*.self_attn.*_proj"], seed=3)
        for name, weight in model.parameters.items():
            if name.endswith("lora_B.weight"):
                weight[:] = 0.1
        return model

    def run(model, part):
        model.zero_grad()
        loss = model.forward(part, 2.0, checkpoint="selective").loss
        model.backward()
        return loss, grads_of(model)

    def work(comm):
        groups = SequenceGroups(comm)
        groups.open([(0, 3)])
        return run(adapted(), groups[0, 3].shard(inputs))

    losses, gradients = zip(*orchvlm.comm.run_threads(3, work))
    compare((sum(losses), summed(gradients)), run(adapted(), inputs))


# ---------------------------------------------------------------- plans


def planned(rng, n_gpus, config, micro_batches=None):
    """(batch of drawn lengths, a plan that gives them to groups of several degrees)"""
    lengths = np.maximum(1, rng.lognormal(2.5, 1.0, 9).astype(np.int64))
    ids = rng.integers(FIRST_TEXT, 40, lengths.sum())
    batch = orchvlm.Inputs(
        input_ids=ids, cu_seqlens=np.cumsum([0, *lengths]), labels=ids,
        weights=rng.random(len(ids)).astype(np.float32) if rng.random() < 0.5 else None)
    degrees = range(1, n_gpus + 1)
    limit = int(max(-(-lengths.max() // max(degrees)), 1.3 * lengths.sum() / n_gpus / 2))
    cost = orchvlm.SequenceCost(1e-6, 1e-4, 1e-3, comm={d: 1e-5 * (d - 1) for d in degrees},
                                memory_per_token=1.0, memory_limit=limit)
    plan = orchvlm.plan_sequences(lengths, n_gpus, cost, gpus_per_node=n_gpus, work_limit=500,
                                  time_limit=None, micro_batches=micro_batches)
    return batch, plan


@pytest.mark.parametrize("n_gpus, family, mode", [
    (3, "qwen3_vl", None), (4, "qwen3_vl_moe", "fsdp"), (6, "seed1_5_vl", "zero1"),
    (8, "qwen3_vl", "hybrid")])
def test_a_plan_is_one_rank(n_gpus, family, mode):
    """Loss, targets and gradients of a planned step, and the bytes that it was to take."""
    print("seed", SEED)
    seed = [SEED, 10, n_gpus]
    rng = np.random.default_rng(seed)
    config, _ = draw(seed, family, n_gpus)
    batch, plan = planned(rng, n_gpus, config, micro_batches=4)
    checkpoint = str(rng.choice(["none", "selective", "full"]))
    model = made(seed, config)
    counts = model.route(batch) if model.config.sparse else None
    model.zero_grad()
    whole = model.forward(batch, None, counts)
    model.backward()

    def work(comm):
        mine = made(seed, config)
        shard = None if mode is None else orchvlm.Shard(mine, comm, mode, 2)
        executor = orchvlm.SequenceExecutor(mine, comm)
        mine.zero_grad()
        first = executor.run(plan, batch, checkpoint=checkpoint)
        made_then = len(executor.groups)
        if shard is None:
            return first, grads_of(mine)
        gradients = {name: np.array(g, np.float64) for name, g in shard.gradients().items()}
        mine.zero_grad()
        again = executor.run(plan, batch, None, counts, checkpoint=checkpoint)
        assert len(executor.groups) == made_then and again.loss == first.loss
        assert again.sent_bytes == first.sent_bytes
        shard.reduce_gradients()  # nobody leaves while others are at it
        return first, gradients

    runs, gradients = zip(*orchvlm.comm.run_threads(n_gpus, work))
    assert sum(run.n_target_tokens for run in runs) == whole.n_target_tokens
    grads = summed(gradients) if mode is None else gradients[0]
    compare((sum(run.loss for run in runs), grads), (whole.loss, grads_of(model)))
    sent = exchange_bytes(plan, model.config, checkpoint=checkpoint)
    assert [run.sent_bytes for run in runs] == sent.tolist()
    for rank, run in enumerate(runs):
        assert len(run.groups) == len(plan.micro_batches) == 4
        for group, micro in zip(run.groups, plan.micro_batches):
            own = [g for g in micro.groups if 0 <= rank - g.first_gpu < g.degree]
            assert (group.first_gpu, group.degree) == (
                (own[0].first_gpu, own[0].degree) if own else (0, 0))
            assert 0 <= group.waited_s <= group.end_s - group.start_s
    assert sum(g.tokens for run in runs for g in run.groups) == batch.n_tokens


def test_what_an_executor_refuses():
    config, _ = draw([SEED, 11], "qwen3_vl", 1)
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    batch, plan = planned(np.random.default_rng(1), 2, config)
    cost = orchvlm.SequenceCost(0.0, 1e-3, comm={3: 0.0})
    whole = orchvlm.plan_sequences(batch.lengths, 3, cost, work_limit=0, time_limit=None)

    def work(comm):
        model = made(0, config)
        executor = orchvlm.SequenceExecutor(model, comm)
        for call, error, words in (
                (lambda: executor.run(plan, batch), ValueError, "for 2 GPUs; there are 3"),
                (lambda: executor.run(whole, batch[:2]), ValueError, "other lengths"),
                (lambda: executor.run(batch, plan), TypeError, "SequencePlan and Inputs"),
                (lambda: orchvlm.SequenceExecutor(comm, model), TypeError, "must be a Model"),
                (lambda: orchvlm.SequenceExecutor(model, model), TypeError, "must be a Comm"),
                (lambda: exchange_bytes(plan, model.config, "int8"), ValueError, "dtype must be"),
                (lambda: exchange_bytes(plan, model.config, checkpoint="some"), ValueError,
                 "checkpoint must be"),
                (lambda: exchange_bytes(plan, model.config, head_ranks=0), ValueError,
                 "head_ranks must be")):
            with pytest.raises(error, match=words):
                call()
        executor.close()

    orchvlm.comm.run_threads(3, work)


# ---------------------------------------------------------------- shards


def test_what_a_shard_holds():
    """Labels and weights reach one token further; positions and features are the shard's."""
    ids = np.array([9, 3, 3, 9, 9, 3, 9])
    weights = np.arange(7, dtype=np.float32)
    inputs = orchvlm.Inputs(input_ids=ids, cu_seqlens=[0, 4, 7], labels=ids + 10, weights=weights)

    def work(comm):
        groups = SequenceGroups(comm)
        groups.open([(0, 3)])
        return groups[0, 3].shard(inputs), groups[0, 3].feature_rows(inputs, [3])

    parts, rows = zip(*orchvlm.comm.run_threads(3, work))
    assert [part.input_ids.tolist() for part in parts] == [[9, 3], [3, 9], [9, 3, 9]]
    assert [part.labels.tolist() for part in parts] == [[19, 13, 13], [13, 19, 19],
                                                        [19, 13, 19, -100]]
    assert [part.weights.tolist() for part in parts] == [[0, 1, 2], [2, 3, 4], [4, 5, 6, 0]]
    assert [part.position_ids[1].tolist() for part in parts] == [[0, 1], [2, 3], [0, 1, 2]]
    assert rows == (slice(0, 1), slice(1, 2), slice(2, 3))
    assert "2 of 7 tokens, <rank 1 of a group of 3>" in repr(parts[1])


def test_counts():
    """Bytes to other ranks, of each exchange; the same for a group that is used again."""
    config, samples = draw([SEED, 8], "qwen3_vl", 2)
    config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 1}
    inputs = orchvlm.Inputs(input_ids=[9] * 7, labels=[9] * 7)
    text = config["text_config"]

    def work(comm):
        model = made(0, config)
        groups = SequenceGroups(comm)
        groups.open([(0, 2)])
        assert groups.counts() == {"exchanges": 0, "sent_bytes": 0, "waited_s": 0.0}
        model.forward(groups[0, 2].shard(inputs), 1.0)
        model.backward()
        return groups.counts()

    for rank, counts in enumerate(orchvlm.comm.run_threads(2, work)):
        mine, theirs = (3, 4) if rank == 0 else (4, 3)
        heads = mine * (2 + 1 + 1 + 2) + theirs * (2 + 2 + 1 + 1)  # q, k, v and slopes; o ...
        assert counts["sent_bytes"] == 4 * heads * text["head_dim"] * text["num_hidden_layers"]
        assert counts["exchanges"] == 4 * text["num_hidden_layers"]


# ---------------------------------------------------------------- what is refused


def in_pairs(work):
    """On both ranks of a group of two, with a model of two heads."""
    def on(comm):
        groups = SequenceGroups(comm)
        groups.open([(0, 2)])
        config = orchvlm.preset("tiny")
        return work(comm, orchvlm.Model.from_config(config, seed=0, threads=1), groups)
    return orchvlm.comm.run_threads(2, on)


TEXT = orchvlm.Inputs(input_ids=[72, 105, 33], labels=[72, 105, 33])


def test_what_is_refused():
    def work(comm, model, groups):
        part = groups[0, 2].shard(TEXT)
        for call, error, words in (
                (lambda: model.forward(part), ValueError, "normalizer is missing"),
                (lambda: model.forward(replace(part, labels=part.labels[1:]), 1.0), ValueError,
                 "labels must have"),
                (lambda: model.forward(replace(part, cu_seqlens=np.array([0, 9], np.int32)), 1.0),
                 ValueError, "cu_seqlens are the whole group's"),
                (lambda: model.forward(replace(part, cu_seqlens=np.array([0, 9, 3], np.int32)),
                                       1.0), ValueError, "cu_seqlens must ascend"),
                (lambda: model.generate(part), TypeError, "orchvlm.Inputs"),
                (lambda: model.flops(part), TypeError, "orchvlm.Inputs"),
                (lambda: groups[0, 2].shard(part), TypeError, "orchvlm.Inputs"),
                (lambda: groups.open([(1, 2)]), ValueError, "not among the 2 ranks"),
                (lambda: groups[0, 1], KeyError, "was not opened"),
                (lambda: groups[0, 2].cut(-1), ValueError, "n must be"),
                (lambda: SequenceGroups(groups), TypeError, "must be a Comm"),
                (lambda: model.encode("vision", part), TypeError, "orchvlm.Inputs")):
            with pytest.raises(error, match=words):
                call()
        groups.open([(0, 1), (1, 1)])
        with pytest.raises(ValueError, match="is not in the group"):
            groups[1 - comm.rank, 1]
        model.forward(part, 1.0)  # nothing of it did harm
        model.backward()
        groups.close()
        for call in (lambda: model.forward(part, 1.0), model.backward):
            with pytest.raises(ValueError, match="closed"):
                call()

    in_pairs(work)


def test_a_rank_that_fails_makes_all_raise():
    seen = []

    def work(comm, model, groups):
        part = groups[0, 2].shard(TEXT)
        if comm.rank == 1:
            part = replace(part, input_ids=np.full(part.n_tokens, 2**30, np.int32))
        try:
            model.forward(part, 1.0)
        except BaseException as error:
            seen.append((comm.rank, type(error), str(error)))
            raise

    with pytest.raises(orchvlm.CommError, match="rank 1 failed: ValueError: input_ids"):
        in_pairs(work)
    (_, kind, said), = [one for one in seen if one[0] == 0]
    assert kind is orchvlm.CommError and "input_ids" in said


def test_a_backward_that_never_comes():
    """A rank that ends between forward and backward leaves nobody waiting."""
    def work(comm, model, groups):
        model.forward(groups[0, 2].shard(TEXT), 1.0)
        if comm.rank == 0:
            raise RuntimeError("enough")
        model.backward()

    with pytest.raises(orchvlm.CommError, match="rank 0 failed: RuntimeError: enough"):
        in_pairs(work)


def test_a_shard_is_made_by_hand_too():
    """A dispatcher that knows one shard alone builds it."""
    def work(comm, model, groups):
        whole = groups[0, 2].shard(TEXT)
        part = TokenShard(groups[0, 2], whole.input_ids, whole.cu_seqlens, whole.position_ids,
                          whole.labels)
        return model.forward(part, 2.0).loss

    loss = orchvlm.Model.from_config(orchvlm.preset("tiny"), seed=0, threads=1).forward(
        TEXT, 2.0).loss
    assert sum(in_pairs(work)) == pytest.approx(loss, rel=1e-12)


def test_ranks_that_open_different_groups():
    """All of them hear it, also where one has its groups already."""
    def work(comm):
        groups = SequenceGroups(comm)
        groups.open([(0, 2)])
        groups.open([(0, 2)] if comm.rank == 0 else [(0, 1), (1, 1)])
    with pytest.raises(orchvlm.CommError, match="ranks 0 and 1 open different groups"):
        orchvlm.comm.run_threads(2, work)


@pytest.mark.parametrize("blocks", ("ab", 3, [(0, "x")], [(0, 1, 2)], None))
def test_blocks_of_a_wrong_kind(blocks):
    def work(comm):
        with pytest.raises(TypeError, match="blocks must be pairs"):
            SequenceGroups(comm).open(blocks)
    orchvlm.comm.run_threads(1, work)
