"""architectures: what can go from the architectures that are known, and from all others."""

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from ..evaluation.catalogue import Entry, list_entries, list_other_types
from .shared import add_output_arguments, open_output
from .tables import Grid, format_count

EXAMPLES = (
    ("", "the table; in a pipe with more columns, as Markdown"),
    ("--json -", "for a script"),
)
TITLES = (
    "model",
    "`model_type`",
    "weights",
    "norms that fold",
    "first layer as a table: numbers read, memory",
    "without skips: goes, weights, of these before / after, bytes read for a token before / after",
    "why no more",
    "attention dropped: runs in",
)
LEGEND = """\
goes: what can go exactly once the skips are gone (--skipless, or trained without them)
first layer a table: the weights that --precompute-first-layer adds where it pays
| cat shows all columns, as Markdown; --json - the figures"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_arguments(parser, "every figure")


def run(options: dict[str, Any]) -> None:
    with open_output(options) as shown:
        entries = list_entries()
        rows = [_make_row(entry) for entry in entries]
        if shown.console.is_terminal:
            tabulate_entries(entries).show(shown.console)
            shown.say(LEGEND)
        else:
            shown.say(Grid(TITLES, rows, words=len(TITLES)).markdown())
        others = list_other_types()
        shown.say("\n" + _describe_others(others))
        models = [entry.as_dict() for entry in entries]
        shown.write_json({"models": models, "other_model_types": others})


def tabulate_entries(entries: Sequence[Entry]) -> Grid:
    """Make the table for a terminal, with the columns that fit there."""
    titles = (
        "\nmodel",
        "\nweights",
        "\ngoes",
        "\nof them",
        "fewer bytes\na token",
        "first layer\na table",
    )
    rows = []
    for entry in entries:
        best = entry.removal
        gone = ("nothing", "", "")
        if best is not None:
            gone = (best.letters.upper(), f"{best.share:.1%}", f"{best.reads:.2f} x")
        pays = f"{entry.table_growth:+.1%}" if entry.table_pays else "too large"
        rows.append((entry.name, format_count(entry.weights), *gone, pays))
    return Grid(titles, rows)


def _describe_others(model_types: Sequence[str]) -> str:
    """Say what is possible for the architectures that only mlx-lm knows."""
    return textwrap.fill(
        f"mlx-lm has {len(model_types)} more model types. None of them loses weights exactly. All "
        "run through mlx-lm's own network: attentions, FFNs and blocks are dropped and measured "
        "(--dry-run says where that cannot be), weights are quantized (-q), and analyze, heal, "
        f"perplexity, evaluate and bench take them: {', '.join(model_types)}.",
        width=79,
        break_on_hyphens=False,
    )


def _make_row(entry: Entry) -> tuple[str, ...]:
    """Describe a model in the cells of the table that ``docs/architectures.md`` has."""
    kept = f"; not {', '.join(entry.kept)}" if entry.kept else ""
    forced = "" if entry.table_pays else " (only if forced)"
    removed = "nothing saves"
    if (best := entry.removal) is not None:
        removed = f"{best.letters.upper()}, -{best.share:.1%}, {best.speedup:.2f}, {best.reads:.2f}"
    return (
        entry.name,
        entry.family,
        f"{entry.weights:,}",
        ", ".join(entry.folded) + kept,
        f"1 / {entry.table_reads:,.0f}, {entry.table_growth:+.1%}{forced}",
        removed,
        _explain_rest(entry),
        "mlx-lm" if entry.drops_stock else "`model.py`",
    )


def _explain_rest(entry: Entry) -> str:
    """Say in a few words why Q and P do not both go; nothing if they do."""
    letters = "" if entry.removal is None else entry.removal.letters
    if letters == "qp":
        return ""
    if "meet at one point" in (why := entry.refused["qp"]):
        return "parallel block: Q or P, one of them"
    why = re.sub(r"(, so| and K and V|:).*", "", why)
    return why if "p" in letters else f"{why}; without P the FFN would read wider heads"
