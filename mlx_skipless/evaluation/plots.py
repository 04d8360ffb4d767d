"""All figures: losses of training runs, an analysis, a benchmark, curves of the tables' scripts.

Matplotlib is imported by the functions that draw, because it takes long to load and most commands
draw nothing.
"""

import contextlib
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..network.wiring import LETTERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .benchmark import Benchmark
    from .findings import Analysis
    from .timing import Result, Spread

DPI = 120  # of a PNG of the usual size; a narrower one, for print, has more
# Okabe and Ito's colours, told apart by most colour-blind readers, and seven more. The last is ink.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999933", "#BB5588",
    "#44AA99", "#AA4499", "#6699CC", "C0",
)  # fmt: skip
# Curves and bars can be told apart without their colours, too.
MARKERS = "osD^"
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx")
# The colours of text and lines, and of what is behind them.
STYLES = {
    "light": ("#000000", "#FFFFFF"),
    "dark": ("#E6E6E6", "#0D1117"),
    "transparent": ("#808080", "none"),
}
NARROW = 5.0  # inches, of a column
PANEL = 2.8  # inches that a panel needs
HANDLE = 9  # letters' widths that a line of a legend has beside its letters


@dataclass(frozen=True)
class Look:
    """How a figure is written.

    Attributes:
        form: "png", "pdf" or "svg".
        width: in inches; None: as wide as what it shows, for a screen.
        style: "light", "dark", or "transparent", which is for either ground.
    """

    form: str = "png"
    width: float | None = None
    style: str = "light"

    @property
    def font_size(self) -> float:
        """Points; a figure that is as wide as a column or a page is printed as it is."""
        if self.width is None:
            return 10.0
        return 8.0 if self.width < NARROW else 9.0

    def parameters(self) -> dict[str, Any]:
        """Matplotlib's settings: text stays text, fonts, colours."""
        ink, ground = STYLES[self.style]
        size = self.font_size
        inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        return {
            "svg.fonttype": "none",
            "svg.hashsalt": "mlx-skipless",  # the same figure is the same file
            "pdf.fonttype": 42,
            "font.family": "sans-serif",
            "font.size": size,
            "axes.titlesize": size,
            "figure.titlesize": size,
            "legend.fontsize": size - 1,
            "legend.frameon": False,
            "xtick.labelsize": size - 1,
            "ytick.labelsize": size - 1,
            "lines.linewidth": 1.0 if size < 9 else 1.5,
            "lines.markersize": 3.0 if size < 9 else 4.0,
            "grid.alpha": 0.3,
            **dict.fromkeys(inked, ink),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), ground),
        }


SCREEN = Look()


@contextlib.contextmanager
def open_panels(
    file: Path, look: Look, widths: Sequence[float], height: float
) -> "Iterator[tuple[Figure, list[Axes]]]":
    """Make a figure of panels, side by side or below each other where that is too narrow.

    It is written when the block ends, with a legend below it of all that has a label.

    Args:
        file: the file to write.
        look: how.
        widths: of the panels, in inches, if there is room for all.
        height: of a panel so wide, in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    whole = look.width or sum(widths)
    columns = len(widths) if look.width is None else max(1, int(whole / PANEL))
    columns = min(columns, len(widths))
    rows = -(-len(widths) // columns)
    height *= min(1.0, max(0.55, whole / columns / max(widths)))
    settings: Any = look.parameters()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(whole, rows * height), layout="constrained")
        grid = figure.subplots(
            rows, columns, squeeze=False, width_ratios=widths if rows == 1 else None
        )
        axes = [*grid.flat]
        for empty in axes[len(widths) :]:
            empty.remove()
        yield figure, axes[: len(widths)]
        _add_legend(figure, look)
        date = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[look.form]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font has not
            dpi = DPI if look.width is None else 300
            figure.savefig(file, format=look.form, dpi=dpi, metadata=date)


def _add_legend(figure: "Figure", look: Look) -> None:
    """Add a legend below all panels, each label once; the figure grows by its lines."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    size = look.font_size - 1
    width, height = figure.get_size_inches()
    fits = int(width * 72 / (0.6 * size)) - HANDLE
    labels = [textwrap.fill(label, max(8, fits)) for label in entries]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(4, len(labels), (fits + HANDLE) // (longest + HANDLE)))
    lines = sum(
        max(1 + label.count("\n") for label in labels[i : i + columns])
        for i in range(0, len(labels), columns)
    )
    figure.set_size_inches(width, height + max(0, lines - 2) * 1.5 * size / 72)
    figure.legend([*entries.values()], labels, loc="outside lower center", ncols=columns)


def plot_curves(
    curves: Mapping[str, Mapping[float, float]],
    file: Path,
    look: Look = SCREEN,
    **labels: Any,
) -> None:
    """Draw curves, one for each name.

    Args:
        curves: heights by place, by the name that the legend gives them.
        file: the file to write.
        look: how to write it.
        labels: what ``Axes.set`` takes: "xlabel", "ylabel", "yscale", "xticks".
    """
    with open_panels(file, look, [8.0], 5.0) as (_, (axes,)):
        draw_curves(axes, curves, look, **labels)


def draw_curves(
    axes: "Axes", curves: Mapping[str, Mapping[float, float]], look: Look, **labels: Any
) -> None:
    """Draw curves into a panel; the arguments are those of ``plot_curves``."""
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot([*curve], [*curve.values()], label=quote(name), **_distinguish(i, look))
    axes.set(**labels)
    axes.grid()


def _distinguish(i: int, look: Look) -> dict[str, Any]:
    """What tells the curve of a number from the others."""
    colour = COLOURS[i % len(COLOURS)]
    return {
        "color": STYLES[look.style][0] if colour == "C0" else colour,
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
    }


def plot_losses(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], file: Path, look: Look = SCREEN
) -> None:
    """Draw the losses of training runs against the tokens that they saw.

    Of runs of ``heal`` the losses are KL, and the distances before and after count as evaluations.

    Args:
        runs: events of each run's log by the name it gets in the figure; training losses are drawn
            as lines, losses of held-out text as dots on them.
        file: the file to write.
        look: how to write it.
    """
    with open_panels(file, look, [8.0], 5.0) as (_, (axes,)):
        shown: list[float] = []
        for i, (name, events) in enumerate(runs.items()):
            shown += _draw_run(quote(name), events, _distinguish(i, look), axes)
        healed = any("before" in event for events in runs.values() for event in events)
        what = "KL" if healed else "loss"
        axes.set(xlabel="tokens, millions", ylabel=f"{what}, nats per token")
        if shown:
            axes.set_ylim(min(shown) - 0.05, max(*shown, min(shown) + 0.5) + 0.05)
        axes.grid()


def _draw_run(
    name: str, events: Sequence[Mapping[str, Any]], look: Mapping[str, Any], axes: "Axes"
) -> list[float]:
    """Draw one run; returns the losses that must be seen: the first ones would flatten the rest."""
    # Logs of older versions say the tokens of the training losses alone.
    known = (e["tokens"] / e["step"] for e in events if "tokens" in e and e["step"])
    per_step = next(known, 1.0)
    losses: dict[float, float] = {}
    held_out: dict[float, float] = {}
    for event in events:
        x = event.get("tokens", event["step"] * per_step) / 1e6
        if "loss" in event:
            losses[x] = event["loss"]
        if "validation_loss" in event:
            held_out[x] = event["validation_loss"]
        for when in ("before", "after"):
            if when in event:
                held_out[x] = event[when]["kl"]
    if losses:
        axes.plot(
            [*losses], [*losses.values()], alpha=0.55, label=f"{name}, training",
            color=look["color"], linestyle=look["linestyle"],
        )  # fmt: skip
    if held_out:
        last = [*held_out.values()][-1]
        axes.plot([*held_out], [*held_out.values()], label=f"{name}, held out: {last:.3f}", **look)
    begun = max(losses, default=0.0) / 10
    return [*held_out.values(), *(loss for x, loss in losses.items() if x >= begun)]


def plot_analysis(analysis: "Analysis", file: Path, look: Look = SCREEN) -> None:
    """Draw what was measured: importance, perplexity against drops, condition numbers.

    Args:
        analysis: an analysis with at least one of these.
        file: the file to write.
        look: how to write it.
    """
    from matplotlib.ticker import MaxNLocator

    panels: list[Callable[[Analysis, Axes, Look], None]] = []
    if analysis.layers[0].importance is not None:
        panels.append(_draw_importance)
    if analysis.drops:
        panels.append(_draw_drops)
    if any(one.condition for one in analysis.layers):
        panels.append(_draw_conditions)
    with open_panels(file, look, [5.2] * len(panels), 4.2) as (figure, axes):
        for draw, ax in zip(panels, axes, strict=True):
            draw(analysis, ax, look)
            ax.grid()
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(quote(Path(analysis.source).name))


def _draw_importance(analysis: "Analysis", ax: "Axes", look: Look) -> None:
    curves = {
        label: {one.layer: (one.importance or {})[part] for one in analysis.layers}
        for part, label in (("attention", "attention"), ("ffn", "FFN"))
    }
    ax.set(xlabel="layer", ylabel="1 - cosine", title="importance")
    _draw_curves(curves, 0, ax, look)


def _draw_drops(analysis: "Analysis", ax: "Axes", look: Look) -> None:
    perplexity = {len(one.layers): one.perplexity for one in analysis.drops or ()}
    ax.set(xlabel="attentions dropped, least important first", ylabel="perplexity")
    ax.set_title("what drops cost")
    _draw_curves({"perplexity without attentions": perplexity}, 2, ax, look)


def _draw_conditions(analysis: "Analysis", ax: "Axes", look: Look) -> None:
    curves = {
        letter.upper(): {one.layer: (one.condition or {}).get(letter) for one in analysis.layers}
        for letter in LETTERS
    }
    ax.set(xlabel="layer", ylabel="condition number", title="conditioning")
    _draw_curves(curves, 3, ax, look)


def _draw_curves(
    curves: Mapping[str, Mapping[int, float | None]], first: int, ax: "Axes", look: Look
) -> None:
    """Draw named curves on a scale of whole decades, with gaps where there is no number.

    The first one looks as the curve of number ``first``.
    """
    shown: list[float] = []
    for i, (label, values) in enumerate(curves.items()):
        finite = {
            x: y for x, y in values.items() if y is not None and math.isfinite(y) and y > 0
        }  # fmt: skip
        if not finite:
            continue
        shown += finite.values()
        gapped = [finite.get(x, math.nan) for x in values]
        ax.plot([*values], gapped, label=label, **_distinguish(first + i, look))
    if shown:
        low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
        ax.set(yscale="log", ylim=(10.0**low, 10.0 ** max(high, low + 1)))


def plot_benchmark(benchmark: "Benchmark", file: Path, look: Look = SCREEN) -> None:
    """Draw tokens per second as bars, in one panel for prompts and one for decoding.

    Args:
        benchmark: a benchmark with at least one result.
        file: the file to write.
        look: how to write it.
    """
    panels: dict[str, list[tuple[Result, Spread, Spread | None]]] = {
        "prompt tokens/s": [
            (one, one.prompt_tps, one.prompt_ratio)
            for one in benchmark.results
            if one.prompt_tps is not None
        ],
        "decode tokens/s": [(one, one.decode_tps, one.decode_ratio) for one in benchmark.results],
    }
    panels = {title: bars for title, bars in panels.items() if bars}
    widths = [max(4.0, 0.6 * len(bars) + 1.5) for bars in panels.values()]
    with open_panels(file, look, widths, 4.2) as (figure, axes):
        for (title, bars), ax in zip(panels.items(), axes, strict=True):
            _draw_bars(bars, [subject.label for subject in benchmark.subjects], ax, look)
            ax.set(title=title)
        figure.suptitle(quote(benchmark.device))


def _draw_bars(
    bars: "Sequence[tuple[Result, Spread, Spread | None]]",
    labels: Sequence[str],
    ax: "Axes",
    look: Look,
) -> None:
    """Draw a group of bars for each case, from 0 to the median, with its spread and its ratio."""
    cases = [*dict.fromkeys(one.case for one, _, _ in bars)]
    width = 0.8 / len(labels)
    ink, ground = STYLES[look.style]
    crowded = look.width is not None and len(bars) > 2 * look.width
    for one, speed, ratio in bars:
        i = labels.index(one.label)
        x = cases.index(one.case) + (i - (len(labels) - 1) / 2) * width
        ax.bar(
            x, speed.median, width, color=_distinguish(i, look)["color"], linewidth=0.5,
            edgecolor="white" if ground == "none" else ground, hatch=HATCHES[i % len(HATCHES)],
            label=quote(one.label), ecolor=ink, capsize=2,
            yerr=[[speed.median - speed.low], [speed.high - speed.median]],
        )  # fmt: skip
        if ratio is not None:
            ax.annotate(
                f"{ratio.median:.2f} x", (x, speed.high), (0, 3), textcoords="offset points",
                ha="center", fontsize=look.font_size - 1, rotation=90 if crowded else 0,
            )  # fmt: skip
    names = [f"{case.describe()}\nbatch {case.batch_size}" for case in cases]
    ax.set_xticks(range(len(cases)), names, rotation=90 if crowded else 0)
    ax.margins(y=0.4 if crowded else 0.12)
    ax.set_axisbelow(True)
    ax.grid(axis="y")


def quote(text: str) -> str:
    """Quote dollar signs, which matplotlib takes for mathematics, and what cannot be printed."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    # Legends leave out what begins with an underscore.
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")
