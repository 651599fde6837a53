"""Arguments of ``orchvlm init``."""
from .configs import PRESETS

_EXAMPLES = """examples:
  orchvlm init base --preset tiny --set text_config.num_hidden_layers=4
  orchvlm init base --preset tiny --data signs.zip --kinds emoji --vocab-size 4096
  orchvlm pretrain --model base --data signs.zip ...      orchvlm train --model base ...
"""


def add_init_command(commands, raw):
    """Adds the command to a parser's subcommands.

    Parameters
    ----------
    commands : argparse subparsers
    raw : type
        Formatter that leaves examples as they are.
    """
    parser = commands.add_parser(
        "init", formatter_class=raw, epilog=_EXAMPLES, help="make a model with new weights",
        description="Writes a folder with a model of new weights, of any size, and with a "
                    "tokenizer learned from data where it is given some; then it is trained as "
                    "one that was downloaded.")
    parser.add_argument("folder", metavar="DIR", help="is made; must not hold a model")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="default %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a key of config.json, such as vision_config.depth=2; several times "
                             "for several")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; default %(default)s")
    parser.add_argument("--std", type=float, help="deviation of the weights; default: as the "
                                                  "preset needs")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--data", nargs="+", default=[], metavar="PATH",
                       help=".jsonl, .json, .tar or .zip files, or folders of them, whose texts a "
                            "tokenizer is learned from; none: the built-in one")
    group.add_argument("--kinds", type=lambda text: text.split(","), metavar="A,B",
                       help="of packs in a .zip")
    group.add_argument("--vocab-size", type=int, metavar="N",
                       help="tokens at most; default 4096")
    group.add_argument("--max-pixels", type=int, metavar="N", help="pictures are shrunk to so many")
