"""Models from the Hub and back: the command as a user runs it, against a Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from factory import make_checkpoint
from hub_server import Drop, HubServer, Refusal

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "VIRTUAL_ENV")
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
FETCHED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
DECOYS = (
    "pytorch_model.bin",
    "consolidated.safetensors",
    "modeling_evil.py",
    "tokenizer.pkl",
    "model.pt",
    "README.md",
    ".gitattributes",
    "onnx/model.onnx",
)


@dataclass
class Result:
    code: int
    stdout: str
    stderr: str
    beside: list[str]  # what lies where OUT would be


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and beside the model what a repository may hold as well."""
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, **SMALL)
    for name in DECOYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never read this")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer({"tales/tiny": {"main": model}}) as hub:
        yield hub


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Run:
    """Run `convert --mlx-path out` with a cache of its own; keyword arguments are environment."""
    place = tmp_path / "place"
    place.mkdir()
    home = tmp_path / "home"

    def run(*arguments: str, **environment: str) -> Result:
        base = {name: os.environ[name] for name in KEPT if name in os.environ}
        base |= {"HOME": str(home), "HF_HOME": str(home), "HF_ENDPOINT": hub.url}
        base |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-m", "mlx_skipless.cli", "convert", *arguments, "--mlx-path", "out"],
            cwd=place,
            env=base | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        beside = sorted(os.listdir(place))
        return Result(done.returncode, done.stdout, done.stderr, beside)

    return run


def the_error(result: Result) -> str:
    """The one line of a refusal that left nothing behind."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert (result.code, result.stdout, result.beside) == (1, "", [])
    return lines[0]


def test_a_hub_model_is_fetched_once_and_no_more_of_it_than_needed(
    hub: HubServer, run: Run, tmp_path: Path
):
    first = run("--model", "tales/tiny")
    assert (first.code, first.stderr, first.beside) == (0, "", ["out"])
    assert hub.sent() == FETCHED
    out = tmp_path / "place" / "out"
    assert json.loads((out / "config.json").read_text())["removed"]["p"] == [0, 1]
    assert "base_model: tales/tiny\n" in (out / "README.md").read_text()

    hub.stop()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        out.rename(tmp_path / f"earlier{len(environment)}")
        again = run("--model", "tales/tiny", **environment)
        assert (again.code, again.stderr, again.beside) == (0, "", ["out"])


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        pytest.param(None, "no such model on the Hub", id="no such repository"),
        pytest.param(
            Refusal(401, "RepoNotFound", "Invalid username or password."),
            "a private one needs `hf auth login`",
            id="private",
        ),
        pytest.param(
            Refusal(403, "GatedRepo", "Access to model is restricted."),
            "accept its terms on huggingface.co/tales/other",
            id="gated",
        ),
        pytest.param(
            Refusal(401, "GatedRepo", "Access to model is restricted.", only_files=True),
            "accept its terms on huggingface.co/tales/other",
            id="gated files",
        ),
        pytest.param(
            Refusal(401, None, "Invalid credentials in Authorization header"),
            "HF_TOKEN",
            id="token refused",
        ),
        pytest.param(
            Refusal(403, None, "enable access in your token's settings"),
            "refuses tales/other (403 Forbidden: enable access in your token's settings",
            id="token too narrow",
        ),
        pytest.param(Refusal(500), "try again", id="server error"),
    ],
)
def test_a_refusal_is_one_line(hub: HubServer, run: Run, refusal: Refusal | None, said: str):
    if refusal is not None:
        hub.repos["tales/other"] = hub.repos["tales/tiny"]
        hub.refusals["tales/other"] = refusal
    error = the_error(run("--model", "tales/other"))
    assert "tales/other" in error and said in error


def test_an_unreachable_hub_is_one_line(hub: HubServer, run: Run):
    hub.stop()
    error = the_error(run("--model", "tales/tiny"))
    assert "tales/tiny" in error and "not in the cache" in error and "connect" in error


def test_a_revision_is_followed_or_refused(hub: HubServer, run: Run, tmp_path: Path):
    shallow = tmp_path / "shallow"
    make_checkpoint(shallow, **SMALL | {"num_hidden_layers": 1})
    hub.repos["tales/tiny"]["v0"] = shallow
    error = the_error(run("--model", "tales/tiny", "--revision", "v9"))
    assert "tales/tiny" in error and "'v9'" in error and "--revision" in error
    assert run("--model", "tales/tiny", "--revision", "v0").code == 0
    config = json.loads((tmp_path / "place" / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1


def test_a_connection_closed_in_mid_file_is_resumed(hub: HubServer, run: Run, tmp_path: Path):
    # The client writes in pieces of 10 MB, so only a larger file shows that it goes on from there.
    large = tmp_path / "large"
    make_checkpoint(large, **SMALL | {"num_hidden_layers": 1, "vocab_size": 100_000})
    hub.repos["tales/large"] = {"main": large}
    hub.drops["model.safetensors"] = Drop()
    result = run("--model", "tales/large", "--no-verify")
    assert (result.code, result.beside) == (0, ["out"]), result.stderr
    assert hub.ranges == ["bytes=10485760-"]
    (fetched,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    assert fetched.read_bytes() == (large / "model.safetensors").read_bytes()


def test_a_connection_reset_in_mid_file_is_one_line_and_the_next_run_goes_on(
    hub: HubServer, run: Run
):
    hub.drops["model.safetensors"] = Drop(reset=True)
    error = the_error(run("--model", "tales/tiny"))
    assert "tales/tiny could not be downloaded" in error and "try again" in error
    hub.log.clear()
    assert run("--model", "tales/tiny").code == 0
    assert hub.sent() == {"model.safetensors"}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_dry_run_fetches_no_weights(hub: HubServer, run: Run, tmp_path: Path, shards: int):
    make_checkpoint(tmp_path / "sharded", shards=shards, **SMALL)
    hub.repos["tales/sharded"] = {"main": tmp_path / "sharded"}
    result = run("--model", "tales/sharded", "--dry-run", "--json", str(tmp_path / "plan.json"))
    assert (result.code, result.stderr, result.beside) == (0, "", [])
    assert "config.json" in hub.sent()
    assert not any("safetensors" in path for _, path in hub.log if not path.endswith(".json"))
    assert json.loads((tmp_path / "plan.json").read_text())["removed"]["q"] == [0, 1]


def test_an_upload_is_the_folder_as_it_was_written(
    hub: HubServer, run: Run, model: Path, tmp_path: Path
):
    result = run("--model", str(model), "--upload-repo", "me/tiny-skipless")
    assert (result.code, result.stderr) == (0, "")
    out = tmp_path / "place" / "out"
    uploaded = hub.uploads["me/tiny-skipless"]
    assert {"README.md", "model.py", "config.json", "model.safetensors"} <= uploaded.keys()
    assert uploaded == {file.name: file.read_bytes() for file in out.iterdir()}
    assert b"Made by mlx-skipless" in uploaded["README.md"]


@pytest.mark.parametrize("reached", [True, False])
def test_a_failed_upload_keeps_the_folder(
    hub: HubServer, run: Run, model: Path, tmp_path: Path, reached: bool
):
    hub.refusals["me/tiny-skipless"] = Refusal(403, None, "You don't have the rights")
    if not reached:
        hub.stop()
    result = run("--model", str(model), "--no-verify", "--upload-repo", "me/tiny-skipless")
    assert (result.code, result.beside, hub.uploads) == (1, ["out"], {})
    (error,) = result.stderr.splitlines()
    assert error.startswith("error: out is written") and "hf upload me/tiny-skipless out" in error
    assert ("You don't have the rights" in error) == reached
    assert (tmp_path / "place" / "out" / "README.md").is_file()
