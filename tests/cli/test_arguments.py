"""Arguments: what may have been meant by wrong ones, and one line for whatever goes wrong."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_skipless import UserError, cli
from mlx_skipless.cli.parser import Parser

TRACEBACK = "MLX_SKIPLESS_TRACEBACK"
thorough = pytest.mark.thorough


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *ignored: None)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line about arguments that are wrong."""
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def list_flags(name: str) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    cli.COMMANDS[name].add_arguments(parser)
    return [flag for action in parser._actions for flag in action.option_strings if len(flag) > 4]


def misspell(name: str) -> Iterator[str]:
    """A letter too few, two in each other's place, one too many."""
    middle = len(name) // 2
    yield name[:middle] + name[middle + 1 :]
    yield name[:-2] + name[-1] + name[-2]
    yield name[:middle] + "x" + name[middle:]


@pytest.mark.parametrize(
    "arguments",
    [
        "convert --target-bytes big",
        "convert --target-kl -1",
        "convert --target-bytes 1MB --target-kl 0.1",
        "convert -q --q-group-size 7",
        "convert --q-bits 4",
        "convert --seed -1",
        "convert --greedy",
        "convert --allow nothing --target-kl 1",
        "convert --heal -1",
        "convert --upload-repo a",
        "train --layers 0 --data nowhere",
        "train --kv-heads 0 --data nowhere",
        "train --norms x --data nowhere",
        "train --decay 2 --data nowhere",
        "train --validation-share 1 --data README.md",
        "train",
        "heal --steps 0",
        "heal --learning-rate 0",
        "generate --max-tokens 0 --prompt a",
        "generate --temp -1 --prompt a",
        "generate --top-p 2 --prompt a",
        "generate --kv-bits 7 --prompt a",
        "generate --compare A",
        "generate --prompt a --prompt-cache-file A --kv-bits 8",
        "generate --prompt a --prompt-cache-file A --max-kv-size 64",
        "generate --prompt a --max-kv-size 3",
        "generate --num-draft-tokens 2 --prompt a",
        "generate --model nowhere --draft-model A --num-draft-tokens 0 --prompt a",
        "generate --model nowhere --draft-model A --max-kv-size 64 --prompt a",
        "generate --model nowhere --draft-model A --repetition-penalty 2 --prompt a",
        "bench",
        "bench --synthetic nothing",
        "bench --repeats 0 A",
        "perplexity --context 0 --data README.md",
        "perplexity",
        "evaluate --tasks a --limit 0 A B",
        "curves A --output a.txt",
        "analyze A --plot a.txt",
    ],
)
def test_values_that_no_file_makes_right(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong arguments are told from what fails, whoever looks at them first."""
    command, *flags = arguments.split()
    error = refused(capsys, command, *flags)
    named = {flag for flag in flags if flag.startswith("--")}
    assert any(flag in error for flag in named or {"give", "--data"}), error


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_mistyped_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in misspell(name):
        if wrong != name:
            assert f"no command '{wrong}': did you mean {name}?" in refused(capsys, wrong, "--json")


@pytest.mark.parametrize("name", [n if n == "perplexity" else pytest.param(n, marks=thorough)
                                  for n in cli.COMMANDS])  # fmt: skip
def test_a_mistyped_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = list_flags(name)
    assert flags
    for flag in flags:
        for wrong in {*misspell(flag), flag[1:]}:
            if wrong == flag or any(known.startswith(wrong) for known in flags):
                continue
            for given in ([wrong, "x"], [f"{wrong}=x"], ["a", wrong]):
                said = refused(capsys, name, *given)
                meant = said.partition("did you mean ")[2].partition("?")[0]
                assert f"no flag {wrong}: " in said and meant in [*flags, "--help"]
                if len(flag) > 7:
                    assert meant == flag or meant[2:] in wrong, (wrong, meant)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nonsense", "no command 'nonsense': choose one of convert, generate, analyze"),
        ("--model x", "--model: the command comes first"),
        ("convert --zzzzz", "no flag --zzzzz (mlx-skipless convert --help explains)"),
        ("convert --q-bits x", "argument --q-bits: 'x' is no whole number"),
        ("convert --q-bits 4.5", "argument --q-bits: '4.5' is no whole number"),
        ("convert --target-kl x", "argument --target-kl: 'x' is no number"),
        ("convert --target-bytes x", "argument --target-bytes: 'x' is no size"),
        ("convert --drop-ffn x", "argument --drop-ffn: 'x' is neither a whole number nor auto"),
        ("convert --max-loss x", "argument --max-loss: 'x' is no share"),
        ("train --query-skip x", "argument --query-skip: 'x' is neither a number nor none"),
        ("generate --temp x", "argument --temp: 'x' is no number"),
        ("generate --prompt \udcff", "argument --prompt: '\\udcff' is no UTF-8 text"),
        ("analyze", "the following arguments are required: SRC"),
        ("bench --repeats", "argument --repeats: expected one argument"),
        ("convert \x1b[2J", "unrecognized arguments: \\x1b[2J"),
    ],
)
def test_what_is_said(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *shlex.split(arguments))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_no_type_is_called_by_the_name_of_its_function(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(add_help=False)
    cli.COMMANDS[name].add_arguments(parser)
    for action in parser._actions:
        if action.option_strings and action.nargs != 0 and not action.choices:
            for value in ("", "x", "1e999", "-", "nan%", "٣٤x"):
                try:
                    parser.parse_args([f"{action.option_strings[-1]}={value}"])
                except UserError as error:
                    assert "invalid " not in str(error) and "lambda" not in str(error)


@pytest.mark.parametrize("values", [["-0.5"], ["-1"], ["- a list"], ["--rem", "none"], ["-h"]])
def test_what_begins_with_a_dash_and_is_no_mistake(values: list[str]) -> None:
    parser = Parser()
    parser.add_argument("--remove")
    parser.add_argument("words", nargs="*")
    if values == ["-h"]:
        with pytest.raises(SystemExit) as end:
            parser.parse_args(values)
        assert not end.value.code
    else:
        found = parser.parse_args(values)
        assert [found.remove, *found.words] in ([None, *values], ["none"])


def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    out, err = capsys.readouterr()
    assert not end.value.code and err == ""
    assert out.startswith("usage: mlx-skipless ") and all(name in out for name in cli.COMMANDS)


class Panic(BaseException):
    """As tokenizers raise one."""


FAULTS = (
    KeyError("x"), TypeError("a\x1b[2Jb\nmore"), ValueError(), AssertionError("a"), IndexError(1),
    ZeroDivisionError("z"), RecursionError("too deep"), NotImplementedError("n"), Panic("in Rust"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ImportError("no"), StopIteration(),
    OverflowError("much"),
)  # fmt: skip
MACHINES = (OSError(5, "Input/output error"), MemoryError("m"), RuntimeError("[malloc] no"))


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def run(options: dict[str, Any]) -> None:
        raise error

    monkeypatch.setattr(cli.COMMANDS["curves"], "run", run)
    return cli.main(["curves", "x"])


@pytest.mark.parametrize("error", [*FAULTS, *MACHINES], ids=lambda error: type(error).__name__)
def test_whatever_goes_wrong_is_one_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TRACEBACK)
    assert fail(monkeypatch, error) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert err[:-1].isprintable()
    told = f"{type(error).__name__}: " in err and TRACEBACK in err
    assert told == (error in FAULTS)


def test_a_current_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["curves", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: the current folder is gone: go to one that exists\n"


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_shows_where_it_is_if_asked(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in all other tests."""
    with pytest.raises(type(error)):
        fail(monkeypatch, error)


def test_an_interrupt_of_the_imports_is_one_line() -> None:
    """Of the installed command, which imports this package before it calls anything of it."""
    code = (
        "import sys, rich.text\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'mlx_skipless.cli.shared': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from mlx_skipless.cli import main"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: interrupted\n")
