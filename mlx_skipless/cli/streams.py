"""Standard input, output and error of a command, which never end it: whatever their encoding,
closed, full, or a pipe that nobody reads any more."""

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import UserError


class Stream:
    """Standard output or error that outlives what it cannot write; all else is the stream's own.

    Attributes:
        failure: why something could not be written, None if all could.
        stops: whether a reader that has left ends the command, as it does where what is printed is
            all that the command makes.
        closed_before: whether the stream was closed as the command began: what is written is lost.
    """

    def __init__(self, stream: Any, stops: bool):
        self._stream, self.stops = stream, stops
        self.failure: OSError | None = None
        self.closed_before = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; characters that the encoding lacks are replaced."""
        if self.closed_before and text:
            self.failure = self.failure or OSError(errno.EBADF, "it is closed")
        with self._outlive():
            try:
                self._stream.write(text)
            except UnicodeError:  # of encodings that replace nothing
                self._stream.reconfigure(encoding="ascii", errors="replace")
                self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Write what is buffered."""
        with self._outlive():
            self._stream.flush()

    @contextlib.contextmanager
    def _outlive(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            with contextlib.suppress(OSError):  # what is buffered would fail again at the end
                _redirect_to_nothing(self._stream.fileno())
            if self.stops and isinstance(error, BrokenPipeError):
                raise


def _redirect_to_nothing(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, descriptor)
    os.close(nothing)


@contextlib.contextmanager
def hold_streams() -> Iterator[Stream]:
    """Make the standard streams safe until the end of the block; yields standard output."""
    closed = _open_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        ascii_too = codecs.lookup(sys.stdin.encoding).name == "ascii"  # what C locales say
        sys.stdin.reconfigure(encoding="utf-8" if ascii_too else None, errors="strict")
    usual = sys.stdout, sys.stderr
    out = Stream(sys.stdout, stops=True)
    out.closed_before = 1 in closed
    sys.stdout, sys.stderr = out, Stream(sys.stderr, stops=False)
    try:
        yield out
    finally:
        out.stops = False
        out.flush()  # at the end of the process a failure would be a message of Python's
        sys.stdout, sys.stderr = usual


def _open_closed() -> set[int]:
    """Open nothing where a stream is closed; returns the numbers of those.

    Else the next file that is opened has its number, and gets what a library prints there.
    """
    closed = set()
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            closed.add(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    return closed


def read_input() -> str:
    """Read all of standard input.

    Raises:
        UserError: if it is no text.
    """
    try:
        return sys.stdin.read().removeprefix("\ufeff")  # which some editors begin with
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is no {sys.stdin.encoding} text ({error.reason}): PYTHONIOENCODING "
            "names another encoding"
        ) from error
