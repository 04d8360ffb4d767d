"""How long work tells that it goes on, and where its time goes."""

import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # stage, done, total
Steps = Callable[[int, int], None]  # done, total, of one stage


def tell_part(progress: Steps, at: int, count: int) -> Steps:
    """Make what tells of one of ``count`` parts as long as each other, of which ``at`` are done."""
    return lambda done, total: progress(at * total + done, count * total)


class Stopwatch:
    """A ``Progress`` that passes on what it is told and adds up each stage's seconds.

    A stage runs from when it is first told of until it is done or another begins; time between
    stages is nobody's.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self._running: str | None = None
        self._since = 0.0
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds.setdefault(stage, 0.0)
        if self._running is not None:
            self.seconds[self._running] += now - self._since
        self._running, self._since = (stage if done < total else None), now
        self._progress(stage, done, total)
