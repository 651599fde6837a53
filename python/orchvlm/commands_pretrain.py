"""What ``orchvlm pretrain`` does."""
import json
from pathlib import Path

from ._files import read_object, write_whole
from .building import model_folder
from .cli import CommandError
from .commands_model import _steps
from .configs import preset
from .pretraining import Pretraining, PretrainingConfig
from .recipes import FIRST_STD
from .training import checkpoints

_SETTINGS = "pretrain.json"
_FIRST = {"lr": 1e-3, "batch": 64, "seed": 0}
_MINUTES = 12.0
_KEPT = ("preset", "model", "data", "kinds", "max_pixels", "steps", "minutes", *_FIRST)
_SAVE_EVERY, _KEEP = 500, 2  # steps between checkpoints, and how many stay
_ENDLESS = 1_000_000         # steps of a run that the clock ends
_LEAST_PIXELS = 56 * 56      # of a picture, where --max-pixels allows as many


def _settings(arguments):
    """(folder of the run, its settings): as asked, else as stored, else the first choice."""
    given = {key: getattr(arguments, key) for key in _KEPT if getattr(arguments, key) is not None}
    if "kinds" in given:
        given["kinds"] = given["kinds"].split(",")
    if "model" not in given and not arguments.resume:
        given.setdefault("preset", "tiny")
    name = given.get("preset") or Path(given.get("model", "tiny")).name
    out = Path(arguments.out or f"run-{name}-vit")
    stored = {}
    if arguments.resume:
        if not checkpoints(out):
            raise CommandError(f"{out}: no run to resume; leave out --resume, or name its folder "
                               "with --out")
        stored = read_object(out / _SETTINGS, CommandError)
    elif checkpoints(out):
        raise CommandError(f"{out} holds a run: --resume goes on with it, --out DIR starts another")
    made = {**_FIRST, **stored}
    if "steps" in given and "minutes" not in given:
        made.pop("minutes", None)
    made |= given
    if "steps" not in made:
        made.setdefault("minutes", _MINUTES)
    return out, made


def _start(settings, threads):
    """(model, processor)"""
    from .data import Processor
    from .model import Model
    most = settings.get("max_pixels")
    rule = {} if most is None else {"max_pixels": most, "min_pixels": min(most, _LEAST_PIXELS)}
    if "model" in settings:
        folder = model_folder(settings["model"])
        return Model.from_pretrained(folder, threads=threads), Processor.from_pretrained(
            folder, **rule)
    name = settings["preset"]
    model = Model.from_config(preset(name), seed=settings["seed"], threads=threads,
                              std=FIRST_STD.get(name, 0.02))
    return model, Processor.from_config(model.config.values, **rule)


def _samples(settings, split):
    """Pictures with captions of a split; those to train on there must be."""
    from .data import DataError, load_pack
    found = []
    for path in settings["data"]:
        for kind in settings.get("kinds") or ["captions"]:
            try:
                pack = load_pack(path, kind, split)
            except DataError:
                if split == "train":
                    raise
                continue
            found += [pack[i] for i in range(len(pack))]
    return found


def pretrain(arguments):
    """``orchvlm pretrain``"""
    from .data.assets import need
    out, settings = _settings(arguments)
    if not settings.get("data"):
        raise CommandError("--data names .zip packs of pictures with captions")
    need("PIL", "pillow")
    samples = _samples(settings, "train")
    model, processor = _start(settings, arguments.threads)
    steps, minutes, lr = settings.get("steps"), settings.get("minutes"), settings["lr"]
    config = PretrainingConfig(steps=steps or _ENDLESS, minutes=minutes, lr=lr, min_lr=lr / 50,
                               batch=settings["batch"], seed=settings["seed"],
                               save_every=_SAVE_EVERY, keep=_KEEP)
    run = Pretraining(model, samples, processor, config, out)
    if arguments.resume:
        run.resume()
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / _SETTINGS, lambda stream: stream.write(
        (json.dumps(settings, indent=1) + "\n").encode()))
    print(f"{model!r}; {len(samples):,} pictures, {len(run.classes.captions):,} captions, "
          f"{settings['batch']} a step; {f'{steps:,} steps' if steps else f'{minutes} minutes'}; "
          f"{out}/", flush=True)
    _steps(run, out)
    others = _samples(settings, "val")
    if others:
        print(f"{100 * run.accuracy(others):.1f} % of {len(others)} held-out captions are told by "
              "the tower and its classifier")
    return 0
