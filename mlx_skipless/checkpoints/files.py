"""Files that anyone may have made: read with care, and replaced whole or not at all."""

import json
import os
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError

SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")  # what is read besides weights
# The largest of the Hub are a few tens of MB.
CONFIG_BYTES = 64 << 20
TOKENIZER_BYTES = 256 << 20
TEMPLATES = "additional_chat_templates"  # transformers' folder of them
AT_ONCE = 16 << 20
AHEAD_BYTES = 1 << 30  # more might be gone again before its turn comes


def check_name(path: Path) -> None:
    """Refuse a path that is no Unicode: neither MLX nor transformers nor a model card takes it.

    Raises:
        UserError: if it is none.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} has a name that is not UTF-8: give it another") from error


def is_there(path: Path, most: int | None = None) -> bool:
    """Whether there is a file; ``most`` is the largest size that is believed.

    Raises:
        UserError: if what has its name is no regular file (one that blocks or never ends), leads
            nowhere or is too large.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing: put the file there") from None
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): check its permissions") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is no regular file: put the real one there")
    if most is not None and found.st_size > most:
        raise UserError(
            f"{path} has {found.st_size / 1e6:,.0f} MB, and a file of this kind {most / 1e6:.0f} "
            "at most: download it again"
        )
    return True


def check_small(folder: Path) -> None:
    """Check everything that is read of a model's folder besides its weights, a tokenizer first.

    Raises:
        UserError: as ``is_there`` does.
    """
    for pattern in SMALL:
        for file in folder.glob(pattern):
            if not file.name.startswith("."):
                is_there(file, TOKENIZER_BYTES)


def check_links(folder: Path, *, code: bool) -> None:
    """Refuse links out of a model's folder among what a result may take from it.

    A result may be uploaded, and a stranger's archive can hold a link to any file of its reader's.
    Of what a tokenizer is made transformers decides, so this is every file but weights and config:
    those may lie anywhere, since nothing gets further that does not parse as safetensors or as a
    known architecture, and folders of links to large weights are common. ``code``: Python files
    are taken, too.

    Raises:
        UserError: for a link that leads elsewhere.
    """
    for file in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")):
        kept = file.name == "config.json" or file.suffix == ".safetensors"
        if not (kept or file.is_dir() or (file.suffix == ".py" and not code)):
            check_inside(file, folder, f"{file} leads")


def check_inside(file: Path, folder: Path, what: str) -> None:
    """Refuse a file that lies outside a model's folder; ``what`` leads there, as the error says.

    The Hub's cache is a folder of links itself, to its own ``blobs``.
    """
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    target = Path(os.path.realpath(file))  # a link to itself is no error here
    if not target.is_relative_to(root) and target.parent != blobs:
        raise UserError(
            f"{what} out of its folder, to {target}, and would be copied into the result: if that "
            "is meant, put a copy in its place"
        )


def fill(path: Path, offset: int, into: Any) -> None:
    """Read so many bytes as a contiguous buffer has.

    Raises:
        UserError: if they cannot be had.
    """
    view = memoryview(into).cast("B")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            found = file.readinto(view)  # type: ignore[attr-defined]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): copy or download it again") from error
    if found < view.nbytes:
        raise UserError(f"{path} has become shorter since it was opened: copy or download it again")


def read_ahead(spans: Iterable[tuple[Path, int, int]]) -> None:
    """Have the system read spans of files (path, offset, bytes), so that they are at hand later.

    Returns at once; what cannot be read is found out then.
    """
    threading.Thread(target=_pass_over, args=(list(spans),), daemon=True).start()


def _pass_over(spans: list[tuple[Path, int, int]]) -> None:
    buffer, most = memoryview(bytearray(AT_ONCE)), AHEAD_BYTES
    for path, offset, left in spans:
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                while min(left, most) > 0 and (read := file.readinto(buffer[: min(left, most)])):
                    left, most = left - read, most - read
        except OSError:
            return


DEEPEST = 64  # levels of a config


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        UserError: if it is missing, malformed, no object, or too large or deep to be believed.
    """
    if not is_there(file, CONFIG_BYTES):
        raise UserError(f"no {file.name} in {file.parent}: give a Hugging Face model folder")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(read, dict):
        raise UserError(f"{file} holds no JSON object: download it again")
    if _deeper(read, DEEPEST):
        raise UserError(f"{file} has more than {DEEPEST} levels: download it again")
    return read


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects lie in one another beyond so many levels."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, dict | list) for one in level)


def write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=4) + "\n"
    replace_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` make a file and put it in place of ``file`` at once."""
    partial = file.with_name(f".partial-{file.name}")
    try:
        write(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
