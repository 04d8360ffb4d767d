"""What several commands have in common: what they show and write, groups of flags."""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from rich import progress as bars
from rich.console import Console

from ..checkpoints.output import check_output, replace_file
from ..constants import HELD_OUT_SHARE, MODES
from ..errors import BadArgument, UserError
from ..options import expand_path, flag_name
from ..progress import Progress

DEFAULT_MODEL = "mlx_model"
SPEED_SECONDS = 600  # of work that tell how long the rest takes; a step may take minutes


def check_files_differ(**files: str | None) -> None:
    """Check that no two flags, given by their options' names, name one file to write.

    Raises:
        UserError: if two do.
    """
    seen: dict[str, str] = {}
    for name, file in files.items():
        if file is None or file == "-":
            continue
        path, flag = os.path.realpath(expand_path(file)), flag_name(name)
        if path in seen:
            raise BadArgument(f"{seen[path]} and {flag} both name {file}: give two files")
        seen[path] = flag


@contextlib.contextmanager
def open_output_file(flag: str, name: str | None, out: str | None = None) -> Iterator[Any]:
    """A function that has another write a file; an impossible path is refused before the work.

    ``out`` is a folder that the work itself makes.
    """
    if name is None:
        yield lambda write: None
        return
    path = expand_path(name)
    made = None if out is None else Path(os.path.realpath(expand_path(out)))
    if made is not None and Path(os.path.realpath(path)).is_relative_to(made):
        raise BadArgument(f"{flag} {name}: --mlx-path {made} is made there, give another file")

    def attempt(do: Callable[[], Any], remedy: Callable[[], str]) -> None:
        try:
            do()
        except BrokenPipeError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{flag} {name}: cannot be written ({reason}){remedy()}") from error

    def put(write: Callable[[Path], Any]) -> None:
        done = f"; {made} is written"
        attempt(lambda: replace_file(path, write), lambda: done if made and made.is_dir() else "")

    attempt(lambda: check_output(path), lambda: ", give a file")
    yield put


def add_output_arguments(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument(
        "--json", metavar="FILE",
        help=f"write {what} there; - is standard output, with nothing else on it",
    )  # fmt: skip
    parser.add_argument(
        "--quiet", action="store_true",
        help="show nothing but warnings, errors and a model's answer",
    )  # fmt: skip


@dataclass(frozen=True)
class Output:
    """What a command shows and writes; bars, warnings and errors go to stderr.

    Attributes:
        console: for tables, on standard output; silent if the command is to be quiet.
        quiet: whether it is.
        to_stdout: whether standard output is for the JSON alone.
        write_json: writes what it is given, if that was asked for.
    """

    console: Console
    quiet: bool
    to_stdout: bool
    write_json: Callable[[Any], None]

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)

    def warn(self, line: str) -> None:
        make_stderr().print(f"WARNING: {line}", style="bold red", soft_wrap=True)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar a stage with the time that is left, if stderr is a terminal.

        What is printed meanwhile appears above the bars, unless standard output goes elsewhere.
        A stage that is told of again from an earlier count begins anew.
        """
        console = make_stderr()
        columns = (
            bars.TextColumn("{task.description:>10}"), bars.BarColumn(20),
            bars.MofNCompleteColumn(), bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(), bars.TextColumn("left"),
        )  # fmt: skip
        shown = console.is_terminal and not self.quiet
        with bars.Progress(
            *columns,
            console=console,
            disable=not shown,
            speed_estimate_period=SPEED_SECONDS,
            redirect_stdout=sys.stdout.isatty(),
        ) as display:
            tasks: dict[str, bars.TaskID] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = display.add_task(stage, total=total)
                task = next(task for task in display.tasks if task.id == tasks[stage])
                if done < task.completed:
                    display.reset(task.id, total=total, completed=done)
                display.update(task.id, total=total, completed=done)

            yield show


def make_stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def open_output(options: dict[str, Any], out: str | None = None) -> Iterator[Output]:
    """Takes what ``add_output_arguments`` added; ``out`` is a folder that the command makes."""
    name, quiet = options.pop("json"), options.pop("quiet")
    to_stdout = name == "-"
    quiet = quiet or to_stdout
    console = Console(highlight=False, markup=False, emoji=False, quiet=quiet)

    def text(content: Any) -> str:
        return json.dumps(_replace_infinities(content), indent=2) + "\n"

    if to_stdout:
        yield Output(console, quiet, True, lambda content: print(text(content), end=""))
        return
    with open_output_file("--json", name, out) as put:
        yield Output(
            console,
            quiet,
            False,
            lambda content: put(lambda file: file.write_text(text(content), encoding="utf-8")),
        )


def _replace_infinities(content: Any) -> Any:
    """What JSON can hold: null for an infinity or what is no number."""
    if isinstance(content, dict):
        return {key: _replace_infinities(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replace_infinities(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def add_quantization_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("-q", "--quantize", action="store_true", help=what)
    parser.add_argument("--q-bits", type=int, help="bits per weight (default: the mode's own)")
    parser.add_argument("--q-group-size", type=int, help="weights that share a scale")
    parser.add_argument(
        "--q-mode", default="affine", choices=[*MODES],
        help="quantization mode (default: %(default)s)",
    )  # fmt: skip


def add_held_out_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", nargs="+", metavar="FILE",
        help='text: .jsonl with "text", "prompt" and "completion" or "messages", else plain',
    )  # fmt: skip
    parser.add_argument(
        "--validation", nargs="+", default=[], metavar="FILE",
        help="held-out text (default: the end of each file of --data)",
    )  # fmt: skip
    parser.add_argument(
        "--validation-share", type=float, default=argparse.SUPPRESS,
        help=f"share of each file's lines that is held out (default: {HELD_OUT_SHARE})",
    )  # fmt: skip


def add_run_arguments(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    """Of a command whose work is a run that can be resumed, in a folder that holds ``what``."""
    parser.add_argument(
        "--mlx-path", default=default, metavar="OUT",
        help=f"folder of {what}; must not exist (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with the run in OUT, bit for bit; only --steps may change",
    )  # fmt: skip
    add_output_arguments(parser, "the outcome")


def refuse_changes(changed: Iterable[str], rest: str) -> None:
    """Refuse flags beside ``--resume`` that would change the run; ``rest`` says what may be given.

    Raises:
        BadArgument: if there are any, given by their fields' names.
    """
    flags = ", ".join(map(flag_name, changed))
    if flags:
        raise BadArgument(f"{flags}: --resume goes on with the run's own {rest}")


def add_fields(parser: argparse.ArgumentParser, *groups: tuple[str, type]) -> dict[str, Any]:
    """Add the flags of dataclasses' fields, under a title each or where a field names its group.

    Returns:
        argparse's groups by title.
    """
    made: dict[str, Any] = {}
    for title, kind in groups:
        for field in fields(kind):
            name = field.metadata["group"] or title
            if name not in made:
                made[name] = parser.add_argument_group(name)
            _add_flag(made[name], field)
    return made


def _add_flag(group: Any, field: Field[Any]) -> None:
    """A flag for a field of a dataclass; absent from the options where it is not given."""
    facts, kinds = field.metadata, get_args(field.type) or (field.type,)
    const, default = facts["const"], field.default
    how: dict[str, Any] = {}
    if bool in kinds and const is None:
        how = {"action": argparse.BooleanOptionalAction}
    elif bool in kinds:
        how, default = {"action": "store_const", "const": const}, None
    else:
        how = _describe_value(field, kinds)
        how |= {} if const is None else {"nargs": "?", "const": const}
    told = "" if default in (None, "") else f" (default: {default})"
    group.add_argument(
        *(facts["flags"] or [flag_name(field.name)]), dest=field.name, default=argparse.SUPPRESS,
        help=f"{facts['help']}{told}".replace("%", "%%"), **how,
    )  # fmt: skip


def _describe_value(field: Field[Any], kinds: tuple[Any, ...]) -> dict[str, Any]:
    """How argparse reads the value of a field's flag."""
    facts = field.metadata
    if choices := [choice for choice in facts["choices"] if choice]:
        return {"choices": choices}
    if facts["parse"] is not None or str in kinds:
        return {"type": _make_reader(facts["parse"] or str), "metavar": facts["metavar"]}
    if type(None) in kinds:
        return {"type": _read_number_or_none, "metavar": "NUMBER"}
    return {"type": kinds[0], "metavar": facts["metavar"] or "N"}


def _make_reader(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of argparse's that says what ``parse`` says of a wrong value."""
    if parse in (int, float):
        return parse  # the parser has words for these

    def read(text: str) -> Any:
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _read_number_or_none(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from None


def take_fields(options: dict[str, Any], kind: type) -> dict[str, Any]:
    """Those options that are fields of a dataclass, which go from the others."""
    return {one.name: options.pop(one.name) for one in fields(kind) if one.name in options}
