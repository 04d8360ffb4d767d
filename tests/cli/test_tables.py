"""Tables: no figure is cut, however narrow the terminal is."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mlx_skipless import convert
from mlx_skipless.architectures.shapes import MODELS
from mlx_skipless.checkpoints.output import write_json
from mlx_skipless.cli.analyze_tables import describe_analysis
from mlx_skipless.cli.architectures import tabulate_entries
from mlx_skipless.cli.bench_tables import tabulate_benchmark
from mlx_skipless.cli.convert import tabulate_plan
from mlx_skipless.cli.tables import Grid, format_count, join_layers
from mlx_skipless.evaluation.analysis import analyze
from mlx_skipless.evaluation.benchmark import Benchmark, Subject
from mlx_skipless.evaluation.catalogue import list_entries
from mlx_skipless.evaluation.findings import Dropped
from mlx_skipless.evaluation.timing import Case, Result, Spread
from mlx_skipless.removal.choices import RemovalCost

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


def fits(grid: Grid) -> list[str]:
    """The lines of a table on a terminal of 80 columns, which all fit."""
    console = Console(width=80, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    grid.show(console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80, lines
    return [" ".join(line.split()) for line in lines]


LARGE = "Mistral-7B-v0.1", "Command R (PaLM's block)"


@pytest.mark.parametrize(
    "name", [n if n in LARGE else pytest.param(n, marks=pytest.mark.thorough) for n in MODELS]
)
def test_large_models_fit_a_terminal(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", MODELS[name])
    report = convert(tmp_path / "config.json", dry_run=True, skipless=True, remove="auto")
    lines = fits(tabulate_plan(report.rows))
    layers = sum(row.name.startswith("layers.") for row in report.rows)
    shared = [line for line in lines if line.startswith("layers.")]
    counts = [
        re.match("layers.\\d+(?:\N{EN DASH}\\d+ \N{MULTIPLICATION SIGN} (\\d+))? ", x)
        for x in shared
    ]
    assert sum(int(one[1] or 1) for one in counts if one) == layers
    assert len(shared) <= 3  # the first layer may differ, and the last
    assert any(f"{report.rows[2].weights_before:,}" in line for line in shared)
    cost = RemovalCost(removed=1.2e-3, rounded=4.5e-3)
    fits(tabulate_plan([replace(row, condition=1e6, cost=cost) for row in report.rows]))
    found = analyze(tmp_path, config_only=True)
    drop = Dropped(tuple(range(layers)), 3.1234, 123456.78, found.weights, 14 * 10**9, 131_072)
    shown = [fits(one) for one in describe_analysis(replace(found, drops=(drop,)))
             if isinstance(one, Grid)]  # fmt: skip
    assert any("14.00 GB" in line for lines in shown for line in lines)


def test_like_layers_share_a_row() -> None:
    kinds = enumerate("aaabbaaba")
    rows = [("embed", "a"), *((f"layers.{i}", kind) for i, kind in kinds), ("head", "a")]
    joined = [(name.replace("\N{EN DASH}", "-").replace("\N{MULTIPLICATION SIGN}", "x"), cell)
              for name, cell in join_layers(rows)]  # fmt: skip
    assert joined == [
        ("embed", "a"), ("layers.0-2 x 3", "a"), ("layers.3-4 x 2", "b"), ("layers.5-6 x 2", "a"),
        ("layers.7", "b"), ("layers.8", "a"), ("head", "a"),
    ]  # fmt: skip
    apart = [("layers.0", "a"), ("layers.2", "a"), ("other.3", "a"), ("layers.1", "a")]
    assert join_layers(apart) == [[*row] for row in apart]


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (596_049_920, "596 M"), (999_950_000, "1,000 M"),
     (7_241_732_096, "7.24 B"), (46_702_792_704, "46.7 B"), (2 * 10**12, "2,000 B")],
)  # fmt: skip
def test_a_count_is_three_digits(number: int, shown: str) -> None:
    assert format_count(number) == shown


def test_measured_speeds_fit_a_terminal() -> None:
    """Of a large model on a fast machine, at the longest prompts, with a label of usual length."""
    fast, ratio = Spread(1234, 1200, 1300), Spread(1.18, 1.17, 1.19)
    label = "skipless without QP"
    result = Result(
        label, Case(16_384, 8, False), fast, Spread(0.5, 0.4, 0.6), fast, 10**10, 0.63, ratio, ratio
    )
    subject = Subject(label, "", 14 * 10**9, 14 * 10**9, 131_072)
    found = Benchmark("a GPU", 4e11, label, 5, 64, (subject,), (result,), ())
    for grid in tabulate_benchmark(found):
        assert any("skipless" in line for line in fits(grid))


@pytest.mark.thorough
def test_the_architectures_fit_a_terminal() -> None:
    lines = fits(tabulate_entries(list_entries()))
    assert len(lines) == len(MODELS) + 2
    assert "Mistral-7B-v0.1 7.24 B QP 14.8% 1.18 x +2.4%" in lines
