"""What a user types: messages of one line or several, and the lines of earlier sessions.

``"\"\"`` opens a message of several lines and ends it. Where readline knows bracketed paste, pasted
lines are one message, too.
"""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

QUOTES = '"""'
REMEMBERED = 1000  # lines
LARGEST = 1 << 20  # bytes of them


def read_message() -> str:
    """Read a message from the terminal, stripped; halves of characters are replaced.

    Raises:
        EOFError: at the end of the input.
        UnicodeDecodeError: for bytes that are no text in the terminal's encoding.
    """
    line = _read_line("> ")
    if not line.lstrip().startswith(QUOTES):
        return line.strip()
    lines = [line.lstrip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(_read_line("... "))
    return "\n".join(lines).rstrip().removesuffix(QUOTES).strip()


def _read_line(prompt: str) -> str:
    if not sys.stdout.isatty():  # input() would write it there, among the answers
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt).encode(errors="replace").decode()


@contextlib.contextmanager
def edit_lines() -> Iterator[None]:
    """Let ``input`` edit lines where this Python can, with those of earlier sessions.

    What cannot be read or written is left alone without a word: history is a convenience.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    if os.environ.get("TERM", "dumb") != "dumb":
        with contextlib.suppress(Exception):  # libedit speaks another language
            readline.parse_and_bind("set enable-bracketed-paste on")
    # Not readline's own reading and writing: each library has its format.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        with _open_history(os.O_RDONLY) as file:
            lines = file.read(LARGEST).decode(errors="replace").splitlines()
        for line in filter(str.isprintable, lines):
            readline.add_history(line)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            count = readline.get_current_history_length()
            typed = [readline.get_history_item(i + 1) or "" for i in range(count)][-REMEMBERED:]
            plain = ("".join(c if c.isprintable() else " " for c in line) for line in typed)
            _write_history("".join(f"{line}\n" for line in plain if line.strip()))


def find_history() -> Path:
    """Find where a user's lines are kept: beside what other programs remember of a session.

    Raises:
        RuntimeError: if the user has no home.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local/state"
    return folder / "mlx-skipless" / "history"


def _open_history(flags: int) -> BinaryIO:
    """Open the file of earlier lines; OSError if it is something else (a pipe would block)."""
    descriptor = os.open(find_history(), flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    file = open(descriptor, "rb" if flags == os.O_RDONLY else "wb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError("no regular file")
    return file


def _write_history(text: str) -> None:
    """Write the lines for this user's eyes only."""
    find_history().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _open_history(os.O_WRONLY | os.O_CREAT) as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate()
        file.write(text.encode())
