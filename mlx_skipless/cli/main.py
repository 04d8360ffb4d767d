"""The command line: arguments in, exit code out. A command is the module of its name.

``--help`` and ``--version`` must be quick, so a command's module is imported when it is asked for,
and what computes is imported when the command runs.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from .. import __version__
from ..checkpoints.output import ignore_signals
from ..errors import BadArgument, UserError, first_line
from .overwriting import check_overwriting
from .parser import Parser, suggest
from .shared import make_stderr
from .streams import Stream, hold_streams

Options = dict[str, Any]
TRACEBACK = "MLX_SKIPLESS_TRACEBACK"  # if set, a fault of the code ends with its traceback

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

    def parse() -> Options:
        parser = Parser(
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
        if not arguments:
            parser.print_help()
            parser.exit()
        _check_command(arguments[0])
        return vars(parser.parse_args(arguments))

    return _exit_code(parse)


def command(name: str) -> int:
    """``python NAME.py``: one command with its own help; returns the exit code."""

    def parse() -> Options:
        parser = Parser(prog=f"python {name}.py")
        _explain(parser, name)
        return {"command": name, **vars(parser.parse_args(sys.argv[1:]))}

    return _exit_code(parse)


def _check_command(name: str) -> None:
    """Refuse a first argument that is neither a command nor one of the flags before them."""
    if name in HELP or any(flag.startswith(name) for flag in ("-h", "--help", "--version")):
        return
    if name.startswith("-"):
        raise BadArgument(f"{name}: the command comes first; mlx-skipless --help lists them")
    meant = suggest(name, [*HELP])
    hint = f"did you mean {meant}?" if meant else f"choose one of {', '.join(HELP)}"
    raise BadArgument(f"no command {name!r}: {hint}")


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


def _exit_code(parse: Callable[[], Options]) -> int:
    """Run a command until its end, a failure or a signal; return the exit code.

    What failed is said in a line.
    """

    def terminate(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt  # unwinds, so that nothing is left behind

    _hear_ctrl_c()
    for end in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(end) != signal.SIG_IGN:  # nohup's run outlives its terminal
            signal.signal(end, terminate)
    with hold_streams() as out:
        try:
            return _run(parse, out)
        except UserError as error:
            _complain(error)
            if isinstance(error, BadArgument):
                return 2  # as argparse does
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt), ignore_signals():
                _complain(UserError("interrupted"))
        except BrokenPipeError:
            pass  # whoever read the output has seen enough
        except SystemExit as end:  # after --help and --version
            out.stops = False
            if end.code or not (lost := _describe_loss(out)):
                raise
            if not isinstance(out.failure, BrokenPipeError):
                _complain(UserError(lost))
        except BaseException as error:  # PanicException, of tokenizers, is no Exception
            if _is_fault(error) and os.environ.get(TRACEBACK):
                raise
            _complain(UserError(_describe(error)))
    return 1


def _hear_ctrl_c() -> None:
    """Let Ctrl-C end a command in front of a terminal, whatever it was started from.

    What a script starts in its background ignores SIGINT, and a terminal that was opened there
    passes that on to all that runs in it.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and sys.stdin and sys.stdin.isatty():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(parse: Callable[[], Options], out: Stream) -> int:
    """Run the command that the arguments name; return the exit code."""
    options = parse()
    try:
        os.getcwd()
    except FileNotFoundError as error:  # libraries ask for it as they are imported
        raise UserError("the current folder is gone: go to one that exists") from error
    check_overwriting(options)
    made = None if options.get("dry_run") else options.get("mlx_path") or options.get("output")
    # What is printed may be all that was asked for.
    needed = made is None or options.get("json") in ("-", "/dev/stdout")
    out.stops = needed
    COMMANDS[options.pop("command")].run(options)
    if lost := _describe_loss(out):
        done = f"; {made} is written" if made is not None else ""
        if needed:
            raise UserError(f"{lost}{done}")
        if not isinstance(out.failure, BrokenPipeError):
            _print_line("WARNING:", f"{lost}{done}")
    return 0


def _describe_loss(out: Stream) -> str:
    """Say why standard output did not take all; nothing if it did."""
    out.flush()
    if out.failure is None:
        return ""
    return f"standard output cannot be written ({out.failure.strerror or out.failure})"


def _is_fault(error: BaseException) -> bool:
    """Whether an exception shows a fault of the code rather than of the machine.

    MLX is out of memory as a RuntimeError.
    """
    machine = isinstance(error, OSError | MemoryError | RuntimeError)
    return not machine or isinstance(error, RecursionError | NotImplementedError)


def _describe(error: BaseException) -> str:
    """What an exception says that nothing else has put into words."""
    if not _is_fault(error):
        return first_line(error)
    return (
        f"{type(error).__name__}: {first_line(error)}; this is a fault of mlx-skipless: "
        f"{TRACEBACK}=1 shows where it is, please report that"
    )


def _complain(error: UserError) -> None:
    """Print one line on stderr, red on a terminal."""
    _print_line("error:", str(error))


def _print_line(kind: str, line: str) -> None:
    make_stderr().print(Text.assemble((kind, "bold red"), f" {line}"), soft_wrap=True)
