"""Files that are written: whole or not at all, and what is no file of ours stays what it is."""

import errno
import json
import os
import pty
import shutil
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_skipless.checkpoints import output
from mlx_skipless.checkpoints.output import check_output, hide_paths, replace_file, write_json

TEXT, OLD = "new\n", "old, and longer\n"


def put(file: Path) -> None:
    """As a command does: it tries first, and writes after its work."""
    check_output(file)
    replace_file(file, lambda made: made.write_text(TEXT))


def tree(folder: Path) -> dict[str, int]:
    """Names and kinds of all that lies in a folder."""
    return {str(p.relative_to(folder)): stat.S_IFMT(p.lstat().st_mode) for p in folder.rglob("*")}


def absent(place: Path) -> Path:
    return place / "r.json"


def present(place: Path) -> Path:
    (place / "r.json").write_text(OLD)
    return place / "r.json"


def long_name(place: Path) -> Path:
    return place / ("n" * 255)


def link(place: Path) -> Path:
    (place / "sub").mkdir()
    (place / "sub/target").write_text(OLD)
    (place / "link").symlink_to("sub/target")
    return place / "link"


def chain_of_links(place: Path) -> Path:
    link(place)
    (place / "first").symlink_to(place / "link")
    return place / "first"


def link_to_nothing(place: Path) -> Path:
    (place / "link").symlink_to("target")
    return place / "link"


def linked_folder(place: Path) -> Path:
    (place / "sub").mkdir()
    (place / "there").symlink_to("sub")
    return place / "there/r.json"


@pytest.mark.parametrize(
    "make",
    [absent, present, long_name, link, chain_of_links, link_to_nothing, linked_folder],
)
def test_a_file_is_written_where_its_path_leads(make: Callable[[Path], Path], tmp_path: Path):
    file = make(tmp_path)
    before = tree(tmp_path)
    put(file)
    assert file.read_text() == TEXT
    new = tree(tmp_path).items() - before.items()
    assert {kind for _, kind in new} <= {stat.S_IFREG} and len(new) <= 1
    assert before.items() <= tree(tmp_path).items()  # links are links


def test_a_file_keeps_its_mode(tmp_path: Path):
    file = present(tmp_path)
    file.chmod(0o640)
    put(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_pipe_is_written_to(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(
        target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True
    )
    reader.start()
    put(tmp_path / "pipe")
    reader.join(60)
    assert read == [TEXT] and tree(tmp_path) == {"pipe": stat.S_IFIFO}


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_device_is_written_to(through_a_link: bool, tmp_path: Path):
    ours, theirs = pty.openpty()
    device = Path(os.ttyname(theirs))
    (tmp_path / "link").symlink_to(device)
    put(tmp_path / "link" if through_a_link else device)
    assert os.read(ours, 100).replace(b"\r", b"") == TEXT.encode()
    assert stat.S_ISCHR(device.stat().st_mode) and (tmp_path / "link").is_symlink()
    os.close(ours)
    os.close(theirs)
    put(Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_an_open_file_is_written_to_where_it_is(folder: str, tmp_path: Path):
    """As /dev/stdout: after what was printed, not over it."""
    if not Path(folder).exists():
        pytest.skip("no such folder here")
    with (tmp_path / "out").open("w") as out:
        out.write("printed\n")
        out.flush()
        (tmp_path / "stdout").symlink_to(f"{folder}/{out.fileno()}")
        put(tmp_path / "stdout")
        out.write("more\n")
    assert (tmp_path / "out").read_text() == f"printed\n{TEXT}more\n"
    with (tmp_path / "out").open() as only_read, pytest.raises(PermissionError):
        check_output(Path(f"{folder}/{only_read.fileno()}"))
    with pytest.raises(OSError):
        check_output(Path(f"{folder}/987654321"))


@pytest.mark.parametrize(
    "name", [".", "no/folder", "file/x", "loop", "n" * 256, "/dev/nothing-of-this-name"]
)
def test_what_cannot_be_written_is_refused_at_once(name: str, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = tree(tmp_path)
    with pytest.raises(OSError):
        check_output(tmp_path / name)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", output.WRITTEN_IN_PLACE)
def test_what_cannot_be_replaced_is_written_in_place(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As a single file that a container mounts, or that lies in a folder of another user."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(error, os.strerror(error))

    file = present(tmp_path)
    same = file.stat().st_ino
    monkeypatch.setattr(os, "replace", refuse)
    put(file)
    assert file.read_text() == TEXT and file.stat().st_ino == same and len(tree(tmp_path)) == 1
    monkeypatch.setattr(output, "temporary_folder", refuse)
    put(file)
    with pytest.raises(OSError):
        put(tmp_path / "new")
    assert len(tree(tmp_path)) == 1


NAMES = (
    ".r.json.partial", ".partial-r.json", ".r.json.partial-x", ".r.json.partial-0123456789abcdeF",
    ".r.json.partial-0123456789abcdef0",
)  # fmt: skip


def test_what_only_looks_like_ours_is_left_alone(tmp_path: Path):
    ours = ".r.json.partial-0123456789abcdef"
    for i, name in enumerate(NAMES):
        (tmp_path / name).mkdir() if i % 2 else (tmp_path / name).write_text("mine")
    os.mkfifo(tmp_path / ours)
    os.mkfifo(tmp_path / ours.replace("0", "1"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ours.replace("0", "2")).symlink_to("elsewhere")
    before = tree(tmp_path)
    put(tmp_path / "r.json")
    (tmp_path / "r.json").unlink()
    assert tree(tmp_path) == before


def test_what_a_killed_run_left_goes(tmp_path: Path):
    left, held = (tmp_path / f".r.json.partial-{digit * 16}" for digit in "0f")
    for folder in (left, held):
        folder.mkdir()
        (folder / "r.json").write_text("half")
    with output.lock_folder(held) as ours:
        assert ours
        put(tmp_path / "r.json")
        assert not left.exists() and held.exists()
    put(tmp_path / "r.json")
    assert [*tree(tmp_path)] == ["r.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, ""), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("make", [absent, present, link])
def test_a_failure_leaves_what_was_there(
    make: Callable[[Path], Path], error: BaseException, tmp_path: Path
):
    file = make(tmp_path)
    before = tree(tmp_path)

    def fail(made: Path) -> None:
        made.write_text("half")
        raise error

    with pytest.raises(type(error)):
        replace_file(file, fail)
    assert tree(tmp_path) == before
    assert not file.exists() or file.read_text() == OLD


def test_nobody_else_can_reach_what_is_being_written(tmp_path: Path):
    """A folder of its own, which cannot have been there before, under a name nobody can guess."""
    places = []

    def write(made: Path) -> None:
        places.append(made.parent)
        assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700 and made.parent.parent == tmp_path
        made.write_text(TEXT)

    for _ in range(2):
        replace_file(tmp_path / "r.json", write)
    assert len({*places}) == 2


LOCAL = (
    "/home/alice/m", "~/m", "C:\\Users\\alice\\m", "C:/Users/alice/m", "\\\\server\\alice\\m",
    "file:///home/alice/m", "/home/alice/my models/m",
)  # fmt: skip


@pytest.mark.parametrize("value", LOCAL)
@pytest.mark.parametrize("key", ["_name_or_path", "name_or_path", "tokenizer_file", "dataset"])
def test_published_files_name_no_local_path(value: str, key: str, tmp_path: Path):
    kept = {"model_type": "llama", "layers": [1, 2.5, None, True], "nested": {"a": {"b": "c/d"}}}
    content = {**kept, key: value, "nested": {"a": {"b": "c/d", key: value}, "list": [value, "x"]}}
    write_json(tmp_path / "config.json", content)
    hide_paths(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == {**kept, "nested": {"a": {"b": "c/d"}, "list": ["x"]}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_name_or_path", "mistralai/Mistral-7B-v0.1"), ("_name_or_path", "m"),
        ("tokenizer_file", "tokenizer.json"), ("bos_token", "/a/b/"), ("hidden_act", "silu"),
        ("chat_template", "/a/{{ messages }}/"), ("stop_strings", ["/a/b/"]),
        ("added_tokens_decoder", {"5": {"content": "/usr/bin/"}}), ("sep_token", "~/"),
        ("auto_map", {"AutoConfig": "owner/name--configuration.Config"}), ("unk_token", "C:\\"),
        ("home", "https://example.org/a/b"),
    ],
)  # fmt: skip
def test_what_is_no_path_of_a_machine_stays(key: str, value: Any, tmp_path: Path):
    write_json(tmp_path / "tokenizer_config.json", {key: value})
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    hide_paths(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_bytes() == before


def test_a_relative_path_that_is_there_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice/m").mkdir(parents=True)
    write_json(tmp_path / "config.json", {"_name_or_path": "alice/m", "x": 1})
    (tmp_path / "broken.json").write_text("{")
    hide_paths(tmp_path)
    assert "alice" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_breaks_off_no_cleaning(end: signal.Signals, tmp_path: Path) -> None:
    """The first one unwinds; one that comes while the folder is removed is not heard."""
    before = {one: signal.getsignal(one) for one in signal.Signals if one != signal.SIGKILL}
    heard = signal.signal(end, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            remove = shutil.rmtree

            def interrupted(folder: Path, **options: Any) -> None:
                os.kill(os.getpid(), end)
                remove(folder, **options)

            patch.setattr(output.shutil, "rmtree", interrupted)
            with (
                pytest.raises(KeyboardInterrupt),
                output.temporary_folder(tmp_path / "o") as folder,
            ):
                (folder / "a").write_text("a")
                os.kill(os.getpid(), end)
    finally:
        signal.signal(end, heard)
    assert not [*tmp_path.iterdir()]
    assert before == {one: signal.getsignal(one) for one in before}
