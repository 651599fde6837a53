"""Global batches on ranks, under plans drawn at random, against the whole batch on one rank.

Under a launcher, draws run over its ranks; alone, over threads, as many as one likes:

    mpirun -n 4 --oversubscribe python tests/py/rank_cases.py 10 SEED
    python tests/py/rank_cases.py 10000
    python tests/py/rank_cases.py 10000 SEED groups
"""
import gc
import hashlib
import secrets
import sys
from fnmatch import fnmatchcase

import numpy as np

import orchvlm
from model_cases import FIRST_TEXT, draw_config, draw_seed_config, fill, grads_of
from omni_cases import draw_any, draw_omni_config, pack_any
from orchvlm.orchestrator import Orchestrator
from orchvlm.passes import OneRank
from orchvlm.routing import Balance
from orchvlm.sharding import MODES
from orchvlm.step import StepPlan

FAMILIES = {
    "qwen3_vl": lambda rng: draw_config(rng, False),
    "qwen3_vl_moe": lambda rng: draw_config(rng, True),
    "seed1_5_vl": lambda rng: draw_seed_config(rng, False),
    "seed1_5_vl_moe": lambda rng: draw_seed_config(rng, True),
    "qwen3_omni": draw_omni_config}
MIXED = {"model.visual.*": "fsdp", "*.experts": "hybrid", "lm_head": "zero1", "*": "ddp"}


class RandomPlans(Orchestrator):
    """Every item and sample on a random rank, in a random micro-batch: the same on all ranks."""

    seed = 0

    def plan(self, batch, costs=None):
        rng = np.random.default_rng(self.seed)
        decisions = [self.share(rng, n) for n in (
            *(len(items) for items in batch.phases.values()), len(batch))]
        options = {"relabel": None, "slack": None, "compose": True, "pad_to": 1, "seed": 0}
        routes = 1 + 2 * len(batch.phases)
        return StepPlan._restore((batch, self.cluster, self.costs, {}), options, tuple(decisions),
                                 None, [(0.0,) * 5] * routes, [], False)


    def share(self, rng, n):
        """Ranks and micro-batches of a phase's items."""
        micro = rng.integers(0, int(rng.integers(1, 4)), n)
        used, micro = np.unique(micro, return_inverse=True)  # none of them empty everywhere
        ranks = rng.integers(0, self.size, n) if rng.random() < 0.8 else np.full(
            n, rng.integers(0, self.size))
        return (ranks.astype(np.int64), micro.astype(np.int64).reshape(-1), max(1, len(used)), 0.0)


class RandomGroups(RandomPlans):
    """Every item on a random rank, and every sample in a random group of a random micro-batch, of
    any degree that the heads allow."""

    def plan(self, batch, costs=None):
        rng = np.random.default_rng([*self.seed, len(batch)])
        heads = self.model.config.text["num_attention_heads"]
        degrees = range(1, min(self.size, heads) + 1)
        cost = orchvlm.SequenceCost(1e-6, 1e-3, comm={d: 1e-4 * (d > 1) for d in degrees},
                                    heads=heads)
        decisions = [self.share(rng, len(items)) for items in batch.phases.values()]
        decisions.append((np.zeros(0, np.int64), np.zeros(0, np.int64), 1, 0.0))
        options = {"relabel": None, "slack": None, "compose": True, "pad_to": 1, "seed": 0}
        routes = 1 + 2 * len(batch.phases)
        return StepPlan._restore(
            (batch, self.cluster, {**self.costs, "llm": cost}, {}), options, tuple(decisions),
            random_groups(rng, batch.language_lengths, self.size, cost),
            [(0.0,) * 5] * routes, [], False)


class PlannedGroups(Orchestrator):
    """Groups as they are planned, of at most so few tokens that there are some."""

    def __init__(self, model, comm):
        super().__init__(model, comm, language="sequence_parallel", max_tokens=15)


def blocks(rng, n_ranks, degrees):
    """Random groups side by side, some ranks in none: [(first, degree)]"""
    aligned = degrees[-1] <= 2  # of other degrees not every one divides the next
    found, first = [], 0
    while first < n_ranks:
        d = int(rng.choice([d for d in degrees if d <= n_ranks - first
                            and (first % d == 0 or not aligned)]))
        if rng.random() < 0.85:
            found.append((first, d))
        first += d
    return found or [(0, degrees[-1])]


def random_groups(rng, lengths, n_ranks, cost):
    """Fields of a sequence plan: samples in random groups, micro-batch after micro-batch, the
    longest first."""
    micros = []
    for some in np.array_split(rng.permutation(len(lengths)), rng.integers(1, 4)):
        groups = blocks(rng, n_ranks, list(cost.comm))
        owner = rng.integers(0, len(groups), len(some))
        made = [(d, first, some[owner == g], cost(lengths[some[owner == g]], d))
                for g, (first, d) in enumerate(groups) if (owner == g).any()]
        if made:
            micros.append(sorted(made, key=lambda group: -group[0]))
    micros.sort(key=lambda groups: -max(group[3] for group in groups))
    flat = [group for groups in micros for group in groups]
    column = [np.array([group[k] for group in flat], np.int64) for k in (0, 1)]
    starts = [np.cumsum([0, *map(len, parts)]) for parts in (micros, [g[2] for g in flat])]
    items = np.concatenate([np.zeros(0, np.int64), *(group[2] for group in flat)])
    times = np.array([group[3] for group in flat], np.float64)
    whole = float(sum(max(group[3] for group in groups) for groups in micros))
    return starts[0], *column, starts[1], items, times, whole, 0.0, 0, False, 0


def only_text(inputs):
    """The same without images and sounds."""
    ids = np.where(inputs.input_ids < FIRST_TEXT + 2, FIRST_TEXT + 2, inputs.input_ids)
    return orchvlm.Inputs(input_ids=ids, cu_seqlens=inputs.cu_seqlens, labels=inputs.labels,
                          position_ids=inputs.position_ids, weights=inputs.weights)


def more_heads(rng, config, degree):
    """A model with at least so many heads, few of them for keys or many."""
    kv = int(rng.integers(1, degree + 2))
    share = -(-degree // kv) + int(rng.integers(0, 2))
    config["text_config"] |= {"num_key_value_heads": kv, "num_attention_heads": kv * share}


def draw_group_case(seed, family, ranks):
    """A case whose model has as many heads as there are ranks, or fewer; of text alone in some."""
    config, samples = draw_case(seed, family)
    rng = np.random.default_rng([*seed, 3])
    more_heads(rng, config, int(rng.integers(2, max(2, ranks) + 1)))
    return config, [only_text(one) for one in samples] if rng.random() < 0.25 else samples


def draw_case(seed, family):
    """(config, samples as Inputs of one each, with weights in half of all cases)"""
    rng = np.random.default_rng(seed)
    config = FAMILIES[family](rng)
    drawn = draw_any(rng, config, int(rng.integers(2, 7)))
    per_sample, samples = rng.random() < 0.5, []
    for one in drawn:
        inputs = pack_any([one])
        if per_sample:  # every sample counts the same, whatever its length
            share = np.float32(1 / max(1, inputs.n_target_tokens))
            inputs = orchvlm.Inputs(**{**vars(inputs), "weights": np.full(
                inputs.n_tokens, share, np.float32)})
        samples.append(inputs)
    return config, samples


def made_model(seed, config, **options):
    return fill(orchvlm.Model(config, threads=1, **options), np.random.default_rng(seed))


def joined(samples):
    if samples:
        return orchvlm.Inputs.concatenate(samples)
    return orchvlm.Inputs(input_ids=np.zeros(0, np.int32), cu_seqlens=[0])


def node_size(n):
    return 2 if n % 2 == 0 else 1


def mode_of(model, mode):
    """The mode, without patterns that match nothing in this model."""
    if isinstance(mode, str):
        return mode
    units = orchvlm._core.shard_units(model._core)
    return {p: m for p, m in mode.items() if any(fnmatchcase(unit, p) for unit in units)}


def expert_ranks(model, n, rng):
    """How many of n ranks share the experts of a model."""
    most = model.config.text.get("num_experts", 0) if model.config.sparse else 0
    degrees = [e for e in range(1, n + 1) if n % e == 0 and e <= max(1, most)]
    return int(rng.choice(degrees))


def spread_modes(model, mode, experts):
    """The same, where experts over ranks are not hybrid."""
    if experts > 1 and mode == "hybrid":
        mode = {"*.experts": "fsdp", "*": "hybrid"}
    elif experts > 1 and not isinstance(mode, str):
        mode = {**mode, "*.experts": "zero1"}
    return mode_of(model, mode)


def on_one_rank(seed, config, samples, **options):
    """(loss, gradients) of the whole batch in one call."""
    model = made_model(seed, config, **options)
    passes = OneRank(model, 1)
    model.zero_grad()
    ran = passes.run([joined(samples)], Balance(model, "exact", 0.0), "none")
    return ran.loss, grads_of(model)


def compare(got, wanted, exact=None):
    """Loss and every gradient: 1e-5 of its norm, or 1e-7 of all.  One in which large terms cancel
    is not known better than that in float32: ``exact()`` gives it in double, and twice what one
    rank is from it is added."""
    (loss, gradients), (loss_wanted, gradients_wanted) = got, wanted
    assert abs(loss - loss_wanted) <= 1e-5 * max(1e-2, abs(loss_wanted))
    whole = np.sqrt(sum((g ** 2).sum() for g in gradients_wanted.values()))
    for name, gradient in gradients_wanted.items():
        error = np.linalg.norm(gradients[name] - gradient)
        bound = 1e-5 * np.linalg.norm(gradient) + 1e-7 * whole
        if error > bound and exact is not None:
            bound += 2 * np.linalg.norm(gradient - exact()[1][name])
        assert error <= bound, (name, error, np.linalg.norm(gradient), whole)


def same_on_all(comm, gradients):
    """Whether all ranks have the same bits."""
    bits = hashlib.sha256()
    for name in sorted(gradients):
        bits.update(np.ascontiguousarray(gradients[name]))
    told = comm.all_gather(np.frombuffer(bits.digest(), np.uint8).reshape(1, -1))
    return bool((told == told[0]).all())


def law(comm, seed, family, make=RandomPlans):
    """Loss and gradients of one drawn batch over the ranks of a communicator, whatever carries it,
    are those of one rank, which rank 0 computes.

    The seed draws everything: model, samples, who holds them, the plan, what is kept for the
    backward, how weights are kept, how many ranks share the experts, and how many of their rows
    come at a time.
    """
    groups = issubclass(make, (RandomGroups, PlannedGroups))
    config, samples = draw_group_case(seed, family, comm.size) if groups else draw_case(
        seed, family)
    rng = np.random.default_rng([*seed, comm.size])
    holder = rng.integers(0, comm.size, len(samples)) if rng.random() < 0.7 else np.full(
        len(samples), rng.integers(0, comm.size))
    checkpoint = str(rng.choice(["none", "selective", "full"]))
    mode = [*MODES, MIXED][rng.integers(1 + len(MODES))]
    model = made_model(seed, config)
    experts = expert_ranks(model, comm.size, rng)
    if rng.random() < 0.3:
        model.moe_chunk_rows = int(rng.integers(1, 60))
    shard = orchvlm.Shard(model, comm, spread_modes(model, mode, experts), node_size(comm.size),
                          experts)
    orchestrator = make(model, comm)
    orchestrator.seed = seed
    model.zero_grad()
    mine = joined([one for one, rank in zip(samples, holder) if rank == comm.rank])
    ran = orchestrator.run(orchestrator.prepare(mine),
                           Balance(model, "exact", 0.0, orchestrator.total), checkpoint)
    orchestrator.reduce_gradients()
    gradients = {name: np.array(g, np.float64) for name, g in shard.gradients().items()}
    loss = float(orchestrator.total(np.array([ran.loss]))[0])
    try:
        assert same_on_all(comm, gradients), "the ranks' gradients are not the same bits"
        if comm.rank == 0:
            compare((loss, gradients), on_one_rank(seed, config, samples),
                    lambda: on_one_rank(seed, config, samples, device="ref", dtype="float64"))
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {family}, {comm.size} ranks, {checkpoint}, "
                             f"{mode}, experts over {experts}: {error}") from error


def laws(comm, seed, draws, make=RandomPlans):
    """So many draws of every family."""
    for draw in range(draws):
        for family in FAMILIES:
            law(comm, [seed, draw], family, make)


def main(draws, seed=None, kind="balance"):
    draws, seed = int(draws), secrets.randbits(32) if seed is None else int(seed)
    make = {"balance": RandomPlans, "groups": RandomGroups}[kind]
    with orchvlm.comm.init() as comm:
        if comm.size > 1:
            laws(comm, seed, draws, make)
            print(f"rank {comm.rank} of {comm.size} over {comm.engine}: fine", flush=True)
            return
    print("seed", seed)
    for draw in range(draws):
        family = list(FAMILIES)[draw % len(FAMILIES)]
        n = (1, 2, 3, 4, 8)[draw // len(FAMILIES) % 5]
        orchvlm.comm.run_threads(n, law, [seed, draw], family, make)
        if (draw + 1) % 100 == 0:
            gc.collect()  # a model and its shard hold each other
            print(f"{draw + 1} draws", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
