"""analyze: measure what a model could do without."""

import argparse
from typing import Any

from ..errors import UserError
from .figures import add_figure_arguments, open_figure
from .shared import add_output_arguments, check_files_differ, open_output
from .tables import Grid

EXAMPLES = (
    ("SRC", "weights, condition numbers, and what each sub-layer is worth"),
    ("mistralai/Mistral-7B-v0.1 --config-only", "what needs no weights"),
    (
        "SRC --calibration notes.txt --plot analysis.png",
        "on text of yours, drawn and in numbers",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="SRC",
        help="Hub id, Hugging Face folder, .gguf file, or a config.json alone (a folder's too)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", metavar="TEXT",
        help="file or data set to measure on, as for convert (default: sampled from the model)",
    )  # fmt: skip
    parser.add_argument(
        "--config-only", action="store_true",
        help="tell only what needs no weights; downloads none",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the source's tokenizer run its code"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled text (default: 0)")
    add_figure_arguments(parser, "--plot", "draw what was measured")
    add_output_arguments(parser, "every figure")


def run(options: dict[str, Any]) -> None:
    from ..evaluation.analysis import NOTHING_TO_MEASURE, analyze
    from ..evaluation.plots import plot_analysis
    from .analyze_tables import describe_analysis

    figure, width, style = map(options.pop, ("plot", "figure_size", "figure_style"))
    check_files_differ(plot=figure, json=options["json"])
    with open_output(options) as shown, open_figure("--plot", figure, width, style) as draw:
        with shown.progress() as progress:
            found = analyze(**options, progress=progress)
        if figure is not None and not any(x.condition or x.importance for x in found.layers):
            raise UserError(NOTHING_TO_MEASURE.format("--plot"))
        for part in describe_analysis(found):
            if isinstance(part, Grid):
                part.show(shown.console)
            else:
                shown.console.print(part, soft_wrap=True)
        for note in found.notes:
            shown.say(f"note: {note}")
        draw(plot_analysis, found)
        shown.write_json(found.as_dict())
