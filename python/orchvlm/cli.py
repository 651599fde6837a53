"""The ``orchvlm`` command: init, pretrain, train, report, generate, eval, inspect; plan, simulate;
doctor."""
import argparse
import os
import sys
import threading
import time
from importlib.util import find_spec

_EXAMPLES = """examples:
  orchvlm train --preset tiny                     a small model, trained and evaluated in minutes
  orchvlm generate run-tiny --image shapes.png "How many shapes?"
  orchvlm inspect seed1.5-vl                      parameters, FLOPs, memory
  orchvlm plan --demo                             a batch of three modalities, planned and proved
  orchvlm plan lengths.csv --nodes 8 --preset a100_40g --batch-size 512
  orchvlm plan sounds.csv --column seconds --seconds-to-tokens 25 --items
  orchvlm simulate --demo --plot step.png         policies side by side
  orchvlm doctor                                  what was built, found, missing
"""
_PLAN_EXAMPLES = """examples:
  orchvlm plan --demo --plot plan.png
  orchvlm plan lengths.npy --nodes 8 --gpus-per-node 8 --preset a100_40g
  orchvlm plan docs.csv.gz --column text_chars --chars-per-token 4 --batch-size 512
  orchvlm plan data.jsonl --field tokens --policy chunked --json > plan.json
  orchvlm plan lengths.csv --model config.json --preset h100 --nodes 16
  orchvlm plan images.csv --column pixels --pixels-per-token 784 --items --nodes 4

Without --items, sequences are given to sequence-parallel groups of GPUs; with it, items to ranks.
--json names items by their row in FILE, from 0; header and blank lines do not count.
"""
_SIMULATE_EXAMPLES = """examples:
  orchvlm simulate --demo
  orchvlm simulate --demo --nodes 16 --policies sampled,veomni,orchvlm --plot step.png
  orchvlm simulate lengths.csv --batch-size 512 --steps 4 --context 196608
"""

SEQUENCES = 512  # per step unless asked otherwise: the global batch of FlexSP's experiments
ITEMS = 200_000


class CommandError(Exception):
    """A mistake of the caller; its message is one line."""


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and options by their whole names only."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message):
        raise CommandError(f"{message} (see {self.prog} --help)")


class Progress:
    """Says on stderr what takes longer than a second: on a terminal in one line that is rewritten
    every second, elsewhere (a log) in a line every ten."""

    def __init__(self, text):
        self.text = text
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def _tell(self):
        start = time.monotonic()
        terminal = sys.stderr.isatty()
        wait_s = 1.0
        while not self._done.wait(wait_s):
            line = f"orchvlm: {self.text}, {time.monotonic() - start:.0f} s"
            print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n",
                  file=sys.stderr, flush=True)
            wait_s = 1.0 if terminal else 10.0
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def report(self, text):
        """Changes what the next line says."""
        self.text = text


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def _scale(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite; got {text}")
    return value


def _count(text):
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2^63; got {text}")
    return value


_positive.__name__ = _count.__name__ = "integer"
_scale.__name__ = "number"


def _add_input(parser, batch_size):
    group = parser.add_argument_group("lengths")
    group.add_argument("file", nargs="?", metavar="FILE",
                       help=".csv, .tsv, .jsonl or .npy, each also .gz")
    group.add_argument("--demo", action="store_true", help="use embedded lengths")
    group.add_argument("--column", help="column of a CSV file, if it has several")
    group.add_argument("--field", help="field of a JSON lines file, if it has several")
    unit = group.add_mutually_exclusive_group()
    unit.add_argument("--chars-per-token", type=_scale, metavar="C",
                      help="the file counts characters or bytes, C to a token (4 is usual)")
    unit.add_argument("--seconds-to-tokens", type=_scale, metavar="T",
                      help="the file counts seconds of T tokens (25 is usual for sound)")
    unit.add_argument("--pixels-per-token", type=_scale, metavar="P",
                      help="the file counts pixels, P to a token (784 is usual)")
    group.add_argument("--batch-size", type=_positive, metavar="B",
                       help=f"lengths per step, from the top of the file (default: {batch_size})")


def _add_machine(parser, nodes):
    group = parser.add_argument_group("machine and model")
    group.add_argument("--nodes", type=_positive, default=nodes, help="default %(default)s")
    group.add_argument("--gpus-per-node", type=_positive, default=8, help="default %(default)s")
    group.add_argument("--preset", metavar="GPU",
                       help="h100, h200, a100_40g, a100_80g, h800 or b200 (default: a100_40g for "
                            "a file, h100 for the demo)")
    group.add_argument("--model", metavar="MODEL",
                       help="gpt7b, gpt13b or gpt30b, as FlexSP measured them on a100_40g and "
                            "counted for other presets, or a Hugging Face config.json, whose "
                            "costs are counted (default gpt7b)")


def _add_output(parser):
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON in place of tables")
    group.add_argument("--plot", metavar="PNG", help="draw it (needs matplotlib)")


def _add_search(parser, limit):
    group = parser.add_argument_group("search")
    group.add_argument("--time-limit", type=_scale, metavar="S",
                       help=f"seconds for each plan (default: {limit})")
    group.add_argument("--work-limit", type=_count, metavar="W",
                       help="search steps for each plan: the same result on every machine")
    group.add_argument("--seed", type=_count, default=0,
                       help="of the search and of the demo's lengths; default %(default)s")


def make_parser():
    """The argument parser of the ``orchvlm`` command."""
    from . import __version__
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="orchvlm", formatter_class=raw, epilog=_EXAMPLES,
                     description="Trains vision-language models, and plans balanced training steps "
                                 "with proofs.")
    parser.add_argument("--version", action="version", version=f"orchvlm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True,
                                     parser_class=_Parser)
    from .cli_model import add_model_commands
    add_model_commands(commands, raw)
    from .cli_init import add_init_command
    add_init_command(commands, raw)
    from .cli_pretrain import add_pretrain_command
    add_pretrain_command(commands, raw)
    plan = commands.add_parser("plan", formatter_class=raw, epilog=_PLAN_EXAMPLES,
                               help="plan one step from lengths",
                               description="Plans one training step and proves how good it is.")
    _add_input(plan, f"{SEQUENCES}; with --items {ITEMS:,}")
    plan.add_argument("--items", action="store_true",
                      help="balance items over ranks in place of sequence-parallel groups")
    plan.add_argument("--policy", choices=["static", "homogeneous", "chunked", "flex"],
                      help="how groups are chosen (default flex)")
    _add_machine(plan, nodes=8)
    _add_search(plan, "0.2; none with --items or with --work-limit alone")
    _add_output(plan)
    simulate = commands.add_parser("simulate", formatter_class=raw, epilog=_SIMULATE_EXAMPLES,
                                   help="simulate steps under several policies",
                                   description="Simulates training steps, policies side by side.")
    _add_input(simulate, SEQUENCES)
    simulate.add_argument("--steps", type=_positive, default=2, help="default %(default)s")
    simulate.add_argument("--samples-per-rank", type=_positive,
                          help="of the demo; default 16")
    simulate.add_argument("--context", type=_positive, metavar="T",
                          help="longest sequence that the run may bring: decides the degree of "
                               "sp_run (default: the longest of these steps)")
    simulate.add_argument("--policies", metavar="A,B,...",
                          help="names from: sampled, prebalanced, veomni, seed, detour, orchmllm, "
                               "orchvlm; for a FILE instead sp_run, sp_static, sp_homogeneous, "
                               "sp_chunked, sp_flex")
    _add_machine(simulate, nodes=8)
    _add_search(simulate, "none, but 200,000 search steps")
    _add_output(simulate)
    commands.add_parser("doctor", help="what was built, found and missing",
                        description="Says what was built, what was found and what is missing.")
    return parser


_OF_A_FILE = ("column", "field", "chars_per_token", "seconds_to_tokens", "pixels_per_token",
              "batch_size", "model", "context")


def _run(arguments):
    from . import commands
    if arguments.command == "doctor":
        return commands.doctor()
    if arguments.command == "init":
        from .commands_init import init
        return init(arguments)
    if arguments.command == "pretrain":
        from .commands_pretrain import pretrain
        return pretrain(arguments)
    if arguments.command in ("train", "report", "generate", "eval", "inspect"):
        from . import commands_model
        name = "evaluate" if arguments.command == "eval" else arguments.command
        return getattr(commands_model, name)(arguments)
    if arguments.demo == (arguments.file is not None):
        raise CommandError("give either a FILE of lengths or --demo")
    for option in _OF_A_FILE if arguments.demo else ():
        if getattr(arguments, option, None) is not None:
            raise CommandError(f"--{option.replace('_', '-')} is for a FILE of lengths; "
                               "leave it out with --demo")
    if arguments.plot is not None:
        from ._files import check_png
        check_png(arguments.plot, "--plot")
        if find_spec("matplotlib") is None:
            raise CommandError("--plot needs matplotlib: pip install matplotlib")
    return getattr(commands, arguments.command)(arguments)


def main(argv=None):
    """Runs the ``orchvlm`` command.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit status: 0; 2 for a mistake in arguments or input, said in one line; 130 after Ctrl-C.

    Examples
    --------
    >>> from orchvlm.cli import main
    >>> main(["plan", "no_such_file.csv"])
    2
    """
    try:
        status = _run(make_parser().parse_args(argv))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("orchvlm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `orchvlm plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:  # --help and --version
        return end.code or 0
    except Exception as error:
        if not _is_callers(error):
            raise
        print(f"orchvlm: {_one_line(error)}", file=sys.stderr)
        return 2


def _is_callers(error):
    """Mistakes of the caller and of the machine get one line; bugs keep their traceback, a module
    of our own that is not there among them."""
    from ._core import Error
    if isinstance(error, ModuleNotFoundError):
        return False
    return isinstance(error, (CommandError, ValueError, TypeError, ImportError, OSError,
                              MemoryError, Error))


def _one_line(error):
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
