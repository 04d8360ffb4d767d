"""The command line: arguments in, exit code out. What a command does is in ``commands``."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.text import Text

from .. import __version__
from ..errors import UserError, first_line
from . import (
    analyze,
    architectures,
    bench,
    convert,
    curves,
    evaluate,
    generate,
    heal,
    train,
    verify,
)
from .shared import stderr

SUMMARY = "Makes language models smaller and faster by removing weights, inside mlx-lm."
COMMANDS = {
    "convert": convert,
    "generate": generate,
    "analyze": analyze,
    "train": train,
    "heal": heal,
    "evaluate": evaluate,
    "verify": verify,
    "bench": bench,
    "architectures": architectures,
    "curves": curves,
}


def main(argv: Sequence[str] | None = None) -> int:
    """``mlx-skipless COMMAND``; returns the exit code."""

    def run() -> None:
        parser = argparse.ArgumentParser(
            prog="mlx-skipless",
            description=SUMMARY,
            epilog="mlx-skipless COMMAND --help explains a command, with examples",
        )
        parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name, module in COMMANDS.items():
            _explain(commands.add_parser(name, help=module.HELP), module)
        options = vars(parser.parse_args(argv))
        COMMANDS[options.pop("command")].run(options)

    return _exit_code(run)


def command(name: str) -> int:
    """``python NAME.py``: one command with its own help; returns the exit code."""

    def run() -> None:
        parser = argparse.ArgumentParser(prog=f"python {name}.py")
        _explain(parser, COMMANDS[name])
        COMMANDS[name].run(vars(parser.parse_args()))

    return _exit_code(run)


def _explain(parser: argparse.ArgumentParser, module: Any) -> None:
    """Give a parser a command's arguments, and its help what they are for."""
    parser.description = f"{module.HELP[0].upper()}{module.HELP[1:]}."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    examples = (
        f"  {f'{parser.prog} {line}'.strip()}\n      {what}" for line, what in module.EXAMPLES
    )
    parser.epilog = "\n".join(["examples:", *examples])
    module.arguments(parser)


def _exit_code(run: Callable[[], None]) -> int:
    """Of what runs until it fails or is told to end; says why in a line."""

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
    """One line on stderr, red on a terminal."""
    stderr().print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
