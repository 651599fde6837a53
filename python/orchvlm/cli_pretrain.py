"""Arguments of ``orchvlm pretrain``."""
from .cli_model import add_run_arguments

_EXAMPLES = """examples:
  orchvlm init base --preset tiny --data signs.zip --kinds emoji --vocab-size 4096
  orchvlm pretrain --model base --data signs.zip --kinds emoji --set data.frame=56 --out signs-vit
  orchvlm train --model signs-vit --data signs.zip --kinds emoji --set data.frame=56 --lr 2e-3 \\
      --set 'training.freeze=["model.visual.*"]' --minutes 12 --out run-signs

The vision tower learns to tell pictures' captions, and the words in them, by classification; the
model that is left in --out has the rest as it was, and trains on from there.
"""


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
                                 description="Pre-trains a vision tower on pictures with captions. "
                                             "Where nothing is said: 12 minutes at a rate of "
                                             "1.5e-3, into run-NAME-vit.")
    add_run_arguments(parser, "data.files data.kinds data.max_pixels",
                      "training.steps training.minutes training.lr training.seed "
                      "pretraining.batch ranks.threads")
