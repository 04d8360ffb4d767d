"""Figures are what their files' suffixes say."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from mlx_skipless import UserError, cli
from mlx_skipless.cli.figures import open_figure, parse_width
from mlx_skipless.evaluation import plots
from mlx_skipless.evaluation.benchmark import Benchmark, Subject
from mlx_skipless.evaluation.findings import Analysis, Dropped, Layer
from mlx_skipless.evaluation.plots import Look, plot_analysis, plot_benchmark, plot_losses
from mlx_skipless.evaluation.timing import Case, Result, Spread

THOROUGH = pytest.mark.thorough
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


ANALYSIS = Analysis(
    "a/model", 1, {}, (), None, None, 1,
    tuple(
        Layer(i, {}, {"attention": 0.5 / (i + 1), "ffn": 0.1, "block": 0.2}, None,
              {"q": 10.0, "k": 20.0, "v": 30.0, "p": 4.0})
        for i in range(4)
    ),
    tuple(Dropped(tuple(range(i)), 1.0, 3.0 + i, 1, 1, 1) for i in range(4)),
    "t", (),
)  # fmt: skip
LOG = [{"step": n, "tokens": 64 * n, "loss": 5 / n, "validation_loss": 6 / n} for n in range(1, 9)]
LOSSES = {f"_a long name of a run, number {i}, and its $seed$": LOG for i in range(5)}


def plot_depths(curves: Any, file: Path, look: Look) -> None:
    plots.plot_curves(curves, file, look, xlabel="layers", ylabel="loss", xticks=[2, 4])


PLOTS = pytest.mark.parametrize(
    ("plot", "content"),
    [
        (plot_losses, LOSSES),
        (plot_benchmark, BENCHMARK),
        (plot_analysis, ANALYSIS),
        (plot_depths, {f"network {i}": {2: 3.0 + i, 4: 2.5 + i} for i in range(14)}),
    ],
    ids=["losses", "benchmark", "analysis", "curves"],
)


@pytest.mark.parametrize(
    "suffix", ["pdf", *(pytest.param(one, marks=THOROUGH) for one in STARTS if one != "pdf")]
)
@PLOTS
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


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written, drawn at the size that they have in print."""
    seen: list[Figure] = []
    write = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **options: Any) -> None:
        seen.append(self)
        write(self, *arguments, **options)
        self.drawn = self.get_tightbbox().extents  # type: ignore[attr-defined]

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def texts_of(figure: Figure) -> list[Text]:
    found: list[Any] = figure.findobj(lambda one: isinstance(one, Text))  # type: ignore[arg-type]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize(
    "size", ["column", pytest.param("page", marks=THOROUGH), pytest.param("5.5", marks=THOROUGH)]
)
@PLOTS
def test_a_figure_fits_its_place(
    size: str, plot: Any, content: Any, tmp_path: Path, figures: list[Figure]
) -> None:
    """As wide as asked, with text that can be read and that lies within it and on no other text."""
    width = parse_width(size)
    with open_figure("--plot", str(tmp_path / "a.svg"), width) as draw:
        draw(plot, content)
    figure: Any = figures[0]
    assert figure.get_size_inches()[0] == pytest.approx(width)
    text = (tmp_path / "a.svg").read_text()
    assert f'width="{72 * width:g}pt"' in text.replace(".0pt", "pt")
    assert all(one.get_fontsize() >= 7 for one in texts_of(figure))
    left, bottom, right, top = figure.drawn
    assert left >= -0.01 and bottom >= -0.01
    assert right <= width + 0.01 and top <= figure.get_size_inches()[1] + 0.01
    names = [one.get_text() for one in figure.legends[0].get_texts()]
    lines = [line for axes in figure.axes for line in axes.lines if plot != plot_benchmark]
    assert len(names) == len({*names}) == (2 if plot == plot_benchmark else len(lines))
    for axes in figure.axes:
        ticks = [one.get_window_extent() for one in axes.get_xticklabels() if one.get_text()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(ticks))


@pytest.mark.parametrize(
    "style",
    ["dark", *(pytest.param(one, marks=THOROUGH) for one in ("light", "transparent"))],
)
@PLOTS
def test_a_figure_can_be_read_on_its_ground(
    style: str, plot: Any, content: Any, tmp_path: Path, figures: list[Figure]
) -> None:
    """Text and lines stand out from what is behind them, and text is written as text."""
    with open_figure("--plot", str(tmp_path / "a.svg"), 3.4, style) as draw:
        draw(plot, content)
    (figure,) = figures
    grounds = {"light": [1.0], "dark": [0.01], "transparent": [1.0, 0.0]}[style]
    inks = [one.get_color() for one in texts_of(figure)]
    inks += [line.get_color() for axes in figure.axes for line in axes.lines]
    for ink, ground in itertools.product(inks, grounds):
        lighter, darker = sorted([shine(ink), ground], reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > (1.7 if ground == 1.0 else 2.4), ink
    text = (tmp_path / "a.svg").read_text()
    assert "<text" in text and "figure_1" in text
    behind = re.search(r'<g id="patch_1">.*?style="fill: (#?\w+)', text, re.DOTALL)
    assert behind is not None
    assert (
        behind[1].lower() == {"light": "#ffffff", "dark": "#0d1117", "transparent": "none"}[style]
    )


def shine(colour: Any) -> float:
    """The relative luminance of WCAG 2."""
    parts = [x / 12.92 if x <= 0.04 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)]
    return sum(x * w for x, w in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))


@pytest.mark.thorough
def test_the_same_figure_is_the_same_file_and_a_pdf_has_its_fonts(tmp_path: Path) -> None:
    for form in ("svg", "pdf", "png"):
        files = [tmp_path / f"{i}.{form}" for i in range(2)]
        for file in files:
            plot_losses({"run": LOG}, file, Look(form, 3.4))
        assert files[0].read_bytes() == files[1].read_bytes()
        assert files[0].read_bytes().startswith(STARTS[form])
    assert b"/FontFile2" in (tmp_path / "0.pdf").read_bytes()  # TrueType, which can be searched


@pytest.mark.parametrize("size", ["", "wide", "0", "-3", "1", "1e9", "nan", "inf"])
def test_widths_that_are_none(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["curves", "x", f"--figure-size={size}"]) == 2
    assert "give column, page or inches from 2 to 100" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["analyze", "bench"])
def test_every_command_that_draws_takes_the_same_flags(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And refuses a suffix before it looks for the model."""
    figure = [
        "--plot",
        str(tmp_path / "a.tiff"),
        "--figure-size",
        "column",
        "--figure-style",
        "dark",
    ]
    assert cli.main([command, str(tmp_path / "none"), *figure]) == 2
    assert "ends in .png, .pdf or .svg" in capsys.readouterr().err


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
    assert cli.main(["curves", str(tmp_path / "run"), "--output", str(tmp_path / "x.jpg")]) == 2
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
