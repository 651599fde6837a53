"""A training run before it runs: what it was told, parameters, memory, FLOPs, time of a step."""
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from types import SimpleNamespace

import numpy as np

from . import _core
from .arenas import SIZES, of_model
from .building import check_frozen, loader_of, model_folder, processor_of, threads_of
from .cli import CommandError
from .comm import run_threads
from .configs import ModelConfig, preset
from .flops import flops_of
from .inputs import Inputs
from .orchestrator import counted_costs, media_of, one_node, planned
from .parts import count_parameters
from .peak import gemm_peak
from .run_config import cores
from .run_keys import KEYS, toml
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
    imbalance : dict of str to float
        Of each phase as planned: largest load over mean; empty on one rank.
    """

    config: object
    parameters: int
    trained: int
    batch: Inputs
    memory: list
    flops: float
    peak: float
    seconds: float
    imbalance: dict


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
    config = _model_config(run)
    rows, batch = _rows(run, config), _first_batch(run, config)
    ranks, threads = run["ranks.n"], threads_of(run) or cores()
    flops = flops_of(config, batch, True, rows)
    peak = gemm_peak("cpu", run["model.dtype"], threads)
    work, plan = flops / _SHARE, None
    if ranks > 1:
        batch = _dealt_out(batch, ranks)
        dealt = _as_read(config, batch, ranks)
        cluster = one_node(ranks)
        limits = {"llm": run["ranks.tokens"], "vision": run["ranks.patches"]}
        plan = planned(dealt, cluster, counted_costs(config, cluster), {
            name: most for name, most in limits.items()
            if most is not None and name in ("llm", *media_of(config))})
        # Its costs are of a model that is trained whole, at the cluster's peak.
        work = plan.time * cluster.peak_flops * flops / flops_of(config, batch, True)
    shares = [_share(plan, batch, config, rank) for rank in range(ranks)]
    phases = {} if plan is None else {**plan.phases, "llm": plan.llm}
    return Foretold(config, sum(prod(row[2]) for row in rows),
                    sum(prod(row[2]) for row in rows if row[3]), batch,
                    [_memory(run, config, rows, share, rank) for rank, share in enumerate(shares)],
                    flops, peak, work / peak * max(1.0, ranks * threads / cores()),
                    {name: phase.imbalance for name, phase in phases.items()})


def _model_config(run):
    folder = run["model.folder"]
    return ModelConfig.load(model_folder(folder)) if folder else preset(run["model.preset"])


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
    """The Batch of samples that are in the order of their ranks."""
    media = {name: medium(config, batch, name) for name in media_of(config)}
    (found,) = run_threads(1, lambda comm: gathered_batch(config, batch, media, comm)[0])
    sizes = [len(range(first, len(found), ranks)) for first in range(ranks)]
    return replace(found, source_rank=np.repeat(np.arange(ranks), sizes))


def _share(plan, batch, config, rank):
    """What a rank computes at a time, as the arenas need it."""
    if plan is None:
        return batch
    lengths = np.diff(batch.cu_seqlens)
    packs = [lengths[(plan.llm.rank == rank) & (plan.llm.micro_batch == m)]
             for m in range(plan.llm.micro_batches)]
    share = SimpleNamespace(cu_seqlens=np.cumsum([0, *max(packs, key=sum)]), grid_thw=None,
                            mel_lengths=None, pixels=batch.pixels)
    for name, phase in plan.phases.items():
        sizes = _sizes(medium(config, batch, name), name)[phase.rank == rank]
        setattr(share, "grid_thw" if name == "vision" else "mel_lengths", sizes)
    return share


def _sizes(held, name):
    """Of the items in the order of the Batch: by sample, then by place."""
    order = np.lexsort((held.position, held.sample))
    return held.sizes[order] if name == "vision" else held.sizes[order, 0]


def _memory(run, config, rows, share, rank):
    """{arena: bytes} of a rank."""
    dtype, ranks = run["model.dtype"], run["ranks.n"]
    whole = Shard.predict(config, ranks, run["ranks.shard"], run["ranks.node_size"], rank=rank,
                          dtype=dtype)
    base = [row for row in rows if ".lora_" not in row[0]]
    trained = sum(prod(row[2]) for row in rows if row[3])
    adapters = sum(prod(row[2]) for row in rows) - sum(prod(row[2]) for row in base)
    state = whole["training"] * trained // sum(prod(row[2]) for row in base)
    ran = of_model(config, share, rows, dtype, True, run["training.checkpoint"])
    if _counts_first(run, config):
        # Over ranks the features are there; on one, images are encoded for the counts too.
        seen = share if ranks == 1 else SimpleNamespace(
            cu_seqlens=share.cu_seqlens, grid_thw=None, mel_lengths=None, pixels=None)
        first = of_model(config, seen, rows, dtype, False, "none")
        ran["workspace"] = max(ran["workspace"], first["workspace"])
    return {"weights": whole["weights"] + SIZES[dtype] * adapters,
            "gradients and state": state, "buffers": whole["buffers"],
            "average": 4 * trained * (run["training.ema"] is not None),
            "activations": ran["activations"], "workspace": ran["workspace"]}


def _counts_first(run, config):
    """Whether a forward for the routers' counts alone, which keeps nothing and works in more
    scratch, comes before a step's own."""
    several = run["ranks.n"] > 1 or run["training.micro_batches"] > 1
    return several and config.sparse and run["training.aux"] != "bias" and config.text.get(
        "router_aux_loss_coef", 0.001) > 0


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
        lines.append("Planned over ranks, largest load over mean: " + ", ".join(
            f"{name} {value:.3f}" for name, value in seen.imbalance.items()) + ".")
    return "\n".join(lines)
