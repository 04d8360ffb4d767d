"""Tables: no figure is cut, however narrow the terminal is."""

import io

import pytest
from rich.console import Console

from mlx_skipless.cli.tables import Grid

ROWS = [
    ("layers.1", "q, p and a name of many words", "1,234,567,890", "1.00 (0.50..2.00)"),
    ("é" * 30, "", "1", ""),
]
TITLES = ("part", "goes", "weights\nthat go", "MB per token")


def shown(width: int, dense: bool) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    Grid(TITLES, ROWS, words=2, dense=dense).show(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("width", [10, 60, 80, 200])
def test_no_cell_is_cut(width: int, dense: bool) -> None:
    text = shown(width, dense)
    assert "…" not in text and text.count("é") == 30
    for figure in ("1,234,567,890", "1.00 (0.50..2.00)", "MB per token", "that go"):
        assert figure in text
    assert "many" in text and "words" in text
    if width == 200:
        assert len(text.splitlines()) == 4  # two of titles


def test_markdown() -> None:
    lines = Grid(TITLES, ROWS, words=2).markdown().splitlines()
    assert lines[:2] == ["| part | goes | weights that go | MB per token |", "|---|---|---:|---:|"]
    assert len(lines) == 4 and lines[2] == f"| {' | '.join(ROWS[0])} |"
