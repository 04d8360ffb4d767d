"""Grids of cases: few of them by default, all with ``--thorough``."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest

thorough = pytest.mark.thorough


def pairs(*features: Any) -> set[Any]:
    """Each two of the features together, for `thin` to keep."""
    return {*itertools.combinations(enumerate(map(str, features)), 2)}


def product(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of values, of which all but a few that hold each pair are thorough."""
    return thin([*itertools.product(*axes)], lambda case: pairs(*case))


def thin(
    cases: Sequence[Any], features: Callable[[Any], Collection[Any]], *, whole: bool = False
) -> list[Any]:
    """Mark those cases as thorough that show nothing which the others do not.

    Args:
        cases: what one test is run with, each a tuple of its arguments or a single argument.
        features: what a case shows.
        whole: whether a tuple is a single argument.

    Returns:
        The cases in their order, as pytest's parameters.
    """
    shown = [{*features(case)} for case in cases]
    order = random.Random(0).sample(range(len(cases)), len(cases))
    kept: set[int] = set()
    seen: set[Any] = set()
    for least in range(max(map(len, shown), default=0), 0, -1):
        for i in order:
            if len(shown[i] - seen) >= least:
                kept.add(i)
                seen |= shown[i]
    marks = [() if i in kept else thorough for i in range(len(cases))]
    return [
        pytest.param(*(case if isinstance(case, tuple) and not whole else (case,)), marks=mark)
        for case, mark in zip(cases, marks, strict=True)
    ]


def only(few: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Mark all cases, single arguments, as thorough but those few."""
    return [case if case in few else pytest.param(case, marks=thorough) for case in cases]
