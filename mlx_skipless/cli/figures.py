"""Figures that commands write, in the format that the file's suffix names."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .shared import open_output_file

FORMATS = ("png", "pdf", "svg")
Draw = Callable[[Callable[[Any, Path, str], None], Any], None]


@contextlib.contextmanager
def open_figure(flag: str, name: str | None) -> Iterator[Draw]:
    """Give a function that draws what it is given with a function of ``plots``, if a file is named.

    Args:
        flag: what names the file.
        name: the file, whose suffix says what is written there: .png, .pdf or .svg.

    Raises:
        UserError: for another suffix or a file that cannot be written, before the work.
    """
    form = "" if name is None else Path(name).suffix.lower().removeprefix(".")
    if name is not None and form not in FORMATS:
        raise UserError(f"{flag} {name}: give a name that ends in .png, .pdf or .svg")
    with open_output_file(flag, name) as put:
        yield lambda plot, content: put(lambda file: plot(content, file, form))
