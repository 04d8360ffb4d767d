"""A benchmark for the eye: tables for the terminal and for documents, a figure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from ..memory import format_bytes
from .benchmark import Benchmark, Case, Result, Spread
from .plots import COLOURS

HATCHES = ("", "//", "..", "xx")  # bars are told apart without their colours, too


@dataclass(frozen=True)
class Grid:
    """A table: its first ``words`` columns are text, the others figures."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int

    def rich(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for i, title in enumerate(self.titles):
            if i < self.words:
                table.add_column(title, overflow="fold")
            else:
                table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---" if i < self.words else "---:" for i in range(len(self.titles))]
        titles = [title.replace("\n", " ") for title in self.titles]
        lines = ["| " + " | ".join(row) + " |" for row in (titles, *self.rows)]
        return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def grids(benchmark: Benchmark) -> Iterator[Grid]:
    """Bytes of each model, then reading of prompts, then decoding, as far as they were measured."""
    yield _bytes(benchmark)
    if any(one.prompt_tps for one in benchmark.results):
        yield _prompts(benchmark)
    if benchmark.results:
        yield _decoding(benchmark)


def remarks(benchmark: Benchmark) -> Iterator[str]:
    """What the tables rest on, line by line."""
    yield benchmark.device
    if benchmark.bandwidth is not None:
        yield (
            f"medians (lowest..highest) of {benchmark.repeats} rounds, in turn; "
            f"{benchmark.decode_tokens} tokens decoded; limit: {benchmark.bandwidth / 1e9:,.1f} "
            "GB/s of memory read or copied"
        )
    yield f"ratios: to {benchmark.baseline}, round by round"
    yield from (f"note: {note}" for note in benchmark.notes)


def markdown(benchmark: Benchmark) -> str:
    """All of it for a document."""
    parts = [grid.markdown() for grid in grids(benchmark)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in remarks(benchmark))]) + "\n"


def _bytes(benchmark: Benchmark) -> Grid:
    titles = ("model", "runs", "weights", "read for\na token", "KV cache\na token, bytes")
    rows = [
        (
            one.label, "" if one.network == one.label else one.network,
            format_bytes(one.weight_bytes), format_bytes(one.bytes_per_token),
            f"{one.cache_bytes_per_token:,}",
        )
        for one in benchmark.subjects
    ]  # fmt: skip
    return Grid(titles, rows, 2)


def _prompts(benchmark: Benchmark) -> Grid:
    titles = ("prompt\nx batch", "model", "prompt\ntokens/s", "ratio", "first token\nms")
    rows = []
    for one in benchmark.results:
        if one.prompt_tps is None or one.first_token_seconds is None:
            continue
        first = one.first_token_seconds
        milliseconds = Spread(*(1e3 * t for t in (first.median, first.low, first.high)))
        rows.append(
            (
                f"{one.case.length:,} x {one.case.batch_size}", one.label,
                _spread(one.prompt_tps), _ratio(one.prompt_ratio), _spread(milliseconds),
            )
        )  # fmt: skip
    return Grid(titles, rows, 2)


def _decoding(benchmark: Benchmark) -> Grid:
    titles = (
        "behind\nx batch", "model", "decode\ntokens/s", "ratio", "of the\nlimit", "peak\nmemory",
    )  # fmt: skip
    rows = [
        (
            f"{_behind(one.case)} x {one.case.batch_size}", one.label, _spread(one.decode_tps),
            _ratio(one.decode_ratio), f"{one.limit_share:.0%}", format_bytes(one.peak_memory_bytes),
        )
        for one in benchmark.results
    ]  # fmt: skip
    return Grid(titles, rows, 2)


def _behind(case: Case) -> str:
    return f"{'cache' if case.decode_only else 'prompt'} {case.length:,}"


def _spread(figure: Spread) -> str:
    digits = 0 if figure.median >= 100 else 1 if figure.median >= 10 else 2
    median, low, high = (f"{x:,.{digits}f}" for x in (figure.median, figure.low, figure.high))
    return f"{median} ({low}..{high})"


def _ratio(figure: Spread | None) -> str:
    if figure is None:
        return ""
    return f"{figure.median:.2f} ({figure.low:.2f}..{figure.high:.2f})"


def plot(benchmark: Benchmark, file: Path) -> None:
    """Draw tokens per second as bars, a panel for prompts and one for decoding.

    Args:
        benchmark: with some results.
        file: the PNG to write; white behind, for documents of either kind.
    """
    prompts = [one for one in benchmark.results if one.prompt_tps is not None]
    panels: list[tuple[str, Sequence[Result], Callable[[Result], tuple[Any, Any]]]] = [
        ("decode tokens/s", benchmark.results, lambda one: (one.decode_tps, one.decode_ratio))
    ]
    if prompts:
        panels.insert(
            0, ("prompt tokens/s", prompts, lambda one: (one.prompt_tps, one.prompt_ratio))
        )
    widths = [max(4.0, 0.6 * len(results) + 1.5) for _, results, _ in panels]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(sum(widths), 4.2), facecolor="white", squeeze=False,
        width_ratios=widths,
    )  # fmt: skip
    for (title, results, figures), ax in zip(panels, axes[0], strict=True):
        _draw(benchmark, results, figures, ax)
        ax.set(title=title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 3), frameon=False)
    figure.suptitle(benchmark.device.replace("$", r"\$"), fontsize="small")
    rows = -(-len(labels) // 3)
    figure.tight_layout(rect=(0, 0.06 * rows, 1, 1))
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _draw(
    benchmark: Benchmark,
    results: Sequence[Result],
    figures: Callable[[Result], tuple[Any, Any]],
    ax: Any,
) -> None:
    """A group of bars a case, each from 0 to its median, with its spread and its ratio."""
    cases = [*dict.fromkeys(one.case for one in results)]
    labels = [subject.label for subject in benchmark.subjects]
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        own = [one for one in results if one.label == label]
        for one in own:
            spread, ratio = figures(one)
            x = cases.index(one.case) + (i - (len(labels) - 1) / 2) * width
            ax.bar(
                x, spread.median, width, color=COLOURS[i % len(COLOURS)], edgecolor="white",
                hatch=HATCHES[i % len(HATCHES)], linewidth=0.5,
                label=label.replace("$", r"\$") if one is own[0] else None,
                yerr=[[spread.median - spread.low], [spread.high - spread.median]], capsize=2,
            )  # fmt: skip
            if ratio is not None:
                text = f"{ratio.median:.2f} x"
                ax.annotate(
                    text, (x, spread.high), (0, 3), textcoords="offset points", ha="center",
                    fontsize="x-small",
                )  # fmt: skip
    ax.set_xticks(range(len(cases)), [f"{_behind(c)}\nbatch {c.batch_size}" for c in cases])
    ax.tick_params(axis="x", labelsize="small")
    ax.margins(y=0.12)
    ax.set_axisbelow(True)
    ax.grid(axis="y", alpha=0.3)
