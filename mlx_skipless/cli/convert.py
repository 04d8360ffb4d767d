"""convert: remove weights from a model."""

import argparse
from typing import Any

from rich.measure import Measurement
from rich.table import Table

from ..conversion import card, convert
from ..conversion.report import Report
from ..memory import format_bytes, parse_bytes
from ..removal.plan import REMOVALS
from .shared import DEFAULT_MODEL, Output, open_output, output_arguments, quantization_arguments

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
    parser.add_argument(
        "--hf-path", "--model", metavar="SRC", dest="model",
        help="Hub id, Hugging Face folder or .gguf file; with --dry-run a config.json will do "
        "(default: the bundled model)",
    )  # fmt: skip
    parser.add_argument(
        "--mlx-path", default=DEFAULT_MODEL, metavar="OUT",
        help="folder to write; must not exist (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--remove", default="auto", choices=REMOVALS,
        help="matrices to merge into their neighbours; auto: all that pays (default)",
    )  # fmt: skip
    parser.add_argument(
        "--skipless", action="store_true",
        help="first make the skipless network of a pretrained model; it needs training to speak",
    )  # fmt: skip
    parser.add_argument(
        "--fold-norms", action="store_true",
        help="put every norm's gain into the matrices behind it (exact)",
    )  # fmt: skip
    quantization_arguments(parser, "quantize the result")
    parser.add_argument(
        "--calibration", metavar="TEXT",
        help="file, or data set of the Hub as OWNER/NAME[:SUBSET[:SPLIT]], to quantize against, "
        "its end for the check (default: sampled from the model)",
    )  # fmt: skip
    parser.add_argument(
        "--target-bytes", type=parse_bytes, metavar="SIZE",
        help="quantize to the best mixture of bits of this size, for instance 1.6MB or 4GB",
    )  # fmt: skip
    parser.add_argument(
        "--target-kl", type=float, metavar="NATS",
        help="quantize to the smallest mixture of bits that is so close to the source, in nats "
        "per token; tries several",
    )  # fmt: skip
    parser.add_argument(
        "--distill", type=int, default=0, metavar="STEPS",
        help="train the scales and biases of the quantized result towards the source, for instance "
        "200 steps; holds both in memory",
    )  # fmt: skip
    for kind, what in (("attention", "attention"), ("ffn", "FFN"), ("block", "attention and FFN")):
        parser.add_argument(
            f"--drop-{kind}", type=_count_or_auto, metavar="N",
            help=f"so many layers lose their {what}, the least important; auto: as many as "
            "--max-loss allows (approximate; needs skip connections)",
        )  # fmt: skip
    parser.add_argument(
        "--greedy", action="store_true", help="measure again after each drop: better, slower"
    )
    parser.add_argument(
        "--max-loss", type=_share, metavar="SHARE",
        help="by how much auto may raise the loss, nats per token (default: 1%%)",
    )  # fmt: skip
    parser.add_argument(
        "--precompute-first-layer", nargs="?", const="auto", choices=["auto", "force"],
        help="make the first layer's projections a table by token, where that pays or by force "
        "(exact; more memory, fewer bytes read)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"],
        help="type of the weights that are not quantized (default: the source's)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--upload-repo", metavar="REPO", help="Hub repository to upload the result to"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the source's tokenizer run its code"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled text (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, write nothing")
    parser.add_argument("--no-verify", action="store_true", help="skip the check at the end")
    output_arguments(parser, "the report")


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def run(options: dict[str, Any]) -> None:
    options["verify"] = not options.pop("no_verify")
    out = None if options["dry_run"] else options["mlx_path"]
    with open_output(options, out) as shown:
        with shown.progress() as progress:
            report = convert.convert(**options, progress=progress)
        _show(report, shown)
        shown.write_json(report.as_dict())


def _show(report: Report, shown: Output) -> None:
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
    lines += card.describe_effect(report)
    for line in lines:
        shown.say(line)
    for warning in report.warnings:
        shown.warn(warning)
    where = f"wrote {report.output}" if report.output else "dry run: nothing written"
    memory = format_bytes(report.peak_memory_bytes)
    time = f"{report.seconds:.1f} s{_stages(report)}"
    shown.say(f"{where}; {time}, peak memory {memory}")


def _stages(report: Report) -> str:
    """Where the time went, if it was long."""
    if report.seconds < LONG:
        return ""
    stages = (f"{stage} {seconds:.0f}" for stage, seconds in report.stages.items())
    return f" ({', '.join(stages)})"
