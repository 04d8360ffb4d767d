"""What commands show and where: terminals, pipes, JSON, help."""

from __future__ import annotations

import argparse
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import ROOT
from factory import make_checkpoint, make_llama

from mlx_skipless import cli

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
Ran = Callable[..., tuple[str, str]]


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Run a command that succeeds: its standard output, and its stderr."""
    monkeypatch.setattr(signal, "signal", lambda *ignored: None)

    def ran(*arguments: Any) -> tuple[str, str]:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 0
        out, err = capsys.readouterr()
        return out, err

    return ran


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_checkpoint(folder, norm="qkv", template=False, **SMALL)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder, **SMALL)
    return folder


# Help


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_are_commands(name: str) -> None:
    module = cli.COMMANDS[name]
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.EXAMPLES
    for line, what in module.EXAMPLES:
        parser.parse_args(shlex.split(line.partition(" < ")[0]))
        assert what


@pytest.mark.parametrize("name", ["convert", "generate"])
def test_help_of_a_script_shows_what_to_type(name: str) -> None:
    run = subprocess.run(
        [sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stderr == ""
    assert run.stdout.startswith(f"usage: python {name}.py ")
    shown = [line.strip() for line in run.stdout.splitlines()]
    for line, what in cli.COMMANDS[name].EXAMPLES:
        assert shown[shown.index(f"python {name}.py {line}".strip()) + 1] == what


# Scripts


def test_json_on_standard_output_is_alone_there(ran: Ran, source: Path, tmp_path: Path) -> None:
    out, err = ran("convert", "--model", source, "--mlx-path", tmp_path / "out", "--json", "-")
    report = json.loads(out)
    assert report["output"] == str(tmp_path / "out") and report["removed"]
    assert err == ""
    answer = ["generate", "--model", tmp_path / "out", "--prompt", "a", "--max-tokens", "9"]
    out, err = ran(*answer, "--json", "-")
    assert json.loads(out)["generation_tokens"] and err == ""
    plain = ran(*answer)
    assert plain[0] == json.loads(out)["text"] + "\n" and "answer 9 tokens" in plain[1]
    assert json.loads(ran("architectures", "--json", "-")[0])["models"]


def test_quiet_shows_results_and_warnings_alone(
    ran: Ran, source: Path, llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    options = ["--quiet", "--json", file]
    assert ran("convert", "--model", source, "--mlx-path", tmp_path / "out", *options) == ("", "")
    report = json.loads(file.read_text())
    assert report["params_after"] < report["params_before"]
    answer = ["generate", "--model", tmp_path / "out", "--prompt", "a", "--max-tokens", "9"]
    quiet, loud = ran(*answer, "--quiet"), ran(*answer)
    assert quiet == (loud[0], "") and loud[0].strip() and loud[1]
    warned = ["convert", "--model", llama, "--mlx-path", tmp_path / "w", "--skipless"]
    out, err = ran(*warned, "--quiet")
    assert out == "" and "WARNING: --skipless drops" in err


def test_a_report_is_on_standard_output_and_its_warnings_are_not(
    ran: Ran, llama: Path, tmp_path: Path
) -> None:
    arguments = ["convert", "--model", llama, "--mlx-path", tmp_path / "out", "--skipless"]
    out, err = ran(*arguments)
    assert "layers.1" in out and f"wrote {tmp_path / 'out'}" in out and "WARNING" not in out
    assert err.startswith("WARNING: --skipless drops the skip connections")


# Terminals


def in_a_terminal(*arguments: str, **environment: str) -> bytes:
    """What a failing command sends to a terminal that is its stderr."""
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "mlx_skipless.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment},
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert run.wait() == 1
    return shown


@pytest.mark.thorough
def test_errors_are_red_on_a_terminal_that_wants_it(tmp_path: Path) -> None:
    command = ("convert", "--model", "/nowhere", "--mlx-path", str(tmp_path / "o"))
    coloured = in_a_terminal(*command)
    assert b"\x1b[1;31merror:\x1b[0m no such file or folder: /nowhere" in coloured
    plain = in_a_terminal(*command, NO_COLOR="1")
    assert b"error:" in plain and b"\x1b[1;31m" not in plain


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "a\x07b", "a\u202eb", "[bold]a[/bold]:x:"])
def test_an_error_is_one_plain_line_whatever_it_names(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_path = str(tmp_path / "o")
    assert cli.main(["convert", "--model", f"/nowhere/{name}", "--mlx-path", out_path]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: no such file or folder: /nowhere/")
    assert err.endswith("\n") and err[:-1].isprintable()
    assert repr(name)[1:-1] in err


def test_a_run_that_ignores_hangups_goes_on_doing_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.COMMANDS["architectures"], "run", lambda options: None)
    before = signal.getsignal(signal.SIGTERM)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["architectures"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) != before
    finally:
        signal.signal(signal.SIGHUP, hangup)
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_a_command_in_front_of_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even in one that was opened by what a script left in its background: that ignores SIGINT."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.setattr(
        cli.COMMANDS["architectures"], "run", lambda options: signal.raise_signal(signal.SIGINT)
    )
    kept = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {which: signal.getsignal(which) for which in kept}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli.main(["architectures"]) == terminal
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    assert capsys.readouterr().err == ("error: interrupted\n" if terminal else "")


def test_an_interrupt_of_the_arguments_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(parser: argparse.ArgumentParser) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(signal, "signal", lambda *ignored: None)
    monkeypatch.setattr(cli.COMMANDS["analyze"], "add_arguments", interrupt)
    assert cli.main(["analyze", "model"]) == 1
    assert capsys.readouterr() == ("", "error: interrupted\n")
