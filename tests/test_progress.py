"""Seconds by stage, on a clock of the test's own."""

import time

import pytest

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
