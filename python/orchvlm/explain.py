"""A training run before it runs: what it was told, parameters, memory, FLOPs, time of a step."""
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import numpy as np

from . import _core
from .arenas import SIZES, of_model
from .building import check_frozen, loader_of, model_config_of, processor_of, threads_of
from .choosing import counted_costs, language_s, media_of, one_node, planned
from .cli import CommandError
from .comm import run_threads
from .configs import ModelConfig, preset
from .flops import flops_of
from .group_metrics import degrees_of
from .inputs import Inputs
from .parts import count_parameters
from .peak import gemm_peak
from .run_config import cores
from .rounds import Rounds, evenness, fewest, share_of, step_bytes
from .run_keys import KEYS, toml
from .sequences import SequencePlan
from .sharding import Shard
from .shares import gathered_batch, medium
from .tables import format_bytes, text_table

_SHARE = 0.5  # of the peak, as the costs of from_model have it


@dataclass(frozen=True)
class Foretold:
    """What a run will take.

    Attributes
    ----------
    config : ModelConfig
    parameters, trained : int
    batch : Inputs
        The first global batch.
    memory : list of dict of str to int
        Bytes by arena, of each rank.
    flops : float
        Of the step on that batch.
    peak : float
        FLOP/s of a matrix product on one rank, measured.
    seconds : float
        Of the step.
    rounds : int
        Of the step; 0 on one rank.
    imbalance : dict of str to float
        Of each phase as planned: largest load over mean; empty on one rank.
    language : str
        Who runs the language phase, and what it takes beside the other way; empty on one rank.
    """

    config: object
    parameters: int
    trained: int
    batch: Inputs
    memory: list
    flops: float
    peak: float
    seconds: float
    rounds: int
    imbalance: dict
    language: str


def foretell(run):
    """Reads the first batch and plans its step; makes no model.

    Parameters
    ----------
    run : RunConfig

    Returns
    -------
    Foretold

    Raises
    ------
    CommandError
        There are no samples.
    ValueError
        What the model, the data or the sharding refuse.

    Notes
    -----
    Time is that of :func:`orchvlm.from_model`: useful FLOPs at half of the peak, which is measured
    here and now, of the slowest rank of each phase of the plan; where ranks have more threads than
    there are cores, they take turns.  With frozen parts or adapters it falls as the FLOPs do, and
    gradients and optimizer state are a rank's share of those of the whole model.
    """
    config = model_config_of(run)
    rows, batch = _rows(run, config), _first_batch(run, config)
    ranks, threads = run["ranks.n"], threads_of(run) or cores()
    flops = flops_of(config, batch, True, rows)
    peak = gemm_peak("cpu", run["model.dtype"], threads)
    work, plans, words = flops / _SHARE, [], ""
    held = [_held(run, config, rows, rank) for rank in range(ranks)]
    shares = [[batch]]
    if ranks > 1:
        batch, cluster = _dealt_out(batch, ranks), one_node(ranks)
        rounds = _rounds(run, config, rows, batch, cluster, held)
        plans = [one.plan for one in rounds]
        words = _language(plans, config, cluster)
        # Its costs are of a model that is trained whole, at the cluster's peak.
        work = sum(plan.time for plan in plans) * cluster.peak_flops * flops / flops_of(
            config, batch, True)
        shares = [[share for one in rounds for share in share_of(one, rank, batch.pixels)]
                  for rank in range(ranks)]
    return Foretold(config, sum(prod(row[2]) for row in rows),
                    sum(prod(row[2]) for row in rows if row[3]), batch,
                    [{**own, **_step(run, config, rows, some, len(plans))}
                     for own, some in zip(held, shares)],
                    flops, peak, work / peak * max(1.0, ranks * threads / cores()), len(plans),
                    {name: evenness(plans, name)[1] for name in (*plans[0].phases, "llm")}
                    if plans else {}, words)


def _language(plans, config, cluster):
    """Who runs the language phase, in words, and what groups save by the plan."""
    groups = [plan.llm for plan in plans if isinstance(plan.llm, SequencePlan)]
    if not groups:
        return "whole samples on ranks"
    costs = counted_costs(config, cluster, "auto")
    alone_s = sum(language_s(planned(plan.batch, cluster, costs, {}), costs["llm"])
                  for plan in plans)
    share = sum(language_s(plan, costs["llm"]) for plan in plans) / alone_s
    return (f"groups of {degrees_of(groups)} ranks by micro-batch, foretold to take "
            f"{100 * share:.0f} % of the time of whole samples on ranks without a limit of tokens")


def _rows(run, config):
    """(name, kind, shape, trained) of all parameters, adapters last."""
    rows = _core.model_parameters(*config.numbers())
    rank, adapters = run["lora.r"], []
    for name, _, shape, _ in rows if rank else ():
        if any(fnmatchcase(name.removesuffix(".weight"), p) for p in run["lora.match"]):
            for letter, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                adapters.append((f"{name.removesuffix('weight')}lora_{letter}.weight", 4, size,
                                 True))
    check_frozen(run, [row[0] for row in (*rows, *adapters)])
    frozen = ["*"] if rank else run["training.freeze"]
    return [(*row[:3], not any(fnmatchcase(row[0], p) for p in frozen))
            for row in rows] + adapters


def _first_batch(run, config):
    loader, packs = loader_of(run, processor_of(run, config)), []
    for pack in loader:
        packs.append(pack)
        if len(packs) == run["training.micro_batches"]:
            return Inputs.concatenate(packs)
    raise CommandError(f"the data end before the first step, behind {len(packs)} of "
                       f"{run['training.micro_batches']} packs")


def _dealt_out(batch, ranks):
    """Its samples by the rank that reads them, every one its n-th."""
    return Inputs.concatenate([batch[k] for first in range(ranks)
                               for k in range(first, len(batch), ranks)])


def _as_read(config, batch, ranks):
    """(Batch, sizes of its items) of samples that are in the order of their ranks."""
    media = {name: medium(config, batch, name) for name in media_of(config)}
    ((found, sizes, _),) = run_threads(1, lambda comm: gathered_batch(config, batch, media, comm))
    counts = [len(range(first, len(found), ranks)) for first in range(ranks)]
    return replace(found, source_rank=np.repeat(np.arange(ranks), counts)), sizes


def _rounds(run, config, rows, batch, cluster, held):
    """The rounds of the first step, as the orchestrator has them."""
    found, sizes = _as_read(config, batch, cluster.n_gpus)
    most = {"llm": run["ranks.tokens"], "vision": run["ranks.patches"]}
    limits = {name: value for name, value in most.items()
              if value is not None and name in ("llm", *media_of(config))}
    language, limit, cut = run["ranks.language"], run["ranks.memory_bytes"], None
    if limit is not None:
        cut = Rounds(config, rows, run["model.dtype"], cluster.n_gpus,
                     max(sum(own.values()) for own in held), limit, run["training.checkpoint"],
                     spread=run["ranks.experts"])

    def plan(batch):
        return planned(batch, cluster, counted_costs(config, cluster, language), limits, language,
                       None if cut is None or language == "balance" else cut.tokens)
    limited = [name for name in media_of(config) if name in limits]
    if cut is None:
        return fewest(found, sizes, plan, limited)
    return cut.of(found, sizes, np.float32 if batch.pixels is None else batch.pixels.dtype, plan,
                  limited)


def _step(run, config, rows, shares, rounds):
    """{arena: bytes} of a rank's step: of its packs, one after the other."""
    alone = run["ranks.n"] == 1
    counts = run["training.aux"] != "bias" and (not alone or run["training.micro_batches"] > 1)
    return step_bytes(config, shares, rows, run["model.dtype"], run["training.checkpoint"],
                      counts=counts, encoded=rounds == 1,
                      spread=run["ranks.experts"])


def _held(run, config, rows, rank):
    """{arena: bytes} of a rank, whatever it computes."""
    dtype, ranks = run["model.dtype"], run["ranks.n"]
    whole = Shard.predict(config, ranks, run["ranks.shard"], run["ranks.node_size"], rank=rank,
                          dtype=dtype, experts=run["ranks.experts"])
    base = [row for row in rows if ".lora_" not in row[0]]
    trained = sum(prod(row[2]) for row in rows if row[3])
    adapters = sum(prod(row[2]) for row in rows) - sum(prod(row[2]) for row in base)
    state = whole["training"] * trained // sum(prod(row[2]) for row in base)
    return {"weights": whole["weights"] + SIZES[dtype] * adapters,
            "gradients and state": state, "buffers": whole["buffers"],
            "average": 4 * trained * (run["training.ema"] is not None)}


# ---------------------------------------------------------------- for people

def explain(run):
    """What a run was told and what it will take.

    Parameters
    ----------
    run : RunConfig

    Returns
    -------
    str
    """
    seen, ranks = foretell(run), run["ranks.n"]
    told = [(key.name, "" if run[key.name] is None else toml(run[key.name]), run.origins[key.name])
            for key in KEYS]
    parts = [(name, f"{count:,}") for name, (count, _) in count_parameters(seen.config).items()]
    arenas = list(seen.memory[0])
    memory = [(rank, *(format_bytes(row[name]) for name in arenas),
               format_bytes(sum(row.values()))) for rank, row in enumerate(seen.memory)]
    batch, steps = seen.batch, run["training.steps"]
    lines = [text_table(["key", "value", "said by"], told, "Configuration"), "",
             text_table(["part", "parameters"], parts, f"{seen.config.family}: {seen.parameters:,} "
                        f"parameters, {seen.trained:,} of them trained"), "",
             text_table(["rank", *arenas, "all"], memory,
                        f"Memory of the first step: {batch!r}"), "",
             f"A step is {seen.flops / 1e9:,.1f} GFLOP. A matrix product reaches "
             f"{seen.peak / 1e9:,.1f} GFLOP/s on a rank (threads: {threads_of(run) or cores()}), "
             f"measured now; at half of that, a step takes {seen.seconds:.3g} s, "
             f"{batch.n_tokens / seen.seconds:,.0f} tokens/s"
             + (f", {steps:,} steps {steps * seen.seconds / 60:,.1f} minutes." if steps else
                f", {run['training.minutes']:g} minutes about "
                f"{60 * run['training.minutes'] / seen.seconds:,.0f} steps.")]
    if ranks > 1:
        lines.append(f"Planned over ranks in {seen.rounds} round{'s' * (seen.rounds > 1)}, "
                     "largest load over mean: " + ", ".join(
            f"{name} {value:.3f}" for name, value in seen.imbalance.items()) + ".")
        lines.append(f"Language phase: {seen.language}.")
    return "\n".join(lines)
