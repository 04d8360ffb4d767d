"""Signals that a run hears at the end of a step, where ending at once would lose the step."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import UserError

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Done = TypeVar("Done")


class Signals:
    """The signals that came, by number, in order; they ended nothing."""

    def __init__(self) -> None:
        self.came: list[int] = []

    def outlive(self, compute: Callable[[], Done]) -> Done:
        """Compute something, and again where a signal ended a compiler that MLX had started for it.

        MLX compiles kernels on a CPU. Ctrl-C and a hangup reach every process of a terminal, and
        what such a kernel computes fails with the compiler. What is computed must not have changed
        anything by then.
        """
        while True:
            before = len(self.came)
            try:
                return compute()
            except (RuntimeError, UserError):
                time.sleep(0.1)  # what ended the compiler may still be on its way to this process
                if len(self.came) == before:
                    raise


@contextlib.contextmanager
def hear_signals() -> Iterator[Signals]:
    """Note signals instead of ending, for as long as a block lasts.

    A second SIGINT or SIGTERM ends at once. SIGHUP never does: a session that ends sends more than
    one, and SIGTERM with it. In a thread none is heard.
    """
    found = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return

    def note(signum: int, frame: Any) -> None:
        if signum != signal.SIGHUP and {signal.SIGINT, signal.SIGTERM} & {*found.came}:
            raise KeyboardInterrupt
        found.came.append(signum)

    before = {
        which: signal.signal(which, note)
        for which in STOPS
        if which != signal.SIGHUP or signal.getsignal(which) != signal.SIG_IGN  # nohup's
    }
    try:
        yield found
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
