"""Files and folders that are written: each appears whole under its name, or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..constants import HUB_ID
from ..errors import UserError

ABSOLUTE = re.compile(r"(?:~?/[^/\n]+/|~[/\\]|[A-Za-z]:[/\\]|\\\\|file:)[^\n]*")
SPOKEN = re.compile(r"(^|_)(tokens?|templates?|stop|strings?|prompts?|schema)(_|$)")  # keys of text
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "model.safetensors.index.json")
LONGEST_NAME = 200  # bytes; most systems have 255 for a name, and a temporary one is longer
# Where a rename fails though the file itself can be written: a file that is a mount point, as in
# containers, or one of a user's own in a folder that is not.
WRITTEN_IN_PLACE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


def check_output(file: Path) -> None:
    """Try whether ``replace_file`` could write a file, without changing anything.

    Raises:
        OSError: if it could not.
    """
    if (own := _find_descriptor(file)) is not None:
        if fcntl.fcntl(own, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "it is open for reading only")
        return
    found = _stat(file)
    if found is None and not _is_replaceable(file):
        raise FileNotFoundError(errno.ENOENT, "no such device")
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if found is not None and (stat.S_ISBLK(found.st_mode) or stat.S_ISSOCK(found.st_mode)):
        raise OSError(errno.EINVAL, "it is a disk or a socket")
    if found is not None and not os.access(file, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if _is_replaceable(file):
        target = Path(os.path.realpath(file))
        try:
            with temporary_folder(target) as folder:
                (folder / target.name).touch()
        except OSError as error:
            if found is None or error.errno not in WRITTEN_IN_PLACE:
                raise


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Create or replace a file atomically.

    Where the path is a link, the file that it leads to is replaced and the link stays. A device, a
    pipe and whatever else is no regular file gets the content written to it.

    Args:
        file: the path, whose folder exists.
        write: writes the content to a path that it is given, in a private folder.
    """
    if not _is_replaceable(file):
        _write_in_place(file, write)
        return
    target = Path(os.path.realpath(file))
    try:
        _remove_abandoned(target)
        with temporary_folder(target) as folder:
            made = folder / target.name
            write(made)
            with suppress(FileNotFoundError):
                shutil.copymode(target, made)
            sync_file(made)
            os.replace(made, target)
    except OSError as error:
        if error.errno not in WRITTEN_IN_PLACE or not os.access(target, os.W_OK):
            raise
        _write_in_place(file, write)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, atomically."""
    text = json.dumps(content, indent=4) + "\n"
    replace_file(file, lambda made: made.write_text(text, encoding="utf-8"))


def hide_paths(folder: Path) -> None:
    """Take paths of the machine that wrote them out of a model's JSON files, which get published.

    ``save_pretrained`` leaves some, such as ``_name_or_path``, and they tell a user's name.
    """
    for file in folder.glob("*.json"):
        if file.name not in VOCABULARIES and file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue  # of a source, where nothing needed to read it
            if (kept := _drop_paths(content)) != content:
                write_json(file, kept)


def _drop_paths(content: Any) -> Any:
    """JSON content without the entries whose values are local paths."""
    if not isinstance(content, dict):
        return content
    kept = {}
    for key, value in content.items():
        if SPOKEN.search(key):
            kept[key] = value
        elif isinstance(value, list):
            kept[key] = [_drop_paths(one) for one in value if not is_local_path(one, key)]
        elif not is_local_path(value, key):
            kept[key] = _drop_paths(value)
    return kept


def is_local_path(value: Any, key: str) -> bool:
    """Whether a value in a JSON file is a path on some machine, and not a Hub id or a word."""
    if not isinstance(value, str):
        return False
    names_file = re.search("(name_or_path|_file|_path|_dir|_folder)$", key)
    separated = "/" in value or "\\" in value
    foreign = not HUB_ID.fullmatch(value) or os.path.exists(value)
    return bool(ABSOLUTE.fullmatch(value) or (names_file and separated and foreign))


def sync_file(file: Path) -> None:
    """Wait until a file's content is on the disk."""
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _stat(file: Path) -> os.stat_result | None:
    """What a path leads to, None if that does not exist."""
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def _is_replaceable(file: Path) -> bool:
    """Whether another file can take a path's place: it is a regular file, or nothing yet.

    Not so in the system's folder of devices, nor what is another name of an open file.
    """
    found = _stat(file)
    if found is not None and not stat.S_ISREG(found.st_mode):
        return False
    return _find_descriptor(file) is None and Path(os.path.realpath(file.parent)) != Path("/dev")


def _find_descriptor(file: Path) -> int | None:
    """The open file of this process that a path such as /dev/stdout or /dev/fd/1 is a name of."""
    ours = {os.path.realpath(folder) for folder in ("/dev/fd", "/proc/self/fd")}
    path = file.absolute()
    for _ in range(40):  # links in a row, as the system allows
        folder = os.path.realpath(path.parent)
        if folder in ours and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder) / os.readlink(path)
    return None


def _write_in_place(file: Path, write: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / file.name
        write(made)
        if sys.stdout is not None:
            sys.stdout.flush()  # which may be the same file
        own = _find_descriptor(file)
        regular = own is None and (found := _stat(file)) is not None and stat.S_ISREG(found.st_mode)
        flags = os.O_WRONLY | os.O_NOCTTY | (os.O_TRUNC if regular else 0)
        with open(os.open(file, flags) if own is None else os.dup(own), "wb") as target:
            target.write(made.read_bytes())


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Make a locked folder beside a path, to be private until it or what is in it is moved there.

    It is removed at the end of the block. After a kill the next run to the same path removes it:
    the system has released the lock on it.

    Raises:
        OSError: if it cannot be made.
    """
    with suppress(FileNotFoundError):
        os.lstat(target)  # fails if there cannot be such a name
    with ExitStack() as locks:
        while True:
            folder = target.absolute().parent / f"{_make_prefix(target)}{secrets.token_hex(8)}"
            try:  # from here on a signal leaves nothing behind
                folder.mkdir(0o700)
                # A run that starts at this moment may take it for abandoned: it is not locked yet.
                if locks.enter_context(lock_folder(folder)) is not False and folder.is_dir():
                    yield folder
                    return
            finally:
                with ignore_signals():
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ignore_signals() -> Iterator[None]:
    """Let no signal break off what cleans up: many press Ctrl-C twice."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = [end for end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(end)]
    before = {end: signal.signal(end, signal.SIG_IGN) for end in ends}
    try:
        yield
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


def remove_abandoned(target: Path, flag: str) -> None:
    """Remove the temporary folders of runs that were killed while they wrote to a path.

    Raises:
        UserError: if a run is writing there; ``flag`` names the path in the message.
    """
    if not _remove_abandoned(target):
        raise UserError(f"another run is writing {target}: wait for it, or give another {flag}")


def _remove_abandoned(target: Path) -> bool:
    """Returns whether no other run is writing to the path."""
    name = re.compile(re.escape(_make_prefix(target)) + "[0-9a-f]{16}")
    alone = True
    with suppress(OSError):
        for folder in target.absolute().parent.iterdir():
            if name.fullmatch(folder.name):
                with lock_folder(folder) as ours:
                    alone &= ours is not False
                    if ours:
                        shutil.rmtree(folder, ignore_errors=True)
    return alone


def _make_prefix(target: Path) -> str:
    name = os.fsencode(target.name)
    short = target.name if len(name) <= LONGEST_NAME else hashlib.sha256(name).hexdigest()
    return f".{short}.partial-"


@contextmanager
def lock_folder(folder: Path) -> Iterator[bool | None]:
    """Lock a folder until the end of the block or of this process.

    Yields True if that succeeded, False if another process holds the lock, and None if nobody can
    tell: the file system has no locks, the folder has gone, or it is no folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    ours: bool | None = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        ours = False
    except OSError:
        ours = None
    try:
        yield ours
    finally:
        os.close(descriptor)
