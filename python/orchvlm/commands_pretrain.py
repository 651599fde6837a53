"""What ``orchvlm pretrain`` does."""
from pathlib import Path

from ._unread import unread
from .building import build, processor_of, resolved
from .cli import CommandError
from .commands_model import length_of, take_steps, told_by
from .pretraining import Pretraining, PretrainingConfig
from .sources import framed


def _first(arguments):
    """What a new run begins with, unless it is told otherwise."""
    given = vars(arguments)
    name = given["model.preset"] or Path(given["model.folder"] or "tiny").name
    return "pretrain", {"training": {"lr": 1.5e-3, "minutes": 12.0,
                                     "weight_decay": PretrainingConfig.weight_decay,
                                     "betas": list(PretrainingConfig.betas)},
                        "output": {"folder": f"run-{name}-vit", "save_every": 500}}


def _samples(config, split):
    """Pictures with captions of a split; those to train on there must be."""
    from .data import NoRecordsError, load_pack
    found = []
    for path in config["data.files"]:
        for kind in config["data.kinds"] or ["captions"]:
            try:
                pack = load_pack(path, kind, split)
            except NoRecordsError:
                if split == "train":
                    raise
                continue
            found += [pack[i] for i in range(len(pack))]
    return found


@unread()
def pretrain(arguments):
    """``orchvlm pretrain``"""
    from .data.assets import need
    config, out = told_by(arguments, _first(arguments))
    config = resolved(config, 1)
    if not config["data.files"]:
        raise CommandError("--data names .zip packs of pictures with captions")
    need("PIL", "pillow")
    samples = _samples(config, "train")
    model = build(config)
    settings = PretrainingConfig(**vars(config.training()), **config.section("pretraining"),
                                 seed=config["training.seed"], frame=config["data.frame"])
    run = Pretraining(model, samples, processor_of(config, model.config), settings, out)
    run.told = config
    if arguments.resume is not None:
        run.resume(None if arguments.resume in ("", "auto") else arguments.resume)
    print(f"{model!r}; {len(samples):,} pictures, {len(run.classes.captions):,} captions, "
          f"{settings.batch} a step; {length_of(config)}; {out}/", flush=True)
    take_steps(run, out)
    others = [framed(sample, settings.frame) for sample in _samples(config, "val")]
    if others:
        print(f"{100 * run.accuracy(others):.1f} % of {len(others)} held-out captions are told by "
              "the tower and its classifier")
    return 0
