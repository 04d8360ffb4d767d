"""Models from the Hub and back: the command, against a Hub on this machine.

Where a test needs nothing of a process of its own, the command runs in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.numpy
from factory import make_checkpoint
from hub_server import Drop, HubServer, Refusal

from mlx_skipless import UserError
from mlx_skipless.cli.main import main
from mlx_skipless.text import samples

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "VIRTUAL_ENV")
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
FETCHED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
INDEX = "model.safetensors.index.json"
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
def place(tmp_path: Path) -> Path:
    """Where the command runs."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def run(
    hub: HubServer,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """Run `convert --mlx-path out` in this process, with a cache of its own."""
    home = str(tmp_path / "home")
    constants = huggingface_hub.constants
    monkeypatch.chdir(place)
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HOME": home,
        "HF_HUB_CACHE": f"{home}/hub",
        "HUGGINGFACE_HUB_CACHE": f"{home}/hub",
        "HF_TOKEN_PATH": f"{home}/token",
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)

    def run(*arguments: str, HF_HUB_OFFLINE: str = "") -> Result:
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", bool(HF_HUB_OFFLINE))
            code = main(["convert", *arguments, "--mlx-path", "out"])
        return Result(code, *capfd.readouterr(), sorted(os.listdir(place)))

    return run


@pytest.fixture
def run_process(hub: HubServer, place: Path, tmp_path: Path) -> Run:
    """The same as a user runs it; keyword arguments are environment."""
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
    hub: HubServer, run: Run, run_process: Run, tmp_path: Path
):
    first = run_process("--model", "tales/tiny")
    assert (first.code, first.stderr, first.beside) == (0, "", ["out"])
    assert hub.sent() == FETCHED
    out = tmp_path / "place" / "out"
    assert json.loads((out / "config.json").read_text())["removed"]["p"] == [0, 1]
    assert "base_model: tales/tiny\n" in (out / "README.md").read_text()

    hub.stop()
    for again_by, environment in ((run, {}), (run_process, {"HF_HUB_OFFLINE": "1"})):
        out.rename(tmp_path / f"earlier{len(environment)}")
        again = again_by("--model", "tales/tiny", **environment)
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


def test_an_unreachable_hub_is_one_line(
    hub: HubServer, run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.stop()
    error = the_error(run("--model", "tales/tiny"))
    monkeypatch.chdir(model)  # another model is none in the cache
    assert run("--model", "tales/tiny").stderr == f"{error}\n"
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


def test_a_repository_that_holds_no_model(hub: HubServer, run: Run, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/words.csv").write_text("a,b")
    hub.repos["some/data"] = {"main": tmp_path / "data"}
    said = the_error(run("--model", "some/data"))
    assert said == "error: some/data holds nothing that a model has: give another Hub id"


def test_a_revision_that_means_nothing(run: Run, model: Path):
    said = the_error(run("--model", "tales/tiny", "--revision", ""))
    assert said == "error: --revision is empty: give a branch, a tag or a commit"
    said = the_error(run("--model", str(model), "--revision", "v1"))
    assert said == f"error: --revision v1: {model} is a path, and has none"


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


def share(folder: Path) -> None:
    """Spread a model over the files that an index names, tensor by tensor in turn."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["layers-0.safetensors", "layers[1].safetensors"]
    named = {tensor: names[i % 2] for i, tensor in enumerate(tensors)}
    for name in names:
        part = {n: array for n, array in tensors.items() if named[n] == name}
        safetensors.numpy.save_file(part, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": named}))


def test_the_files_that_an_index_names_are_fetched_and_no_others(
    hub: HubServer, run: Run, tmp_path: Path
):
    repo = tmp_path / "repo"
    make_checkpoint(repo, **SMALL)
    share(repo)
    for name in ("model.fp16.safetensors", "layers-2.safetensors", "onnx/config.json"):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_bytes(b"never read this")
    hub.repos["tales/shared"] = {"main": repo}
    result = run("--model", "tales/shared", "--no-verify")
    assert (result.code, result.stderr) == (0, "")
    shards = {"layers-0.safetensors", "layers[1].safetensors", INDEX}
    assert hub.sent() == (FETCHED - {"model.safetensors"}) | shards


def test_a_repository_of_adapters(hub: HubServer, run: Run, tmp_path: Path):
    (tmp_path / "repo").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "tales/tiny"}
    (tmp_path / "repo" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "repo" / "adapter_model.safetensors").write_bytes(b"weights")
    hub.repos["tales/adapters"] = {"main": tmp_path / "repo"}
    error = the_error(run("--model", "tales/adapters"))
    assert "LoRA adapters and no model: merge them into tales/tiny with PEFT's" in error
    assert hub.sent() == {"adapter_config.json"}


def test_an_index_that_a_repository_has_outgrown(hub: HubServer, run: Run, tmp_path: Path):
    repo = tmp_path / "repo"
    make_checkpoint(repo, **SMALL)
    (repo / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}}))
    hub.repos["tales/old"] = {"main": repo}
    result = run("--model", "tales/old", "--no-verify")
    assert (result.code, result.stderr) == (0, "")
    assert hub.sent() == FETCHED | {INDEX}


@pytest.mark.parametrize("lacks", ["", "tokenizer.json", "config.json", "model.safetensors"])
def test_a_cache_that_another_program_has_filled(
    hub: HubServer, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], lacks: str
):
    """With as much as is needed the Hub is, else it is told what is missing."""
    repo = tmp_path / "repo"
    make_checkpoint(repo, **SMALL)
    for name in ("original/tokenizer.model", "LICENSE.txt", "tokenizer.model"):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_bytes(b"not needed")
    hub.repos["tales/cached"] = {"main": repo}
    kept = sorted({*FETCHED} - {lacks, "tokenizer.model"})
    huggingface_hub.snapshot_download("tales/cached", allow_patterns=kept)
    huggingface_hub.close_session()  # it would go on with an open connection
    capfd.readouterr()
    hub.stop()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        if not lacks:
            assert run("--model", "tales/cached", "--no-verify", **environment).code == 0
            (tmp_path / "place" / "out").rename(tmp_path / f"out{len(environment)}")
        else:
            error = the_error(run("--model", "tales/cached", **environment))
            assert "tales/cached is only in part in the cache: connect" in error


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


ROWS = [{"text": f"Row {i} of a long and winding tale.\n" * 40} for i in range(120)]
TALKS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]}
    for i in range(3)
]
CARD = """---
configs:
- {config_name: plain, data_files: [{split: train, path: a.jsonl}, {split: test, path: b.jsonl}]}
- {config_name: talks, data_files: talks.jsonl}
---
"""
READ = """
import json, sys
from mlx_skipless import UserError
from mlx_skipless.text import samples as passages
passages.DATA_SET = int(sys.argv[1])
for source in sys.argv[2:]:
    try:
        print(json.dumps(passages.corpus.join_documents(passages.read_text(source))))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data_sets(hub: HubServer, tmp_path: Path) -> None:
    """The same rows in two formats, and a data set with subsets and splits."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("datasets")
    for name in ("rows", "parquet", "parts"):
        (tmp_path / name).mkdir()
        hub.repos[f"tales/{name}"] = {"main": tmp_path / name}
    (tmp_path / "rows" / "train.jsonl").write_text(lines(ROWS))
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    (tmp_path / "parts" / "README.md").write_text(CARD)
    for name, rows in (("a", ROWS[:2]), ("b", [{"text": " \n"}, *ROWS[2:4]]), ("talks", TALKS)):
        (tmp_path / "parts" / f"{name}.jsonl").write_text(lines(rows))


@pytest.fixture
def read(hub: HubServer, tmp_path: Path) -> Callable[..., list[Any]]:
    """Texts, or {"error"}, of sources; a data set is read up to so many characters."""

    def read(most: int, *sources: str) -> list[Any]:
        home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        done = subprocess.run(
            [sys.executable, "-c", READ, str(most), *sources],
            cwd=tmp_path,
            env={name: os.environ[name] for name in KEPT if name in os.environ}
            | {**home, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(line) for line in done.stdout.splitlines()]

    return read


@pytest.mark.thorough
@pytest.mark.usefixtures("data_sets")
def test_a_data_set_checks_as_its_rows_in_a_file_do(
    model: Path, run: Run, run_process: Run, tmp_path: Path
):
    (tmp_path / "place" / "rows.jsonl").write_text(lines(ROWS))
    checks = []
    for source, convert in (("tales/rows", run_process), ("rows.jsonl", run)):
        report = tmp_path / "report.json"
        made = convert("--model", str(model), "--calibration", source, "--json", str(report))
        assert (made.code, made.stderr) == (0, "")
        checks.append(json.loads(report.read_text())["verification"])
        (tmp_path / "place" / "out").rename(tmp_path / f"out of {len(checks)}")
    assert [check.pop("text") for check in checks] == ["tales/rows", "rows.jsonl"]
    assert checks[0]["source_perplexity"] == pytest.approx(checks[1]["source_perplexity"])


@pytest.mark.thorough
@pytest.mark.usefixtures("data_sets")
def test_formats_subsets_and_splits_of_a_data_set(read: Callable[..., list[Any]], tmp_path: Path):
    texts = [row["text"] for row in ROWS]
    talk = "<|im_start|>user\n{}?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    expected = {
        "tales/rows": texts[:9],  # no more than it takes
        "tales/parquet": texts[:9],
        "tales/parts:plain": texts[:2],
        "tales/parts:plain:test": texts[2:4],
        "tales/parts:talks": [talk.format(i) for i in range(3)],
        "tales/here": ["a file comes first"],
    }
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "here").write_text("a file comes first")
    found = read(sum(map(len, texts[:8])) + 1, *expected)
    assert found == ["\n\n".join(rows) for rows in expected.values()]


@pytest.mark.thorough
@pytest.mark.usefixtures("data_sets")
def test_what_is_wrong_with_a_data_set_is_told(
    hub: HubServer, read: Callable[..., list[Any]], tmp_path: Path
):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "train.jsonl").write_text(lines([{"title": "A tale", "body": "Once."}]))
    for name in ("odd", "down"):
        hub.repos[f"tales/{name}"] = {"main": tmp_path / "odd"}
    hub.refusals["tales/down"] = Refusal(500)
    wrong = {
        "tales/parts": "'plain', 'talks'",
        "tales/parts:plain:dev": "dev",
        "tales/odd": "no record (its keys: 'title', 'body'): each must",
        "tales/down": "the Hub refuses",
        "tales/missing.jsonl": "tales/missing.jsonl cannot be read",
    }
    for (source, said), found in zip(wrong.items(), read(1000, *wrong), strict=True):
        assert found["error"].startswith("--calibration ") and "\n" not in found["error"]
        assert source in found["error"] and said in found["error"]


@pytest.mark.parametrize(
    ("reached", "environment", "said"),
    [
        (True, {}, "no such file, and no such data set on the Hub: tales/none"),
        (False, {}, "connect, or give a file"),
        (True, {"HF_HUB_OFFLINE": "1"}, "connect, or give a file"),
    ],
    ids=["none", "unreachable", "offline"],
)
def test_no_data_set_is_one_line(
    hub: HubServer, model: Path, run: Run, reached: bool, environment: dict[str, str], said: str
):
    pytest.importorskip("datasets")
    if not reached:
        hub.stop()
    error = the_error(run("--model", str(model), "--calibration", "tales/none", **environment))
    assert "tales/none" in error and said in error


def test_a_data_set_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"no such file: a/b; .*pip install 'mlx-lm\[train\]'"):
        samples.read_text("a/b")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=["convert", "plan"])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["m.Q4_K_M.gguf"], "m.Q4_K_M.gguf: `hf download tales/gguf m.Q4_K_M.gguf` prints"),
        (
            ["b/m 2.GGUF", "a.gguf", "mmproj-m.gguf"],
            "a.gguf, b/m 2.GGUF: `hf download tales/gguf a",
        ),
        (["sub/m 2.gguf"], "sub/m 2.gguf: `hf download tales/gguf 'sub/m 2.gguf'` prints the path"),
        (
            ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
            "m-00001-of-00002.gguf, m-00002-of-00002.gguf: all are parts, which `llama-gguf-split",
        ),
        (
            ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "m.gguf"],
            "a-00001-of-00002.gguf, a-00002-of-00002.gguf, m.gguf: `hf download tales/gguf m.gguf`",
        ),
    ],
    ids=["one", "several", "elsewhere", "parts", "parts and one"],
)
def test_a_repository_of_gguf_files_says_which_file_to_fetch(
    hub: HubServer, run: Run, tmp_path: Path, names: list[str], said: str, flags: list[str]
):
    repo = tmp_path / "repo"
    for name in ["README.md", *names]:
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_bytes(b"GGUF")
    hub.repos["tales/gguf"] = {"main": repo}
    error = the_error(run("--model", "tales/gguf", *flags))
    assert f"tales/gguf holds GGUF files, {said}" in error
    assert not hub.sent() & {*names}  # files of many gigabytes, of which one is wanted
