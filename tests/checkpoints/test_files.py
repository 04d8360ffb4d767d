"""Files that change or fail while they are read: an error that names them, and never other numbers.

MLX takes what it could not read for read, and a mapped file that got shorter ends the process.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import safetensors.numpy
from factory import make_checkpoint, make_llama
from gguf_maker import add_byte_tokenizer, write_gguf

from mlx_skipless import UserError, convert, load
from mlx_skipless.checkpoints import files
from mlx_skipless.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mlx_skipless.checkpoints.tokenizer import carry_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(params=["folder", "gguf"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the file that its weights are in."""
    config, weights = make_llama(tmp_path / "model", **SMALL)
    if request.param == "folder":
        return tmp_path / "model", tmp_path / "model" / "model.safetensors"
    file = tmp_path / "model.gguf"
    write_gguf(file, config, weights, describe=add_byte_tokenizer)
    return file, file


def read_all(checkpoint: Checkpoint) -> dict[str, mx.array]:
    return checkpoint.read(checkpoint.store.shapes)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.0])
def test_a_file_that_became_shorter(source: tuple[Path, Path], share: float):
    model, file = source
    checkpoint = open_checkpoint(model)
    whole = read_all(checkpoint)
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(UserError, match=f"{file} has become shorter"):
        read_all(checkpoint)
    for name, array in whole.items():
        try:
            (read,) = checkpoint.read([name]).values()
        except UserError:
            continue
        assert mx.array_equal(read, array)


def test_a_tokenizer_in_a_file_that_became_shorter(tmp_path: Path, source: tuple[Path, Path]):
    model, file = source
    if model != file:
        pytest.skip("its tokenizer has a file of its own")
    checkpoint = open_checkpoint(model)
    os.truncate(file, 1000)
    with pytest.raises(UserError, match=f"{file} has become shorter"):
        carry_tokenizer(checkpoint, tmp_path, stock=True, trust_remote_code=False)


class Failing(io.BufferedReader):
    """A disk that gives up."""

    def readinto(self, buffer: Any) -> int:
        raise OSError(5, "Input/output error")


def test_a_disk_that_fails(source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    model, file = source
    checkpoint = open_checkpoint(model)
    usual = Path.open

    def open_failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path != file:
            return usual(path, *arguments, **options)
        return Failing(io.FileIO(str(path)))

    monkeypatch.setattr(Path, "open", open_failing)
    with pytest.raises(UserError, match=f"{file} cannot be read .*Input/output error"):
        read_all(checkpoint)


def test_a_file_that_is_gone(source: tuple[Path, Path]):
    model, file = source
    checkpoint = open_checkpoint(model)
    file.unlink()
    with pytest.raises(UserError, match=f"{file} cannot be read .*No such file"):
        read_all(checkpoint)


def test_a_conversion_whose_source_becomes_shorter(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    model, file = source
    size = file.stat().st_size

    def shorten(stage: str, done: int, total: int) -> None:
        if stage == "converting":
            os.truncate(file, size // 2)

    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"{file} has become shorter"):
        convert(model, tmp_path / "out", progress=shorten)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("stage", ["converting", "checking"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_conversion_whose_source_becomes_another(
    tmp_path: Path, source: tuple[Path, Path], stage: str, verify: bool
):
    """As many bytes, and valid ones: of whichever layers were read before, the result is of two."""
    model, file = source
    data = bytearray(file.read_bytes())
    data[-400:] = bytes(400)

    def change(at: str, done: int, total: int) -> None:
        if at == stage and done == 0:
            file.write_bytes(data)

    before = sorted(tmp_path.iterdir())
    if stage == "checking" and not verify:
        return
    with pytest.raises(UserError, match=f"{file} changed while it was read: try again"):
        convert(model, tmp_path / "out", verify=verify, progress=change)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("maker", [make_checkpoint, make_llama])
def test_a_truncated_model_is_not_loaded(tmp_path: Path, maker: Callable[..., Any]):
    """mlx-lm would load whatever lay in memory."""
    maker(tmp_path, **SMALL)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(UserError, match=f"{file} is truncated"):
        load(tmp_path)


@pytest.mark.parametrize("maker", [make_checkpoint, make_llama])
def test_a_model_that_changes_while_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Callable[..., Any]
):
    maker(tmp_path, **SMALL)
    file = tmp_path / "model.safetensors"
    usual = mlx_lm.utils.load_model

    def shorten(*arguments: Any, **options: Any) -> Any:
        found = usual(*arguments, **options)
        os.truncate(file, file.stat().st_size - 1000)
        return found

    monkeypatch.setattr(mlx_lm.utils, "load_model", shorten)
    with pytest.raises(UserError, match=f"{file} changed while it was read"):
        load(tmp_path)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int8, np.uint32, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0)])
def test_tensors_of_every_shape_read_as_they_are(tmp_path: Path, shape: tuple[int, ...], kind: Any):
    make_checkpoint(tmp_path, **SMALL)
    store: Any = open_checkpoint(tmp_path).store
    values = np.random.default_rng(0).integers(0, 2, shape).astype(kind)
    safetensors.numpy.save_file(
        {"b": np.ones(3, np.int8), "a": values}, tmp_path / "model.safetensors"
    )
    store = type(store)(tmp_path)
    read = store.read(["a"])["a"]
    assert store.shapes["a"] == read.shape == shape and store.dtypes["a"] == read.dtype
    assert np.array_equal(np.array(read), values)


def test_bfloat16_reads_as_it_is(tmp_path: Path):
    make_checkpoint(tmp_path, dtype="bfloat16", **SMALL)
    expected: Any = mx.load(str(tmp_path / "model.safetensors"))
    read = read_all(open_checkpoint(tmp_path))
    assert read.keys() == expected.keys()
    assert all(read[n].dtype == mx.bfloat16 for n in read)
    assert all(mx.array_equal(read[n], expected[n]) for n in read)


def test_what_is_read_ahead_may_fail_in_peace(
    source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    model, file = source
    checkpoint = open_checkpoint(model)
    waits: list[Any] = []

    class Waits(threading.Thread):
        def start(self) -> None:
            waits.append(self)

    monkeypatch.setattr(threading, "Thread", Waits)
    for change in (lambda: os.truncate(file, 100), file.unlink):
        change()
        checkpoint.read_ahead([LAST])
        waits.pop().run()


def test_reading_ahead_reads_the_spans_and_no_more_than_may_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a").write_bytes(bytes(1000))
    monkeypatch.setattr(files, "AT_ONCE", 300)
    monkeypatch.setattr(files, "AHEAD_BYTES", 1500)
    read: list[tuple[int, int]] = []

    class Noting(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            start = self.tell()
            count = super().readinto(buffer)
            read.append((start, count))
            return count

    monkeypatch.setattr(Path, "open", lambda path, *arguments, **options: Noting(str(path)))
    files._read_spans([(tmp_path / "a", 100, 700), (tmp_path / "a", 0, 1000)])
    assert read[:3] == [(100, 300), (400, 300), (700, 100)]
    assert read[3:] == [(0, 300), (300, 300), (600, 200)]
