"""Sequence-parallel groups: the bytes of a step, what changing groups costs, busy time beside plan.

    python tests/bench/bench_sequence_parallel.py [bytes] [switch] [busy] [train] [--steps 4]
                                                  [--ranks 4]

Ranks are processes with one thread each, more than there are cores, so work is measured by the
processor time of each rank's thread: waiting for others takes none.  The model is ``tiny`` with 8
query heads, texts are drawn with a long tail and few tokens.

bytes     what ranks sent each other beside what the plan says, on 4 and 8 ranks.
switch    the same plan again and again: opening groups in the first step and later, and all that
          is no pass, of a step: wall time, and processor time, which other processes do not touch.
busy      a SequenceCost fitted to some steps, then busy time per group beside the plans of later
          steps: the largest of the group's ranks, copies of exchanges included, as in the plan;
          medians of three runs of each.
train     steps of ``orchvlm train --preset long``: processor time of the language phase with whole
          samples on ranks and with groups, and what the plans foretold.
"""
import argparse
import copy
import math
import time
from collections import Counter
from dataclasses import replace

import numpy as np

import orchvlm
from bench_orchestrator import table
from instances import lognormal_lengths
from orchvlm.building import loader_of, processor_of
from orchvlm.choosing import language_s
from orchvlm.group_metrics import degrees_of
from orchvlm.routing import Balance
from orchvlm.sequence_executor import exchange_bytes

HEADS, LONGEST = 8, 900
MIXED = 11  # seed of a batch whose plan on four ranks changes groups twice
PRIOR = orchvlm.SequenceCost(2e-7, 3e-4, 5e-3, heads=HEADS)  # before anything is measured


def made(**options):
    values = copy.deepcopy(orchvlm.preset("tiny").values)
    values["text_config"]["num_attention_heads"] = HEADS
    return orchvlm.Model.from_config(values, seed=0, threads=1, **options)


def drawn(seed, n=20):
    """A batch of texts with a long tail."""
    lengths = lognormal_lengths(n, seed, LONGEST, median=90, sigma=1.0)
    ids = np.random.default_rng(seed).integers(10, 210, lengths.sum())
    return orchvlm.Inputs(input_ids=ids, labels=ids, cu_seqlens=np.cumsum([0, *lengths]))


def planned(batch, ranks, cost, **options):
    """A plan that is the same on all ranks; memory for 2/5 of the tokens at a time, if need be for
    the longest sequence."""
    tokens = math.ceil(max(0.4 * batch.n_tokens, batch.lengths.max()) / ranks)
    cost = replace(cost, memory_per_token=1.0, memory_limit=float(tokens))
    return orchvlm.plan_sequences(batch.lengths, ranks, cost, gpus_per_node=ranks, work_limit=3000,
                                  time_limit=None, **options)


def prior(ranks):
    return replace(PRIOR, comm={d: 3e-5 * (d > 1) for d in range(1, ranks + 1)})


def shape(plan):
    """Degrees of the groups, micro-batch by micro-batch."""
    return "; ".join("+".join(str(group.degree) for group in micro.groups)
                     for micro in plan.micro_batches)


class Busy:
    """Processor time of the passes of a model's thread."""

    def __init__(self, model):
        self.seconds = []
        self._forward, self._backward = model.forward, model.backward
        model.forward, model.backward = self.forward, self.backward

    def forward(self, *args, **options):
        start = time.thread_time()
        out = self._forward(*args, **options)
        self.seconds.append(time.thread_time() - start)
        return out

    def backward(self):
        start = time.thread_time()
        self._backward()
        self.seconds[-1] += time.thread_time() - start

    def take(self):
        """Seconds of each micro-batch since the last call."""
        taken, self.seconds = self.seconds, []
        return np.array(taken)


# ---------------------------------------------------------------- bytes

WAYS = (("float32", "none"), ("float32", "full"), ("bfloat16", "none"))


def sent(comm, plan, batch):
    """Bytes that this rank sent, by way."""
    out = []
    for dtype, checkpoint in WAYS:
        executor = orchvlm.SequenceExecutor(made(dtype=dtype), comm)
        out.append(executor.run(plan, batch, checkpoint=checkpoint).sent_bytes)
        executor.close()
    return out


def count_bytes(options):
    rows, batch = [], drawn(MIXED)
    for ranks in (4, 8):
        plan = planned(batch, ranks, prior(ranks))
        got = np.array(orchvlm.comm.run_processes(ranks, sent, plan, batch))  # rank, way
        for mine, (dtype, checkpoint) in zip(got.T, WAYS):
            wanted = exchange_bytes(plan, made().config, dtype, checkpoint)
            rows.append([str(ranks), shape(plan), dtype, checkpoint, f"{wanted.sum():,}",
                         f"{mine.sum():,}", str(int(np.abs(mine - wanted).max()))])
    print(f"Bytes of a step's exchanges, {batch.n_tokens} tokens; degrees by micro-batch\n")
    table(["ranks", "groups", "dtype", "checkpoint", "planned", "sent",
           "largest difference of a rank"], rows)


# ---------------------------------------------------------------- changing groups

def repeat(comm, plan, batch, steps):
    """Of each step of a rank: seconds in all, of opening groups and how many were made, between
    micro-batches and in no pass; processor time in all and in no pass."""
    model = made()
    executor, busy = orchvlm.SequenceExecutor(model, comm), Busy(model)
    opens, rows = [], []
    open_groups = executor.groups.open

    def opening(blocks):
        start = time.perf_counter()
        made_now = open_groups(blocks)
        opens.append((time.perf_counter() - start, made_now))
        return made_now

    executor.groups.open = opening
    for _ in range(steps):
        model.zero_grad()
        comm.barrier()
        start, used = time.perf_counter(), time.thread_time()
        ran = executor.run(plan, batch)
        end, used = time.perf_counter(), time.thread_time() - used
        passes = sum(one.end_s - one.start_s for one in ran.groups)
        between = sum(b.start_s - a.end_s for a, b in zip(ran.groups, ran.groups[1:]))
        rows.append((end - start, *opens.pop(), between, end - start - passes, used,
                     used - busy.take().sum()))
    return rows


def switch(options):
    batch = drawn(MIXED)
    plan = planned(batch, options.ranks, prior(options.ranks))
    steps = np.array(orchvlm.comm.run_processes(options.ranks, repeat, plan, batch,
                                                options.steps + 1))  # rank, step, column
    step, opened, new, between, around, used, apart = steps.max(0).T
    rows = []
    for name, at in (("first", slice(0, 1)), (f"{options.steps} later, median", slice(1, None)),
                     ("worst of these", None)):
        if at is None:
            worst = 1 + int(np.argmax((around / step)[1:]))
            at = slice(worst, worst + 1)
        rows.append([name, f"{np.median(step[at]):.3f}", f"{new[at].max():.0f}",
                     f"{1e3 * np.median(opened[at]):.3f}", f"{1e3 * np.median(between[at]):.3f}",
                     f"{1e3 * np.median(around[at]):.3f}",
                     f"{100 * np.median((around / step)[at]):.2f} %",
                     f"{100 * np.median((apart / used)[at]):.2f} %"])
    print(f"{options.ranks} ranks, {batch.n_tokens} tokens, groups {shape(plan)}; of the slowest "
          "rank\n")
    table(["step", "s", "groups made", "opening groups, ms", "between micro-batches, ms",
           "all that is no pass, ms", "of the step", "in processor time"], rows)


# ---------------------------------------------------------------- busy time

def measured(comm, executor, busy, plan, batch):
    """(group, its largest busy time over ranks) of a step."""
    executor.model.zero_grad()
    busy.take()
    executor.run(plan, batch)
    mine, groups = busy.take(), []
    for m, micro in enumerate(plan.micro_batches):
        for group in micro.groups:
            inside = group.first_gpu <= comm.rank < group.first_gpu + group.degree
            groups.append((group, mine[m] if inside else 0.0))
    largest = comm.all_reduce(np.array([seconds for _, seconds in groups]), "max")
    return [(group, seconds) for (group, _), seconds in zip(groups, largest)]


def fit_and_follow(comm, steps):
    """Rank 0's (fit, rows of later steps: step, group, busy seconds)."""
    executor = orchvlm.SequenceExecutor(made(), comm)
    busy, seen = Busy(executor.model), []
    guess = prior(comm.size)
    for seed in range(steps):
        batch = drawn(seed)
        plans = [orchvlm.plan_sequences(batch.lengths, comm.size, guess, degrees=[degree],
                                        gpus_per_node=comm.size, work_limit=500, time_limit=None,
                                        micro_batches=2) for degree in guess.comm]
        plans.append(planned(batch, comm.size, guess))
        for plan in plans:
            ran = measured(comm, executor, busy, plan, batch)
            if seed > 0:  # memory is new in the first step
                seen += [(batch.lengths[group.items], group.degree, seconds, None)
                         for group, seconds in ran]
    fitted, later = orchvlm.fit(seen, heads=HEADS), []
    for seed in range(steps, 2 * steps):
        batch = drawn(seed)
        plan = planned(batch, comm.size, fitted.cost)
        runs = [measured(comm, executor, busy, plan, batch) for _ in range(3)]
        later += [(seed, shape(plan), same[0][0], float(np.median([took for _, took in same])))
                  for same in zip(*runs)]
    return fitted, len(seen), later


def busy_time(options):
    fitted, n, later = orchvlm.comm.run_processes(options.ranks, fit_and_follow, options.steps)[0]
    cost, off = fitted.cost, {}
    for _, _, group, seconds in later:
        for key in (f"degree {group.degree}", "all"):
            off.setdefault(key, []).append((abs(group.time / seconds - 1), group.time, seconds))
    print(f"{options.ranks} ranks; fitted to {n} groups: quadratic {cost.quadratic:.2e}, linear "
          f"{cost.linear:.2e}, fixed {cost.fixed:.2e} s, comm "
          + ", ".join(f"{d}: {value:.1e}" for d, value in cost.comm.items())
          + f"; median off {100 * np.median(abs(fitted.seconds_error)):.1f} %")
    plans = {seed: text for seed, text, *_ in later}
    print(f"{len(plans)} later steps, by shape:",
          ", ".join(f"{text} ({k})" for text, k in Counter(plans.values()).most_common(4)), "\n")
    rows = []
    for key in sorted(off, key=lambda key: (key == "all", key)):
        errors, times, took = np.array(off[key]).T
        rows.append([key, str(len(errors)), f"{times.sum():.3f}", f"{took.sum():.3f}",
                     f"{100 * (times.sum() / took.sum() - 1):+.1f} %",
                     f"{100 * np.median(errors):.1f} %", f"{100 * errors.max():.1f} %",
                     f"{100 * (errors <= 0.1).mean():.0f} %"])
    table(["groups of", "groups", "planned, s", "busy, s", "in all", "median off", "largest off",
           "within 10 %"], rows)


# ---------------------------------------------------------------- steps of a run

def steps_of(comm, language, steps):
    """Of each step of a rank: busy seconds by micro-batch, the plan's seconds, degrees."""
    told = orchvlm.RunConfig({"model": {"preset": "long"}})
    model = orchvlm.Model.from_config(orchvlm.preset("long"), seed=0, threads=1)
    loader = loader_of(told, processor_of(told, model.config), comm)
    ranks = orchvlm.Orchestrator(model, comm, language=language, max_tokens=told["ranks.tokens"])
    rows = []
    for _ in range(steps + 1):
        prepared = ranks.make(loader)
        model.zero_grad()
        ran = ranks.run(prepared, Balance(model, "exact", 0.0, ranks.total))
        ranks.reduce_gradients()
        plan = ran.plans[0]
        degrees = degrees_of([plan.llm]) if isinstance(
            plan.llm, orchvlm.SequencePlan) else "whole samples"
        rows.append(([run.busy_s for run in ran.groups], language_s(plan, ranks.costs["llm"]),
                     degrees))
    return rows[1:]  # memory is new in the first step


def slowest(busy, degrees):
    """Seconds of a step from busy[rank, micro-batch]: groups wait for each other in each of them,
    ranks with whole samples only at the end."""
    return busy.sum(1).max() if degrees == "whole samples" else busy.max(0).sum()


def train(options):
    found, rows = {}, []
    for language in ("balance", "sequence_parallel", "auto"):
        ranks = orchvlm.comm.run_processes(options.ranks, steps_of, language, options.steps)
        found[language] = [(slowest(np.array([one[0] for one in step]), step[0][2]), *step[0][1:])
                           for step in zip(*ranks)]
    base_s, base_plan = (sum(step[i] for step in found["balance"]) for i in range(2))
    for language, steps in found.items():
        took, plan = (sum(step[i] for step in steps) for i in range(2))
        shapes = Counter(step[2] for step in steps)
        rows.append([language, f"{took:.2f}", f"{took / base_s:.2f}", f"{plan / base_plan:.2f}",
                     ", ".join(f"{shape} ({n})" for shape, n in shapes.most_common(4))])
    print(f"{options.steps} steps on {options.ranks} ranks; busy time of the language phase\n")
    table(["language", "slowest rank, s", "of whole samples", "by the plans", "groups (steps)"],
          rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = {"bytes": count_bytes, "switch": switch, "busy": busy_time, "train": train}
    parser.add_argument("what", nargs="*", metavar="WAY", help=", ".join(ways))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    if unknown := set(options.what) - set(ways):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(ways)}")
    for name in options.what or ways:
        ways[name](options)


if __name__ == "__main__":
    main()
