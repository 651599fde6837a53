"""Global batches on ranks that are threads, under plans drawn at random."""

import numpy as np

import orchvlm
from model_cases import draw_config, draw_seed_config, fill, grads_of
from omni_cases import draw_any, draw_omni_config, pack_any
from orchvlm.orchestrator import Orchestrator
from orchvlm.passes import OneRank
from orchvlm.routing import Balance
from orchvlm.step import StepPlan

FAMILIES = {
    "qwen3_vl": lambda rng: draw_config(rng, False),
    "qwen3_vl_moe": lambda rng: draw_config(rng, True),
    "seed1_5_vl": lambda rng: draw_seed_config(rng, False),
    "seed1_5_vl_moe": lambda rng: draw_seed_config(rng, True),
    "qwen3_omni": draw_omni_config}


class RandomPlans(Orchestrator):
    """Every item and sample on a random rank, in a random micro-batch: the same on all ranks."""

    seed = 0

    def plan(self, batch):
        rng = np.random.default_rng(self.seed)
        decisions = []
        for n in (*(len(items) for items in batch.phases.values()), len(batch)):
            most = int(rng.integers(1, 4))
            micro = rng.integers(0, most, n)
            used, micro = np.unique(micro, return_inverse=True)  # none of them empty everywhere
            ranks = rng.integers(0, self.size, n) if rng.random() < 0.8 else np.full(
                n, rng.integers(0, self.size))
            decisions.append((ranks.astype(np.int64), micro.astype(np.int64).reshape(-1),
                              max(1, len(used)), 0.0))
        options = {"relabel": None, "slack": None, "compose": True, "pad_to": 1, "seed": 0}
        routes = 1 + 2 * len(batch.phases)
        return StepPlan._restore((batch, self.cluster, self.costs, {}), options, tuple(decisions),
                                 None, [(0.0,) * 5] * routes, [], False)


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


def made_model(seed, config):
    return fill(orchvlm.Model(config, threads=1), np.random.default_rng(seed))


def joined(samples):
    if samples:
        return orchvlm.Inputs.concatenate(samples)
    return orchvlm.Inputs(input_ids=np.zeros(0, np.int32), cu_seqlens=[0])


def on_one_rank(seed, config, samples):
    """(loss, gradients) of the whole batch in one call."""
    model = made_model(seed, config)
    passes = OneRank(model, 1)
    model.zero_grad()
    ran = passes.run([joined(samples)], Balance(model, "exact", 0.0), "none")
    return ran.loss, grads_of(model)


def on_ranks(seed, config, samples, n, make=RandomPlans, checkpoint="none"):
    """(loss, gradients) over n ranks that hold the samples as the seed says."""
    rng = np.random.default_rng(seed)
    holder = rng.integers(0, n, len(samples)) if rng.random() < 0.7 else np.full(
        len(samples), rng.integers(0, n))

    def work(comm):
        model = made_model(seed, config)
        orchestrator = make(model, comm)
        orchestrator.seed = seed
        model.zero_grad()
        mine = joined([one for one, rank in zip(samples, holder) if rank == comm.rank])
        ran = orchestrator.run(orchestrator.prepare(mine),
                               Balance(model, "exact", 0.0, orchestrator.total), checkpoint)
        orchestrator.reduce_gradients()
        return float(orchestrator.total(np.array([ran.loss]))[0]), grads_of(model)

    results = orchvlm.comm.run_threads(n, work)
    for _, gradients in results[1:]:  # the same bits on all ranks
        assert all((gradients[name] == results[0][1][name]).all() for name in gradients)
    return results[0]


def compare(got, wanted):
    """Loss and every gradient: 1e-5 of its norm, or 1e-7 of all."""
    (loss, gradients), (loss_wanted, gradients_wanted) = got, wanted
    assert abs(loss - loss_wanted) <= 1e-5 * max(1e-2, abs(loss_wanted))
    whole = np.sqrt(sum((g ** 2).sum() for g in gradients_wanted.values()))
    for name, gradient in gradients_wanted.items():
        error = np.linalg.norm(gradients[name] - gradient)
        assert error <= 1e-5 * np.linalg.norm(gradient) + 1e-7 * whole, (
            name, error, np.linalg.norm(gradient), whole)
