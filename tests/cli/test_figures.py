"""Figures are what their files' suffixes say."""

from pathlib import Path
from typing import Any

import pytest

from mlx_skipless import UserError
from mlx_skipless.cli.figures import open_figure
from mlx_skipless.evaluation.benchmark import Benchmark, Case, Result, Spread, Subject
from mlx_skipless.evaluation.plots import plot_benchmark, plot_losses

STARTS = {"png": b"\x89PNG\r\n", "PNG": b"\x89PNG\r\n", "pdf": b"%PDF-", "svg": b"<?xml"}
SPEED = Spread(2, 1, 3)
BENCHMARK = Benchmark(
    "a $device$", 1e9, "mlx-lm llama", 1, 1,
    (Subject("mlx-lm llama", "", 1, 1, 1), Subject("ours", "", 1, 1, 1)),
    tuple(
        Result(label, Case(8, n, alone), None, None, SPEED, 1, 0.5, None, ratio)
        for n in (1, 2)
        for alone in (False, True)
        for label, ratio in (("mlx-lm llama", None), ("ours", SPEED))
    ),
    (),
)  # fmt: skip


@pytest.mark.parametrize("suffix", STARTS)
@pytest.mark.parametrize(
    ("plot", "content"),
    [
        (plot_losses, {"run": [{"step": 1, "tokens": 64, "loss": 2.5, "validation_loss": 3}]}),
        (plot_benchmark, BENCHMARK),
    ],
    ids=["losses", "benchmark"],
)
def test_a_suffix_says_what_is_written(
    suffix: str, plot: Any, content: Any, tmp_path: Path
) -> None:
    file = tmp_path / f"a.b.{suffix}"
    with open_figure("--plot", str(file)) as draw:
        draw(plot, content)
    assert file.read_bytes().startswith(STARTS[suffix])
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", ".png", "a.png.txt", "a.eps"])
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    file = str(tmp_path / name)
    with pytest.raises(UserError) as refusal, open_figure("--output", file):
        pytest.fail("the work has begun")
    assert str(refusal.value) == f"--output {file}: give a name that ends in .png, .pdf or .svg"
    assert not any(tmp_path.iterdir())


def test_no_figure_is_drawn_unasked() -> None:
    with open_figure("--plot", None) as draw:
        draw(pytest.fail, "drawn")
