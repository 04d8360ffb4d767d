"""Shards that a thread writes: in order, whole, and gone if anything goes wrong."""

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_skipless.checkpoints import writer
from mlx_skipless.checkpoints.writer import Writer
from mlx_skipless.errors import UserError

ABANDONED = ".out.partial-0123456789abcdef"
PATIENCE = 60  # seconds until a thread that hangs fails its test


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 64)


def shard(number: int) -> dict[str, mx.array]:
    """A tensor that fills one, not laid out as files hold it."""
    return {f"t{number}": (mx.arange(16).reshape(2, 8) + number).astype(mx.float32).T}


def test_shards_are_whole_and_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Writer(out, 0) as writing:
        for number in range(4):
            writing.add(shard(number))
        writing.finish_weights(64)
        writing.commit()
    for number in range(4):
        (stored,) = mx.load(str(out / f"model-{number + 1:05d}-of-00004.safetensors")).items()
        (expected,) = shard(number).items()
        assert stored[0] == expected[0] and np.array_equal(stored[1], expected[1])


@pytest.mark.parametrize("expected, files", [(0, 8), (512, 8), (1024, 4), (1 << 20, 1)])
def test_a_small_result_has_small_shards(
    expected: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight tensors of 64 bytes; no shard is smaller than 64 bytes or larger than 512."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 512)
    monkeypatch.setattr(writer, "LEAST_SHARD_BYTES", 64)
    monkeypatch.setattr(writer, "SHARDS", 8)
    with Writer(tmp_path / "out", expected) as writing:
        for number in range(8):
            writing.add(shard(number))
        writing.finish_weights(128)
        writing.commit()
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == files


def test_a_result_may_be_read_as_any_new_folder(tmp_path: Path) -> None:
    """It is private only until it is whole."""
    with Writer(tmp_path / "out", 0) as writing:
        assert writing.folder.stat().st_mode & 0o777 == 0o700
        writing.commit()
    (tmp_path / "other").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_shard_is_written_while_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time, by another thread."""
    save, made = mx.save_safetensors, threading.Event()
    at_work: list[threading.Thread] = []
    most = 0

    def slow(*arguments: Any, **options: Any) -> None:
        nonlocal most
        at_work.append(threading.current_thread())
        most = max(most, len(at_work))
        assert made.wait(PATIENCE), "the next shard waits for this one"
        save(*arguments, **options)
        assert at_work.pop() is not threading.main_thread()

    monkeypatch.setattr(mx, "save_safetensors", slow)
    with Writer(tmp_path / "out", 0) as writing:
        writing.add(shard(0))
        writing.add(shard(1))  # the first is full, and on its way
        made.set()
        for number in range(2, 6):
            writing.add(shard(number))
        writing.finish_weights(96)
        assert len(list(writing.folder.glob("*-of-00006.safetensors"))) == 6
    assert most == 1


@pytest.mark.parametrize("call", ["add", "finish_weights", "discard_weights"])
def test_a_failure_to_write_shows_in_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(UserError, match=r"No space left on device.*disk full"),
        Writer(tmp_path / "out", 0) as writing,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(mx, "save_safetensors", full)
            writing.add(shard(0))
            writing.add(shard(1))
        if call == "add":
            writing.add(shard(2))
        elif call == "finish_weights":
            writing.finish_weights(32)
        else:
            writing.discard_weights()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_waits_for_the_thread_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, begun, interrupted = mx.save_safetensors, threading.Event(), threading.Event()
    ended = threading.Event()

    def slow(*arguments: Any, **options: Any) -> None:
        begun.set()
        assert interrupted.wait(PATIENCE)
        save(*arguments, **options)
        ended.set()

    monkeypatch.setattr(mx, "save_safetensors", slow)
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", 0) as writing:
        writing.add(shard(0))
        writing.add(shard(1))
        assert begun.wait(PATIENCE)
        threading.Timer(0.1, interrupted.set).start()  # while it is waited for
        raise KeyboardInterrupt
    assert ended.is_set()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_the_folder_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def interrupted(folder: Path, *arguments: Any) -> None:
        make(folder, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out", 0):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("known", "left"), [(True, []), (False, [ABANDONED])])
def test_without_locks_nothing_of_another_run_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool, left: list[str]
) -> None:
    def unknown(*arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    (tmp_path / ABANDONED).mkdir()
    if not known:
        monkeypatch.setattr(fcntl, "flock", unknown)
    with Writer(tmp_path / "out", 0) as writing:
        writing.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "out"]


def test_discarded_weights_are_not_written_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, discarding = mx.save_safetensors, threading.Event()

    def slow(*arguments: Any, **options: Any) -> None:
        assert discarding.wait(PATIENCE)
        save(*arguments, **options)

    out = tmp_path / "out"
    with Writer(out, 0) as writing:
        with monkeypatch.context() as patch:
            patch.setattr(mx, "save_safetensors", slow)
            writing.add(shard(0))
            writing.add(shard(1))
            threading.Timer(0.1, discarding.set).start()
            writing.discard_weights()
        assert list(writing.folder.glob("*.safetensors")) == []
        writing.add(shard(7))
        writing.finish_weights(16)
        writing.commit()
    (stored,) = mx.load(str(out / "model.safetensors"))
    assert stored == "t7"


def test_names_in_a_text_need_not_be_utf8(tmp_path: Path) -> None:
    """The card names the user's text, whose name may be any bytes."""
    with Writer(tmp_path / "out", 0) as writing:
        writing.write_text("README.md", os.fsdecode(b"of \xff.txt"))
        writing.finish_weights(0)
        writing.commit()
    assert (tmp_path / "out/README.md").read_text("utf-8") == "of \\udcff.txt"
