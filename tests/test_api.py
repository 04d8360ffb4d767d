"""The page on the Python interface can be made, and docstrings say what it needs."""

import dataclasses
import inspect
import re
import runpy
from typing import Any

import pytest
from commands import ROOT

import mlx_skipless

PAGE = runpy.run_path(str(ROOT / "tools/api.py"))
THINGS = [*PAGE["PUBLIC"], *PAGE["reached"]()]
FUNCTIONS = [thing for thing in THINGS if inspect.isfunction(thing)]


def test_the_page_has_all_that_is_public() -> None:
    headings = re.findall(r"^### (\S+)$", PAGE["document"](), re.MULTILINE)
    assert set(mlx_skipless.__all__) <= set(headings) and len(headings) == len(THINGS)


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__qualname__)
def test_a_docstring_names_every_parameter(thing: Any) -> None:
    """And no other; fields that are flags say themselves what they are."""
    docstring = inspect.cleandoc(thing.__doc__)
    items = re.findall(r"^ {4}(\w+(?:, \w+)*): \S", docstring, re.MULTILINE)
    named = {name for item in items for name in item.split(", ")} - {"UserError"}
    if dataclasses.is_dataclass(thing):
        named |= {one.name for one in dataclasses.fields(thing) if one.metadata.get("help")}
    elif inspect.isclass(thing):
        return  # an exception
    assert named == set(inspect.signature(thing).parameters)


@pytest.mark.parametrize("thing", FUNCTIONS, ids=lambda thing: thing.__qualname__)
def test_a_docstring_says_what_is_raised(thing: Any) -> None:
    assert "Raises:\n" in thing.__doc__ and "UserError: " in thing.__doc__
