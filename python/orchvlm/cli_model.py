"""Arguments of ``orchvlm train``, ``generate``, ``eval`` and ``inspect``."""
import argparse

_TRAIN_EXAMPLES = """examples:
  orchvlm train --preset tiny                     ten minutes on the embedded tasks, and a report
  orchvlm train --preset tiny --steps 2000 --kinds read,chart --out run-read
  orchvlm train --preset tiny --resume            goes on where it was stopped
  orchvlm train --preset small --data chats.jsonl shards/ emoji.zip --minutes 60
  orchvlm train --model run-tiny --data chats.jsonl --lr 1e-4 --out run-chats
  orchvlm train --preset tiny-omni --data speech.zip --kinds digits
  orchvlm train --preset tiny --data signs.zip --kinds emoji --max-pixels 3136 --minutes 30

Data are .jsonl files with messages, .tar shards, .zip packs with a records.jsonl, or folders of
these; without --data, pictures with questions are drawn as they are needed.  Files are mixed by
their lengths; packs with a split are trained on "train" and evaluated on the other.
"""
_GENERATE_EXAMPLES = """examples:
  orchvlm generate run-tiny --image shapes.png "How many shapes?"
  orchvlm generate run-tiny-omni --audio nine.wav "Which digit?"
"""


def _whole(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def _real(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite; got {text}")
    return value


def _share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in 0 .. 1; got {text}")
    return value


_whole.__name__, _real.__name__, _share.__name__ = "integer", "number", "number"


def _add_tasks(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", metavar="PATH",
                       help=".jsonl, .tar or .zip files, or folders of them")
    group.add_argument("--kinds", metavar="A,B,...",
                       help="of embedded tasks: read, colour, shape, describe, count, point, box, "
                            "chart, puzzle, screen; of packs in a zip: captions, emoji, screens, "
                            "nlvr, nlvr_captions, digits")
    group.add_argument("--difficulty", type=_share, metavar="D", help="of embedded tasks, 0 to 1")


def _add_train(commands, raw):
    parser = commands.add_parser("train", formatter_class=raw, epilog=_TRAIN_EXAMPLES,
                                 help="train a model, evaluate it, write a report",
                                 description="Trains a vision-language model on this computer.")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--preset", metavar="NAME",
                       help="tiny (default), tiny-moe, tiny-omni or small")
    start.add_argument("--model", metavar="DIR", help="go on from a model's or run's weights")
    _add_tasks(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="DIR", help="default run-PRESET")
    group.add_argument("--resume", action="store_true",
                       help="go on from the last checkpoint in --out, with its settings")
    group.add_argument("--steps", type=_whole, metavar="N")
    group.add_argument("--minutes", type=_real, metavar="M",
                       help="of training, which the learning rate then follows, so that no run "
                            "repeats another; by default as the preset says, unless --steps is "
                            "given")
    group.add_argument("--lr", type=_real, metavar="R", help="greatest learning rate")
    group.add_argument("--vision-lr", type=_real, metavar="R",
                       help="that of the vision tower, where it is another: a pre-trained one "
                            "keeps what it knows while the decoder learns to read it")
    group.add_argument("--tokens", type=_whole, metavar="T", help="in a step; 2,048 for tiny")
    group.add_argument("--max-pixels", type=_whole, metavar="P",
                       help="pictures are shrunk to so many; 3136 are 56 x 56")
    group.add_argument("--ranks", type=_whole, metavar="N",
                       help="processes that train together, balanced; default 2, or as torchrun, "
                            "mpirun or srun started them")
    group.add_argument("--threads", type=_whole, metavar="N",
                       help="of each rank; default: all cores, shared out")
    group.add_argument("--seed", type=int, metavar="S", help="of weights and data; default 0")
    group.add_argument("--samples", type=_whole, default=100, metavar="N",
                       help="held-out samples of each kind; default %(default)s")


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
    generate.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    generate.add_argument("question", metavar="QUESTION")
    generate.add_argument("--image", action="append", default=[], metavar="FILE",
                          help="a picture; several times for several")
    generate.add_argument("--audio", action="append", default=[], metavar="WAV",
                          help="a sound, likewise")
    generate.add_argument("--max-new-tokens", type=_whole, default=64, metavar="N",
                          help="default %(default)s")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T",
                          help="0 (default) takes the likeliest token")
    generate.add_argument("--seed", type=int, default=0, metavar="S")
    generate.add_argument("--threads", type=_whole, metavar="N")
    score = commands.add_parser("eval", help="how often a model answers right, by task",
                                description="Asks held-out questions and counts right answers.")
    score.add_argument("model", metavar="MODEL", help="folder of a model or of a run")
    _add_tasks(score)
    score.add_argument("--split", choices=["val", "test"], default="test",
                       help="default %(default)s; a training run looks at val")
    score.add_argument("--samples", type=_whole, default=100, metavar="N",
                       help="of each kind; default %(default)s")
    score.add_argument("--report", metavar="HTML", help="write pictures, questions and answers")
    score.add_argument("--json", action="store_true", help="print JSON in place of the table")
    score.add_argument("--threads", type=_whole, metavar="N")
    look = commands.add_parser("inspect", help="parameters, FLOPs and memory of a model",
                               description="Counts what a configuration makes, without making it.")
    look.add_argument("model", metavar="MODEL|PRESET",
                      help="folder with a config.json, a run, or a preset: tiny, tiny-moe, "
                           "tiny-omni, small, seed1.5-vl, qwen3-omni-thinker")
    look.add_argument("--image", default="448x448", metavar="WxH",
                      help="of the sample that is counted; default %(default)s")
    look.add_argument("--text-tokens", type=_whole, default=128, metavar="T",
                      help="of that sample; default %(default)s")
    look.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                      help="of the weights; default %(default)s")
    look.add_argument("--tokens", type=_whole, default=4096, metavar="T",
                      help="of a pack, for activations; default %(default)s")
    look.add_argument("--checkpoint", choices=["none", "selective", "full"], default="none",
                      help="activations that are computed again; default %(default)s")
