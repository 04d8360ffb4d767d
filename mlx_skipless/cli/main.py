"""The command line: arguments in, exit code out. A command is the module of its name.

``--help`` and ``--version`` must be quick, so a command's module is imported when it is asked for,
and what computes is imported when the command runs.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from .. import __version__
from ..errors import UserError, first_line
from .shared import make_stderr

SUMMARY = "Makes language models smaller and faster by removing weights, inside mlx-lm."
HELP = {
    "convert": "remove weights from a model",
    "generate": "chat with a model, measure tokens per second",
    "analyze": "measure what a model could do without",
    "train": "train a model, skipless unless told otherwise",
    "heal": "distil a reduced model towards its original",
    "perplexity": "score a model on held-out text",
    "evaluate": "score two models on lm-eval's tasks",
    "bench": "measure models side by side, against plain mlx-lm",
    "architectures": "show what can go from the architectures that are known, by published shapes",
    "curves": "draw the losses of training runs in one figure",
}


class Commands(Mapping[str, Any]):
    """The commands' modules by name; each has ``EXAMPLES``, ``add_arguments`` and ``run``."""

    def __getitem__(self, name: str) -> Any:
        if name not in HELP:
            raise KeyError(name)
        return importlib.import_module(f".{name}", __package__)

    def __iter__(self) -> Iterator[str]:
        return iter(HELP)

    def __len__(self) -> int:
        return len(HELP)


COMMANDS = Commands()


def main(argv: Sequence[str] | None = None) -> int:
    """``mlx-skipless COMMAND``; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)

    def run() -> None:
        parser = argparse.ArgumentParser(
            prog="mlx-skipless",
            description=SUMMARY,
            epilog="mlx-skipless COMMAND --help explains a command, with examples",
        )
        parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name, text in HELP.items():
            subparser = commands.add_parser(name, help=text)
            if name in arguments:
                _explain(subparser, name)
        options = vars(parser.parse_args(arguments))
        COMMANDS[options.pop("command")].run(options)

    return _exit_code(run)


def command(name: str) -> int:
    """``python NAME.py``: one command with its own help; returns the exit code."""

    def run() -> None:
        parser = argparse.ArgumentParser(prog=f"python {name}.py")
        _explain(parser, name)
        COMMANDS[name].run(vars(parser.parse_args()))

    return _exit_code(run)


def _explain(parser: argparse.ArgumentParser, name: str) -> None:
    """Give a parser a command's arguments, and its help what they are for."""
    module = COMMANDS[name]
    parser.description = f"{HELP[name][0].upper()}{HELP[name][1:]}."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    examples = (
        f"  {f'{parser.prog} {line}'.strip()}\n      {what}" for line, what in module.EXAMPLES
    )
    parser.epilog = "\n".join(["examples:", *examples])
    module.add_arguments(parser)


def _exit_code(run: Callable[[], None]) -> int:
    """Run until the end, a failure or a signal; return the exit code, and say in a line why."""

    def terminate(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt  # unwinds, so that nothing is left behind

    for end in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(end) != signal.SIG_IGN:  # nohup's run outlives its terminal
            signal.signal(end, terminate)
    if sys.stdin is None:  # closed: else the next file is descriptor 0, which MLX takes for none
        sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        run()
    except UserError as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        _complain(UserError("interrupted"))
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError, RuntimeError) as error:  # MLX is out of memory as a RuntimeError
        _complain(UserError(first_line(error)))
        return 1
    return 0


def _complain(error: UserError) -> None:
    """Print one line on stderr, red on a terminal."""
    make_stderr().print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
