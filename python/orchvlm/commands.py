"""What the subcommands of ``orchvlm`` do; :mod:`orchvlm.cli` reads their arguments."""
import json
import sys
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from .cli import ITEMS, SEQUENCES, CommandError, Progress
from .cost import _FLEXSP, BatchCost, Cluster, SequenceCost
from .tables import format_count, format_percent, format_seconds, text_table

_PUBLISHED = {"gpt7b": SequenceCost.flexsp_gpt7b, "gpt13b": SequenceCost.flexsp_gpt13b,
              "gpt30b": SequenceCost.flexsp_gpt30b}
_MEASURED = "a100_40g"  # where the published costs were measured


def doctor():
    """``orchvlm doctor``"""
    from .doctor import examine
    facts = examine()
    print(text_table(["part", "state", "detail"], facts))
    return 1 if any(state == "broken" for _, state, _ in facts) else 0


def _cluster(arguments, default):
    return Cluster.preset(arguments.preset or default, nodes=arguments.nodes,
                          gpus_per_node=arguments.gpus_per_node)


def _read_config(path):
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"--model: {path}: {error.strerror}; known models: "
                           f"{', '.join(_PUBLISHED)}") from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"--model: {path}: not JSON ({error})") from None
    return config


def _gpt_config(name):
    """Counting takes gated MLPs: 8/3 of the width has the parameters and FLOPs of a plain 4."""
    layers, width = _FLEXSP[name.removeprefix("gpt")][:2]
    return {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 64,
            "num_key_value_heads": 64, "intermediate_size": round(width * 8 / 3),
            "vocab_size": 50257}


def _is_measured(arguments):
    return ((arguments.model or "gpt7b") in _PUBLISHED
            and (arguments.preset or _MEASURED) == _MEASURED)


def _cost_words(arguments):
    how = "as FlexSP measured it on" if _is_measured(arguments) else "costs counted for"
    return f"{arguments.model or 'gpt7b'}, {how} {arguments.preset or _MEASURED}"


def _sequence_cost(arguments, cluster):
    """(cost, FLOPs): the cost measured where it was measured, else counted; FLOPs counted."""
    from .model_cost import from_model
    name = arguments.model or "gpt7b"
    config = _gpt_config(name) if name in _PUBLISHED else _read_config(name)
    counted = from_model(config, cluster, llm="sequence_parallel")
    measured = _PUBLISHED[name](n_gpus=cluster.n_gpus) if _is_measured(arguments) else None
    return measured or counted.costs["llm"], counted.flops["llm"]


def _read(arguments, default, steps=1):
    """(Lengths of at most ``steps`` batches, batch size); says what of the file it leaves out."""
    from .reading import Lengths, read_lengths
    per_unit = arguments.seconds_to_tokens
    for divisor in (arguments.chars_per_token, arguments.pixels_per_token):
        per_unit = 1 / divisor if divisor is not None else per_unit
    asked = arguments.batch_size
    with Progress(f"reading {arguments.file}"):
        found = read_lengths(arguments.file, arguments.column, arguments.field, per_unit,
                             most=asked and asked * steps)
    tokens, row, left_out = found
    if len(tokens) == 0:
        raise CommandError(left_out.replace("left out", "no lengths above 0;") or
                           f"{arguments.file}: no lengths above 0")
    words = sys.stderr if arguments.json else sys.stdout
    if left_out:
        print(left_out, file=words)
    size = asked or default
    most = size * steps
    if most < len(tokens):
        print(f"first {most:,} of {len(tokens):,} lengths; --batch-size N for another", file=words)
    return Lengths(tokens[:most], row[:most], left_out), size


def _search(arguments):
    """Limits as given: a work limit alone switches the planners' own time limit off."""
    chosen = {"seed": arguments.seed}
    if arguments.work_limit is not None or arguments.time_limit is not None:
        chosen |= {"work_limit": arguments.work_limit, "time_limit": arguments.time_limit}
    return chosen


def _print_json(value):
    print(json.dumps(value, indent=1, default=_plain))


def _plain(value):
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


# ---------------------------------------------------------------- plan


def plan(arguments):
    """``orchvlm plan``"""
    if arguments.items:
        for option, value in (("--demo", arguments.demo), ("--policy", arguments.policy),
                              ("--model", arguments.model), ("--preset", arguments.preset)):
            if value:
                raise CommandError(f"{option} has no meaning with --items; leave out one of them")
    arguments.policy = arguments.policy or "flex"
    if arguments.demo:
        return _plan_demo(arguments)
    cluster = _cluster(arguments, _MEASURED)
    found, _ = _read(arguments, ITEMS if arguments.items else SEQUENCES)
    return (_plan_items if arguments.items else _plan_groups)(arguments, found, cluster)


def _plan_items(arguments, found, cluster):
    lengths = found.tokens
    from .balancing import balance
    with Progress(f"balancing {format_count(len(lengths), 'item')} over "
                  f"{format_count(cluster.n_gpus, 'rank')}"):
        part = balance(lengths, cluster.n_gpus, BatchCost(linear=1.0), **_search(arguments))
    drawn = np.bincount(np.arange(len(lengths)) * cluster.n_gpus // len(lengths), weights=lengths,
                        minlength=cluster.n_gpus)
    if arguments.plot:
        from .plots import plot_loads
        plot_loads({"tokens": drawn}, {"tokens": part.loads}, arguments.plot,
                   {"tokens": part.bound})
    if arguments.json:
        _print_json({"row": found.row, "rank": part.rank, "loads": part.loads,
                     "bound": part.bound, "gap": part.gap, "imbalance": part.imbalance,
                     "status": part.status, "cut_short": part.cut_short})
        return 0
    mean = drawn.mean()
    print(text_table(["", "largest", "mean", "max / mean"],
                     [["in file order", f"{drawn.max():.0f}", f"{mean:.0f}",
                       f"{drawn.max() / mean:.4f}"],
                      ["planned", f"{part.loads.max():.0f}", f"{mean:.0f}",
                       f"{part.imbalance:.4f}"],
                      ["proven bound", f"{part.bound:.0f}", "", ""]],
                     f"{format_count(len(lengths), 'item')} on "
                     f"{format_count(cluster.n_gpus, 'rank')}, tokens"))
    print("Optimal: no plan is better." if part.status == "optimal" else
          f"No plan is better by more than {format_percent(part.gap, 3)}.")
    return 0


def _groups_text(micro):
    """For example "32 16 8x2": degrees, largest first."""
    degrees, counts = np.unique([g.degree for g in micro.groups], return_counts=True)
    pairs = sorted(zip(degrees.tolist(), counts.tolist()), reverse=True)
    return " ".join(f"{d}x{c}" if c > 1 else str(d) for d, c in pairs)


def _groups_rows(plan_, n_gpus):
    for m, micro in enumerate(plan_.micro_batches):
        seconds = max((g.time for g in micro.groups), default=0.0)
        busy = sum(g.degree * g.time for g in micro.groups)
        yield [m + 1, _groups_text(micro), sum(len(g.items) for g in micro.groups),
               sum(g.tokens for g in micro.groups), format_seconds(seconds),
               format_percent(1 - busy / (n_gpus * seconds) if seconds else 0.0)]


def _groups_table(plan_, n_gpus, title):
    return text_table(["micro-batch", "groups", "sequences", "tokens", "time", "idle"],
                      list(_groups_rows(plan_, n_gpus)), title)


def _groups_json(plan_, row):
    """``row`` names each sequence."""
    return {"time": plan_.time, "bound": plan_.bound, "gap": plan_.gap, "status": plan_.status,
            "cut_short": plan_.cut_short, "micro_batches": [
                [{"degree": g.degree, "first_gpu": g.first_gpu, "items": row[g.items].tolist(),
                  "tokens": int(g.tokens), "time": g.time} for g in m.groups]
                for m in plan_.micro_batches]}


def _proof(plan_):
    return (f"Step {plan_.time:.4f} s; no plan takes less than {plan_.bound:.4f} s: "
            f"gap {format_percent(plan_.gap, 2)}." + "\n" * bool(plan_.advice) + plan_.advice)


def _plan_groups(arguments, found, cluster):
    lengths = found.tokens
    from .sequences import plan_sequences
    cost, _ = _sequence_cost(arguments, cluster)
    with Progress(f"planning {format_count(len(lengths), 'sequence')} on "
                  f"{format_count(cluster.n_gpus, 'GPU')}"):
        made = plan_sequences(lengths, cluster.n_gpus, cost,
                              gpus_per_node=cluster.gpus_per_node, policy=arguments.policy,
                              **_search(arguments))
    if arguments.plot:
        from .plots import plot_groups
        plot_groups(made, cluster.n_gpus, arguments.plot)
    if arguments.json:
        _print_json(_groups_json(made, found.row))
        return 0
    print(_groups_table(made, cluster.n_gpus,
                        f"{format_count(len(lengths), 'sequence')}, {int(lengths.sum())} tokens, "
                        f"longest {int(lengths.max())}, on {format_count(cluster.n_gpus, 'GPU')}; "
                        f"{_cost_words(arguments)}"))
    print(_proof(made))
    return 0


def _plan_demo(arguments):
    from . import demo
    from .sequences import plan_sequences
    from .step import plan_step
    cluster = _cluster(arguments, "h100")
    name, config, model = demo.model_for(cluster)
    with Progress(f"planning a batch on {format_count(cluster.n_gpus, 'GPU')}"):
        batch = demo.batch(cluster.n_gpus, 16, arguments.seed, config["hidden_size"])
        step = plan_step(batch, cluster, model.costs, memory=model.memory, **_search(arguments))
        lengths = demo.wikipedia_lengths(512, arguments.seed)
        made = plan_sequences(lengths, cluster.n_gpus,
                              SequenceCost.flexsp_gpt7b(n_gpus=cluster.n_gpus),
                              gpus_per_node=cluster.gpus_per_node, policy=arguments.policy,
                              **_search(arguments))
        others = "" if arguments.json else _others_text(lengths, cluster, made, arguments)
    if arguments.plot:
        from .plots import plot_plans
        plot_plans(*step._loads(), made, cluster.n_gpus, arguments.plot)
    if arguments.json:
        _print_json({"step": {"time": step.time, "bound": step.bound, "gap": step.gap},
                     "sequences": _groups_json(made, np.arange(len(lengths)))})
        return 0
    print(f"{len(batch.text_tokens)} samples (captions, pages, speech, video, text), a model of "
          f"{name} parameters, {format_count(cluster.n_gpus, 'GPU')}:\n")
    print(step.report())
    print(f"\n{len(lengths)} Wikipedia-like articles, GPT-7B as FlexSP measured it, "
          f"{format_count(cluster.n_gpus, 'GPU')}:\n")
    print(_groups_table(made, cluster.n_gpus, None))
    print(_proof(made))
    print(others)
    return 0


def _others_text(lengths, cluster, made, arguments):
    """What other policies make of the same sequences."""
    from .sequences import plan_sequences
    cost = SequenceCost.flexsp_gpt7b(n_gpus=cluster.n_gpus)
    widest = max(d for d in cost.comm if d <= cluster.n_gpus)
    parts = []
    for words, policy, degrees in ((f"groups of {widest} throughout", "static", [widest]),
                                   ("one degree per micro-batch", "homogeneous", None),
                                   ("FlexSP's chunks", "chunked", None),
                                   ("micro-batches and groups together", "flex", None)):
        if policy == arguments.policy and degrees is None:
            continue
        other = plan_sequences(lengths, cluster.n_gpus, cost, policy=policy, degrees=degrees,
                               gpus_per_node=cluster.gpus_per_node, **_search(arguments))
        parts.append(f"{words} {other.time:.4f} s ({other.time / made.time:.2f}x)")
    return "Other policies (and their time over this plan's): " + ", ".join(parts) + "."


# ---------------------------------------------------------------- simulate


def simulate(arguments):
    """``orchvlm simulate``"""
    from .simulator import simulate as run
    policies = _policies(arguments)
    prepare = _simulate_demo if arguments.demo else _simulate_file
    batches, cluster, costs, more = prepare(arguments)
    with Progress("simulating") as progress:
        result = run(batches, cluster, costs, policies=policies, context=arguments.context,
                     progress=lambda title: progress.report(f"simulating {title}"), **more,
                     **_search(arguments))
    if arguments.plot:
        result.plot(arguments.plot)
    if arguments.json:
        _print_json(result.as_dict())
    else:
        print(result)
    return 0


def _policies(arguments):
    """The names asked for; None for the usual ones."""
    from .policies import POLICIES
    if not arguments.demo and arguments.samples_per_rank is not None:
        raise CommandError("--samples-per-rank is for --demo; a FILE has --batch-size")
    if arguments.policies is None:
        return None
    names = [name.strip() for name in arguments.policies.split(",")]
    known = [name for name in POLICIES if arguments.demo != name.startswith("sp_")]
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, 1) or [k for k in known if k == f"sp_{name}"]
            why = "is unknown" + (f"; did you mean {close[0]}?" if close else "")
            if name in POLICIES:
                why = "is for a FILE of lengths" if arguments.demo else "is for --demo"
            raise CommandError(f"--policies: {name!r} {why} (there are {', '.join(known)})")
    if arguments.context is not None and "sp_run" not in names:
        raise CommandError("--context decides the degree of sp_run; add sp_run to --policies or "
                           "leave it out")
    return names


def _simulate_demo(arguments):
    from . import demo
    cluster = _cluster(arguments, "h100")
    _, config, model = demo.model_for(cluster)
    with Progress("drawing the demo's batches"):
        batches = [demo.batch(cluster.n_gpus, arguments.samples_per_rank or 16, arguments.seed + i,
                              config["hidden_size"]) for i in range(arguments.steps)]
    return batches, cluster, model.costs, {
        "flops": model.flops, "memory": model.memory, "parameters": model.parameters,
        "backward": 3.0}


def _simulate_file(arguments):
    cluster = _cluster(arguments, _MEASURED)
    cost, flops = _sequence_cost(arguments, cluster)
    lengths, size = _read(arguments, SEQUENCES, arguments.steps)
    batches = [lengths.tokens[i:i + size] for i in range(0, len(lengths.tokens), size)]
    return batches, cluster, {"llm": cost}, {"flops": {"llm": flops}}
