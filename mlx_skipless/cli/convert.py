"""convert: remove weights from a model."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion.options import CHECK, Options
from ..errors import BadArgument
from .figures import add_figure_arguments, open_figure
from .shared import (
    Output,
    add_fields,
    add_output_arguments,
    check_files_differ,
    open_output,
    take_fields,
)
from .tables import Grid, format_count, join_layers

if TYPE_CHECKING:
    from ..conversion.report import ChoiceRow, LayerRow, Report

EXAMPLES = (
    ("", "make mlx_model of the bundled model, without its Q and P"),
    ("--model mistralai/Mistral-7B-v0.1 --dry-run", "what could go, without writing anything"),
    (
        "--model SRC --mlx-path OUT -q",
        "remove what pays, and quantize to 4 bits",
    ),
    (
        "--model SRC --target-bytes 4GB --calibration notes.txt",
        "the best model of 4 GB for such text",
    ),
    (
        "--model SRC --drop-attention auto --max-loss 1%",
        "a pretrained model without the attentions that it hardly needs",
    ),
    (
        "--model SRC --mlx-path OUT --json - --no-verify",
        "for a script: the report on standard output",
    ),
)
LONG = 10  # seconds that make one ask where they went


def add_arguments(parser: argparse.ArgumentParser) -> None:
    groups = add_fields(parser, ("", Options))
    add_figure_arguments(
        groups[CHECK], "--plot", "draw KL against bytes of what --allow could have chosen"
    )
    add_output_arguments(groups[CHECK], "the report")


def run(options: dict[str, Any]) -> None:
    from ..training.converting import convert

    asked = take_fields(options, Options)
    wanted = Options(**asked)
    plot, out = options["plot"], None if wanted.dry_run else str(wanted.mlx_path)
    if plot is not None and (wanted.allow is None or wanted.dry_run):
        raise BadArgument("--plot draws what --allow could choose: add --allow, without --dry-run")
    check_files_differ(plot=plot, json=options["json"])
    figure = plot, options["figure_size"], options["figure_style"]
    with open_output(options, out) as shown, open_figure("--plot", *figure) as draw:
        with shown.progress() as progress:
            report = convert(options=wanted, progress=progress)
        draw(partial(_plot, by_speed=wanted.target_speed is not None), report)
        _show(report, shown)
        shown.write_json(report.as_dict())


def _plot(report: "Report", file: Path, look: Any, *, by_speed: bool) -> None:
    from ..evaluation.plots import plot_curves

    what = "bytes of weights that a token reads" if by_speed else "bytes of weights"
    curves = {name: dict(points) for name, points in report.curves.items()}
    labels = {"xlabel": what, "ylabel": "KL, nats per token", "yscale": "log"}
    plot_curves(curves, file, look, **labels)


def _show(report: "Report", shown: Output) -> None:
    from ..conversion.card import describe_effect
    from ..memory import format_bytes

    if report.packing:
        again = "" if report.quantization else ", and not quantized again: -q does that"
        done = "it stays as it is" if report.kept_packed else f"dequantized first{again}"
        dense = "bytes before are those of dense weights"
        shown.say(f"the source is quantized ({report.packing}): {done}; {dense}")
    tabulate_plan(report.rows).show(shown.console)
    if report.choices:
        tabulate_choices(report.choices).show(shown.console)
    lines = [f"note: {note}" for note in report.notes]
    if report.stock:
        kept = not (report.folded or report.quantization or report.replaced)
        done = (
            "norm gains folded, exactly; " * bool(report.folded) + "matrices as they were; " * kept
        )
        lines.append(f"note: {done}the result runs in plain mlx-lm")
    lines += describe_effect(report)
    lines += [f"note: {advice}" for advice in report.advice]
    for line in lines:
        shown.say(line)
    for warning in report.warnings:
        shown.warn(warning)
    where = f"wrote {report.output}" if report.output else "dry run: nothing written"
    memory = format_bytes(report.peak_memory_bytes)
    time = f"{report.seconds:.1f} s{_describe_stages(report)}"
    shown.say(f"{where}; {time}, peak memory {memory}")


def tabulate_plan(rows: Sequence["LayerRow"]) -> Grid:
    """Make the table of a plan, with like layers in one row."""
    costly = any(row.cost for row in rows)
    titles = ["part", "goes", "weights", "after", "bytes", "after"]
    titles += ["condition"] if any(row.condition is not None for row in rows) else []
    titles += ["KL\nwithout", "KL\nwith"] if costly else []
    cells = [_list_cells(row, brief=costly)[: len(titles)] for row in rows]
    return Grid(titles, join_layers(cells), words=2)


def _list_cells(row: "LayerRow", brief: bool) -> tuple[str, ...]:
    """The cells of a row; ``brief``: with rounded counts, as there are many columns."""
    from ..memory import format_bytes

    condition = "" if row.condition is None else f"{row.condition:.1e}"
    costs = ("", "")
    if row.cost is not None:
        costs = (f"{row.cost.removed:.1e}", f"{row.cost.rounded:.1e}")
    weights = (row.weights_before, row.weights_after)
    return (
        row.name, row.goes, *(format_count(n) if brief else f"{n:,}" for n in weights),
        format_bytes(row.bytes_before), format_bytes(row.bytes_after), condition, *costs,
    )  # fmt: skip


def tabulate_choices(rows: Sequence["ChoiceRow"]) -> Grid:
    """Make the table of why sub-layers stay or go."""
    titles = ["sub-layer", "", "bits", "bits\ncost", "drop\ncosts", "drop\nsaves"]
    titles += ["matrix\ncosts", "matrix\nsaves"]

    def show(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    cells = [
        (
            row.name, row.choice, "" if row.bits is None else f"{row.bits:.1f}",
            *map(show, (row.rounding, row.drop_costs, row.drop_saves)),
            *map(show, (row.replacing_costs, row.replacing_saves)),
        )
        for row in rows
    ]  # fmt: skip
    return Grid(titles, cells, words=2)


def _describe_stages(report: "Report") -> str:
    """Where the time went, if it was long."""
    if report.seconds < LONG:
        return ""
    stages = (f"{stage} {seconds:.1f}" for stage, seconds in report.stages.items())
    return f" ({', '.join(stages)})"
