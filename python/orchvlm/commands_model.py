"""What ``orchvlm train``, ``generate``, ``eval`` and ``inspect`` do."""
import json
import math
import os
import shlex
import sys
import time
import warnings
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ._files import read_object, write_whole
from ._unread import unread
from .averaging import averaged, has_average
from .building import model_config_of, model_folder, open_model, processor_of, watch_of
from .cli import CommandError
from .configs import ModelConfig, preset
from .first_rank import first_rank_says
from .run_config import RUN_FILE, RunConfig, nested, override, read_toml
from .run_keys import BY_NAME, KEYS, reference, toml
from .run_folder import MANIFEST, best_checkpoint, latest_checkpoint
from .sources import answered, framed, held_out, training_source
from .tables import format_bytes, text_table
from .training import Trainer, checkpoints, read_metrics

_TIMELINE, _SHOWN = "timeline.json", "answers.json"  # for a report that is written again


# ---------------------------------------------------------------- models and what runs were told


def _stored(folder):
    """What the run was told that a folder is or belongs to; None for a model from elsewhere."""
    for place in (Path(folder), Path(folder).parent):
        if (place / RUN_FILE).exists():
            return RunConfig.load(place / RUN_FILE)
    return None


def _open(path, threads, weights=None):
    """(model, processor, what its run was told) of a folder; ``weights`` are the average where one
    is kept, or what is named."""
    from .data import Processor
    folder = model_folder(path)
    of_run, best = folder != Path(path), best_checkpoint(path)
    folder = best if of_run and best else folder
    kept = has_average(folder)
    if weights == "average" and not kept:
        raise CommandError(f"{folder}: no average of the weights; runs with training.ema keep one")
    if of_run:
        print(f"orchvlm: takes {folder}, "
              f"{'the best on held-out samples' if best else 'the latest'}; the folder of another "
              "checkpoint names that one", file=sys.stderr)
    return (open_model(folder, kept and weights != "trained", threads=threads),
            Processor.from_pretrained(folder), _stored(folder))


def _given(arguments):
    """What options and --set say: layers of a configuration."""
    options = {key.name: vars(arguments)[key.name] for key in KEYS
               if vars(arguments).get(key.name) is not None}
    sets = dict(map(override, getattr(arguments, "set", ())))
    return ("command line", nested(options)), ("--set", nested(sets))


def _resumed(run, path, layers):
    """What a run goes on with: what it was told, then a file that is given besides, then layers."""
    own = run / RUN_FILE
    if path and not os.path.samefile(path, own):
        layers = (path, read_toml(path)), *layers
    return RunConfig.load(own, *layers)


def told_by(arguments, *first):
    """(configuration of the run, its folder) from file, options and what is stored; a new run's
    ``first`` layers are what all of these win over."""
    layers, path = _given(arguments), arguments.config
    config = RunConfig.load(path, *layers, first=first) if path else RunConfig(*first, *layers)
    out = Path(config["output.folder"])
    if arguments.resume == "auto" and not checkpoints(out):
        arguments.resume = None
    if arguments.resume not in (None, "", "auto"):
        given = Path(arguments.resume).resolve()
        if not (given / MANIFEST).exists() or not (given.parent / RUN_FILE).exists():
            raise CommandError(f"{arguments.resume}: no checkpoint-N of a run")
        config = _resumed(given.parent, path, layers)
        out = Path(given.parent if config.origins["output.folder"] in
                   ("default", str(given.parent / RUN_FILE)) else config["output.folder"])
        config.set("output.folder", str(out), "command line")
    elif arguments.resume is not None:
        if not (out / RUN_FILE).exists() or not checkpoints(out):
            raise CommandError(f"{out}: no run to resume; leave out --resume, or name its folder "
                               "with --out")
        config = _resumed(out, path, layers)
        config.set("output.folder", str(out), "command line")
    elif checkpoints(out):
        named = config.origins["output.folder"] in ("command line", "--set")
        if named or not path or not (out / RUN_FILE).exists() or not os.path.samefile(
                path, out / RUN_FILE):
            raise CommandError(f"{out} holds a run: --resume goes on with it, --out DIR starts "
                               "another")
        out = next(place for n in count(2) if not (place := Path(f"{out}-{n}")).exists())
        config.set("output.folder", str(out), "repeats")
    return config, out


# ---------------------------------------------------------------- train


class _Mean:
    """Mean of the last losses, of which one of 20 steps ago counts a third of the newest; those
    that are no number are left out."""

    _SPAN = 20

    def __init__(self):
        self._sum = self._weight = 0.0
        self._n = 0

    def add(self, loss):
        if loss is None or not math.isfinite(loss):
            return
        new = 1 / self._SPAN
        self._sum += new * (loss - self._sum)
        self._weight += new * (1 - self._weight)  # what the first ones lack, as in Adam
        self._n += 1

    def __str__(self):
        if not self._n:
            return "loss is no number"
        last = self._n if self._n < self._SPAN else f"~{self._SPAN}"
        return f"loss {self._sum / self._weight:.3f} (mean of last {last})"


class _Line:
    """Progress of a run: on a terminal one line that is rewritten, in a log a line now and then."""

    def __init__(self, trainer, wait_s=30.0):
        self._trainer, self._terminal = trainer, sys.stderr.isatty()
        self._wait_s = 0.2 if self._terminal else wait_s
        self._next, self._loss = 0.0, _Mean()

    def show(self, row):
        self._loss.add(row["loss"])
        done, now = self._trainer.done, time.monotonic()
        if "eval_loss" in row:
            print(f"step {row['step']:,}  held out: " + "  ".join(
                f"{key.removeprefix('eval_')} {value:.4g}" for key, value in row.items()
                if key.startswith("eval_")), file=sys.stderr, flush=True)
        if now < self._next and done < 1:
            return
        self._next = now + self._wait_s
        left_s = row["elapsed_s"] * (1 - done) / done
        text = (f"step {row['step']:,}  {100 * done:3.0f} %  {self._loss}  "
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
        looked = [key for key in row if key.startswith("eval_")]
        more = [key for key in ("patches_per_s", "exposed_comm_ms", "exposed_comm_share")
                if key in row]
        for key in ("loss", "lr", "grad_norm", "tokens_per_s", "tflops", "mfu", *more, *looked):
            writer.add_scalar(key, float(row[key]), row["step"])
    return write, writer.close


def train(arguments):
    """``orchvlm train``"""
    from .comm import init, run_processes
    from .data.assets import need
    if arguments.keys:
        print(reference(), end="")
        return 0

    def told():
        config, out = told_by(arguments)
        if not config["data.files"]:
            need("PIL", "pillow")  # the embedded tasks are drawn; nothing is left without it
        return config, out, arguments.resume

    with init() as launched:
        # A rank's own look at the folder may be at another disk, or come too early or too late.
        said, error = first_rank_says(launched, told, _given(arguments), arguments.config)
        if error is None:
            config, out, arguments.resume = said
        if launched.size > 1 and error is None:  # torchrun, mpirun or srun started the ranks
            config.set("ranks.n", launched.size, "launcher")
            if arguments.explain:
                return _explain(config) if launched.rank == 0 else 0
            return _train_rank(launched, arguments, out, config)
    if error is not None:
        raise error
    if arguments.explain:
        return _explain(config)
    # What is wrong with the data, this process says.
    training_source(config.section("data"), config["training.seed"])
    watch_of(config, processor_of(config, model_config_of(config)))
    ranks = config["ranks.n"]
    if ranks == 1:
        return _train_rank(None, arguments, out, config)
    return run_processes(ranks, _train_rank, arguments, out, config)[0]


def _explain(config):
    from .explain import explain
    print(explain(config))
    return 0


@contextmanager
def _plain_warnings():
    """Warnings as lines, not as code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"orchvlm: {message}", file=sys.stderr)
        yield


@unread()
@_plain_warnings()
def _train_rank(comm, arguments, out, config):
    """What one rank does; the first one talks and writes."""
    trainer = Trainer.from_config(config, comm)
    if arguments.resume is not None:
        trainer.resume(None if arguments.resume in ("", "auto") else arguments.resume)
    if trainer.passes.rank:
        for _ in trainer.run():  # rows are rank 0's to keep
            pass
        return 0
    ranks = trainer.passes.size
    print(f"{trainer.model!r}; {config['data.tokens']:,} tokens a step; "
          f"{length_of(config)}; {f'{ranks} ranks; ' if ranks > 1 else ''}{out}/", flush=True)
    take_steps(trainer, out)
    return _finish(trainer, config, out)


def length_of(config):
    """How long a run goes on, in words."""
    steps = config["training.steps"]
    return f"{steps:,} steps" if steps else f"{config['training.minutes']:g} minutes"


def take_steps(trainer, out):
    """All that are left, with a line that tells how far."""
    line, (write, close) = _Line(trainer), _board(out)
    try:
        for row in trainer.run():
            line.show(row)
            write(row)
    except (KeyboardInterrupt, SystemExit):
        line.end()
        print(f"stopped at step {trainer.step}; " + (
            f"{out} holds it, --resume goes on" if checkpoints(out) else "nothing was saved yet"),
              file=sys.stderr)
        raise
    finally:
        close()
    line.end()
    left_out = (trainer.facts()["loader"] or {}).get("skipped", 0)
    if left_out:
        print(f"{left_out:,} samples could not be used and were left out", file=sys.stderr)


def _finish(trainer, config, out):
    """Evaluation and report."""
    best = _best(trainer, out)
    samples, seen = held_out(config.section("data"), "val", config["evaluation.samples"]), None
    if samples := answered(samples):
        seen = _asked(trainer, samples, out, best)
        print(seen)
        table = {kind: {"score": mean, "exact": exact, "samples": n}
                 for kind, (mean, exact, n) in seen.by_kind().items()}
        write_whole(out / "evaluation.json",
                    lambda stream: stream.write((json.dumps(table, indent=1) + "\n").encode()))
    step = int(best.name.rpartition("-")[2]) if best else trainer.step
    for path in _reports(trainer, seen, step, config, out):
        print(f"wrote {path}")
    return 0


def _best(trainer, out):
    """The checkpoint that the watch liked best, where it is not the last; says so."""
    watch, step = trainer.watch, trainer.step
    best = best_checkpoint(out) if watch and watch.best_step not in (None, step) else None
    words = [f"stopped early, at step {step:,}"] if watch and watch.over else []
    if best:
        words.append(f"the best {watch.figure} of held-out samples, {watch.best:.4g}, is of step "
                     f"{watch.best_step:,}, {best}, which `orchvlm eval {out}` and `generate` take")
    if words:
        print(": ".join(words))
    return best


def _asked(trainer, samples, out, best):
    """The Evaluation of the best weights, else of the last ones."""
    from .evaluation import evaluate
    model, processor = trainer.model, trainer.processor
    if best or model.shard is not None and model.shard.holds:  # of a part, what is written is whole
        folder = best or latest_checkpoint(out)
        model = open_model(folder, has_average(folder), dtype=model.dtype, threads=model.threads)
        return evaluate(model, samples, processor, progress=_counted)
    with averaged(trainer.ema):
        return evaluate(model, samples, processor, progress=_counted)


def _repeated(run):
    """The command that trains the same."""
    return shlex.join(["orchvlm", "train", str(Path(run) / RUN_FILE)])


def _facts(config):
    """[(key, value)] of what is not so by default."""
    return [(name, toml(value)) for name, value in config.values.items()
            if value is not None and value != BY_NAME[name].default]


def _counted(done, whole):
    if sys.stderr.isatty():
        print(f"\rasking held-out questions, {done} of {whole}\x1b[K"
              if done < whole else "\r\x1b[K", end="", file=sys.stderr, flush=True)


def _reports(trainer, seen, step, config, out):
    """Writes them; their paths, one by one."""
    from .ranks_report import trace_of
    from .training_report import plot_training, shown
    timeline = trainer.passes.timeline
    kept = {_SHOWN: {"model": repr(trainer.model).strip("<>"), "step": step,
                     **(shown(seen) if seen else {})}}
    if timeline:
        kept[_TIMELINE] = trace_of(timeline)
    for name, what in kept.items():
        text = json.dumps(what).encode()
        write_whole(out / name, lambda stream, text=text: stream.write(text))
        yield out / name
    yield _report(out, out / "report.html", config)
    try:
        plot_training(read_metrics(out / "metrics.jsonl"), out / "curves.png", seen)
        yield out / "curves.png"
    except ImportError:  # the report has the curves too
        return


def _report(run, path, config):
    """Writes a report of what a run's folder holds; its path."""
    from .ranks_report import timeline_of
    from .training_report import write_report
    rows, seen = read_metrics(run / "metrics.jsonl"), _kept(run / _SHOWN)
    facts = [("model", seen["model"])] if "model" in seen else []
    if rows:
        tokens, elapsed_s = sum(row["tokens"] for row in rows), rows[-1]["elapsed_s"]
        facts += [("steps taken", f"{rows[-1]['step']:,}"),
                  ("time in steps", f"{elapsed_s / 60:.1f} minutes"),
                  ("tokens in all", f"{tokens:,}"), ("mean speed", f"{tokens / elapsed_s:,.0f} "
                                                                   "tokens/s")]
    if "table" in seen:
        facts.append(("held-out samples", f"after step {seen['step']:,}"))
    title = f"Run {run.name}"
    if config:
        facts += _facts(config)
        title = f"Training {config['model.preset'] or config['model.folder']}"
    timeline = _kept(run / _TIMELINE)
    write_report(path, rows, seen if "table" in seen else None, title=title, facts=facts,
                 command=_repeated(run) if config else "",
                 timeline=timeline_of(timeline) if timeline else ())
    return path


def _kept(path):
    """The object in a file of a run; empty where there is none."""
    return read_object(path, CommandError) if path.exists() else {}


def report(arguments):
    """``orchvlm report``"""
    run = Path(arguments.run)
    if not (run / "metrics.jsonl").exists():
        raise CommandError(f"{run}: no run (metrics.jsonl) in this folder")
    print(f"wrote {_report(run, Path(arguments.out or run / 'report.html'), _stored(run))}")
    return 0


# ---------------------------------------------------------------- generate, eval, inspect


def generate(arguments):
    """``orchvlm generate``"""
    for path in (*arguments.image, *arguments.audio):
        if not Path(path).exists():
            raise CommandError(f"{path}: no such file")
    model, processor, told = _open(arguments.model, arguments.threads, arguments.weights)
    parts = [{"type": "image", "image": str(path)} for path in arguments.image]
    parts += [{"type": "audio", "audio": str(path)} for path in arguments.audio]
    parts.append({"type": "text", "text": arguments.question})
    sample = framed({"messages": [{"role": "user", "content": parts}]}, told and told["data.frame"])
    inputs = processor(sample, prompt=True)
    (said,) = model.generate(inputs, arguments.max_new_tokens, seed=arguments.seed,
                             temperature=arguments.temperature, stop=processor.tokenizer.stop)
    print(processor.tokenizer.decode(said))
    return 0


def evaluate(arguments):
    """``orchvlm eval``"""
    from .evaluation import evaluate as ask
    model, processor, told = _open(arguments.model, arguments.threads, arguments.weights)
    layers = [("run", nested(told.values))] if told else []
    config = RunConfig(*layers, *_given(arguments))
    samples = answered(held_out(config.section("data"), arguments.split, arguments.samples))
    if not samples:
        raise CommandError("these data have no held-out samples with answers")
    seen = ask(model, samples, processor, progress=_counted)
    if arguments.json:
        print(json.dumps({kind: {"score": mean, "exact": exact, "samples": n}
                          for kind, (mean, exact, n) in seen.by_kind().items()}, indent=1))
    else:
        print(seen)
    if arguments.report:  # last: where it cannot be written, the answers are not lost
        from .training_report import write_report
        write_report(arguments.report, [], seen, title=f"Evaluation of {arguments.model}")
    return 0


def _config(name):
    if not Path(name).exists():
        try:
            return preset(name)
        except ValueError as error:
            raise CommandError(f"{name}: no such folder; {error}") from None
    return ModelConfig.load(model_folder(name))


def _size(text):
    from .data.images import MOST_RATIO
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise CommandError(f"--image must be WIDTHxHEIGHT in pixels, e.g. 448x448; got {text}")
    sides = int(height), int(width)
    if max(sides) > MOST_RATIO * min(sides):
        raise CommandError(f"--image {text}: the aspect ratio is above {MOST_RATIO}; such pictures "
                           "are refused in training, too")
    return sides


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
