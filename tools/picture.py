"""Draws the README's picture: two blocks of a skipless transformer before and after a removal.

    python tools/picture.py docs/removal.svg

Q of each block moves into the matrices on both sides of it, P into the matrices behind it. The
suffix of the file decides its format. In a column there is one block.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from mlx_skipless.cli.figures import add_figure_arguments, check_suffix
from mlx_skipless.evaluation.plots import NARROW, Look

KEPT, GONE, CHANGED, LINE = "#DCE6F2", "#F6C9A8", "#BFE3D0", "#44505C"
ARROW = "#7B8794"  # between matrices, on light and on dark
WIDTH, HEIGHT = 1.1, 0.62  # of a matrix
BLOCK = 8.8  # from one block to the next
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
Q, K, V = 1.0, 0.0, -1.0  # heights of the three ways into attention


def draw_matrix(
    axes: Any, x: float, y: float, text: str, colour: str, width: float = WIDTH
) -> None:
    """A matrix: a box with its name, centred on (x, y)."""
    corner = (x - width / 2, y - HEIGHT / 2)
    dashed = "--" if colour == GONE else "-"
    axes.add_patch(
        FancyBboxPatch(
            corner, width, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.1",
            facecolor=colour, edgecolor=LINE, linewidth=1, linestyle=dashed,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", color="black")


def draw_arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """The stream's way from one place to another."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, color=ARROW, linewidth=1,
            shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def draw_move(axes: Any, start: tuple[float, float], end: tuple[float, float], bend: float) -> None:
    """A removed matrix on its way into a neighbour."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
            mutation_scale=12, color="#C4561B", linewidth=1.6, linestyle=(0, (3, 2)),
        )
    )  # fmt: skip


def draw_block(axes: Any, x: float, after: bool) -> None:
    """One block, from the matrix before it (O of the block before) to the FFN's activation."""
    half = WIDTH / 2
    draw_matrix(axes, x, 0, "O·Q" if after else "O", CHANGED if after else KEPT)
    for y, name in ((Q, "Q"), (K, "Q⁻¹K" if after else "K"), (V, "Q⁻¹V" if after else "V")):
        gone = name == "Q"
        start, end = (x + half + 0.35, y), (x + 4.05, y)
        axes.plot([x + half + 0.35, x + half + 0.35], [0, y], color=ARROW, linewidth=1)
        if gone and after:
            draw_arrow(axes, start, end)
            continue
        draw_arrow(axes, start, (x + 2.2 - half - 0.02, y))
        draw_matrix(axes, x + 2.2, y, name, CHANGED if after else GONE if gone else KEPT)
        draw_arrow(axes, (x + 2.2 + half + 0.02, y), end)
    axes.plot([x + half, x + half + 0.35], [0, 0], color=ARROW, linewidth=1)
    axes.add_patch(
        FancyBboxPatch(
            (x + 4.1, -1.35), 0.75, 2.7, boxstyle="round,pad=0.02,rounding_size=0.15",
            facecolor="white", edgecolor=LINE, linewidth=1,
        )
    )  # fmt: skip
    axes.text(x + 4.475, 0, "attention", rotation=90, ha="center", va="center", color="black")
    if after:
        draw_arrow(axes, (x + 4.9, 0), (x + 6.45, 0))
    else:
        draw_arrow(axes, (x + 4.9, 0), (x + 5.3, 0))
        draw_matrix(axes, x + 5.75, 0, "P", GONE, 0.85)
        draw_arrow(axes, (x + 6.2, 0), (x + 6.9 - 0.45, 0))
    draw_matrix(axes, x + 6.95, 0, "P·M" if after else "M", CHANGED if after else KEPT, 0.95)
    axes.plot([x + 7.45, x + 7.6], [0, 0], color=ARROW, linewidth=1)
    axes.add_patch(Circle((x + 7.78, 0), 0.19, facecolor="white", edgecolor=LINE, linewidth=1))
    axes.text(x + 7.78, -0.02, SIGMA, ha="center", va="center", color="black")
    draw_arrow(axes, (x + 7.97, 0), (x + BLOCK - half - 0.02, 0))


def draw(file: Path, look: Look) -> None:
    """Draw both networks, one above the other."""
    width = look.width or 12.0
    blocks = 1 if width < NARROW else 2
    extent = blocks * BLOCK + 2.6
    settings: Any = look.parameters() | {"font.size": max(6.5, min(12.0, 20 * width / extent))}
    settings["axes.titlesize"] = settings["font.size"]
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, 9 * width / extent), layout="constrained")
        for axes, after in zip(figure.subplots(2, 1), (False, True), strict=True):
            draw_network(axes, blocks, after)
        metadata = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[look.form]
        figure.savefig(file, format=look.form, dpi=300 if look.width else 120, metadata=metadata)


def draw_network(axes: Any, blocks: int, after: bool) -> None:
    """Draw some blocks and the matrix behind them, whole or without Q and P."""
    for i in range(blocks):
        draw_block(axes, i * BLOCK, after)
    draw_matrix(axes, blocks * BLOCK, 0, "O", KEPT)
    draw_arrow(axes, (-1.1, 0), (-WIDTH / 2 - 0.02, 0))
    draw_arrow(axes, (blocks * BLOCK + WIDTH / 2, 0), (blocks * BLOCK + 1.1, 0))
    for x in [] if after else [i * BLOCK for i in range(blocks)]:
        draw_move(axes, (x + 2.2, Q + 0.36), (x, 0.36), 0.35)
        draw_move(axes, (x + 2.75, Q), (x + 2.75, K + 0.1), -0.7)
        draw_move(axes, (x + 2.75, Q + 0.1), (x + 2.75, V), -0.8)
        draw_move(axes, (x + 5.75, 0.36), (x + 6.95, 0.36), -0.6)
    what = "two blocks without skips" if blocks > 1 else "a block without skips"
    axes.set_title(
        "After: 15 % fewer weights in Mistral-7B's shape, and the same function"
        if after
        else f"Before: {what} (M: gate and up, {SIGMA}: SwiGLU, O: down)",
        loc="left",
    )  # fmt: skip
    axes.set(xlim=(-1.3, blocks * BLOCK + 1.3), ylim=(-1.6, 1.9), aspect="equal")
    axes.axis("off")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_figure_arguments(parser, "file", "draw it")
    given = parser.parse_args()
    form = check_suffix("FILE", given.file)
    draw(Path(given.file), Look(form, given.figure_size, given.figure_style))
