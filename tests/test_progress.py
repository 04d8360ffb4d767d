"""Seconds by stage and bars, on a clock of the test's own."""

import io
import re
import sys
import time

import pytest
from rich.console import Console

from mlx_skipless.cli import shared
from mlx_skipless.progress import Stopwatch


def test_stages_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that begins within another ends it; what is between two is nobody's."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    told: list[tuple[str, int, int]] = []
    stopwatch = Stopwatch(lambda *stage: told.append(stage))
    events = [
        (1, ("a", 0, 2)), (3, ("a", 1, 2)), (6, ("a", 2, 2)), (10, ("b", 0, 3)), (15, ("c", 0, 1)),
        (21, ("c", 1, 1)), (28, ("a", 0, 1)), (36, ("a", 1, 1)), (45, ("d", 0, 0)),
    ]  # fmt: skip
    for moment, event in events:
        now = float(moment)
        stopwatch(*event)
    assert stopwatch.seconds == {"a": 5 + 8, "b": 5, "c": 6, "d": 0}
    assert [*stopwatch.seconds] == ["a", "b", "c", "d"]
    assert told == [event for _, event in events]


def test_bars_tell_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the steps so far, though each takes minutes; also resumed and begun anew."""
    now, screen = 0.0, io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, get_time=lambda: now)
    monkeypatch.setattr(shared, "make_stderr", lambda: console)
    output = shared.Output(Console(quiet=True), False, False, lambda content: None)
    printed = io.StringIO()
    monkeypatch.setattr(printed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", printed)
    with output.progress() as progress:
        output.say("a line")
        for stage, seconds, events in (
            ("measuring removals", 100, ((0, 10), (1, 10), (2, 10), (3, 10))),  # 7 are left
            ("training", 2, ((500, 1000), (501, 1000), (502, 1000))),  # 498, not two seconds
            ("fitting", 5, ((0, 3), (1, 3), (2, 3), (3, 3), (0, 3), (1, 3), (2, 3))),
        ):
            for event in events:
                progress(stage, *event)
                now += seconds
    last = screen.getvalue().split("measuring removals")[-1]
    bars = [line for line in re.sub(r"\x1b\[[0-9;?]*\w", "", last).splitlines() if line.strip()]
    assert [line.split()[-2] for line in bars] == ["0:11:40", "0:16:36", "0:00:05"]
    assert all(len(line) <= 80 for line in bars)
    assert "a line\n" in screen.getvalue() and printed.getvalue() == ""


def test_bars_leave_standard_output_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is a file or a pipe, what is printed goes there."""
    screen, written = io.StringIO(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(shared, "make_stderr", lambda: console)
    monkeypatch.setattr(sys, "stdout", written)
    output = shared.Output(Console(quiet=True), False, False, lambda content: None)
    with output.progress() as progress:
        progress("steps", 1, 2)
        output.say("a line")
    assert written.getvalue() == "a line\n" and "a line" not in screen.getvalue()
    assert "steps" in screen.getvalue()
