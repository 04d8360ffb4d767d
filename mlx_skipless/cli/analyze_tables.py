"""An analysis as tables and lines for the terminal."""

from collections.abc import Iterator

from ..evaluation.findings import Analysis
from ..memory import format_bytes
from ..network.wiring import LETTERS
from .tables import Grid


def describe_analysis(analysis: Analysis) -> Iterator[Grid | str]:
    """Yield tables of weights by part, what each removal would save, and what each layer is worth.

    Lines stand between the tables.
    """
    yield _tabulate_parts(analysis)
    if analysis.removals:
        yield ""
        yield _tabulate_removals(analysis)
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
            f"--precompute-first-layer: numbers read there, as a multiple of the table's: {reads}; "
            f"{table.growth:+,} weights ({table.growth / analysis.weights:+.1%})"
        )
    if any(layer.condition or layer.importance for layer in analysis.layers):
        yield ""
        yield _tabulate_layers(analysis)
    if analysis.drops:
        yield ""
        yield _tabulate_drops(analysis)
        yield f"importance and losses: {analysis.text}"


def _tabulate_parts(analysis: Analysis) -> Grid:
    rows = [
        (part, f"{count:,}", f"{count / analysis.weights:.1%}")
        for part, count in analysis.parts.items()
        if count
    ]
    return Grid(("part", "weights", "share"), [*rows, ("all", f"{analysis.weights:,}", "")])


def _tabulate_removals(analysis: Analysis) -> Grid:
    skipless = any(one.skipless for one in analysis.removals)
    titles = [
        f"{'--skipless' if skipless else ''}\n--remove", "weights\nthat go", "\nshare",
        "weights\nbefore/after", "less read\nper token", "per token\nbefore/after",
    ]  # fmt: skip
    rows = []
    for one in analysis.removals:
        if one.obstacle is not None:
            continue
        assert one.bytes_per_token is not None
        rows.append(
            [
                one.letters, f"{one.weights:,}", f"{one.share:.1%}", f"{one.speedup:.2f} x",
                format_bytes(one.bytes_per_token), f"{one.reads:.2f} x",
            ]
        )  # fmt: skip
    if not skipless:
        titles, rows = [*titles, ""], [[*row, "exact"] for row in rows]
    return Grid(titles, rows)


def _tabulate_layers(analysis: Analysis) -> Grid:
    letters = [x for x in LETTERS if any(x in (one.condition or {}) for one in analysis.layers)]
    titles = ["\nlayer"]
    if analysis.layers[0].importance is not None:
        titles += [
            "1 - cos\nattention", "1 - cos\nFFN", "cost of no\nattention", "cost of no\nFFN"
        ]  # fmt: skip
    titles += [f"cond\n{letter.upper()}" for letter in letters]
    rows = []
    for one in analysis.layers:
        cells = [str(one.layer)]
        if one.importance is not None and one.drop_cost is not None:
            cells += [_cell(one.importance[part], ".4f") for part in ("attention", "ffn")]
            cells += [_cell(one.drop_cost.get(part), "+.4f") for part in ("attention", "ffn")]
        cells += [_cell((one.condition or {}).get(letter), ".1e") for letter in letters]
        rows.append(cells)
    return Grid(titles, rows, dense=True)


def _cell(figure: float | None, form: str) -> str:
    return "gone" if figure is None else format(figure, form)


def _tabulate_drops(analysis: Analysis) -> Grid:
    titles = (
        "attentions\ndropped", "last of\nlayer", "\nweights", "read\nper token",
        "KV cache\nper token", "\nloss", "\nperplexity",
    )  # fmt: skip
    rows = [
        (
            str(len(one.layers)), str(one.layers[-1]) if one.layers else "", f"{one.weights:,}",
            format_bytes(one.bytes_per_token), f"{one.cache_bytes:,}", f"{one.loss:.4f}",
            f"{one.perplexity:.2f}",
        )
        for one in analysis.drops or ()
    ]  # fmt: skip
    return Grid(titles, rows)
