"""Limits for a stranger's program that runs in this process: a chat template.

transformers runs templates in a sandbox, which keeps them from files and from Python's insides. It
lets them count to ten billion, and double a string forty times.
"""

import contextlib
import itertools
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from ..errors import UserError

OPENING = ("(", ",")  # before the ** of keyword arguments

SECONDS = 5.0  # of this thread's processor time; a chat of a thousand turns takes a tenth of one
_hold = threading.RLock()  # of the process's limit
LOOK_EVERY = 64  # lines and calls
MEMORY = 4 << 30  # bytes beyond what the process has
MEMORY_MAP = Path("/proc/self/statm")  # Linux alone limits what a process may map


def check_template(template: str, what: str) -> None:
    """Refuse a template with what cannot be interrupted; ``what`` begins the message.

    Raises:
        UserError: if it raises a number to a power.
    """
    before = ""
    try:
        for _, kind, text in jinja2.Environment().lex(template):
            if text == "**" and kind == "operator" and before not in OPENING:
                raise UserError(f"{what} raises a number to a power, which no chat needs")
            before = text if kind != "whitespace" else before
    except jinja2.TemplateError:
        return  # whoever renders it says what is wrong


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """Bound the time of Python code and, on Linux, its memory; ``what`` begins the message.

    Raises:
        UserError: if it takes more.
    """
    try:
        with _limit_memory(), _limit_time(what):
            yield
    except MemoryError as error:
        raise UserError(f"{what} takes more than {MEMORY >> 30} GB of memory") from error


@contextlib.contextmanager
def _limit_time(what: str) -> Iterator[None]:
    end, events = time.thread_time() + SECONDS, itertools.count(1)

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if not next(events) % LOOK_EVERY and time.thread_time() > end:
            sys.settrace(before)
            raise UserError(f"{what} takes more than {SECONDS:g} seconds")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def _limit_memory() -> Iterator[None]:
    with _hold:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        try:
            pages = int(MEMORY_MAP.read_text().split()[0])
        except (OSError, ValueError, IndexError):
            yield
            return
        most = pages * resource.getpagesize() + MEMORY
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
