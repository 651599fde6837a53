"""Models over ranks, kept in every way, against the same model on one rank."""
import os
import secrets

import numpy as np
import pytest

import orchvlm
from model_cases import SANITIZED, fill
from orchvlm.passes import OneRank
from orchvlm.routing import Balance
from orchvlm.sharding import MODES
from rank_cases import (FAMILIES, MIXED, RandomPlans, compare, draw_case, joined, made_model,
                        mode_of, node_size)

SEED = int(os.environ.get("ORCHVLM_TEST_SEED", secrets.randbits(32)))
NAME = "model.language_model.norm.weight"


def sharded(seed, config, comm, mode, prepare=None, **options):
    model = fill(orchvlm.Model(config, threads=1, **options), np.random.default_rng(seed))
    if prepare is not None:
        prepare(model)
    if comm is not None:
        orchvlm.Shard(model, comm, mode_of(model, mode), node_size(comm.size))
    return model


class Ranks:
    """Steps of one rank, or of one among several, on a batch that they share."""

    def __init__(self, seed, config, samples, comm=None, mode="ddp", prepare=None, **options):
        self.comm, self.routed = comm, []  # tokens of each expert, step by step
        self.model = sharded(seed, config, comm, mode, prepare, **options)
        if comm is None:
            self.passes, self.mine = OneRank(self.model, 1), samples
            return
        self.passes = RandomPlans(self.model, comm)
        self.passes.seed = seed
        holder = np.random.default_rng(seed).integers(0, comm.size, len(samples))
        self.mine = [one for one, rank in zip(samples, holder) if rank == comm.rank]

    def gradients(self):
        """(loss, gradients) of the whole batch."""
        model, passes, inputs = self.model, self.passes, joined(self.mine)
        model.zero_grad()
        balance = Balance(model, "exact", 0.0, passes.total)
        ran = passes.run([inputs] if self.comm is None else passes.prepare(inputs), balance,
                         "none")
        passes.reduce_gradients()
        if model.config.sparse:
            self.routed.append(passes.total(balance._counts))
        grads = model.grads if self.comm is None else model.shard.gradients()
        return float(passes.total(np.array([ran.loss]))[0]), {
            name: np.array(g, np.float64) for name, g in grads.items()}

    def steps(self, optimizer, n):
        for _ in range(n):
            self.gradients()
            assert not optimizer.step()["skipped"]
        return self


def over_ranks(n, work, *args):
    """What all ranks return, who must agree to the bit."""
    results = orchvlm.comm.run_threads(n, work, *args)
    for other in results[1:]:
        for name, values in results[0].items():
            assert (other[name] == values).all(), name
    return results[0]


def distance(got, wanted, start):
    """Of the updates, as a share of their norm."""
    error = sum(((got[name] - wanted[name]) ** 2).sum() for name in start)
    update = sum(((wanted[name] - start[name]) ** 2).sum() for name in start)
    return float(np.sqrt(error / update))


def like_sgd(model):
    """w -= lr (clip g + decay w): without memory, and eps drowns the second moment."""
    return orchvlm.AdamW(model, 1e7, (0.0, 0.0), 1e9, weight_decay=1e-8, max_grad_norm=0.5)


def adam(model):
    # eps keeps numbers whose gradient is nothing but rounding from moving by a whole lr.
    return orchvlm.AdamW(model, 1e-3, eps=1e-6, groups=[{"match": "*embed*", "lr": 3e-3}])


# Sanitized, the family with most kinds of units stands for all.
CASES = [(family, mode) for family in (["qwen3_omni"] if SANITIZED else FAMILIES)
         for mode in (*MODES, "mixed")]


# ---------------------------------------------------------------- against one rank


@pytest.mark.parametrize("family, mode", CASES)
def test_gradients_are_those_of_one_rank(family, mode):
    print("seed", SEED)
    for n in (1, 2, 3, 4):
        seed = [SEED, n]
        config, samples = draw_case(seed, family)
        wanted = Ranks(seed, config, samples).gradients()
        results = orchvlm.comm.run_threads(n, lambda comm: Ranks(
            seed, config, samples, comm, MIXED if mode == "mixed" else mode).gradients())
        for got in results:
            compare(got, wanted)


@pytest.mark.parametrize("make, steps, most", [(like_sgd, 1, 1e-5), (adam, 10, 1e-3)])
@pytest.mark.parametrize("family, mode", CASES)
def test_steps_are_those_of_one_rank(family, mode, make, steps, most):
    print("seed", SEED)
    n = 1 + (SEED + CASES.index((family, mode))) % 4
    seed = [SEED, 9]
    config, samples = draw_case(seed, family)

    def work(comm=None, steps=steps):
        ranks = Ranks(seed, config, samples, comm, MIXED if mode == "mixed" else mode)
        state = ranks.steps(make(ranks.model), steps).model.state_dict()
        return {**state, "routed": np.array(ranks.routed)}

    start, got, wanted = made_model(seed, config).state_dict(), over_ranks(n, work), work()
    other = [k for k, (one, two) in enumerate(zip(got["routed"], wanted["routed"]))
             if (one != two).any()]
    if other:  # a token between two experts, by the last bits: what was before is the same
        got, wanted = over_ranks(n, work, other[0]), work(None, other[0])
    assert other[:1] == [0] or distance(got, wanted, start) <= most, (n, other)


def freeze(model):
    model.freeze("model.visual.*", "*norm*")


def adapt(model):
    model.add_lora(r=2, match=["model.language_model.layers.*.self_attn.*_proj"], seed=3)
    for name, weight in model.parameters.items():
        if name.endswith("lora_B.weight"):
            weight[:] = 0.1


@pytest.mark.parametrize("prepare", [freeze, adapt])
@pytest.mark.parametrize("mode", [*MODES, "mixed"])
def test_what_is_trained_in_part(mode, prepare):
    print("seed", SEED)
    seed, n = [SEED, 5], 2 + SEED % 3
    config, samples = draw_case(seed, "qwen3_vl_moe")

    def work(comm=None):
        ranks = Ranks(seed, config, samples, comm, MIXED if mode == "mixed" else mode, prepare)
        return ranks.steps(like_sgd(ranks.model), 1).model.state_dict()

    model = made_model(seed, config)
    prepare(model)
    assert distance(over_ranks(n, work), work(), model.state_dict()) <= 1e-5


def test_a_gradient_without_a_number_stops_all_ranks():
    """It comes from one rank alone, and of a shard maybe to one alone."""
    config, _ = draw_case([SEED, 3], "seed1_5_vl_moe")

    def work(comm, mode):
        weights = np.full(4, 1e38 if comm.rank == 1 else 1.0, np.float32)
        ranks = Ranks([SEED, 3], config, [], comm, mode)
        model, passes, optimizer = ranks.model, ranks.passes, adam(ranks.model)
        before = model.state_dict()
        prepared = passes.prepare(orchvlm.Inputs(input_ids=[5, 6, 7, 8], labels=[5, 6, 7, 8],
                                                 weights=weights))
        prepared.normalizer = 1e-3
        model.zero_grad()
        passes.run(prepared, Balance(model, "exact", 0.0, passes.total), "none")
        done, after = optimizer.step(), model.state_dict()
        return done["skipped"], optimizer.step_count, all(
            (after[name] == values).all() for name, values in before.items())

    for mode in MODES:
        assert orchvlm.comm.run_threads(3, work, mode) == [(True, 0, True)] * 3


# ---------------------------------------------------------------- saved and loaded


def saved(ranks, optimizer):
    return ranks.model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("was, then", [((3, "fsdp"), (2, "zero1")), ((2, "zero1"), (4, "hybrid")),
                                       ((4, "hybrid"), (1, None)), ((1, None), (3, "mixed")),
                                       ((4, "mixed"), (2, "ddp"))])
def test_state_of_some_ranks_is_loaded_by_others(was, then, dtype):
    """A step after loading is the one that would have been taken."""
    print("seed", SEED)
    seed = [SEED, 4]
    config, samples = draw_case(seed, "qwen3_vl_moe")

    def run(kind, work):
        return [work(None, "ddp")] if kind[1] is None else orchvlm.comm.run_threads(
            kind[0], work, MIXED if kind[1] == "mixed" else kind[1])

    def first(comm, mode):
        ranks = Ranks(seed, config, samples, comm, mode, dtype=dtype)
        optimizer = adam(ranks.model)
        ranks.steps(optimizer, 3)
        held = saved(ranks, optimizer)
        ranks.steps(optimizer, 1)
        return *held, ranks.model.state_dict()

    results = run(was, first)

    def second(comm, mode):
        ranks = Ranks([*seed, 1], config, samples, comm, mode, dtype=dtype)
        optimizer = adam(ranks.model)
        ranks.model.load_state_dict(results[0][0])
        optimizer.load_state_dict([state for _, state, _ in results])
        assert optimizer.step_count == 3
        held = saved(ranks, optimizer)
        with pytest.raises(ValueError, match="missing"):
            optimizer.load_state_dict({"step": 1})
        ranks.passes.seed = seed
        ranks.steps(optimizer, 1)
        return *held, ranks.model.state_dict()

    again = run(then, second)
    whole = [assembled([state for _, state, _ in some]) for some in (results, again)]
    assert whole[0].keys() == whole[1].keys()
    for key, values in whole[0].items():
        assert (whole[1][key] == values).all(), key
    for name, values in results[0][0].items():
        assert (again[0][0][name] == values).all(), name
    assert distance(again[0][2], results[0][2], results[0][0]) <= (
        1e-3 if dtype == "float32" else 0.1)


def assembled(states):
    """Whole arrays of optimizer state, in the test's own way; every number is in one state."""
    if not any(key.endswith("/piece") for key in states[0]):
        states = states[:1]  # all ranks have all of it
    whole = {}
    for state in states:
        for key, values in state.items():
            name, _, label = key.rpartition("/")
            if label.startswith(("exp_avg", "master")):
                first, n, *shape = state.get(f"{name}/piece", [0, values.size, *values.shape])
                flat = whole.setdefault(key, np.full(int(np.prod(shape)), np.nan))
                assert n == values.size and np.isnan(flat[first:first + n]).all(), key
                flat[first:first + n] = values.reshape(-1)
    assert not any(np.isnan(flat).any() for flat in whole.values())
    return whole


def test_files_are_those_of_a_whole_model(tmp_path):
    for family in ("qwen3_vl_moe", "qwen3_omni"):
        config, _ = draw_case([SEED, 6], family)
        whole = made_model([SEED, 6], config)
        whole.save_pretrained(tmp_path / "whole")

        def work(comm):
            model = sharded([SEED, 6], config, comm, "fsdp")
            model.save_pretrained(tmp_path / "parts")
        orchvlm.comm.run_threads(3, work)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "parts" / file).read_bytes() == (
                tmp_path / "whole" / file).read_bytes()


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", [*MODES, "mixed"])
def test_memory_is_what_was_predicted(mode, dtype):
    seed, n = [SEED, 7], 4
    config, samples = draw_case(seed, "qwen3_vl_moe")

    def work(comm):
        how = MIXED if mode == "mixed" else mode
        ranks = Ranks(seed, config, samples, comm, how, dtype=dtype)
        shard = ranks.model.shard
        ranks.steps(adam(ranks.model), 1)
        predicted = orchvlm.Shard.predict(ranks.model, n, mode_of(ranks.model, how), 2,
                                          rank=comm.rank)
        assert shard.memory() == predicted == orchvlm.Shard.predict(
            config, n, mode_of(ranks.model, how), 2, rank=comm.rank, dtype=dtype)
        own = ranks.model.memory()
        if mode in ("ddp", "zero1"):
            assert own["weights"] == predicted["weights"] and predicted["buffers"] == 0
        else:
            assert own["training"] == 0 and own["weights"] < predicted["weights"]
        return predicted
    alone = orchvlm.Shard.predict(config, 1, "ddp", dtype=dtype)
    wide, narrow = 4, 2 if dtype == "bfloat16" else 4
    planes = 3 if dtype == "bfloat16" else 2
    parts = orchvlm.comm.run_threads(n, work)
    elements = alone["training"] / (1 + planes) / wide
    for part in parts:
        slack = 0.2 * elements * wide  # ranges end at multiples of 64 numbers; models are tiny
        share = {"ddp": (1, 1, 1), "zero1": (1, 1, 1 / 4), "fsdp": (1 / 4,) * 3,
                 "hybrid": (1 / 2,) * 3}.get(mode)
        if share is not None:
            weights, gradients, state = (s * elements for s in share)
            assert abs(part["weights"] - weights * narrow) <= slack
            assert abs(part["training"] - (gradients + planes * state) * wide) <= 4 * slack


def test_memory_falls_with_the_ranks():
    config = orchvlm.preset("tiny-moe")
    whole = orchvlm.Shard.predict(config, 1, "fsdp")
    for n in (2, 4, 8, 16):
        part = orchvlm.Shard.predict(config, n, "fsdp", rank=n - 1)
        for name in ("weights", "training"):
            assert part[name] == pytest.approx(whole[name] / n, rel=0.05)
        assert part["buffers"] == whole["buffers"]


# ---------------------------------------------------------------- what is refused, what fails


def test_what_a_sharded_model_refuses():
    config, samples = draw_case([SEED, 8], "seed1_5_vl_moe")

    def work(comm):
        model = made_model([SEED, 8], config)
        kept = model.parameters[NAME]
        with pytest.raises(RuntimeError, match="still in use"):
            orchvlm.Shard(model, comm, "fsdp")
        del kept
        for mode, message in (("zero", "mode must be"), ({"nothing": "ddp"}, "matches no unit"),
                              ({"lm_head": "ddp"}, "no pattern matches|matches no unit")):
            with pytest.raises(ValueError, match=message):
                orchvlm.Shard(model, comm, mode)
        with pytest.raises(ValueError, match="node_size"):
            orchvlm.Shard(model, comm, "hybrid", 3)
        shard = orchvlm.Shard(model, comm, "fsdp")
        optimizer = adam(model)
        for call, message in ((lambda: model.parameters[NAME], "several ranks"),
                              (lambda: model.grads[NAME], "several ranks"),
                              (lambda: model.freeze("*norm*"), "freeze"),
                              (lambda: model.add_lora(r=1), "adapters"),
                              (lambda: orchvlm.EMA(model), "average"),
                              (lambda: orchvlm.Shard(model, comm), "sharded already")):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(AttributeError):  # a pass may be using it
            model.shard = None
        before = model.state_dict()
        shard.undo()
        assert model.shard is None
        for name, values in model.parameters.items():
            assert (values == before[name]).all(), name
        optimizer.step()
        with orchvlm.EMA(model).swap():
            pass
    orchvlm.comm.run_threads(2, work)


def test_an_average_in_zero1_is_that_of_one_rank():
    seed = [SEED, 10]
    config, samples = draw_case(seed, "qwen3_vl")

    def work(comm=None):
        ranks = Ranks(seed, config, samples, comm, "zero1")
        average, optimizer = orchvlm.EMA(ranks.model, 0.5), like_sgd(ranks.model)
        for _ in range(2):
            ranks.steps(optimizer, 1)
            average.update()
        return average.state_dict()
    got, wanted = over_ranks(3, work), work()
    for key, values in wanted.items():
        assert np.abs(got[key] - values).max() <= 1e-4 * np.abs(values).max() + 1e-6, key


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_fails_takes_the_others_along(mode):
    seed = [SEED, 11]
    config, samples = draw_case(seed, "qwen3_vl_moe")

    def work(comm):
        ranks = Ranks(seed, config, samples, comm, mode)
        optimizer = adam(ranks.model)
        ranks.steps(optimizer, 1)
        if comm.rank == 1:
            raise KeyError("the reason")
        ranks.steps(optimizer, 1)
    with pytest.raises(orchvlm.CommError, match="rank 1 failed: KeyError: 'the reason'"):
        orchvlm.comm.run_threads(4, work, silent_s=20.0)


def in_a_process(comm, mode):
    seed = [1, 2]
    config, samples = draw_case(seed, "qwen3_omni")
    ranks = Ranks(seed, config, samples, comm, mode)
    return ranks.steps(like_sgd(ranks.model), 2).model.state_dict()


def test_processes_and_threads_have_the_same_bits():
    threads = orchvlm.comm.run_threads(2, in_a_process, "fsdp")
    for results in orchvlm.comm.run_processes(2, in_a_process, "fsdp"):
        for name, values in threads[0].items():
            assert (results[name] == values).all(), name


# ---------------------------------------------------------------- the trainer


def test_runs_that_change_ranks_and_modes(tmp_path):
    """fsdp on two ranks, then zero1 on three, then one rank: the losses of one rank throughout."""
    pytest.importorskip("PIL")
    from orchvlm import data
    from test_training import CONFIG

    def run(comm, folder, steps, mode, resume):
        model = orchvlm.Model.from_config(orchvlm.ModelConfig(CONFIG), seed=0, threads=1)
        source = data.Mixture([data.Tasks(seed=2, kinds=["colour", "count"], max_side=56)])
        processor = data.Processor.from_config(CONFIG)
        loader = data.Loader(source, processor, 150) if comm is None else \
            data.RankLoader(source, processor, 150, comm)
        config = orchvlm.TrainingConfig(steps=6, lr=3e-3, warmup=2, shard=mode)
        trainer = orchvlm.Trainer(model, loader, config, folder, comm)
        if resume:
            trainer.resume()
        rows = []
        for row in trainer.run():
            rows.append(row["loss"])
            if row["step"] == steps:
                break
        return rows

    wanted = run(None, tmp_path / "one", 6, "ddp", False)
    folder = tmp_path / "many"
    got = orchvlm.comm.run_threads(2, run, folder, 2, "fsdp", False)[0]
    assert sorted(path.name for path in (folder / "checkpoint-2").glob("optimizer*")) == [
        "optimizer-1-of-2.safetensors", "optimizer-2-of-2.safetensors"]
    got += orchvlm.comm.run_threads(3, run, folder, 4, "zero1", True)[0]
    got += run(None, folder, 6, "ddp", True)
    assert got == pytest.approx(wanted, rel=2e-4)
