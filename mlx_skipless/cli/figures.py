"""Figures that commands write, in the format that the file's suffix names."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BadArgument
from .shared import open_output_file

FORMATS = ("png", "pdf", "svg")
STYLES = ("light", "dark", "transparent")
WIDTHS = {"column": 3.4, "page": 7.0}  # inches
NARROWEST, WIDEST = 2.0, 100.0
Draw = Callable[[Callable[[Any, Path, Any], None], Any], None]


def add_figure_arguments(
    parser: argparse.ArgumentParser, flag: str, what: str, default: str | None = None
) -> None:
    """Add the flag that names a figure's file, and those that say how to draw it."""
    parser.add_argument(
        flag, default=default, metavar="FILE",
        help=f"{what} there, as .png, .pdf or .svg" + (f" (default: {default})" if default else ""),
    )  # fmt: skip
    parser.add_argument(
        "--figure-size", type=parse_width, metavar="WIDTH",
        help="column (3.4 inches), page (7 inches) or a number of inches, with fonts to be read at "
        "that size (default: for a screen)",
    )  # fmt: skip
    parser.add_argument(
        "--figure-style", choices=STYLES, default=STYLES[0],
        help="the figure's ground; a transparent one suits light and dark (default: %(default)s)",
    )  # fmt: skip


def parse_width(text: str) -> float:
    """The inches that "column", "page" or a number stands for."""
    try:
        width = WIDTHS[text] if text in WIDTHS else float(text)
    except ValueError:
        width = 0.0
    if not NARROWEST <= width <= WIDEST:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give column, page or inches from {NARROWEST:g} to {WIDEST:g}"
        )
    return width


def check_suffix(flag: str, name: str) -> str:
    """Return the format that the suffix of a figure's file names.

    Raises:
        UserError: if it names none.
    """
    form = Path(name).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise BadArgument(f"{flag} {name}: give a name that ends in .png, .pdf or .svg")
    return form


@contextlib.contextmanager
def open_figure(
    flag: str,
    name: str | None,
    width: float | None = None,
    style: str = STYLES[0],
    out: str | None = None,
) -> Iterator[Draw]:
    """Give a function that draws what it is given with a function of ``plots``, if a file is named.

    Args:
        flag: what names the file.
        name: the file, whose suffix says what is written there: .png, .pdf or .svg.
        width: in inches; None: for a screen.
        style: "light", "dark" or "transparent".
        out: a folder that the command makes, in which no figure can be.

    Raises:
        UserError: for another suffix or a file that cannot be written, before the work.
    """
    form = "png" if name is None else check_suffix(flag, name)

    def draw(plot: Callable[[Any, Path, Any], None], content: Any) -> None:
        from ..evaluation.plots import Look

        put(lambda file: plot(content, file, Look(form, width, style)))

    with open_output_file(flag, name, out) as put:
        yield draw
