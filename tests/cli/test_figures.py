"""Figures are what their files' suffixes say."""

import re
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

from mlx_skipless import UserError, cli
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


def test_curves_write_what_their_suffix_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/training").mkdir(parents=True)
    log = '{"step": 1, "tokens": 64, "loss": 2.5}\n{"step": 2, "tokens": 128, "loss": 2.4}\n'
    (tmp_path / "run/training/log.jsonl").write_text(log)
    file = tmp_path / "x.pdf"
    assert cli.main(["curves", str(tmp_path / "run"), "--output", str(file)]) == 0
    assert file.read_bytes().startswith(b"%PDF-")
    assert cli.main(["curves", str(tmp_path / "run"), "--output", str(tmp_path / "x.jpg")]) == 1
    assert "--output" in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run", "x.pdf"]


def test_matplotlib_is_imported_where_something_is_drawn() -> None:
    """And nowhere else, as it takes long: no module of the package does when it is imported."""
    imported = re.compile(r"^(?:import|from) matplotlib", re.MULTILINE)
    drawn = re.compile(r"^ +(?:import|from) matplotlib", re.MULTILINE)
    texts = {
        file.name: file.read_text(encoding="utf-8")
        for file in (ROOT / "mlx_skipless").rglob("*.py")
    }
    assert not [name for name, text in texts.items() if imported.search(text)]
    assert [name for name, text in texts.items() if drawn.search(text)] == ["plots.py"]
