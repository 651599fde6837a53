"""Arguments of ``orchvlm train``, ``generate``, ``eval`` and ``inspect``."""
import argparse

_TRAIN_EXAMPLES = """examples:
  orchvlm train run.toml --set training.ema=0.999
  orchvlm train --preset tiny                     ten minutes on the embedded tasks, and a report
  orchvlm train --preset tiny --steps 2000 --kinds read,chart --out run-read
  orchvlm train --preset tiny --resume            goes on where it was stopped
  orchvlm train --preset tiny --resume auto       the same, or begins: for jobs that are restarted
  orchvlm train --preset small --data chats.jsonl shards/ emoji.zip --minutes 60
  orchvlm train --model run-tiny --data chats.jsonl --lr 1e-4 --out run-chats
  orchvlm train --preset tiny-omni --data speech.zip --kinds digits
  orchvlm train --preset tiny --data signs.zip --kinds emoji --max-pixels 3136 --minutes 30

Data are .jsonl and .json files with messages, .tar shards, .zip packs with a records.jsonl, or
folders of these (but .json); without --data, pictures with questions are drawn as they are needed.
Files are mixed by their lengths, or by data.weights; packs with a split are trained on "train" and
evaluated on the other, and --set data.held_out=valid.jsonl names a file to look at.
"""
_GENERATE_EXAMPLES = """examples:
  orchvlm generate run-tiny --image shapes.png "How many shapes?"
  orchvlm generate run-tiny-omni --audio nine.wav "Which digit?"
"""


def _count(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


_count.__name__ = "integer"
_METAVARS = {"--preset": "NAME", "--model": "DIR", "--out": "DIR", "--kinds": "A,B,..."}


def _typed(key):
    """What turns an option's text into the key's value."""
    def value(text):
        try:
            return key.kind.parse(text, plain=True)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return value


def _add_keys(group, names):
    """Options for keys of a run, from the table of keys."""
    from .run_keys import BY_NAME
    for name in names.split():
        key = BY_NAME[name]
        how = {"nargs": "+", "metavar": "PATH"} if name == "data.files" else {
            "type": _typed(key), "metavar": _METAVARS.get(key.option, key.short[0].upper())}
        words = f"{key.words} (default: {key.default_words})".replace("%", "%%")
        group.add_argument(key.option, dest=name, help=words, **how)


def add_run_arguments(parser, data, run):
    """The arguments of a command that trains.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    data, run : str
        Keys that get an option, by group.

    Returns
    -------
    argparse group
        For more about the run.
    """
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml",
                        help="what the run is told; options win over it, and `orchvlm train "
                             "--keys` lists all that it may say")
    _add_keys(parser.add_mutually_exclusive_group(), "model.preset model.folder")
    _add_keys(parser.add_argument_group("data"), data)
    group = parser.add_argument_group("run")
    _add_keys(group, "output.folder")
    group.add_argument("--resume", nargs="?", const="", metavar="auto|DIR",
                       help="go on from the last good checkpoint in --out, with its configuration; "
                            "auto: where there is one, else begin; DIR: from this checkpoint")
    _add_keys(group, run)
    group.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
                       help="any key, the value in TOML or plain text; several times for several; "
                            "wins over everything")
    return group


def _add_train(commands, raw):
    parser = commands.add_parser("train", formatter_class=raw, epilog=_TRAIN_EXAMPLES,
                                 help="train a model, evaluate it, write a report",
                                 description="Trains a vision-language model on this computer.")
    group = add_run_arguments(
        parser, "data.files data.kinds data.difficulty data.max_pixels data.tokens",
        "training.steps training.minutes training.lr training.seed ranks.n ranks.threads "
        "evaluation.samples")
    group.add_argument("--explain", action="store_true",
                       help="print the whole configuration, parameters, memory of each rank by "
                            "arena, FLOPs and time of a step; train nothing")
    group.add_argument("--keys", action="store_true", help="list all keys, train nothing")


def _add_asked(parser):
    """Which model is asked."""
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    parser.add_argument("--weights", choices=["average", "trained"],
                        help="of a checkpoint that holds a moving average: that (default), or what "
                             "was trained")


def add_model_commands(commands, raw):
    """Adds the five commands to a parser's subcommands.

    Parameters
    ----------
    commands : argparse subparsers
    raw : type
        Formatter that leaves examples as they are.
    """
    _add_train(commands, raw)
    report = commands.add_parser("report", help="one HTML file about a run",
                                 description="Writes a run's curves, how even its phases were over "
                                             "the ranks, and one step's timeline.")
    report.add_argument("run", metavar="RUN", help="folder of a training run")
    report.add_argument("--out", metavar="FILE", help="default RUN/report.html")
    generate = commands.add_parser("generate", formatter_class=raw, epilog=_GENERATE_EXAMPLES,
                                   help="ask a model about pictures and sounds",
                                   description="Prints a model's answer.")
    _add_asked(generate)
    generate.add_argument("question", metavar="QUESTION")
    generate.add_argument("--image", action="append", default=[], metavar="FILE",
                          help="a picture; several times for several")
    generate.add_argument("--audio", action="append", default=[], metavar="WAV",
                          help="a sound, likewise")
    generate.add_argument("--max-new-tokens", type=_count, default=64, metavar="N",
                          help="default %(default)s")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T",
                          help="0 (default) takes the likeliest token")
    generate.add_argument("--seed", type=int, default=0, metavar="S")
    generate.add_argument("--threads", type=_count, metavar="N")
    score = commands.add_parser("eval", help="how often a model answers right, by task",
                                description="Asks held-out questions and counts right answers.")
    _add_asked(score)
    _add_keys(score.add_argument_group("data"), "data.files data.kinds data.difficulty")
    score.add_argument("--split", choices=["val", "test"], default="test",
                       help="default %(default)s; a training run looks at val")
    score.add_argument("--samples", type=_count, default=100, metavar="N",
                       help="of each kind; default %(default)s")
    score.add_argument("--report", metavar="HTML", help="write pictures, questions and answers")
    score.add_argument("--json", action="store_true", help="print JSON in place of the table")
    score.add_argument("--threads", type=_count, metavar="N")
    look = commands.add_parser("inspect", help="parameters, FLOPs and memory of a model",
                               description="Counts what a configuration makes, without making it.")
    look.add_argument("model", metavar="MODEL|PRESET",
                      help="folder with a config.json, a run, or a preset: tiny, tiny-moe, "
                           "tiny-omni, long, small, seed1.5-vl, qwen3-omni-thinker")
    look.add_argument("--image", default="448x448", metavar="WxH",
                      help="of the sample that is counted; default %(default)s")
    look.add_argument("--text-tokens", type=_count, default=128, metavar="T",
                      help="of that sample; default %(default)s")
    look.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                      help="of the weights; default %(default)s")
    look.add_argument("--tokens", type=_count, default=4096, metavar="T",
                      help="of a pack, for activations; default %(default)s")
    look.add_argument("--checkpoint", choices=["none", "selective", "full"], default="none",
                      help="activations that are computed again; default %(default)s")
