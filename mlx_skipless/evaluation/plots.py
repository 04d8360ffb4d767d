"""All figures: losses of training runs, an analysis, a benchmark.

Matplotlib is imported by the functions that draw, because it takes long to load and most commands
draw nothing. Every figure has a white background, for documents of either kind.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..network.wiring import LETTERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .analysis import Analysis
    from .benchmark import Benchmark, Result, Spread

DPI = 120  # of a PNG
# Okabe and Ito's colours, told apart by most colour-blind readers, and seven more.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933",
    "#882255", "#44AA99", "#AA4499", "#6699CC",
)  # fmt: skip
# Curves and bars can be told apart without their colours, too.
MARKERS = "osD^"
HATCHES = ("", "//", "..", "xx")


def plot_losses(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], file: Path, form: str = "png"
) -> None:
    """Draw the losses of training runs against the tokens that they saw.

    Args:
        runs: events of each run's log by the name it gets in the figure; training losses are drawn
            as lines, validation losses as dots on them.
        file: the file to write.
        form: what to write: "png", "pdf" or "svg".
    """
    figure, (axes,) = _make_panels([8.0], 5.0)
    lowest: list[float] = []
    for i, (name, events) in enumerate(runs.items()):
        lowest += _draw_run(name, events, COLOURS[i % len(COLOURS)], axes)
    axes.set_xlabel("tokens, millions")
    axes.set_ylabel("loss, nats per token (dots: held-out text)")
    if lowest:
        span = sorted(lowest)
        # The first steps would flatten all that follows.
        axes.set_ylim(span[0] - 0.05, max(span[int(0.9 * (len(span) - 1))], span[0] + 0.5))
    axes.grid(alpha=0.3)
    if runs:
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, format=form, dpi=DPI)


def _draw_run(
    name: str, events: Sequence[Mapping[str, Any]], colour: str, axes: "Axes"
) -> list[float]:
    """Draw one run and return its losses."""
    tokens = {e["step"]: e["tokens"] / 1e6 for e in events if "tokens" in e}
    losses = [(tokens[e["step"]], e["loss"]) for e in events if "loss" in e]
    held_out = [
        (tokens[e["step"]], e["validation_loss"])
        for e in events
        if "validation_loss" in e and e["step"] in tokens
    ]
    label = _quote(name)
    if held_out:
        label += f": {held_out[-1][1]:.3f}"
    axes.plot(*zip(*losses, strict=True) if losses else ([], []), color=colour, alpha=0.35)
    axes.plot(
        *zip(*held_out, strict=True) if held_out else ([], []),
        color=colour, marker="o", markersize=4, label=label,
    )  # fmt: skip
    return [loss for _, loss in losses + held_out]


def plot_analysis(analysis: "Analysis", file: Path, form: str = "png") -> None:
    """Draw what was measured: importance, perplexity against drops, condition numbers.

    Args:
        analysis: an analysis with at least one of these.
        file: the file to write.
        form: what to write: "png", "pdf" or "svg".
    """
    from matplotlib.ticker import MaxNLocator

    panels: list[Callable[[Analysis, Axes], None]] = []
    if analysis.layers[0].importance is not None:
        panels.append(_draw_importance)
    if analysis.drops:
        panels.append(_draw_drops)
    if any(one.condition for one in analysis.layers):
        panels.append(_draw_conditions)
    figure, axes = _make_panels([5.2] * len(panels), 4.2)
    for draw, ax in zip(panels, axes, strict=True):
        draw(analysis, ax)
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(_quote(Path(analysis.source).name))
    figure.tight_layout()
    figure.savefig(file, format=form, dpi=DPI)


def _draw_importance(analysis: "Analysis", ax: "Axes") -> None:
    curves = {
        label: {one.layer: (one.importance or {})[part] for one in analysis.layers}
        for part, label in (("attention", "attention"), ("ffn", "FFN"))
    }
    ax.set(xlabel="layer", ylabel="1 - cosine", title="importance")
    _draw_curves(curves, ax)


def _draw_drops(analysis: "Analysis", ax: "Axes") -> None:
    perplexity = {len(one.layers): one.perplexity for one in analysis.drops or ()}
    ax.set(xlabel="attentions dropped, least important first", ylabel="perplexity")
    ax.set_title("what drops cost")
    _draw_curves({"": perplexity}, ax)


def _draw_conditions(analysis: "Analysis", ax: "Axes") -> None:
    curves = {
        letter.upper(): {one.layer: (one.condition or {}).get(letter) for one in analysis.layers}
        for letter in LETTERS
    }
    ax.set(xlabel="layer", ylabel="condition number", title="conditioning")
    _draw_curves(curves, ax)


def _draw_curves(curves: Mapping[str, Mapping[int, float | None]], ax: "Axes") -> None:
    """Draw named curves on a scale of whole decades, with gaps where there is no number."""
    shown: list[float] = []
    for (label, values), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        finite = {
            x: y for x, y in values.items() if y is not None and math.isfinite(y) and y > 0
        }  # fmt: skip
        if not finite:
            continue
        shown += finite.values()
        gapped = [finite.get(x, math.nan) for x in values]
        ax.plot([*values], gapped, color=colour, marker=marker, markersize=4, label=label)
    if shown:
        low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
        ax.set(yscale="log", ylim=(10.0**low, 10.0 ** max(high, low + 1)))
    if any(curves):  # below, where they hide nothing
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(curves), frameon=False)


def plot_benchmark(benchmark: "Benchmark", file: Path, form: str = "png") -> None:
    """Draw tokens per second as bars, in one panel for prompts and one for decoding.

    Args:
        benchmark: a benchmark with at least one result.
        file: the file to write.
        form: what to write: "png", "pdf" or "svg".
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
    figure, axes = _make_panels(widths, 4.2)
    for (title, bars), ax in zip(panels.items(), axes, strict=True):
        _draw_bars(bars, [subject.label for subject in benchmark.subjects], ax)
        ax.set(title=title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 3), frameon=False)
    figure.suptitle(_quote(benchmark.device), fontsize="small")
    rows = -(-len(labels) // 3)
    figure.tight_layout(rect=(0, 0.06 * rows, 1, 1))
    figure.savefig(file, format=form, dpi=DPI)


def _draw_bars(
    bars: "Sequence[tuple[Result, Spread, Spread | None]]", labels: Sequence[str], ax: "Axes"
) -> None:
    """Draw a group of bars for each case, from 0 to the median, with its spread and its ratio."""
    cases = [*dict.fromkeys(one.case for one, _, _ in bars)]
    width = 0.8 / len(labels)
    for one, speed, ratio in bars:
        i = labels.index(one.label)
        x = cases.index(one.case) + (i - (len(labels) - 1) / 2) * width
        ax.bar(
            x, speed.median, width, color=COLOURS[i % len(COLOURS)], edgecolor="white",
            hatch=HATCHES[i % len(HATCHES)], linewidth=0.5,
            label=_quote(one.label) if one.case == cases[0] else None,
            yerr=[[speed.median - speed.low], [speed.high - speed.median]], capsize=2,
        )  # fmt: skip
        if ratio is not None:
            ax.annotate(
                f"{ratio.median:.2f} x", (x, speed.high), (0, 3), textcoords="offset points",
                ha="center", fontsize="x-small",
            )  # fmt: skip
    names = [f"{case.describe()}\nbatch {case.batch_size}" for case in cases]
    ax.set_xticks(range(len(cases)), names)
    ax.tick_params(axis="x", labelsize="small")
    ax.margins(y=0.12)
    ax.set_axisbelow(True)
    ax.grid(axis="y", alpha=0.3)


def _make_panels(widths: Sequence[float], height: float) -> "tuple[Figure, list[Axes]]":
    """Make a figure of panels side by side; widths and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(sum(widths), height), facecolor="white")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)
    return figure, [*axes[0]]


def _quote(text: str) -> str:
    """Quote dollar signs, which matplotlib takes for mathematics."""
    return text.replace("$", r"\$")
