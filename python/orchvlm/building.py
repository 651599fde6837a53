"""A run's configuration made into what trains: model, processor, loader."""
import os
from fnmatch import fnmatchcase
from pathlib import Path

from .averaging import take_average
from .cli import CommandError
from .configs import ModelConfig, preset
from .data import Loader, Processor, RankLoader
from .model import Model
from .run_config import RunConfig, cores
from .sources import answered, held_out, training_source
from .training import checkpoints, latest_checkpoint
from .watch import Watch

_LEAST_PIXELS = 56 * 56  # of a picture, where max_pixels allows as many


def model_folder(path):
    """The folder with ``config.json``: itself, or a run's latest checkpoint."""
    path = Path(path)
    if (path / "config.json").exists():
        return path
    if path.is_dir() and checkpoints(path):
        return latest_checkpoint(path)
    raise CommandError(f"{path}: neither a model (config.json) nor a run (checkpoint-N)")


def picture_rule(most):
    """What a processor is told about the size of pictures; ``most`` may be None."""
    return {} if most is None else {"max_pixels": most, "min_pixels": min(most, _LEAST_PIXELS)}


def open_model(folder, average=False, kind=Model, **options):
    """The model of a folder with ``config.json``, its adapter with it; of a checkpoint that holds
    an average of the weights, that or what was trained."""
    model = kind.from_pretrained(folder, **options)
    if (Path(folder) / "adapter_config.json").exists():
        model.load_adapter(folder)
    if average:
        take_average(model, folder)
    return model


def resolved(config, ranks):
    """The RunConfig, also of a path or dict, for so many ranks."""
    if isinstance(config, (str, os.PathLike)):
        config = RunConfig.load(config)
    elif not isinstance(config, RunConfig):
        config = RunConfig(config)
    if config["ranks.n"] != ranks:
        config.set("ranks.n", ranks, "launcher")
    return config


def pieces(config, comm=None):
    """(RunConfig, processor, model, loader, watch) of a run: of a RunConfig, path or dict."""
    config = resolved(config, 1 if comm is None else comm.size)
    model = build(config)
    processor = processor_of(config, model.config)
    return config, processor, model, loader_of(config, processor, comm), watch_of(config, processor)


def threads_of(config):
    """Of each rank; None: as many as a model takes by itself."""
    ranks = config["ranks.n"]
    return config["ranks.threads"] or (None if ranks == 1 else max(1, cores() // ranks))


def model_config_of(config):
    """The ModelConfig of what is trained."""
    folder = config["model.folder"]
    return ModelConfig.load(model_folder(folder)) if folder else preset(config["model.preset"])


def processor_of(config, model_config):
    """What makes inputs of the run's samples."""
    rule, folder = picture_rule(config["data.max_pixels"]), config["model.folder"]
    if folder:
        return Processor.from_pretrained(model_folder(folder), **rule)
    return Processor.from_config(model_config.values, **rule)


def check_frozen(config, names):
    """Refuses a pattern of what is not to be trained that matches none of the parameters: what it
    was meant for would be trained in silence."""
    for pattern in config["training.freeze"]:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CommandError(f"training.freeze: {pattern!r} matches no parameter")


def build(config):
    """The model that a run starts from, with its adapters."""
    options = {"dtype": config["model.dtype"], "threads": threads_of(config)}
    if config["model.folder"]:
        model = open_model(model_folder(config["model.folder"]), **options)
    else:
        model = Model.from_config(preset(config["model.preset"]), config["training.seed"],
                                  std=config["model.std"], **options)
    if config["lora.r"]:
        model.add_lora(config["lora.r"], config["lora.alpha"], config["lora.match"],
                       config["training.seed"], rslora=config["lora.rslora"])
    check_frozen(config, model.parameters)
    return model


def watch_of(config, processor):
    """What looks at held-out samples, or None."""
    every, figure = config["evaluation.every"], config["evaluation.figure"]
    named = config["data.held_out"]
    if not every and not named:
        return None
    samples = held_out(config.section("data"), "val", config["evaluation.samples"])
    if named:  # what cannot be used is found before the first step, not at the first look
        for sample in samples:
            processor.one(sample, encoded=True)
    if not samples:
        raise CommandError("data.held_out: no samples in these files" if named else
                           "evaluation.every: these data have no held-out samples with answers; "
                           "name files with some as data.held_out, or leave it out")
    if not every and not answered(samples):
        raise CommandError("data.held_out: no sample has an answer and a check, so that only a "
                           "loss can be looked at: set evaluation.every")
    if figure != "loss" and not answered(samples):
        raise CommandError(f"evaluation.figure = {figure}: no sample of data.held_out has an "
                           "answer and a check; leave it at loss")
    return Watch(samples, processor, every, figure, config["evaluation.patience"]) \
        if every else None


def loader_of(config, processor, comm=None):
    """What yields a run's packs: on one rank all samples, over ranks this one's."""
    source = training_source(config.section("data"), config["training.seed"])
    limits = config["data.tokens"], config["data.patches"]
    if comm is None or comm.size == 1:
        return Loader(source, processor, *limits, too_long="skip")
    return RankLoader(source, processor, limits[0], comm, limits[1], too_long="skip")
