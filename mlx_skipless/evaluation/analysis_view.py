"""An analysis for the eye: tables for the terminal, a figure for a document."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from ..network.wiring import LETTERS
from .analysis import Analysis
from .plots import COLOURS

MARKERS = "osD^"  # curves are told apart without their colours, too


def tables(analysis: Analysis) -> Iterator[Table | str]:
    """Weights by part, what each removal would save, and what each layer is worth."""
    parts = Table("part", box=None, pad_edge=False)
    for title in ("weights", "share"):
        parts.add_column(title, justify="right")
    for part, count in analysis.parts.items():
        if count:
            parts.add_row(part, f"{count:,}", f"{count / analysis.weights:.1%}")
    parts.add_row("all", f"{analysis.weights:,}", "")
    yield parts
    yield ""
    yield _removals(analysis)
    obstacles: dict[str, list[str]] = {}
    for one in analysis.removals:
        if one.obstacle is not None:
            obstacles.setdefault(one.obstacle, []).append(one.letters)
    for why, letters in obstacles.items():
        yield f"not {', '.join(letters)}: {why}"
    if (table := analysis.first_layer) is not None and analysis.first_layer_reads:
        reads = ", ".join(
            f"{times:,.{0 if times >= 10 else 1}f} at batch {n:,}"
            for n, times in analysis.first_layer_reads.items()
        )
        yield (
            f"--precompute-first-layer: times fewer numbers read there: {reads}; "
            f"{table.growth:+,} weights ({table.growth / analysis.weights:+.1%})"
        )
    if any(layer.condition or layer.importance for layer in analysis.layers):
        yield ""
        yield _layers(analysis)
    if analysis.drops:
        yield ""
        yield _drops(analysis)
        yield f"importance and losses: {analysis.text}"


def _removals(analysis: Analysis) -> Table:
    skipless = any(one.skipless for one in analysis.removals)
    table = Table(f"{'--skipless' if skipless else ''}\n--remove", box=None, pad_edge=False)
    for title in (
        "weights\nthat go", "\nshare", "weights\nbefore/after", "MB less\nper token",
        "MB per token\nbefore/after",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    table.add_column("")
    for one in analysis.removals:
        if one.obstacle is not None:
            continue
        assert one.weights is not None and one.share is not None
        assert one.bytes_per_token is not None
        table.add_row(
            one.letters, f"{one.weights:,}", f"{one.share:.1%}", f"{one.speedup:.2f} x",
            f"{one.bytes_per_token / 1e6:,.2f}", f"{one.reads:.2f} x",
            "" if skipless else "exact",
        )  # fmt: skip
    return table


def _layers(analysis: Analysis) -> Table:
    measured = analysis.layers[0].importance is not None
    letters = [x for x in LETTERS if any(x in (one.condition or {}) for one in analysis.layers)]
    table = Table("\nlayer", box=None, pad_edge=False, collapse_padding=True)
    if measured:
        for title in (
            "1 - cos\nattention", "1 - cos\nFFN", "cost of no\nattention", "cost of no\nFFN",
        ):  # fmt: skip
            table.add_column(title, justify="right")
    for letter in letters:
        table.add_column(f"cond\n{letter.upper()}", justify="right")
    for one in analysis.layers:
        cells = []
        if one.importance is not None and one.drop_cost is not None:
            values = [one.importance[part] for part in ("attention", "ffn")]
            cells += ["gone" if value is None else f"{value:.4f}" for value in values]
            costs = [one.drop_cost.get(part) for part in ("attention", "ffn")]
            cells += ["gone" if cost is None else f"{cost:+.4f}" for cost in costs]
        condition = one.condition or {}
        cells += [f"{condition[x]:.1e}" if x in condition else "gone" for x in letters]
        table.add_row(str(one.layer), *cells)
    return table


def _drops(analysis: Analysis) -> Table:
    table = Table("attentions\ndropped", box=None, pad_edge=False)
    for title in (
        "last of\nlayer", "\nweights", "MB read\nper token", "KV cache\nper token", "\nloss",
        "\nperplexity",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for one in analysis.drops or ():
        last = str(one.layers[-1]) if one.layers else ""
        table.add_row(
            str(len(one.layers)), last, f"{one.weights:,}", f"{one.bytes_per_token / 1e6:,.2f}",
            f"{one.cache_bytes:,}", f"{one.loss:.4f}", f"{one.perplexity:.2f}",
        )  # fmt: skip
    return table


def plot(analysis: Analysis, file: Path) -> None:
    """Draw what was measured: importance, perplexity against drops, condition numbers.

    Args:
        analysis: with some of these.
        file: the PNG to write; white behind, for documents of either kind.
    """
    panels = [
        draw
        for draw, there in (
            (_draw_importance, analysis.layers[0].importance is not None),
            (_draw_drops, bool(analysis.drops)),
            (_draw_conditions, any(one.condition for one in analysis.layers)),
        )
        if there
    ]
    size = (5.2 * len(panels), 4.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, facecolor="white", squeeze=False)
    for draw, ax in zip(panels, axes[0], strict=True):
        draw(analysis, ax)
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(Path(analysis.source).name.replace("$", r"\$"))
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _draw_importance(analysis: Analysis, ax: Any) -> None:
    curves = {
        label: {one.layer: (one.importance or {})[part] for one in analysis.layers}
        for part, label in (("attention", "attention"), ("ffn", "FFN"))
    }
    ax.set(xlabel="layer", ylabel="1 - cosine", title="importance")
    _draw_curves(curves, ax)


def _draw_drops(analysis: Analysis, ax: Any) -> None:
    perplexity = {len(one.layers): one.perplexity for one in analysis.drops or ()}
    ax.set(xlabel="attentions dropped, least important first", ylabel="perplexity")
    ax.set_title("what drops cost")
    _draw_curves({"": perplexity}, ax)


def _draw_conditions(analysis: Analysis, ax: Any) -> None:
    curves = {
        letter.upper(): {one.layer: (one.condition or {}).get(letter) for one in analysis.layers}
        for letter in LETTERS
    }
    ax.set(xlabel="layer", ylabel="condition number", title="conditioning")
    _draw_curves(curves, ax)


def _draw_curves(curves: Mapping[str, Mapping[int, float | None]], ax: Any) -> None:
    """Curves by their names, with gaps where there is no number, on a scale of whole decades."""
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
