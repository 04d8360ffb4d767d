"""convert: remove weights from a model."""

import argparse
from typing import TYPE_CHECKING, Any

from rich.measure import Measurement
from rich.table import Table

from ..conversion.options import CHECK, Options
from .shared import Output, field_groups, open_output, output_arguments, take_fields

if TYPE_CHECKING:
    from ..conversion.report import Report

EXAMPLES = (
    ("", "make mlx_model of the bundled model, without its Q and P"),
    ("--model mistralai/Mistral-7B-v0.1 --dry-run", "what could go, without writing anything"),
    (
        "--model SRC --mlx-path OUT -q",
        "remove what pays, then quantize to 4 bits against the model's own text",
    ),
    (
        "--model SRC --mlx-path OUT --target-bytes 4GB --calibration notes.txt",
        "the best model of 4 GB for such text",
    ),
    (
        "--model SRC --mlx-path OUT --drop-attention auto --max-loss 1%",
        "a pretrained model without the attentions that it hardly needs",
    ),
    (
        "--model SRC --mlx-path OUT --json - --no-verify",
        "for a script: the report on standard output",
    ),
)
LONG = 10  # seconds that make one ask where they went


def arguments(parser: argparse.ArgumentParser) -> None:
    groups = field_groups(parser, ("", Options))
    output_arguments(groups[CHECK], "the report")


def run(options: dict[str, Any]) -> None:
    from ..conversion.convert import convert

    asked = take_fields(options, Options)
    wanted = Options(**asked)
    with open_output(options, None if wanted.dry_run else str(wanted.mlx_path)) as shown:
        with shown.progress() as progress:
            report = convert(options=wanted, progress=progress)
        _show(report, shown)
        shown.write_json(report.as_dict())


def _show(report: "Report", shown: Output) -> None:
    from ..conversion.card import describe_effect
    from ..memory import format_bytes

    console = shown.console
    if report.packing:
        again = "" if report.quantization else ", and not quantized again: -q does that"
        done = "and stays as it is" if report.kept_packed else f"dequantized first{again}"
        shown.say(f"the source is quantized ({report.packing}): {done}")
    table = Table("part", "goes", box=None, pad_edge=False)
    measured = any(row.cost for row in report.rows)
    costs = ("KL without", "KL with") if measured else ()
    for title in ("weights", "after", "MB", "after", "condition", *costs):
        table.add_column(title, justify="right")
    for row in report.rows:
        condition = "" if row.condition is None else f"{row.condition:.1e}"
        table.add_row(
            row.name, row.goes, f"{row.weights_before:,}", f"{row.weights_after:,}",
            f"{row.bytes_before / 1e6:.2f}", f"{row.bytes_after / 1e6:.2f}", condition,
            *((f"{row.cost.removed:.1e}", f"{row.cost.rounded:.1e}") if row.cost else ()),
        )  # fmt: skip
    # No figure is cut short: a narrow terminal wraps the lines.
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)
    lines = [f"note: {note}" for note in report.notes]
    if report.stock:
        done = "norm gains folded, exactly" if report.folded else "matrices as they were"
        lines.append(f"note: {done}; the result runs in plain mlx-lm")
    lines += describe_effect(report)
    for line in lines:
        shown.say(line)
    for warning in report.warnings:
        shown.warn(warning)
    where = f"wrote {report.output}" if report.output else "dry run: nothing written"
    memory = format_bytes(report.peak_memory_bytes)
    time = f"{report.seconds:.1f} s{_stages(report)}"
    shown.say(f"{where}; {time}, peak memory {memory}")


def _stages(report: "Report") -> str:
    """Where the time went, if it was long."""
    if report.seconds < LONG:
        return ""
    stages = (f"{stage} {seconds:.0f}" for stage, seconds in report.stages.items())
    return f" ({', '.join(stages)})"
