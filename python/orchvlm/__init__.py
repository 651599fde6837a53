"""orchvlm: balanced training steps for vision-language models, with proofs.

Names load on first use, so that ``import orchvlm`` needs NumPy only and stays fast.
"""
from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "Error": "_core", "BackendError": "_core", "CommError": "_core",
    "BatchCost": "cost", "SequenceCost": "cost", "Cluster": "cost", "fit": "fitting",
    "from_model": "model_cost",
    "balance": "balancing", "Partition": "balancing",
    "plan_sequences": "sequences", "SequencePlan": "sequences",
    "bucket_lengths": "sequences", "blast_lengths": "sequences",
    "plan_sequences_milp": "milp", "sequence_bound": "bounds",
    "Batch": "batch", "Items": "batch", "plan_step": "step", "StepPlan": "step",
    "Route": "routes", "Dispatcher": "dispatch", "Dispatch": "dispatch",
    "Planner": "planner",
    "simulate": "simulator", "Simulation": "simulator",
    "Model": "model", "Output": "model", "ModelConfig": "configs", "preset": "configs",
    "AdamW": "optim", "schedule": "optim", "model_flops": "flops", "evaluate": "evaluation",
    "Evaluation": "evaluation", "Trainer": "training", "TrainingConfig": "training",
    "RunConfig": "run_config", "Watch": "watch", "replay": "nonfinite",
    "NonFiniteError": "nonfinite", "recipe": "recipes", "profile": "profiling", "EMA": "averaging",
    "Pretraining": "pretraining", "PretrainingConfig": "pretraining",
    "Comm": "comm", "Orchestrator": "orchestrator", "Shard": "sharding",
    "Inputs": "inputs", "data": "data", "losses": "losses",
    "compat": "compat", "demo": "demo", "comm": "comm",
    "sequence_parallel": "sequence_parallel", "SequenceExecutor": "sequence_executor",
    "sequence_executor": "sequence_executor",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name == "torch":  # not in __all__: it imports PyTorch, and raises ImportError without it
        return import_module(f"{__name__}.torch")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'orchvlm' has no attribute {name!r}")
    module = import_module(f"{__name__}.{home}")
    value = module if home == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
