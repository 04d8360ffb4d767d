"""No command writes over what it reads."""

import argparse
import os
from pathlib import Path

import pytest

from mlx_skipless import cli
from mlx_skipless.cli import overwriting
from mlx_skipless.cli.main import COMMANDS, HELP
from mlx_skipless.cli.parser import Parser

BEFORE = b"before"
REFUSED = [
    "convert --model m --json m/config.json",
    "convert --model m --json ~/m/README.md",
    "convert --model m --json link/config.json",
    "convert --model link --json m/config.json",
    "convert --model m --json linked.json",
    "convert --model cached --json blob",
    "convert --model cached --json cached/config.json",
    "convert --model m.gguf --json m.gguf",
    "convert --model m/config.json --dry-run --json m/config.json",
    "convert --model m --calibration t.txt --json t.txt",
    "generate --model m --prompt hi --json m/config.json",
    "generate --model n --prompt hi --compare m --json m/config.json",
    "generate --model n --prompt hi --draft-model m --json m/config.json",
    "generate --model n --prompt hi --adapter-path m --json m/config.json",
    "generate --model n --prompt hi --prompt-cache-file t.txt --json t.txt",
    "analyze m --json m/config.json",
    "analyze m --calibration linked.png --plot linked.png",
    "bench m n --markdown m/README.md",
    "bench n m --json m/config.json",
    "bench --synthetic m/config.json:1 --json m/config.json",
    "evaluate n m --tasks t.txt --json m/config.json",
    "evaluate n m --tasks t.txt --json t.txt",
    "perplexity --model n --data t.txt --json t.txt",
    "perplexity --model n --data n t.txt --json ./t.txt",
    "perplexity --model n --validation t.txt --json m/../t.txt",
    "train --data t.txt --json t.txt",
    "train --data n -c t.txt --json t.txt",
    "train --resume --mlx-path m --json m/config.json",
    "heal --model n --teacher m --json m/config.json",
    "convert --json tales/config.json",
    "generate --prompt hi --json tales/config.json",
    "convert --model owner/name --json hub/snapshot/config.json",
    "bench owner/name --json hub/blob",
    "heal --model n --teacher owner/name --json hub/blob",
]
ALLOWED = [
    "convert --model m --json m/new.json",
    "convert --model m --json other.json",
    "analyze m --plot m/old.png",
    "curves m --output m/old.png",
    "analyze m --json -",
    "analyze owner/name --json other.json",
    "generate --prompt t.txt --json t.txt",
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A model, links to it and into it, and a folder of links as the Hub's cache has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(overwriting, "BUNDLED", tmp_path / "tales")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder in ("m", "n", "cached", "tales", "hub/snapshot"):
        Path(folder).mkdir(parents=True)
    made = ["m/config.json", "m/README.md", "m/old.png", "m.gguf", "t.txt", "other.json", "blob"]
    made += ["tales/config.json", "hub/blob"]
    for name in made:
        Path(name).write_bytes(BEFORE)
    links = {"link": "m", "linked.json": "m/config.json", "cached/config.json": "../blob"}
    links["hub/snapshot/config.json"] = "../blob"
    for name, target in {**links, "linked.png": "t.txt"}.items():
        os.symlink(target, name)
    return [Path(name) for name in made]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that began their work, of which none is done here."""
    began: list[str] = []
    for name in ("convert", "generate", "analyze", "bench", "evaluate", "perplexity", "train",
                 "heal", "curves"):  # fmt: skip
        monkeypatch.setattr(f"mlx_skipless.cli.{name}.run", lambda options: began.append("yes"))
    return began


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_read_is_not_written_over(
    line: str, files: list[Path], run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == 1 and not run
    flag = next(flag for flag in ("--json", "--plot", "--markdown") if flag in line)
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag} {line.partition(flag)[2].split()[0]}: is ")
    assert said.count("\n") == 1 and " read" in said


@pytest.mark.parametrize("line", ALLOWED)
def test_other_files_are_written(line: str, files: list[Path], run: list[str]) -> None:
    assert cli.main(line.split()) == 0 and run


def test_a_source_keeps_its_config(files: list[Path]) -> None:
    assert cli.main(["convert", "--model", "m", "--json", "m/config.json"]) == 1
    assert all(file.read_bytes() == BEFORE for file in files)


@pytest.mark.parametrize("path", ["pipe", "loop", "/dev/null", "link"])
@pytest.mark.parametrize(
    "line", ["convert", "train --data t.txt", "heal --model m --teacher n", "train --resume"]
)
def test_no_folder_takes_the_place_of_what_is_none(
    line: str, path: str, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, and without opening it: a pipe would wait for its other end."""
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    assert cli.main([*line.split(), "--mlx-path", path]) == 1
    said = capsys.readouterr().err
    there = path == "link" and "--resume" in line
    assert said.startswith(f"error: {path} ") and said.count("\n") == 1
    reason = "has no" if there else "is no folder" if "--resume" in line else "exists already"
    assert reason in said


@pytest.mark.parametrize("path", ["pipe", "/dev/null"])
@pytest.mark.parametrize(
    "line",
    [
        "convert --model",
        "generate --prompt hi --model",
        "analyze",
        "perplexity --data t.txt --model",
        "bench",
        "heal --teacher n --model",
    ],
)
def test_no_model_is_read_from_a_pipe(
    line: str, path: str, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("pipe")
    assert cli.main([*line.split(), path]) == 1
    said = capsys.readouterr().err
    where = "" if path.startswith("/") or "heal" not in line else f"{Path.cwd()}/"
    assert said == f"error: {where}{path} is neither a file nor a folder: give a model\n"


@pytest.mark.parametrize("command", HELP)
def test_what_names_a_file_is_read_or_written(command: str) -> None:
    parser = Parser(prog="mlx-skipless")
    COMMANDS[command].add_arguments(parser)
    named = {"FILE", "DIR", "DIR_OR_REPO", "FOLDER", "TEXT", "SRC", "YAML", "OTHER", "SMALL"}
    found = {action.dest for action in parser._actions if {*action_names(action)} & named}
    others = {"mlx_path", "save", "system_prompt"}  # which may not be there, or is no file
    assert found <= {*overwriting.READ, *overwriting.WRITTEN, *others}


def action_names(action: argparse.Action) -> tuple[str, ...]:
    given = action.metavar or ()
    return (given,) if isinstance(given, str) else tuple(given)
