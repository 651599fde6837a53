"""Runs functions on the ranks of a gloo group, a process each; brings back what they raise."""
import datetime
import importlib
import os
import traceback
from pathlib import Path

TIMEOUT_S = 600  # of a loaded machine; nothing that works comes near it


MODULES = ("balancer_checks", "balancer_towers", "balancer_trainer")


def _work(rank, size, folder, module, names, seed):
    import torch
    from torch import distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=size, timeout=datetime.timedelta(seconds=TIMEOUT_S / 2))
    checks = importlib.import_module(module)
    for place, name in enumerate(names):
        said = ""
        try:
            getattr(checks, name)(rank, size, [seed, place, size])
        except BaseException:
            said = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(said)
        if said:  # the others may be anywhere: nothing after this would mean a thing
            os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def run(size, folder, module, names, seed):
    """Calls each function as ``check(rank, size, seed)`` on all ranks, in order.

    Returns
    -------
    dict of str to str
        Name -> what its ranks raised; empty where all is well, and for all after the first failure
        that they were not reached.
    """
    import torch.multiprocessing as spawning
    context = spawning.get_context("forkserver")  # as spawn, but torch is imported once for all
    context.set_forkserver_preload(list(MODULES))
    ranks = [context.Process(target=_work, args=(rank, size, str(folder), module, names, seed))
             for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
    answers = {}
    for name in names:
        files = [Path(folder, f"{name}.{rank}") for rank in range(size)]
        said = [f"rank {rank}: {file.read_text() if file.exists() else 'never came to an end'}"
                for rank, file in enumerate(files) if not file.exists() or file.read_text()]
        answers[name] = "\n".join(said)
    return answers
