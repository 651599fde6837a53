"""What ``orchvlm train``, ``generate``, ``eval`` and ``inspect`` do."""
import json
import os
import shlex
import sys
import time
from pathlib import Path

from ._files import read_object, write_whole
from .cli import CommandError
from .configs import ModelConfig, preset
from .recipes import FIRST_STD, TASKS, starting_point
from .sources import held_out, training_source
from .tables import format_bytes, text_table
from .training import Trainer, TrainingConfig, checkpoints, latest_checkpoint, read_metrics

_SETTINGS, _TIMELINE = "run.json", "timeline.json"
_KEPT = ("preset", "model", "data", "kinds", "difficulty", "max_pixels", "steps", "minutes", "lr",
         "vision_lr", "tokens", "seed")
_SAVE_EVERY, _KEEP = 200, 2  # steps between checkpoints, and how many stay
_ENDLESS = 1_000_000         # steps of a run that the clock ends
_LEAST_PIXELS = 56 * 56      # of a picture, where --max-pixels allows as many


# ---------------------------------------------------------------- models and settings


def model_folder(path):
    """The folder with ``config.json``: itself, or a run's latest checkpoint."""
    path = Path(path)
    if (path / "config.json").exists():
        return path
    if path.is_dir() and checkpoints(path):
        return latest_checkpoint(path)
    raise CommandError(f"{path}: neither a model (config.json) nor a run (checkpoint-N)")


def _open(path, threads=None, settings=None):
    """(model, processor) of a folder; pictures as these settings, or its run's, have them."""
    from .data import Processor
    from .model import Model
    folder = model_folder(path)
    rule = _picture_rule(_stored(folder) if settings is None else settings)
    return Model.from_pretrained(folder, threads=threads), Processor.from_pretrained(folder, **rule)


def _picture_rule(settings):
    """What the processor is told about the size of pictures."""
    most = settings.get("max_pixels")
    return {} if most is None else {"max_pixels": most, "min_pixels": min(most, _LEAST_PIXELS)}


def _stored(folder):
    """Settings of the run that a folder is or belongs to; {} for a model from elsewhere."""
    for place in (Path(folder), Path(folder).parent):
        if (place / _SETTINGS).exists():
            return read_object(place / _SETTINGS, CommandError)
    return {}


def _settings(arguments):
    """(folder of the run, its settings): as asked, else as stored, else as the recipe says."""
    given = {key: getattr(arguments, key) for key in _KEPT if getattr(arguments, key) is not None}
    if "kinds" in given:
        given["kinds"] = given["kinds"].split(",")
    name = given.get("preset") or (Path(given["model"]).name if "model" in given else "tiny")
    out = Path(arguments.out or f"run-{name}")
    stored = {}
    if arguments.resume:
        stored = _stored(out) if (out / _SETTINGS).exists() else None
        if stored is None or not checkpoints(out):
            raise CommandError(f"{out}: no run to resume; leave out --resume, or name its folder "
                               "with --out")
    elif checkpoints(out):
        raise CommandError(f"{out} holds a run: --resume goes on with it, --out DIR starts another")
    elif "model" not in given:
        given.setdefault("preset", "tiny")
    made = {**starting_point(stored.get("preset") or given.get("preset")), "seed": 0, **stored}
    if "steps" in given and "minutes" not in given:
        made.pop("minutes", None)
    made |= given
    if not made.get("data"):
        made = {"kinds": TASKS["kinds"], "difficulty": TASKS["difficulty"], **made}
    return out, {key: made[key] for key in _KEPT if key in made}


# ---------------------------------------------------------------- train


class _Line:
    """Progress of a run: on a terminal one line that is rewritten, in a log a line now and then."""

    def __init__(self, trainer, wait_s=30.0):
        self._trainer, self._terminal = trainer, sys.stderr.isatty()
        self._wait_s = 0.2 if self._terminal else wait_s
        self._next, self._loss = 0.0, None

    def show(self, row):
        loss = row["loss"]
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        done, now = self._trainer.done, time.monotonic()
        if now < self._next and done < 1:
            return
        self._next = now + self._wait_s
        left_s = row["elapsed_s"] * (1 - done) / done
        text = (f"step {row['step']:,}  {100 * done:3.0f} %  loss {self._loss:.3f}  "
                f"{row['tokens_per_s']:,.0f} tokens/s  {1e3 * row['tflops']:.0f} GFLOP/s  "
                f"MFU {100 * row['mfu']:.0f} %  {left_s // 60:.0f}:{left_s % 60:02.0f} left")
        print(f"\r{text}\x1b[K" if self._terminal else text, end="" if self._terminal else "\n",
              file=sys.stderr, flush=True)

    def end(self):
        if self._terminal:
            print(file=sys.stderr)


def _board(folder):
    """``write(row)`` for TensorBoard where it is installed, else nothing."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return lambda row: None, lambda: None
    writer = Writer(str(folder / "tensorboard"))

    def write(row):
        for key in ("loss", "lr", "grad_norm", "tokens_per_s", "tflops", "mfu"):
            writer.add_scalar(key, float(row[key]), row["step"])
    return write, writer.close


def _start(settings, threads):
    from .data import Processor
    from .model import Model
    if "model" in settings:
        return _open(settings["model"], threads, settings)
    name = settings["preset"]
    model = Model.from_config(preset(name), seed=settings["seed"], threads=threads,
                              std=FIRST_STD.get(name, 0.02))
    return model, Processor.from_config(model.config.values, **_picture_rule(settings))


def train(arguments):
    """``orchvlm train``"""
    from .comm import init, run_processes
    from .data.assets import need
    out, settings = _settings(arguments)
    if not settings.get("data"):
        need("PIL", "pillow")  # the embedded tasks are drawn; nothing is left behind without it
    with init() as launched:
        if launched.size > 1:  # torchrun, mpirun or srun started the ranks
            return _train_rank(launched, arguments, out, settings)
    training_source(settings)  # what is wrong with the data, this process says
    ranks = arguments.ranks or min(2, _cores())
    if ranks == 1:
        return _train_rank(None, arguments, out, settings)
    return run_processes(ranks, _train_rank, arguments, out, settings)[0]


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _train_rank(comm, arguments, out, settings):
    """What one rank does; the first one talks and writes."""
    from .data import Loader, RankLoader
    ranks = 1 if comm is None else comm.size
    first = comm is None or comm.rank == 0
    threads = arguments.threads or (None if ranks == 1 else max(1, _cores() // ranks))
    model, processor = _start(settings, threads)
    source = training_source(settings)
    loader = Loader(source, processor, settings["tokens"], too_long="skip") if ranks == 1 else \
        RankLoader(source, processor, settings["tokens"], comm, too_long="skip")
    lr = settings["lr"]
    steps = settings.get("steps")
    config = TrainingConfig(steps=steps or _ENDLESS, minutes=settings.get("minutes"), lr=lr,
                            min_lr=lr / 50, save_every=_SAVE_EVERY, keep=_KEEP,
                            groups=_tower_rate(settings.get("vision_lr")))
    trainer = Trainer(model, loader, config, out, comm)
    if arguments.resume:
        trainer.resume()
    if not first:
        for _ in trainer.run():
            pass
        return 0
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / _SETTINGS, lambda stream: stream.write(
        (json.dumps(settings, indent=1) + "\n").encode()))
    print(f"{model!r}; {settings['tokens']:,} tokens a step; "
          f"{f'{steps:,} steps' if steps else str(settings['minutes']) + ' minutes'}; "
          f"{f'{ranks} ranks; ' if ranks > 1 else ''}{out}/", flush=True)
    _steps(trainer, out)
    return _finish(trainer, processor, settings, arguments, out)


def _tower_rate(lr):
    """Groups of the optimizer, where the vision tower has a rate of its own."""
    return () if lr is None else ({"match": "model.visual.*", "lr": lr},)


def _steps(trainer, out):
    line, (write, close) = _Line(trainer), _board(out)
    try:
        for row in trainer.run():
            line.show(row)
            write(row)
    except KeyboardInterrupt:
        line.end()
        print(f"stopped at step {trainer.step}; {out} holds it, --resume goes on",
              file=sys.stderr)
        raise
    finally:
        close()
    line.end()


def _finish(trainer, processor, settings, arguments, out):
    """Evaluation and report."""
    from .evaluation import evaluate
    samples, seen = held_out(settings, "val", arguments.samples), None
    if samples:
        seen = evaluate(trainer.model, samples, processor, progress=_counted)
        print(seen)
        table = {kind: {"score": mean, "exact": exact, "samples": n}
                 for kind, (mean, exact, n) in seen.by_kind().items()}
        write_whole(out / "evaluation.json",
                    lambda stream: stream.write((json.dumps(table, indent=1) + "\n").encode()))
    for path in _reports(trainer, seen, settings, _repeated(settings), out):
        print(f"wrote {path}")
    return 0


def _repeated(settings):
    """The command that trains the same."""
    words = ["orchvlm", "train"]
    for key, value in settings.items():
        if value is not None:
            words.append(f"--{key.replace('_', '-')}")
            words += [",".join(value)] if key == "kinds" else map(str, value) if isinstance(
                value, list) else [str(value)]
    return shlex.join(words)


def _counted(done, whole):
    if sys.stderr.isatty():
        print(f"\rasking held-out questions, {done} of {whole}\x1b[K"
              if done < whole else "\r\x1b[K", end="", file=sys.stderr, flush=True)


def _reports(trainer, seen, settings, command, out):
    """Writes them; their paths, one by one."""
    from .ranks_report import trace_of
    from .training_report import plot_training, write_report
    rows = read_metrics(out / "metrics.jsonl")
    model, tokens = trainer.model, sum(row["tokens"] for row in rows)
    facts = [("model", repr(model).strip("<>")), ("steps taken", f"{trainer.step:,}"),
             ("time in steps", f"{trainer.elapsed_s / 60:.1f} minutes"),
             ("tokens in all", f"{tokens:,}"),
             ("mean speed", f"{tokens / trainer.elapsed_s:,.0f} tokens/s"
              if trainer.elapsed_s else "")]
    facts += [(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
              for key, value in settings.items() if key not in ("preset", "model")]
    title = f"Training {settings.get('preset') or settings['model']}"
    timeline = trainer.passes.timeline
    if timeline:
        trace = json.dumps(trace_of(timeline)).encode()
        write_whole(out / _TIMELINE, lambda stream: stream.write(trace))
        yield out / _TIMELINE
    write_report(out / "report.html", rows, seen, title=title, facts=facts, command=command,
                 timeline=timeline)
    yield out / "report.html"
    try:
        plot_training(rows, out / "curves.png", seen)
        yield out / "curves.png"
    except ImportError:  # the report has the curves too
        return


def report(arguments):
    """``orchvlm report``"""
    from .ranks_report import timeline_of
    from .training_report import write_report
    run = Path(arguments.run)
    if not (run / "metrics.jsonl").exists():
        raise CommandError(f"{run}: no run (metrics.jsonl) in this folder")
    timeline = ()
    if (run / _TIMELINE).exists():
        timeline = timeline_of(json.loads((run / _TIMELINE).read_text(encoding="utf-8")))
    path = Path(arguments.out or run / "report.html")
    settings = _stored(run)
    write_report(path, read_metrics(run / "metrics.jsonl"), title=f"Run {run.name}",
                 facts=[(key, str(value)) for key, value in settings.items()],
                 command=_repeated(settings), timeline=timeline)
    print(f"wrote {path}")
    return 0


# ---------------------------------------------------------------- generate, eval, inspect


def generate(arguments):
    """``orchvlm generate``"""
    model, processor = _open(arguments.model, arguments.threads)
    parts = [{"type": "image", "image": str(path)} for path in arguments.image]
    parts += [{"type": "audio", "audio": str(path)} for path in arguments.audio]
    for path in (*arguments.image, *arguments.audio):
        if not Path(path).exists():
            raise CommandError(f"{path}: no such file")
    parts.append({"type": "text", "text": arguments.question})
    inputs = processor({"messages": [{"role": "user", "content": parts}]}, prompt=True)
    (said,) = model.generate(inputs, arguments.max_new_tokens, seed=arguments.seed,
                             temperature=arguments.temperature, stop=processor.tokenizer.stop)
    print(processor.tokenizer.decode(said))
    return 0


def evaluate(arguments):
    """``orchvlm eval``"""
    from .evaluation import evaluate as ask
    model, processor = _open(arguments.model, arguments.threads)
    settings = _stored(model_folder(arguments.model))
    for key in ("data", "kinds", "difficulty"):
        value = getattr(arguments, key)
        if value is not None:
            settings[key] = value.split(",") if key == "kinds" else value
    samples = held_out(settings, arguments.split, arguments.samples)
    if not samples:
        raise CommandError("these data have no held-out samples with answers")
    seen = ask(model, samples, processor, progress=_counted)
    if arguments.report:
        from .training_report import write_report
        write_report(arguments.report, [], seen, title=f"Evaluation of {arguments.model}")
    if arguments.json:
        print(json.dumps({kind: {"score": mean, "exact": exact, "samples": n}
                          for kind, (mean, exact, n) in seen.by_kind().items()}, indent=1))
    else:
        print(seen)
    return 0


def _config(name):
    if not Path(name).exists():
        try:
            return preset(name)
        except ValueError as error:
            raise CommandError(f"{name}: no such folder; {error}") from None
    return ModelConfig.load(model_folder(name))


def _size(text):
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise CommandError(f"--image must be WIDTHxHEIGHT in pixels, e.g. 448x448; got {text}")
    return int(height), int(width)


def inspect(arguments):
    """``orchvlm inspect``"""
    from .parts import count_parameters, plan_memory, sample_flops
    config, size = _config(arguments.model), _size(arguments.image)
    parts = count_parameters(config)
    total = sum(count for count, _ in parts.values())
    tower = sum(parts.get(name, (0, 0))[0] for name in ("patch embedding", "position table",
                                                        "vision blocks"))
    rows = [(name, f"{count:,}", f"{used:,}") for name, (count, used) in parts.items()]
    rows.append(("all", f"{total:,}", f"{sum(used for _, used in parts.values()):,}"))
    print(text_table(["part", "parameters", "used per token"], rows,
                     f"{arguments.model}: {config.family}, vision tower {tower:,}"))
    tokens, forward = sample_flops(config, size, arguments.text_tokens, training=False)
    print(f"\nOne picture of {arguments.image} and {arguments.text_tokens} text tokens: {tokens} "
          f"tokens, {forward / 1e9:,.4g} GFLOP forward, {3 * forward / 1e9:,.4g} to train on.")
    memory = plan_memory(config, arguments.dtype, arguments.tokens, arguments.checkpoint, size,
                         arguments.text_tokens)
    cache = memory.pop("cache")
    print(text_table(["memory", "bytes"], [(k, format_bytes(v)) for k, v in memory.items()] + [
        ("all", format_bytes(sum(memory.values())))],
        f"\nTraining in {arguments.dtype} on packs of {arguments.tokens:,} tokens, such samples, "
        f"checkpoint='{arguments.checkpoint}':"))
    print(f"Generation keeps {format_bytes(cache)} of keys and values of as many tokens.")
    return 0
