"""The command line: arguments in, exit code out. What a command does is in ``commands``."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .commands import (
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
from .errors import UserError, first_line

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
    parser = argparse.ArgumentParser(prog="mlx-skipless", description=SUMMARY)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.arguments(commands.add_parser(name, help=module.HELP, description=module.HELP))
    options = vars(parser.parse_args(argv))
    return _run(COMMANDS[options.pop("command")].run, options)


def command(name: str) -> int:
    """``python NAME.py``: one command with its own help; returns the exit code."""
    module = COMMANDS[name]
    parser = argparse.ArgumentParser(description=module.HELP)
    module.arguments(parser)
    return _run(module.run, vars(parser.parse_args()))


def _run(run: Any, options: dict[str, Any]) -> int:
    def terminate(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt  # unwinds, so that nothing is left behind

    signal.signal(signal.SIGTERM, terminate)
    if sys.stdin is None:  # closed: else the next file is descriptor 0, which MLX takes for none
        sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError, RuntimeError) as error:  # MLX is out of memory as a RuntimeError
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
