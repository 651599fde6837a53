"""Training over ranks: how even the phases are, what a step takes, and what the plan costs it.

    python tests/bench/bench_orchestrator.py [balance] [predict] [speed] [exposed] [fsdp2]
        [--data ../shared/data/packs] [--steps 20] [--ranks 4] [--refit 8]

Ranks are processes with one thread each; two cores cannot show a cluster's speed, so work is
measured by the processor time of each rank's thread, and ratios come from one run.

balance   largest work over mean by phase, medians over steps: every item where it was read, as the
          plan has it, as the ranks computed it; and whether counted work is the plan's.
predict   step time simulated with costs that were fitted to the first half of the steps, beside
          what two ranks took in the second half.
speed     two ranks of one thread beside one rank of two threads, same batches.
exposed   planning and moving data that a step waits for, of ``small`` on so many ranks.
fsdp2     two fully sharded ranks beside torch's FSDP2 over gloo, same model and samples (needs
          torch and transformers).
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import orchvlm
from orchvlm import data
from orchvlm.rounds import items_of, phase_of

PACKS = {"pictures": [("emoji_flags_screens.zip", "captions", 1.0)],
         "pictures and speech": [("emoji_flags_screens.zip", "captions", 0.5),
                                 ("nlvr_fsdd.zip", "nlvr", 0.2),
                                 ("nlvr_fsdd.zip", "digits", 0.3)],
         "drawn tasks": None}


def mixture(name, folder):
    """Samples of a mix; of tasks without end where it has no pack."""
    if PACKS[name] is None:
        return data.Mixture([data.Tasks(seed=1, difficulty=0.6, max_side=672)])
    sets = [data.load_pack(Path(folder) / file, kind, "train") for file, kind, _ in PACKS[name]]
    return data.Mixture(sets, weights=[share for *_, share in PACKS[name]], seed=1)


class Watch:
    """A trainer's steps on one rank, with what lies between its rows."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []
        self._run = trainer.passes.run
        trainer.passes.run = self.run

    def run(self, prepared, balance, checkpoint):
        began = time.perf_counter()
        self.ran = self._run(prepared, balance, checkpoint)
        self.waited = began - self.start
        return self.ran

    def take(self, steps):
        rows = self.trainer.run()
        self.start = time.perf_counter()
        for row in rows:
            self.steps.append((row, self.ran, self.waited))
            if len(self.steps) == steps:
                break
            self.start = time.perf_counter()
        rows.close()
        return self


def train(comm, spec):
    """A rank's steps: rows, and of each phase seconds, processor time and counted work."""
    preset = orchvlm.preset(spec["preset"])
    model = orchvlm.Model.from_config(preset, seed=0, threads=spec.get("threads", 1), std=0.05)
    processor = data.Processor.from_config(preset.values)
    source = mixture(spec["mix"], spec["data"])
    loader = data.RankLoader(source, processor, spec["tokens"], comm, too_long="skip")
    config = orchvlm.TrainingConfig(steps=10**6, lr=1e-5, rank_refit=spec.get("refit", 0))
    with tempfile.TemporaryDirectory() as folder:
        run = orchvlm.Trainer(model, loader, config, folder, comm)
        watch = Watch(run).take(spec["steps"])
    out = []
    for row, ran, waited in watch.steps[spec.get("skip", 2):]:
        mine = {"row": row, "waited": waited, "busy": ran.busy, "seconds": ran.seconds}
        if ran.plans:
            (plan,) = ran.plans  # no limit of memory, so one round
            mine["work"] = {name: work_of(plan, name, comm.rank) for name in phases(plan)}
            mine["load"] = {name: phase_of(plan, name).loads[comm.rank]
                            for name in phases(plan)}
            mine["even"] = {name: (phase_of(plan, name).sampled_imbalance,
                                   phase_of(plan, name).imbalance,
                                   best(phase_of(plan, name))) for name in phases(plan)}
            mine["lengths"] = {name: lengths_of(plan, name, comm.rank)
                               for name in phases(plan)}
        out.append(mine)
    return out


def phases(plan):
    return [*plan.phases, "llm"]


def best(share):
    """Largest load over mean that no plan can be below."""
    return max(1.0, share.bound / share.loads.mean()) if share.loads.any() else 1.0


def lengths_of(plan, name, rank):
    share, (length, square) = phase_of(plan, name), items_of(plan, name)
    mine = (share.rank == rank) & (length > 0)
    return length[mine].tolist(), square[mine].tolist()


def work_of(plan, name, rank):
    """What the cost function says of the items that this rank computed, micro-batch by
    micro-batch."""
    share, (length, square) = phase_of(plan, name), items_of(plan, name)
    total = 0.0
    for m in range(share.micro_batches):
        mine = (share.rank == rank) & (share.micro_batch == m) & (length > 0)
        total += plan.costs[name](length[mine], squares=square[mine])
    return total


def median(values):
    return statistics.median(values) if values else float("nan")


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print(flush=True)


# ---------------------------------------------------------------- balance

def balance(options):
    rows = []
    for mix in PACKS:
        audio = mix == "pictures and speech"
        spec = {"preset": "tiny-omni" if audio else "tiny", "mix": mix, "data": options.data,
                "tokens": 2048 * options.ranks, "skip": 2 + 2 * options.refit,
                "steps": options.steps + 2 + 2 * options.refit, "refit": options.refit}
        ranks = orchvlm.comm.run_processes(options.ranks, train, spec)
        for name in ranks[0][0]["even"]:
            busy = np.array([[step["busy"].get(name, 0.0) for step in rank] for rank in ranks])
            work = np.array([[step["work"][name] for step in rank] for rank in ranks])
            load = np.array([[step["load"][name] for step in rank] for rank in ranks])
            even = np.array([step["even"][name] for step in ranks[0]])
            ratio = busy.max(0) / busy.mean(0)
            off = np.abs(work - load).max() / load.max()
            rows.append([mix, name, *(f"{x:.3f}" for x in np.median(even, axis=0)),
                         f"{np.median(ratio):.3f}", f"{1e3 * np.median(busy):.0f}",
                         f"{off:.1e}"])
    print(f"{options.ranks} ranks, {options.steps} steps: largest work over mean\n")
    table(["mix", "phase", "as read", "planned", "bound", "measured", "busy, ms",
           "counted work off the plan"], rows)


# ---------------------------------------------------------------- prediction

def fitted(ranks, name, half):
    """A cost of the phase from what each rank's items took."""
    seen = [(np.array(step["lengths"][name][0]), step["seconds"][name])
            for rank in ranks for step in rank[:half] if len(step["lengths"][name][0])]
    return orchvlm.fit(seen, terms=("linear", "quadratic", "per_item", "fixed")).cost


def predict(options):
    spec = {"preset": "tiny", "mix": "drawn tasks", "data": options.data, "tokens": 4096,
            "steps": options.steps + 2}
    ranks = orchvlm.comm.run_processes(2, train, spec)
    half, rows = len(ranks[0]) // 2, []
    names = [name for name in ranks[0][0]["lengths"]]
    costs = {name: fitted(ranks, name, half) for name in names}

    def rest(step):
        """Of a step, what is in no phase: transfers, the reduction, the optimizer."""
        return step["row"]["seconds"] - sum(
            max(rank[step["at"]]["seconds"].get(name, 0.0) for rank in ranks) for name in names)
    for at, step in enumerate(ranks[0]):
        step["at"] = at
    fixed = median([rest(step) for step in ranks[0][:half]])
    for step in ranks[0][half:]:
        predicted = fixed + sum(
            max(costs[name](np.array(rank[step["at"]]["lengths"][name][0])) for rank in ranks)
            for name in names)
        rows.append((predicted, step["row"]["seconds"]))
    off = [abs(a / b - 1) for a, b in rows]
    print("Two ranks: predicted beside measured step time\n")
    table(["steps", "predicted, s", "measured, s", "median off", "largest off"],
          [[str(len(rows)), f"{median([a for a, _ in rows]):.3f}",
            f"{median([b for _, b in rows]):.3f}", f"{100 * median(off):.1f} %",
            f"{100 * max(off):.1f} %"]])


# ---------------------------------------------------------------- speed

def speed(options):
    spec = {"preset": "tiny", "mix": "pictures", "data": options.data, "tokens": 4096,
            "steps": options.steps + 2}
    seconds = {1: [], 2: []}
    for _ in range(2):
        for n in (1, 2):
            ranks = orchvlm.comm.run_processes(n, train, spec | {"threads": 2 // n})
            seconds[n].append(median([step["row"]["seconds"] for step in ranks[0]]))
    one, two = (min(seconds[n]) for n in (1, 2))
    print("The same batches\n")
    table(["one rank, two threads, s", "two ranks, one thread each, s", "speed"],
          [[f"{one:.3f}", f"{two:.3f}", f"{one / two:.2f}"]])


def exposed(options):
    spec = {"preset": "small", "mix": "pictures", "data": options.data,
            "tokens": 1024 * options.ranks, "steps": max(4, options.steps // 4) + 1, "skip": 1}
    ranks = orchvlm.comm.run_processes(options.ranks, train, spec)
    steps = [step["row"]["seconds"] for step in ranks[0]]
    waited = [max(rank[i]["waited"] for rank in ranks) for i in range(len(steps))]
    moved = [max(sum(v for k, v in rank[i]["busy"].items() if "->" in k) for rank in ranks)
             for i in range(len(steps))]
    planned = [step["row"]["plan_ms"] / 1e3 for step in ranks[0]]
    print(f"small on {options.ranks} ranks\n")
    table(["step, s", "planning beside it, s", "waited for the batch", "moving rows"],
          [[f"{median(steps):.2f}", f"{median(planned):.4f}",
            f"{100 * median([w / s for w, s in zip(waited, steps)]):.2f} %",
            f"{100 * median([m / s for m, s in zip(moved, steps)]):.2f} %"]])


# ---------------------------------------------------------------- torch's FSDP2

def case(rank, n):
    """The tiny case of bench_model and a rank's samples of it, as they were drawn."""
    import bench_model
    values, tokens = bench_model.CASES["tiny"]
    samples, pixels = bench_model.batch(values, tokens)
    return values, samples, samples[rank::n], pixels[rank::n]


def ours_fsdp(comm, steps):
    import bench_model
    from orchvlm.routing import Balance
    values, samples, mine, pixels = case(comm.rank, comm.size)
    model = orchvlm.Model(values, threads=1)
    model.load_state_dict({name: bench_model.weights(name, shape)
                           for name, shape in model.config.parameters().items()})
    orchvlm.Shard(model, comm, "fsdp")
    ranks, opt = orchvlm.Orchestrator(model, comm), orchvlm.AdamW(model, lr=1e-4)
    inputs, seconds = bench_model.packed(mine, pixels), []
    for _ in range(steps):
        comm.barrier()
        start = time.perf_counter()
        model.zero_grad()
        ran = ranks.run(ranks.prepare(inputs), Balance(model, "exact", 0.0, ranks.total))
        ranks.reduce_gradients()
        opt.step()
        loss = float(comm.all_reduce(np.array([ran.loss]))[0])
        seconds.append(time.perf_counter() - start)
    return seconds, loss


def theirs_fsdp(rank, port, steps, out):
    import os

    import bench_model
    import torch
    from oracle_cases import make, to_ours
    from torch.distributed.fsdp import fully_shard
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    values, samples, mine, pixels = case(rank, 2)
    model = make(values)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            array = bench_model.weights(name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(to_ours(name, array)))
    model.set_attn_implementation("sdpa")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for block in (*model.model.visual.blocks, *model.model.language_model.layers):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    given = bench_model.padded(mine, pixels, "dense")
    share = bench_model.count_targets(mine) / bench_model.count_targets(samples)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), foreach=True)
    seconds = []
    for _ in range(steps):
        torch.distributed.barrier()
        start = time.perf_counter()
        opt.zero_grad()
        loss = model(**given).loss * share
        (2 * loss).backward()  # gradients are means over ranks
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        out.put((seconds, float(total)))
    torch.distributed.destroy_process_group()


def fsdp2(options):
    import multiprocessing as mp
    import socket
    ours, loss = orchvlm.comm.run_processes(2, ours_fsdp, options.steps)[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.Queue()
    peers = [context.Process(target=theirs_fsdp, args=(rank, port, options.steps, out))
             for rank in range(2)]
    for peer in peers:
        peer.start()
    theirs, their_loss = out.get(timeout=600)
    for peer in peers:
        peer.join()
    ours, theirs = median(ours[2:]), median(theirs[2:])
    print("Fully sharded over two ranks of one thread\n")
    table(["ours, s", "FSDP2, s", "speed", "last losses"],
          [[f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}",
            f"{loss:.5f} {their_loss:.5f}"]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = {"balance": balance, "predict": predict, "speed": speed, "exposed": exposed,
            "fsdp2": fsdp2}
    parser.add_argument("what", nargs="*", metavar="WAY", help=", ".join(ways))
    parser.add_argument("--data", default=Path(__file__).parents[3] / "shared/data/packs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--refit", type=int, default=0, help="balance: steps from one fit of the "
                        "costs to the next; what is shown comes behind the second")
    options = parser.parse_args()
    if unknown := set(options.what) - set(ways):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(ways)}")
    for name in options.what or ["balance", "predict", "speed", "exposed"]:
        ways[name](options)


sys.path.insert(0, str(Path(__file__).parents[1] / "py"))
sys.path.insert(0, str(Path(__file__).parent))
if __name__ == "__main__":
    main()
