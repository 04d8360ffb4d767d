"""Standard streams: any encoding, closed, full, or a pipe whose reader has left."""

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from factory import make_checkpoint

from mlx_skipless import UserError, cli
from mlx_skipless.checkpoints.files import read_json
from mlx_skipless.checkpoints.output import write_json
from mlx_skipless.cli import streams

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8", "utf-16", "shift_jis", "idna", "undefined"]
thorough = pytest.mark.thorough


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose config and every word that it says no Latin alphabet has."""
    place = tmp_path_factory.mktemp("streams")
    make_checkpoint(place / "m", norm="qkv", template=False, **SMALL)
    tokenizer = read_json(place / "m/tokenizer.json")
    replace = {"type": "Replace", "pattern": {"Regex": "."}, "content": "語é"}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [replace]}
    write_json(place / "m/tokenizer.json", tokenizer)
    (place / "run/training").mkdir(parents=True)
    (place / "run/training/log.jsonl").write_text('{"step": 1, "tokens": 64, "loss": 2.5}\n')
    (place / "t.txt").write_text("hello, this is a text\n" * 60)
    return place


COMMANDS = (
    "convert --model m --dry-run --remove none",
    "generate --model m --prompt hi --max-tokens 4",
    "analyze m",
    "perplexity --model m --data t.txt --context 16",
    pytest.param("architectures", marks=thorough),  # seconds of arithmetic
    "curves run --output loss.svg",
    "convert --help",
    "--help",
)


class Full(io.RawIOBase):
    """A device like /dev/full, or with EPIPE a pipe that nobody reads; it says what it got."""

    def __init__(self, error: int | None = None):
        self.error, self.got = error, b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        self.got += bytes(data)
        return len(data)


def run(line: str, encoding: str = "utf-8", error: int | None = None) -> tuple[int, str, str]:
    """The exit code of a command, and what it says, with a standard output of its own."""
    device = Full(error)
    out = io.TextIOWrapper(io.BufferedWriter(device), encoding=encoding)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", said)
        patch.setattr("signal.signal", lambda *ignored: None)
        try:
            code = cli.main(line.split())
        except SystemExit as end:  # of --help
            code = int(end.code or 0)
    device.error = None
    out.flush()
    return code, device.got.decode(out.encoding, errors="ignore"), said.getvalue()


@pytest.mark.parametrize("line", COMMANDS)
@pytest.mark.parametrize(
    "encoding", [pytest.param(e, marks=[thorough] * (e != "ascii")) for e in ENCODINGS]
)
def test_what_an_encoding_lacks_is_replaced(
    encoding: str, line: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    code, shown, said = run(line, encoding)
    assert code == 0 and shown.strip() and "error" not in said, said
    if line.startswith("generate"):
        expected = {"utf-8": "語é", "utf-16": "語é", "latin-1": "?é", "shift_jis": "語?"}
        assert expected.get(encoding, "?" * 2) in shown or encoding == "cp1252"
    if line.startswith("convert --model"):
        assert ("layers.0?1 ? 2" in shown) == (encoding in ("ascii", "idna", "undefined"))


@pytest.mark.parametrize(
    ("line", "made"),
    [
        *((line, None) for line in COMMANDS if isinstance(line, str) and "curves" not in line),
        pytest.param("architectures --json -", None, marks=thorough),
        ("analyze m --json -", None),
        ("convert --model m --no-verify --json - --mlx-path out1", "out1"),
        ("convert --model m --no-verify --mlx-path out2", "out2"),
        ("curves run --output full.svg", "full.svg"),
    ],
)
def test_a_full_device_is_one_true_line(
    line: str, made: str | None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    code, _, said = run(line, error=errno.ENOSPC)
    (lost,) = (one for one in said.splitlines() if "standard output cannot be written" in one)
    fails = made is None or "--json" in line  # then what is printed is what was asked for
    assert code == fails and lost.startswith("error: " if fails else "WARNING: ")
    assert "(No space left on device)" in lost
    assert made is None or (lost.endswith(f"; {made} is written") and Path(made).exists())


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_a_result_that_is_written_is_no_failure(
    error: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    code, _, said = run(f"convert --model m --mlx-path {out} --no-verify", error=error)
    assert code == 0 and (out / "config.json").is_file()
    reason = (
        f"WARNING: standard output cannot be written ({os.strerror(error)}); {out} is written\n"
    )
    assert said == ("" if error == errno.EPIPE else reason)
    code, _, said = run(f"convert --model m --mlx-path {out} --no-verify", error=error)
    assert code == 1 and said.startswith(f"error: {out} exists already")


def test_a_report_that_cannot_be_written_says_what_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no such device here")
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    line = f"convert --model m --mlx-path {out} --no-verify --quiet --json /dev/full"
    code, shown, said = run(line)
    lost = "--json /dev/full: cannot be written (No space left on device)"
    assert (code, shown, said) == (1, "", f"error: {lost}; {out} is written\n")
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("line", ["generate --model m --prompt hi --max-tokens 500", "--help"])
def test_a_reader_that_leaves_ends_what_only_prints(
    line: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    code, _, said = run(line, error=errno.EPIPE)
    assert code == 1 and said == ""


CLOSED = """
import os, sys
sys.path.insert(0, sys.argv[1])
closed = [int(number) for number in sys.argv[2]]
sys.argv[1:3] = []
from mlx_skipless.cli import main
assert [sys.stdin, sys.stdout, sys.stderr].count(None) == len(closed)
code = main(sys.argv[1:])
for number in closed:
    assert os.fstat(number).st_rdev == os.stat(os.devnull).st_rdev
os._exit(code)
"""


@pytest.mark.parametrize(
    "closed", ["12", *(pytest.param(c, marks=thorough) for c in ("0", "1", "2", "01", "02", "012"))]
)
def test_closed_streams_are_no_files(closed: str, place: Path, tmp_path: Path) -> None:
    """The next files to be opened must not have their numbers: what is printed goes there."""
    closing = " ".join(f"{number}>&-" for number in closed)
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", CLOSED, str(ROOT), closed]
    arguments += ["convert", "--model", str(place / "m"), "--mlx-path", str(out)]
    shell = ["sh", "-c", f'exec "$@" {closing}', "sh", *arguments]
    done = subprocess.run(shell, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "config.json").read_text())["removed"]
    assert "Error" not in done.stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("generate --model m --prompt hi --max-tokens 2", 1),
        ("analyze m --config-only --json -", 1),
        ("analyze m --config-only", 1),
        ("--help", 1),
        ("analyze m --config-only --quiet --json {}/x.json", 0),  # nothing is lost
        ("convert --model m --no-verify --mlx-path {}/out", 0),
        ("convert --model m --no-verify --quiet --mlx-path {}/out", 0),
    ],
)
def test_a_result_told_to_a_closed_output_is_lost(
    line: str, code: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(streams, "_open_closed", lambda: {1})
    found, _, said = run(line.format(tmp_path))
    lost = "standard output cannot be written (it is closed)"
    told = {0: f"WARNING: {lost}; {tmp_path}/out is written\n", 1: f"error: {lost}\n"}[code]
    assert found == code
    assert said.endswith(told if "--quiet" not in line or code else "") and (
        (lost in said) == ("--quiet" not in line)
    )


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def make(data: bytes, encoding: str) -> None:
        text = io.TextIOWrapper(io.BytesIO(data), encoding=encoding, errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", text)

    return make  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("data", "encoding", "text"),
    [
        ("語é".encode(), "utf-8", "語é"),
        ("\ufeff語\ufeff".encode(), "utf-8", "語\ufeff"),  # a mark of the encoding, and a character
        ("語é".encode(), "ascii", "語é"),  # a C locale says nothing of what comes
        ("é".encode("latin-1"), "latin-1", "é"),
        (b"\xff", "utf-8", None),
        (b"\xff", "ascii", None),
    ],
)
def test_standard_input_is_text_or_one_line(
    data: bytes, encoding: str, text: str | None, stdin: Any
) -> None:
    stdin(data, encoding)
    with streams.hold_streams():
        if text is not None:
            assert streams.read_input() == text
            return
        with pytest.raises(UserError, match="is no utf-8 text"):
            streams.read_input()
