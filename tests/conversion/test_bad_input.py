"""What convert refuses (DESIGN §7): one line that names the thing, and nothing touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from factory import make_checkpoint, make_llama
from grids import only, product, thorough
from zoo import make_model

from mlx_skipless import UserError, convert, load
from mlx_skipless.checkpoints import files
from mlx_skipless.cli.main import main
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.source import SourceReader

# Warnings go to stderr as well, beside the error; pytest would hide them.
pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.filterwarnings("error::UserWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EVERYTHING = SMALL | {
    "norm": "qkv",
    "gains": True,
    "linear_paths": True,
    "skips": ("query", "head", "output"),
    "bias": ("q_proj", "k_proj", "o_proj", "down_proj"),
}
Refused = Callable[..., str]
Change = Callable[[Path], object]


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """All that lies in a folder: a file's bytes, a link's target, None for a folder."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`main` handles SIGTERM and SIGHUP; pytest gets its own handling back."""
    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """A test that waits for a file that never ends fails, rather than wait."""

    def late(*arguments: Any) -> None:
        raise TimeoutError("still waiting for a file")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder made by the factory, once for each set of arguments; not to be changed."""
    folders: dict[str, Path] = {}

    def make(maker: Callable[..., Any] = make_checkpoint, **options: Any) -> Path:
        key = f"{maker.__name__} {options}"
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("made")
            maker(folders[key], **(SMALL | options))
        return folders[key]

    return make


@pytest.fixture
def place(tmp_path: Path, made: Callable[..., Path]) -> Path:
    """A folder with a good source, `model`, in it."""
    shutil.copytree(made(), tmp_path / "model")
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run convert from `model` to `out`; check that it changes nothing.

    Returns its one error line, with `@` for the folder, whose name holds the test's.
    """

    def refused(*arguments: Any, model: Any = None, out: Any = None) -> str:
        where = ["--model", str(model or tmp_path / "model")]
        where += ["--mlx-path", str(out or tmp_path / "out")]
        before = contents(tmp_path)
        capsys.readouterr()
        assert main(["convert", *where, *map(str, arguments)]) in (1, 2)
        printed, error = capsys.readouterr()
        assert printed == ""
        assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
        assert contents(tmp_path) == before
        return error.replace(str(tmp_path), "@")

    return refused


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; the value `...` drops one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    file = folder / "model.safetensors"
    loaded: Any = mx.load(str(file))
    tensors: dict[str, mx.array] = dict(loaded)
    mx.eval(tensors)
    change(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors)


def spoil(folder: Path, name: str, value: float) -> None:
    """Put one such value into a tensor."""

    def change(tensors: dict[str, mx.array]) -> None:
        array = np.array(tensors[name])
        array.reshape(-1)[-1] = value
        tensors[name] = mx.array(array)

    edit_tensors(folder, change)


# Where the model should be


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nowhere", None, "no such file or folder"),
        ("nowhere.gguf", None, "no such file or folder"),
        ("no/where/at/all", None, "no such file or folder"),
        ("n" * 300, None, "no such file or folder"),
        ("notes.txt", b"once upon a time", "no model"),
        ("empty.gguf", b"", "no GGUF file"),
        ("noise.gguf", bytes(range(256)) * 8, "no GGUF file"),
        ("cut.gguf", b"GGUF" + struct.pack("<IQQ", 3, 9, 9), "no GGUF file"),
        ("noise.json", b"once upon a time", "cannot be read as JSON"),
        ("config.json", b'{"model_type": "llama"}', "num_hidden_layers"),
    ],
)
def test_a_path_that_is_no_model(
    refused: Refused, tmp_path: Path, name: str, content: bytes | None, said: str
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = refused(model=tmp_path / name)
    assert said in error
    assert f"@/{name}" in error or said == "num_hidden_layers"


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "./nowhere", "../nowhere"])
def test_a_home_of_nobody(refused: Refused, name: str):
    """And what looks like a Hub id, but for its dots."""
    assert f"no such file or folder: {name}" in refused(model=name)


def test_a_config_or_a_weight_file_instead_of_the_folder(refused: Refused, place: Path):
    assert "without weights" in refused(model=place / "model" / "config.json")
    assert "is no model" in refused(model=place / "model" / "model.safetensors")


# Files of the folder


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, left: float) -> Change:
    """Keep this part of a file."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * left)])

    return change


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def rename(name: str, new: str) -> Change:
    return lambda folder: (folder / name).rename(folder / new)


def point_outside(name: str) -> Change:
    """An index that names this file, which exists, and would be read."""

    def change(folder: Path) -> None:
        elsewhere = folder.parent / "elsewhere.safetensors"
        (folder / "model.safetensors").rename(elsewhere)
        target = str(elsewhere) if name == "absolute" else name
        index = {"weight_map": {"model.embed_tokens.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(empty, "config.json", id="empty folder"),
        pytest.param(remove("config.json"), "config.json", id="no config"),
        pytest.param(overwrite("config.json", b""), "config.json", id="empty config"),
        pytest.param(overwrite("config.json", b"{model_type"), "as JSON", id="no JSON"),
        pytest.param(overwrite("config.json", b"\xff\xfe\x00"), "as JSON", id="no UTF-8"),
        pytest.param(overwrite("config.json", b"[" * 9**6), "as JSON", id="JSON too deep"),
        pytest.param(overwrite("config.json", b'["llama"]'), "no JSON object", id="no object"),
        pytest.param(overwrite("config.json", b"null"), "no JSON object", id="null"),
        pytest.param(remove("model.safetensors"), "no model*.safetensors", id="no weights"),
        pytest.param(
            rename("model.safetensors", "pytorch_model.bin"), "never read", id="pickles only"
        ),
        pytest.param(cut("model.safetensors", 0), "truncated", id="empty weights"),
        pytest.param(cut("model.safetensors", 0.001), "truncated", id="half a header"),
        pytest.param(cut("model.safetensors", 0.9), "truncated", id="truncated weights"),
        pytest.param(
            overwrite("model.safetensors", b"once upon a time"), "corrupt", id="no safetensors"
        ),
        pytest.param(
            overwrite("model.safetensors", header(b"{}" * 40)), "corrupt", id="corrupt header"
        ),
        pytest.param(
            overwrite(
                "model.safetensors",
                header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"1234"),
            ),
            "corrupt",
            id="a shape that is not the data's",
        ),
        pytest.param(
            overwrite(
                "model.safetensors",
                header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [90, 94]}}', b"1234"),
            ),
            "corrupt",
            id="an offset outside the file",
        ),
        pytest.param(overwrite("model.safetensors", header(b"{}")), "no tensor", id="no tensors"),
        pytest.param(point_outside("../elsewhere.safetensors"), "refused", id="index leads out"),
        pytest.param(point_outside("absolute"), "refused", id="index with an absolute path"),
        pytest.param(point_outside("sub/../../elsewhere.safetensors"), "refused", id="winding"),
        pytest.param(overwrite(INDEX, b"{"), INDEX, id="index is no JSON"),
        pytest.param(overwrite(INDEX, b"[]"), INDEX, id="index is no object"),
        pytest.param(overwrite(INDEX, b"{}"), "weight_map", id="index without a map"),
        pytest.param(overwrite(INDEX, b'{"weight_map": [1]}'), "weight_map", id="map is a list"),
        pytest.param(overwrite(INDEX, b'{"weight_map": {"a": 1}}'), "weight_map", id="map to 1"),
        pytest.param(
            overwrite(
                INDEX, b'{"weight_map": {"a": "model-2.safetensors", "b": "model.safetensors"}}'
            ),
            "lacks model-2.safetensors",
            id="missing shard",
        ),
        pytest.param(overwrite("tokenizer.json", b"{"), "tokenizer", id="corrupt tokenizer"),
        pytest.param(
            overwrite("tokenizer_config.json", b"{"), "tokenizer", id="corrupt tokenizer config"
        ),
    ],
)
def test_broken_files(refused: Refused, place: Path, change: Change, said: str):
    change(place / "model")
    error = refused()
    assert said in error and "@/model" in error


def entry(kind: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


ABSURD = 1 << 40


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        pytest.param({"a": entry(), "b": entry(offsets=(0, 4))}, 4, id="overlap"),
        pytest.param({"a": entry(), "b": entry(offsets=(2, 6))}, 6, id="partial overlap"),
        pytest.param({"a": entry(), "b": entry(offsets=(8, 12))}, 12, id="hole"),
        pytest.param({"a": entry()}, 8, id="more data than tensors"),
        pytest.param({"a": entry()}, 0, id="no data"),
        pytest.param({"a": entry(offsets=(4, 0))}, 4, id="backwards"),
        pytest.param({"a": entry(offsets=(-4, 0))}, 4, id="before the data"),
        pytest.param({"a": entry(offsets=(0, 1 << 64))}, 4, id="offset beyond 64 bits"),
        pytest.param({"a": entry(offsets=(0.0, 4.0))}, 4, id="fractions"),
        pytest.param({"a": entry(offsets=(0,))}, 4, id="no end"),
        pytest.param({"a": entry("F16")}, 4, id="shorter type"),
        pytest.param({"a": entry("F33")}, 4, id="unknown type"),
        pytest.param({"a": entry(32)}, 4, id="type a number"),
        pytest.param({"a": entry(shape=(-1,))}, 4, id="negative shape"),
        pytest.param({"a": entry(shape=(ABSURD, ABSURD))}, 4, id="huge shape"),
        pytest.param({"a": entry(shape=((1 << 62) + 1, 4))}, 4, id="shape that wraps around"),
        pytest.param({"a": entry(shape=(0, ABSURD), offsets=(0, 0))}, 0, id="huge and empty"),
        pytest.param({"a": entry(shape="1")}, 4, id="shape a string"),
        pytest.param({"a": [1]}, 4, id="no entry"),
        pytest.param({"__metadata__": {"a": 1}}, 0, id="metadata of numbers"),
        pytest.param({"a": entry(), "__metadata__": [1]}, 4, id="metadata a list"),
    ],
)
def test_headers_that_cannot_be(refused: Refused, place: Path, tensors: Any, size: int):
    content = header(json.dumps(tensors).encode(), bytes(size))
    (place / "model" / "model.safetensors").write_bytes(content)
    assert "@/model/model.safetensors" in refused()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: b"\xef\xbb\xbf" + text, id="byte order mark"),
        pytest.param(lambda text: text + b"\0" * 8, id="ends in zeros"),
        pytest.param(lambda text: text.replace(b"F32", b"F\xff2", 1), id="no UTF-8"),
        pytest.param(lambda text: text.replace(b'"F32"', b"NaN", 1), id="no JSON"),
        pytest.param(lambda text: text[:-1] + b"," + text[1:], id="all names twice"),
        pytest.param(lambda text: b"[" * 100_000, id="too deep"),
        pytest.param(lambda text: b"", id="empty"),
    ],
)
def test_headers_of_other_text(refused: Refused, place: Path, change: Callable[[bytes], bytes]):
    file = place / "model" / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    file.write_bytes(header(change(content[8 : 8 + size]), content[8 + size :]))
    assert "@/model/model.safetensors is truncated or corrupt" in refused()


def test_a_header_that_names_a_tensor_twice(refused: Refused, place: Path):
    """The library takes one of them, and another reader may take the other."""
    one = json.dumps({"a": entry()})
    (place / "model" / "model.safetensors").write_bytes(
        header(f"{one[:-1]}, {one[1:]}".encode(), bytes(4))
    )
    assert "names something twice" in refused()


@pytest.mark.parametrize("length", [1 << 40, (1 << 63) + 5, (1 << 64) - 1])
def test_a_header_longer_than_its_file(refused: Refused, place: Path, length: int):
    file = place / "model" / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    assert "@/model/model.safetensors is truncated or corrupt" in refused()


def split(folder: Path) -> tuple[Path, Path]:
    """Put the layers' tensors into a shard of their own, the index as it should be."""
    loaded: Any = mx.load(str(folder / "model.safetensors"))
    mx.eval(loaded)
    (folder / "model.safetensors").unlink()
    parts = [{n: a for n, a in loaded.items() if (".layers." in n) == of} for of in (False, True)]
    names = [f"model-{i}.safetensors" for i in (1, 2)]
    index = {name: file for part, file in zip(parts, names, strict=True) for name in part}
    for part, file in zip(parts, names, strict=True):
        mx.save_safetensors(str(folder / file), part)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder / names[0], folder / names[1]


def test_a_tensor_in_two_shards(refused: Refused, place: Path):
    _, second = split(place / "model")
    loaded: Any = mx.load(str(second))
    mx.save_safetensors(str(second), loaded | {"model.norm.weight": mx.ones(32)})
    error = refused()
    assert "model.norm.weight is in @/model/model-2.safetensors and in model-1" in error


def test_a_tensor_that_the_index_names_and_no_shard_has(refused: Refused, place: Path):
    first, _ = split(place / "model")
    loaded: Any = mx.load(str(first))
    mx.eval(loaded)
    loaded.pop("model.norm.weight")
    mx.save_safetensors(str(first), loaded)
    assert "has no tensor model.norm.weight" in refused()


def test_an_index_that_is_wrong_on_where_and_silent_on_some(made: Callable[..., Path], place: Path):
    """It says which files there are: what is in them is as in one file."""
    _, second = split(place / "model")
    index = json.loads((place / "model" / INDEX).read_text())["weight_map"]
    index = {name: second.name if "norm" in name else file for name, file in index.items()}
    index.pop("model.layers.0.mlp.up_proj.weight")
    (place / "model" / INDEX).write_text(json.dumps({"weight_map": index}))
    for source, out in ((place / "model", "a"), (made(), "b")):
        convert(source, place / out, verify=False)
    a, b = (place / out / "model.safetensors" for out in "ab")
    assert a.read_bytes() == b.read_bytes()


NOT_REGULAR: dict[str, Change] = {
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", NOT_REGULAR)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        INDEX,
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    ],
)
def test_what_is_no_regular_file(refused: Refused, place: Path, name: str, kind: str):
    (place / "model" / name).unlink(missing_ok=True)
    NOT_REGULAR[kind](place / "model" / name)
    assert f"@/model/{name}" in refused()


@pytest.mark.parametrize("kind", NOT_REGULAR)
@pytest.mark.parametrize("name", ["model.gguf", "config.json", "model"])
def test_no_regular_file_in_the_place_of_a_model(
    refused: Refused, tmp_path: Path, name: str, kind: str
):
    NOT_REGULAR[kind](tmp_path / name)
    assert f"@/{name}" in refused(model=tmp_path / name)


def test_a_shard_that_is_none(refused: Refused, place: Path):
    overwrite(INDEX, b'{"weight_map": {"a": "model-2.safetensors"}}')(place / "model")
    os.mkfifo(place / "model" / "model-2.safetensors")
    assert "@/model/model-2.safetensors is no regular file" in refused()


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        ("CONFIG_BYTES", "config.json"),
        ("CONFIG_BYTES", INDEX),
        ("TOKENIZER_BYTES", "tokenizer.json"),
        ("TOKENIZER_BYTES", "tokenizer.model"),
        ("TOKENIZER_BYTES", "generation_config.json"),
    ],
)
def test_an_absurd_size(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch, limit: str, name: str
):
    with (place / "model" / name).open("ab") as file:
        file.write(b" " * 100_000)
    monkeypatch.setattr(files, limit, 99_999)
    assert f"@/model/{name} has 0 MB" in refused()


@pytest.mark.parametrize("content", ["", '{"eos_token_id": 1,}', "[1]", "null"])
def test_generation_settings_that_cannot_be_read(refused: Refused, place: Path, content: str):
    """mlx-lm passes over such a file; the result's other readers would not."""
    (place / "model" / "generation_config.json").write_text(content)
    error = refused()
    assert "@/model/generation_config.json " in error and "tokenizer" not in error


@pytest.mark.parametrize("levels", [65, 900])
def test_a_config_of_absurd_depth(refused: Refused, place: Path, levels: int):
    edit_config(place / "model", **json.loads('{"deep":' * levels + "1" + "}" * levels))
    assert "config.json has more than 64 levels" in refused()


def test_a_number_of_absurd_length(refused: Refused, place: Path):
    text = (place / "model" / "config.json").read_text()
    (place / "model" / "config.json").write_text(text.replace("10000.0", "9" * 5000))
    assert "cannot be read as JSON" in refused()
    (place / "model" / "config.json").write_text(text.replace("10000.0", "9" * 4000))
    assert 0 < len(refused()) < 3000


@pytest.mark.parametrize("name", ["a\nb", "\x1b]0;mine\x07", "\u202e", "\ud800"])
def test_what_an_error_quotes_stays_in_its_line(refused: Refused, place: Path, name: str):
    """Whoever made the file may have meant the terminal."""
    edit_config(place / "model", model_type=name)
    assert refused().count("\n") == 1
    edit_config(place / "model", model_type="skipless", hidden_act="silu")
    if name != "\ud800":
        edit_tensors(place / "model", put(name, lambda array: mx.zeros(3)))
        error = refused()
        assert name not in error and ascii(name)[1:-1] in error
        with pytest.raises(UserError) as caught:
            convert(place / "model", place / "out")
        assert ascii(name)[1:-1] in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_a_name_that_is_no_unicode(refused: Refused, place: Path):
    odd = Path(os.fsdecode(os.fsencode(place) + b"/\xff"))
    assert "@/\\udcff has a name that is not UTF-8" in refused(out=odd)
    (place / "model").rename(odd)
    assert "@/\\udcff has a name that is not UTF-8" in refused(model=odd)


# Links

SECRET = b'{"password": "tell nobody"}'
TAKEN = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "additional_chat_templates/more.jinja",
    "spiece.model",
)


def link_out(folder: Path, name: str) -> None:
    """A file of a model's folder becomes a link to one that is its reader's own."""
    (folder.parent / "secret").write_bytes(SECRET)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(Path("..") / "secret" if "/" not in name else folder / "../secret")


@pytest.mark.parametrize("flags", ["", "--skipless --remove p"])
@pytest.mark.parametrize("name", TAKEN)
def test_a_link_out_of_the_folder_that_would_be_copied(
    refused: Refused, made: Callable[..., Path], tmp_path: Path, name: str, flags: str
):
    shutil.copytree(made(make_llama), tmp_path / "model")
    link_out(tmp_path / "model", name)
    error = refused(*flags.split())
    assert f"@/model/{name} leads out of its folder, to @/secret" in error


def test_a_linked_folder_of_templates(refused: Refused, place: Path):
    (place / "own").mkdir()
    (place / "own" / "diary.jinja").write_bytes(SECRET)
    (place / "model" / "additional_chat_templates").symlink_to(place / "own")
    assert "leads out of its folder, to @/own/diary.jinja" in refused()


@pytest.mark.parametrize("flags", ["", "--skipless --remove p"])
@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "special_tokens_map_file"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_tokenizer_that_names_a_file_elsewhere(
    refused: Refused,
    made: Callable[..., Path],
    tmp_path: Path,
    key: str,
    flags: str,
    relative: bool,
):
    """transformers read it once."""
    shutil.copytree(made(make_llama), tmp_path / "model")
    (tmp_path / "secret").write_bytes(SECRET)
    file = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    secret = "../secret" if relative else str(tmp_path / "secret")
    file.write_text(json.dumps(config | {key: secret}))
    error = refused(*flags.split())
    assert f'"{key}" in @/model/tokenizer_config.json leads out of its folder, to @/secret' in error
    gone = {key: "/home/of-its-author/vocab.json", "tokenizer_file": None}
    file.write_text(json.dumps(config | gone))
    convert(tmp_path / "model", tmp_path / "out", verify=False)


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"model_max_length": "x"}'])
def test_a_malformed_tokenizer_config_is_named(
    refused: Refused, made: Callable[..., Path], tmp_path: Path, content: str
):
    shutil.copytree(made(make_llama), tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(content)
    said = "tokenizer_config.json (cannot be read as JSON|holds no JSON object|is no number)"
    assert re.search(said, refused())
    with pytest.raises(UserError, match=said):
        load(str(tmp_path / "model"))


def test_code_that_is_taken_where_it_is_trusted(
    refused: Refused, made: Callable[..., Path], tmp_path: Path
):
    shutil.copytree(made(make_llama), tmp_path / "model")
    link_out(tmp_path / "model", "tokenization.py")
    assert "tokenization.py leads out" in refused("--trust-remote-code")
    convert(tmp_path / "model", tmp_path / "out", verify=False)
    assert not (tmp_path / "out" / "tokenization.py").exists()


def test_a_layout_like_the_cache_of_the_hub_is_no_way_out(
    refused: Refused, made: Callable[..., Path], tmp_path: Path
):
    cached = in_the_cache(made(), tmp_path)
    (tmp_path / "secret").write_bytes(SECRET)
    blob = cached / os.readlink(cached / "tokenizer_config.json")
    blob.unlink()
    blob.symlink_to(tmp_path / "secret")
    assert "leads out of its folder, to @/secret" in refused(model=cached)
    blobs = blob.parent
    blob.unlink()
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / blob.name).write_bytes(SECRET)
    assert "leads out of its folder" in refused(model=cached)


def in_the_cache(folder: Path, cache: Path) -> Path:
    """The same folder as huggingface_hub keeps it."""
    snapshot, blobs = (cache / "models--a--b" / part for part in ("snapshots/0123", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.copyfile(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    return snapshot


@pytest.mark.parametrize("flags", ["", "--skipless --remove p"])
@pytest.mark.parametrize("kind", ["cache", "linked folder", "weights elsewhere", "within"])
def test_links_that_are_fine(made: Callable[..., Path], tmp_path: Path, flags: str, kind: str):
    source = made(make_llama)
    model = tmp_path / "model"
    if kind == "cache":
        model.symlink_to(in_the_cache(source, tmp_path))
    elif kind == "linked folder":
        model.symlink_to(source)
    else:
        shutil.copytree(source, model)
        names = ["model.safetensors", "config.json"]
        elsewhere = tmp_path
        if kind == "within":
            names += ["tokenizer.json", "tokenizer_config.json"]
            elsewhere = model / "real"
            elsewhere.mkdir()
        for name in names:
            (model / name).rename(elsewhere / name)
            (model / name).symlink_to(elsewhere / name)
    arguments = ["--model", str(model), "--mlx-path", str(tmp_path / "out"), *flags.split()]
    assert main(["convert", *arguments]) == 0
    written = [*(tmp_path / "out").iterdir()]
    assert not any(file.is_symlink() for file in written)
    assert "tokenizer.json" in {file.name for file in written}


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--skipless --remove qp",
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_tokenizer_that_transformers_cannot_read(
    refused: Refused, made: Callable[..., Path], tmp_path: Path, name: str, flags: str
):
    shutil.copytree(made(make_llama), tmp_path / "model")
    if name == "config.json":
        edit_config(tmp_path / "model", bos_token_id="<s>")
    else:
        overwrite(name, b"{")(tmp_path / "model")
    said = name if name == "config.json" else "tokenizer"
    assert said in refused(*flags.split())


# The config

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")


@pytest.mark.parametrize("value", [-1, 0, "32", 2.5, True, [32], {}, 10**12, float("nan")])
@pytest.mark.parametrize("key", [*SIZES, *OPTIONAL_SIZES])
def test_absurd_sizes(refused: Refused, place: Path, key: str, value: Any):
    edit_config(place / "model", **{key: value})
    assert f'"{key}" in config.json is ' in refused()


@pytest.mark.parametrize("key", SIZES)
def test_missing_sizes(refused: Refused, place: Path, key: str):
    edit_config(place / "model", **{key: ...})
    assert f'"{key}" in config.json is ' in refused()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bloom"}, "'bloom'"),
        ({"model_type": ...}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "head_dim"),
        ({"head_dim": 7}, "head_dim 7 is odd, and RoPE needs pairs: make it even"),
        ({"head_dim": 16}, "q_proj.weight"),
        ({"num_attention_heads": 8, "head_dim": None}, "k_proj.weight"),
        ({"hidden_size": 64}, "shape"),
        ({"vocab_size": 300}, "embed_tokens"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"num_hidden_layers": 2048}, "no tensor model.layers."),
        ({"hidden_act": "tanh"}, '"hidden_act"'),
        ({"hidden_act": ["silu"]}, '"hidden_act"'),
        ({"hidden_act": False}, '"hidden_act"'),
        ({"block": "diagonal"}, '"block"'),
        ({"skip": "most"}, '"skip"'),
        ({"norm": "layer"}, '"norm"'),
        ({"norm": {"type": "pre"}}, '"norm"'),
        ({"norm": ""}, '"norm"'),
        ({"norm": "pre"}, "input_layernorm"),
        ({"norms": "q"}, '"norms"'),
        ({"norms": False}, '"norms"'),
        ({"norm": "qkv", "norms": ["q", "value"]}, '"norms"'),
        ({"norm": "qkv", "norms": ["o"]}, "a list of q, k, v, kv, heads, hidden"),
        ({"norm": "qkv", "gains": ["heads"]}, '"gains"'),
        ({"norm": "qkv", "norms": {"q": True}}, '"norms"'),
        ({"norm": "qkv", "norms": [["q"], 1]}, '"norms"'),
        ({"norms": ["q"]}, '"norms"'),
        ({"norm": "qkv", "norms": ["k"], "gains": ["q"]}, '"gains"'),
        (
            {"norm": "qkv", "norms": ["kv"], "head_dim": 12},
            "4 queries of 12 are not as wide as a stream",
        ),
        ({"norm": "qkv", "norms": ["kv"], "fused": {"qkv_proj": [0]}}, "qkv_proj, whose matrices"),
        ({"final_norm": False}, "model.norm.weight"),
        ({"final_norm": "false"}, '"final_norm"'),
        ({"tie_word_embeddings": "false"}, '"tie_word_embeddings"'),
        ({"rms_norm_eps": "1e-5"}, '"rms_norm_eps"'),
        ({"rms_norm_eps": -1}, '"rms_norm_eps"'),
        ({"rope_theta": float("inf")}, '"rope_theta"'),
        ({"rope_theta": [10000]}, '"rope_theta"'),
        ({"rope_scaling": "linear"}, "RoPE scaling"),
        ({"rope_scaling": False}, "RoPE scaling"),
        ({"rope_scaling": []}, "RoPE scaling"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "RoPE scaling"),
        ({"rope_scaling": {"rope_type": 5}}, "RoPE scaling"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "RoPE scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": "8"}}, "RoPE scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -2}}, "RoPE scaling"),
        ({"rope_parameters": "default"}, "RoPE scaling"),
        ({"rope_parameters": [1], "rope_scaling": {"type": "default"}}, "RoPE scaling"),
        ({"layer_types": "full_attention"}, '"layer_types"'),
        ({"layer_types": ["full_attention"]}, '"layer_types"'),
        ({"layer_types": ["full_attention", "half_attention"]}, '"layer_types"'),
        ({"layer_types": [["full_attention"], {}]}, '"layer_types"'),
        ({"layer_types": ["sliding_attention"] * 2}, '"sliding_window"'),
        ({"removed": ["q"]}, '"removed"'),
        ({"removed": {"q": [2]}}, '"removed"'),
        ({"removed": {"q": 1}}, '"removed"'),
        ({"removed": {"o": [1]}}, '"removed"'),
        ({"removed": {"q": [0]}}, "model.layers.0.self_attn.q_proj.weight"),
        ({"extra_bits": 5}, '"extra_bits"'),
        ({"extra_bits": {"lm_head": "two"}}, '"extra_bits"'),
    ],
    ids=str,
)
def test_a_broken_config(refused: Refused, place: Path, changes: dict[str, Any], said: str):
    edit_config(place / "model", **changes)
    assert said in refused()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization": 5}, "5"),
        ({"quantization": "4bit"}, "4bit"),
        ({"quantization": [1]}, "[1]"),
        ({"quantization": {"mode": [1]}}, "mode [1]"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "gptq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 5}}, "5"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, 'call it "quantization"'),
        ({"quantization_config": {"quant_method": "gptq", "bits": [4]}}, "[4]"),
        ({"quantization_config": {"quant_method": "awq", "version": 5}}, "AWQ"),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_weights", [True, False])
def test_a_quantization_that_cannot_be_read(
    refused: Refused, place: Path, changes: dict[str, Any], said: str, with_weights: bool
):
    edit_config(place / "model", **changes)
    if with_weights:
        edit_tensors(place / "model", put(Q, lambda a: a.astype(mx.uint32)))
        assert said in refused()
    else:
        (place / "model" / "model.safetensors").unlink()
        assert said in refused("--dry-run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"biases": ["q_proj"]}, '"biases"'),
        ({"biases": {"q_proj": 1}}, '"biases"'),
        ({"gains": 5}, '"gains"'),
        ({"gains": ["query"]}, '"gains"'),
        ({"gate_offset": "no"}, '"gate_offset"'),
        ({"value_skip": [1, 2]}, '"value_skip"'),
        ({"attention_gain": 1.0}, '"attention_gain"'),
        ({"uniform_gain": "all"}, '"uniform_gain"'),
        ({"query_skip": 1}, '"query_skip"'),
        ({"head_skip": [True]}, '"head_skip"'),
        ({"channel_skips": "yes"}, '"channel_skips"'),
    ],
    ids=str,
)
def test_a_broken_config_alone(refused: Refused, place: Path, changes: dict[str, Any], said: str):
    edit_config(place / "model", **changes)
    assert said in refused("--dry-run", model=place / "model" / "config.json")


def test_a_config_at_every_limit_costs_nothing(place: Path, capsys: pytest.CaptureFixture[str]):
    """Sizes that are believed are only counted, not built."""
    largest = {"hidden_size": 1 << 18, "intermediate_size": 1 << 20, "vocab_size": 1 << 23}
    heads = {"num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 16}
    edit_config(place / "model", **largest, **heads)
    before = contents(place)
    config = place / "model" / "config.json"
    assert main(["convert", "--model", str(config), "--dry-run"]) == 0
    assert "dry run" in capsys.readouterr().out
    assert contents(place) == before


# The tensors


def drop(name: str) -> Callable[[dict[str, mx.array]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, make: Callable[[Any], Any]) -> Callable[..., None]:
    def change(tensors: dict[str, mx.array]) -> None:
        tensors[name] = make(tensors.get(name))

    return change


Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        (Q, None, "no tensor"),
        ("model.embed_tokens.weight", None, "no tensor"),
        ("model.norm.weight", None, "no tensor"),
        (Q, lambda a: a[:-1], "(31, 32)"),
        (UP, lambda a: a.T, "(32, 48)"),
        (UP, lambda a: a[None], "(1, 48, 32)"),
        (UP, lambda a: a.reshape(-1), f"({48 * 32},)"),
        (UP, lambda a: mx.array(1.0), "()"),
        ("model.norm.weight", lambda a: a[:-1], "(31,)"),
        ("model.norm.weight", lambda a: a[:4], "(4,)"),  # as many as heads
        ("model.layers.0.self_attn.k_proj.bias", lambda a: mx.zeros(3), "(3,)"),
        ("model.layers.0.self_attn.value_skip", lambda a: mx.zeros(3), "(3,)"),
        ("model.layers.0.self_attn.attention_gain", lambda a: mx.ones(1), "(1,)"),
        ("model.layers.1.self_attn.uniform_gain", lambda a: mx.zeros((4, 8)), "(4, 8)"),
        ("model.layers.1.self_attn.uniform_gain.weight", lambda a: mx.zeros(4), "does not use"),
        ("model.layers.0.self_attn.query_skip", lambda a: mx.zeros(3), "query_skip in"),
        ("model.layers.0.self_attn.query_skip", lambda a: mx.zeros((4, 8)), "(4, 8)"),
        ("model.layers.1.self_attn.head_skip", lambda a: mx.zeros(16), "(16,)"),
        ("model.layers.0.self_attn.head_skip", lambda a: mx.zeros(4), "one before"),
        ("model.layers.2.self_attn.head_skip", lambda a: mx.zeros(4), "one before"),
        ("model.layers.1.self_attn.head_skip", lambda a: mx.zeros(32) > 0, "number type"),
        ("model.layers.0.self_attn.output_skip", lambda a: mx.zeros(4), "last layer"),
        ("model.layers.1.self_attn.output_skip", lambda a: mx.zeros(3), "output_skip in"),
        ("model.layers.0.self_attn.attention_gain", lambda a: mx.ones(4) > 0, "number type"),
        ("model.layers.0.self_attn.rope.weight", lambda a: mx.zeros(3), "does not use"),
        ("model.layers.2.mlp.up_proj.weight", lambda a: mx.zeros((48, 32)), "does not use"),
        ("model.layers.0.self_attn.q_norm.weight", lambda a: mx.zeros(32), "does not use"),
        ("model.layers.9.mlp.up_proj.bias", lambda a: mx.zeros(48), "does not use"),
        ("transformer.wte.weight", lambda a: mx.zeros(3), "does not use"),
        (Q, lambda a: a.astype(mx.int32), "number type"),
        (UP, lambda a: a.astype(mx.uint8), "number type"),
        ("model.norm.weight", lambda a: a > 0, "number type"),
        (Q, lambda a: a.astype(mx.complex64), "number type"),
    ],
)
def test_tensors_of_another_model(
    refused: Refused,
    place: Path,
    name: str,
    make: Callable[[Any], Any] | None,
    said: str,
):
    edit_tensors(place / "model", drop(name) if make is None else put(name, make))
    error = refused()
    assert name in error and said in error


@pytest.mark.parametrize(
    "name",
    [Q, "model.layers.1.post_attention_layernorm.weight", "model.norm.weight", "lm_head.weight"],
)
def test_a_pretrained_model_that_lacks_a_tensor(
    refused: Refused, made: Callable[..., Path], tmp_path: Path, name: str
):
    shutil.copytree(made(make_llama), tmp_path / "model")
    edit_tensors(tmp_path / "model", drop(name))
    assert f"no tensor {name}" in refused()


def test_a_model_of_another_kind_is_called_by_its_name(
    refused: Refused, made: Callable[..., Path], tmp_path: Path
):
    model = tmp_path / "model"
    shutil.copytree(made(make_llama), model)
    edit_tensors(model, drop("lm_head.weight"))
    edit_config(model, architectures=["LlamaForSequenceClassification"])
    assert "says LlamaForSequenceClassification, and that is no language model" in refused()
    edit_config(model, architectures=["LlamaModel"])

    def cut(tensors: dict[str, Any]) -> None:
        for name in [*tensors]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(model, cut)
    assert "its tensors have other names, such as embed_tokens.weight" in refused()


def test_a_number_type_that_mlx_does_not_read(refused: Refused, place: Path):
    file = place / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors[Q] = tensors[Q].astype(np.float64)
    safetensors.numpy.save_file(tensors, file)
    error = refused()
    assert Q in error and "number type" in error


def test_scales_of_a_quantized_cache_are_passed_over(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(made(make_llama), tmp_path / "model")
    whole = convert(tmp_path / "model", tmp_path / "whole")
    for part in ("k_scale", "v_scale", "rotary_emb.cos_cached", "rotary_emb.inv_freq"):
        name = f"model.layers.1.self_attn.{part}"
        edit_tensors(tmp_path / "model", lambda tensors, n=name: tensors.update({n: mx.ones(1)}))
    edit_tensors(tmp_path / "model", put("model.rotary_emb.inv_freq", lambda _: mx.ones(4)))
    assert convert(tmp_path / "model", tmp_path / "out").params_after == whole.params_after
    tokens = mx.arange(9)[None]
    logits = [load(tmp_path / name)[0](tokens) for name in ("model", "whole")]
    assert mx.allclose(*logits, rtol=1e-5, atol=1e-5)


def test_a_tensor_that_is_ignored_may_be_of_a_type_that_mlx_has_not(place: Path):
    file = place / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4)
    safetensors.numpy.save_file(tensors, file)
    assert convert(place / "model", place / "out").verification is not None


SKIPLESS_KINDS = [
    "model.embed_tokens.weight",
    *(f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"model.layers.1.self_attn.{x}_proj.bias" for x in "qko"),
    *(f"model.layers.1.self_attn.{x}_norm.weight" for x in "qkv"),
    *(f"model.layers.1.self_attn.{x}" for x in ("value_skip", "attention_gain", "uniform_gain")),
    *(f"model.layers.1.self_attn.{x}_skip" for x in ("query", "head", "output")),
    *(f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    "model.layers.1.mlp.down_proj.bias",
    "model.layers.1.mlp.hidden_norm.weight",
    "model.layers.1.mlp.gate_offset",
    "model.norm.weight",
    "lm_head.weight",
]
LLAMA_KINDS = [
    "model.embed_tokens.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.0.self_attn.v_proj.bias",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("value", "removal", "name"),
    product([np.nan, np.inf, -np.inf], ["qp", "none"], SKIPLESS_KINDS),
)
def test_not_a_number_in_a_skipless_model(
    refused: Refused,
    made: Callable[..., Path],
    tmp_path: Path,
    name: str,
    removal: str,
    value: float,
):
    shutil.copytree(made(**EVERYTHING), tmp_path / "model")
    spoil(tmp_path / "model", name, value)
    error = refused("--remove", removal)
    assert f"{name} holds NaN or infinity" in error


@pytest.mark.parametrize(
    "flags", ["", "--remove none", "--skipless --remove qp", "-q --q-group-size 32"]
)
@pytest.mark.parametrize("name", LLAMA_KINDS)
def test_not_a_number_in_a_pretrained_model(
    refused: Refused, made: Callable[..., Path], tmp_path: Path, name: str, flags: str
):
    shutil.copytree(made(make_llama, attention_bias=True), tmp_path / "model")
    spoil(tmp_path / "model", name, np.nan)
    assert f"{name} holds NaN or infinity" in refused(*flags.split())


@pytest.mark.parametrize(
    ("value", "name", "flags"),
    product(
        [np.nan, np.inf],
        ["embed_tokens.weight", "layers.1.self_attn.q_proj.weight", "up_"],
        ["-q", "--target-bytes 150KB"],
    ),
)
def test_rounding_hides_no_number_that_is_none(
    refused: Refused, tmp_path: Path, name: str, value: float, flags: str
):
    make_model(tmp_path / "model", "olmoe")
    tensors = safetensors.numpy.load_file(tmp_path / "model/model.safetensors")
    name = next(one for one in tensors if name in one)
    spoil(tmp_path / "model", name, value)
    assert "holds NaN or infinity" in refused(*flags.split(), "--q-group-size", "32", "--no-verify")


@pytest.mark.parametrize("removal", ["qp", "none"])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"],
)
def test_a_type_too_narrow(refused: Refused, place: Path, name: str, removal: str):
    spoil(place / "model", name, 1e6)
    error = refused("--remove", removal, "--dtype", "float16")
    assert "does not fit float16" in error and "bfloat16" in error
    assert name in error or removal == "qp"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_gain_too_large_for_any_type(
    refused: Refused, made: Callable[..., Path], tmp_path: Path, dtype: str
):
    """NumPy would warn of it beside the error."""
    shutil.copytree(made(make_llama), tmp_path / "model")
    for name in ("input_layernorm", "self_attn.q_proj"):
        edit_tensors(
            tmp_path / "model", put(f"model.layers.1.{name}.weight", lambda array: array * 1e25)
        )
    error = refused("--fold-norms", "--dtype", dtype)
    assert "model.layers.1.self_attn.q_proj.weight does not fit float32" in error


def test_a_product_too_large_for_any_type(refused: Refused, place: Path):
    spoil(place / "model", "model.embed_tokens.weight", 1e38)
    edit_tensors(place / "model", put("model.layers.0.self_attn.q_proj.weight", lambda a: a * 1e9))
    error = refused("--remove", "qp")
    assert "model.embed_tokens.weight does not fit float32" in error


# Where the result should go


def test_an_existing_place_is_refused(refused: Refused, place: Path):
    (place / "folder").mkdir()
    (place / "file").write_text("mine")
    (place / "dangling").symlink_to(place / "nothing")
    (place / "link").symlink_to(place / "folder")
    for name in ("folder", "file", "dangling", "link"):
        assert f"@/{name} exists already" in refused(out=place / name)
    assert "@ exists already" in refused(out=place)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing/out", "@/missing is no folder"),
        ("file/out", "@/file is no folder"),
        ("n" * 300, f"beside @/{'n' * 300}"),
    ],
)
def test_a_place_that_cannot_be(refused: Refused, place: Path, name: str, said: str):
    (place / "file").write_text("mine")
    assert said in refused(out=place / name)


@pytest.mark.parametrize("name", ["", "missing/report.json", "file/report.json"])
def test_a_report_that_cannot_be_written(refused: Refused, place: Path, name: str):
    (place / "file").write_text("mine")
    error = refused("--json", place / name)
    assert f"--json {f'@/{name}'.rstrip('/')}: " in error


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_a_report_in_a_folder_that_takes_none(refused: Refused, place: Path):
    assert "--json /proc/report.json" in refused("--json", "/proc/report.json")


def test_too_little_disk(refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    error = refused()
    assert "@ has 0.00 GB free" in error and "--mlx-path" in error


def test_too_little_memory(refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch):
    values = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**17}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    error = refused()
    assert "memory" in error and "larger" in error


def test_a_disk_that_fills_up(refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert "No space left" in refused()
    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        assert "No space left" in refused()
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: full() if b == place / "out" else rename(a, b))
    assert "No space left" in refused()


# Removals that cannot be


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(getattr(v, "__name__", f"{k}={v}")) for k, v in value.items())
    return str(value)


@pytest.mark.parametrize(
    ("options", "flags", "said"),
    [
        ({"head_dim": 4}, "--remove qp", "narrows the stream from 32 to 16"),
        ({"head_dim": 16}, "--remove q", "widens the stream from 32 to 64"),
        ({}, "--remove kp", "K maps 32 to 16"),
        ({}, "--remove v", "V maps 32 to 16"),
        ({"block": "parallel"}, "--remove qp", "meet at one point"),
        ({"block": "parallel", "head_dim": 16}, "--remove p", "P maps 64 to 32"),
        ({"skip": "ffn"}, "--remove qp", "meet at one point"),
        ({"skip": "both"}, "--remove q", "skip connections"),
        ({"skip": "both"}, "--remove p", "skip connections"),
        ({"norm": "pre"}, "--remove q", "norm acts on the stream"),
        ({"norm": "pre"}, "--remove p", "norm acts on the stream"),
        ({"tie_word_embeddings": True, "num_hidden_layers": 1}, "--remove q", "tied"),
        ({"block": "parallel", "num_hidden_layers": 1}, "--remove p", "final norm"),
        ({}, "--skipless", "drop it"),
        ({"maker": make_llama}, "--remove q", "--skipless"),
        ({"maker": make_llama}, "--remove p", "--skipless"),
        ({"maker": make_llama}, "--skipless --remove k", "K maps 32 to 16"),
    ],
    ids=name_of,
)
def test_an_impossible_removal(
    refused: Refused,
    made: Callable[..., Path],
    tmp_path: Path,
    options: dict[str, Any],
    flags: str,
    said: str,
):
    shutil.copytree(made(**options), tmp_path / "model")
    assert said in refused(*flags.split())


def test_what_is_gone_already(refused: Refused, place: Path, capsys: pytest.CaptureFixture[str]):
    once = ["--model", str(place / "model"), "--mlx-path", str(place / "once"), "--remove", "qp"]
    assert main(["convert", *once, "--no-verify"]) == 0
    assert "gone already" in refused("--remove", "qp", model=place / "once")


@pytest.mark.parametrize(
    ("options", "matrix", "flags"),
    [
        ({}, "q", "--remove q"),
        ({}, "q", "--remove qp"),
        ({"num_key_value_heads": 4}, "k", "--remove kp"),
        ({"num_key_value_heads": 4}, "v", "--remove v"),
        ({"block": "parallel"}, "o", "--remove p"),
        ({"maker": make_llama}, "q", "--skipless --remove q"),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("how", ["zero", "rank"])
def test_a_singular_matrix(
    refused: Refused,
    made: Callable[..., Path],
    tmp_path: Path,
    options: dict[str, Any],
    matrix: str,
    flags: str,
    how: str,
):
    def spoiled(array: mx.array) -> mx.array:
        if how == "zero":
            return mx.zeros_like(array)
        return mx.concatenate([array[:-1], array[:1]])

    shutil.copytree(made(**options), tmp_path / "model")
    name = f"model.layers.0.self_attn.{matrix}_proj.weight"
    edit_tensors(tmp_path / "model", put(name, spoiled))
    error = refused(*flags.split())
    letter = {"o": "P"}.get(matrix, matrix.upper())
    assert f"{letter} of layer 0 is singular" in error and "--remove auto" in error
    assert main(["convert", "--model", str(tmp_path / "model"), "--dry-run"]) == 0


# Flags


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--q-bits 4", "need -q"),
        ("--q-bits 0", "need -q"),
        ("--q-group-size 32", "need -q"),
        ("--q-mode mxfp4", "need -q"),
        ("-q --q-bits 7", "--q-bits 2, 3, 4"),
        ("-q --q-bits 0", "--q-bits 2, 3, 4"),
        ("-q --q-group-size 48", "--q-group-size 32, 64"),
        ("-q --q-mode mxfp4 --q-bits 8", "--q-bits 4"),
        ("-q --q-mode nvfp4 --q-group-size 32", "--q-group-size 16"),
        ("--calibration missing.txt", "missing.txt"),
        ("--calibration short.txt", "short.txt"),
        ("--calibration .", "--calibration ."),
    ],
)
def test_flags_that_do_not_fit(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch, flags: str, said: str
):
    monkeypatch.chdir(place)
    (place / "short.txt").write_text("once")
    assert said in refused(*flags.split())


def test_calibration_without_a_tokenizer(refused: Refused, place: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place / "model" / name).unlink()
    (place / "text.txt").write_text("once upon a time " * 99)
    assert "tokenizer" in refused("--calibration", place / "text.txt")


@pytest.mark.parametrize(
    "flags",
    [
        "--remove pq",
        "--q-bits four",
        "--q-mode ternary",
        "--dtype int8",
        "--seed x",
        "--no-such-flag",
        "--model",
    ],
)
def test_flags_that_do_not_parse(place: Path, capsys: pytest.CaptureFixture[str], flags: str):
    before = contents(place)
    assert main(["convert", "--model", str(place / "model"), *flags.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and flags.split()[0] in last
    assert contents(place) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remove": "pq"}, "--remove 'pq'"),
        ({"dtype": "int8"}, "--dtype 'int8'"),
        ({"quantize": True, "q_mode": "ternary"}, "--q-mode 'ternary'"),
    ],
)
def test_options_that_only_python_can_give(place: Path, options: dict[str, Any], said: str):
    before = contents(place)
    with pytest.raises(UserError, match=f"{said}: choose "):
        convert(place / "model", place / "out", **options)
    assert contents(place) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": True, "q_bits": "x"}, "--q-bits 'x': must be a number"),
        ({"quantize": True, "q_group_size": ""}, "--q-group-size '': must be a number"),
        ({"mlx_path": "\0"}, "a path has no null byte"),
        ({"model": "m\0"}, "a path has no null byte"),
    ],
)
def test_text_that_python_would_not_take(place: Path, options: dict[str, Any], said: str):
    before = contents(place)
    with pytest.raises(UserError, match=said):
        convert(**{"model": place / "model", "mlx_path": place / "out", **options})
    assert contents(place) == before


# Interruptions


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (Merger, "embedding"),
        (Merger, "layer"),
        (Merger, "head"),
        (SourceReader, "measure_conditioning"),
    ],
)
def test_an_interrupt_leaves_nothing(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
):
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, method, interrupt)
    assert "interrupted" in refused()


PROGRAM = """
import signal, sys, time
from pathlib import Path
from mlx_skipless.cli import main
from mlx_skipless.removal.merger import Merger

def wait(self, layer):
    Path(sys.argv[1]).touch()
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
Merger.layer = wait
sys.exit(main(["convert", "--model", sys.argv[2], "--mlx-path", sys.argv[3]]))
"""


class InMidConversion:
    """A convert in a process of its own that stops and waits after the embedding."""

    def __init__(self, place: Path, out: str = "out"):
        self.place, reached = place / "place", place / "reached"
        self.place.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(reached), str(place / "model"), out],
            cwd=self.place,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + 60
        while not reached.exists():
            assert self.process.poll() is None and time.monotonic() < end, (
                self.process.communicate()
            )
            time.sleep(0.02)
        assert self.left(), "it works in no folder yet"

    def left(self) -> list[str]:
        return sorted(os.listdir(self.place))

    def end(self, how: signal.Signals) -> tuple[int, str]:
        """Send a signal; the exit code and stderr."""
        self.process.send_signal(how)
        _, error = self.process.communicate(timeout=30)
        return self.process.returncode, error


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (signal.SIGHUP, 1, "error: interrupted\n"),
        # These two are sent in test_faults.py as well.
        pytest.param(signal.SIGINT, 1, "error: interrupted\n", marks=thorough),
        pytest.param(signal.SIGTERM, 1, "error: interrupted\n", marks=thorough),
    ],
)
def test_a_signal_leaves_nothing(place: Path, how: signal.Signals, code: int, said: str):
    running = InMidConversion(place)
    assert running.end(how) == (code, said)
    assert running.left() == []


@pytest.mark.parametrize("out", only(["a[1]*?"], ["out", "a[1]*?"]))
def test_a_kill_leaves_nothing_after_the_next_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: str
):
    running = InMidConversion(place, out)
    monkeypatch.chdir(running.place)
    assert running.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert len(running.left()) == 1
    (running.place / ".outer.partial-of-another").mkdir()
    assert main(["convert", "--model", str(place / "model"), "--mlx-path", out]) == 0
    assert running.left() == sorted([".outer.partial-of-another", out])


def test_what_another_run_is_writing_is_refused_at_once(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch
):
    running = InMidConversion(place)
    before = running.left()
    monkeypatch.chdir(running.place)
    assert "another run is writing out: wait for it" in refused(out="out")
    assert running.left() == before
    assert running.end(signal.SIGTERM)[0] == 1 and running.left() == []


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range(refused: Refused, place: Path, seed: int) -> None:
    assert f"--seed {seed}" in refused("--seed", seed)


def test_a_report_inside_the_result(refused: Refused, place: Path) -> None:
    assert "--mlx-path" in refused("--json", place / "out")
    assert "--mlx-path" in refused("--json", place / "out" / "report.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"removed": {"k": [0, 1]}},
        {"removed": {"v": [1]}},
        {"removed": {"q": [0]}, "head_dim": 4},
        {"removed": {"p": [0]}, "head_dim": 4, "block": "parallel"},
    ],
)
def test_what_cannot_be_absent(refused: Refused, place: Path, changes: dict[str, Any]) -> None:
    """Where the stream itself stands in for a matrix, it must be as wide."""
    edit_config(place / "model", **changes)
    assert '"removed" in config.json names' in refused()


def test_an_upload_to_no_repository(refused: Refused, place: Path) -> None:
    assert "--upload-repo nowhere" in refused("--upload-repo", "nowhere")


def test_running_out_of_memory_is_one_line(
    refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: Any) -> None:
        raise RuntimeError("[malloc] Unable to allocate 8 bytes.\nmore")

    monkeypatch.setattr(Merger, "layer", exhausted)
    assert "Unable to allocate" in refused()
