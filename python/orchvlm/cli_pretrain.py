"""Arguments of ``orchvlm pretrain``."""
import argparse

from .cli_model import _count

_EXAMPLES = """examples:
  orchvlm pretrain --preset tiny --data signs.zip --kinds emoji --max-pixels 3136 --minutes 12
  orchvlm train --model run-tiny-vit --data signs.zip --kinds emoji --max-pixels 3136 \\
      --lr 7e-4 --set 'training.groups=[{match="model.visual.*", lr=1e-4}]' \\
      --tokens 1024 --minutes 18 --out run-signs

The vision tower learns to tell pictures' captions, and the words in them, by classification; the
model that is left in --out has the rest as it was, and trains on from there.
"""


def _real(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite; got {text}")
    return value


_real.__name__ = "number"


def add_pretrain_command(commands, raw):
    """Adds the command to a parser's subcommands.

    Parameters
    ----------
    commands : argparse subparsers
    raw : type
        Formatter that leaves examples as they are.
    """
    parser = commands.add_parser("pretrain", formatter_class=raw, epilog=_EXAMPLES,
                                 help="teach a vision tower captions before a model is trained",
                                 description="Pre-trains a vision tower on pictures with captions.")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--preset", metavar="NAME", help="tiny (default), tiny-moe or small")
    start.add_argument("--model", metavar="DIR", help="go on from a model's or run's weights")
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", metavar="PATH", help=".zip packs with captions")
    group.add_argument("--kinds", metavar="A,B,...",
                       help="of packs in a zip: captions, emoji, screens, nlvr_captions")
    group.add_argument("--max-pixels", type=_count, metavar="P",
                       help="pictures are shrunk to so many; 3136 are 56 x 56")
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="DIR", help="default run-PRESET-vit")
    group.add_argument("--resume", action="store_true",
                       help="go on from the last checkpoint in --out, with its settings")
    group.add_argument("--steps", type=_count, metavar="N")
    group.add_argument("--minutes", type=_real, metavar="M",
                       help="of training, which the learning rate then follows; 12 by default, "
                            "unless --steps is given")
    group.add_argument("--lr", type=_real, metavar="R",
                       help="greatest learning rate; default 0.001")
    group.add_argument("--batch", type=_count, metavar="N", help="pictures of a step; default 64")
    group.add_argument("--threads", type=_count, metavar="N", help="default: all cores")
    group.add_argument("--seed", type=int, metavar="S", help="of weights and data; default 0")
