"""bench: measure models side by side, against plain mlx-lm."""

import argparse
from typing import Any

from ..constants import REMOVALS
from ..errors import BadArgument
from .figures import add_figure_arguments, open_figure
from .shared import (
    add_output_arguments,
    add_quantization_arguments,
    check_files_differ,
    open_output,
    open_output_file,
)

REPORT = "mlx-skipless-report.md"
EXAMPLES = (
    ("--report", f"what this machine does, in ten minutes, as {REPORT} for an issue"),
    ("OUT SRC", "two models side by side, and plain mlx-lm"),
    (
        "--synthetic mistral-7b:4 -q",
        "four layers of a shape, random and in 4 bits: nothing is downloaded",
    ),
    ("--synthetic mistral-7b --prompt-lengths", "bytes alone, at once"),
    (
        "OUT --contexts 1024 --batch-sizes 1 8 --markdown speed.md",
        "decoding behind long contexts, in batches",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help="model folders or Hub ids; the first that runs in mlx-lm's own code is the baseline, "
        "else mlx-lm's network of the first one's sizes",
    )  # fmt: skip
    parser.add_argument(
        "--report", nargs="?", const=REPORT, metavar="FILE",
        help="measure a fixed set instead, in less than ten minutes and with nothing to download: "
        "speeds of a 7B shape, a conversion, exactness; write them as a file to paste into an "
        f"issue (default: {REPORT})",
    )  # fmt: skip
    parser.add_argument(
        "--synthetic", metavar="NAME[:LAYERS]",
        help="random weights of a shape, in mlx-lm's own network and the skipless one: a model "
        "that `architectures` lists, or a config.json",
    )  # fmt: skip
    parser.add_argument(
        "--remove", default="auto", choices=REMOVALS,
        help="from the synthetic skipless network (default: all that pays, by arithmetic)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"],
        help="of the synthetic weights (default: the config's, else bfloat16)",
    )  # fmt: skip
    add_quantization_arguments(parser, "quantize the synthetic networks")
    parser.add_argument(
        "--save", metavar="DIR",
        help="write the synthetic shape's checkpoint there, dense and without a tokenizer, for "
        "convert; must not exist",
    )  # fmt: skip
    for flag, what, default in (
        ("--prompt-lengths", "tokens of the prompts, none to read none", (128, 1024)),
        ("--contexts", "tokens in random caches behind which to decode alone", ()),
        ("--batch-sizes", "sequences at once", (1, 4)),
    ):
        parser.add_argument(
            flag, nargs="+" if flag == "--batch-sizes" else "*", type=int, default=default,
            metavar="N", help=f"{what} (default: {' '.join(map(str, default)) or 'none'})",
        )  # fmt: skip
    parser.add_argument(
        "--decode-tokens", type=int, default=64, metavar="N",
        help="to time for each sequence (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N",
        help="rounds in which the models take turns (default: %(default)s)",
    )  # fmt: skip
    add_figure_arguments(parser, "--plot", "draw the speeds")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there")
    add_output_arguments(parser, "every figure")


def run(options: dict[str, Any]) -> None:
    if (report := options.pop("report")) is None:
        _compare(options)
    else:
        _report(report, options)


def _report(file: str, options: dict[str, Any]) -> None:
    """Measure this machine and write the report."""
    from ..conversion.convert import convert
    from ..evaluation.device_report import report_device
    from .report_tables import write_report

    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    if any(options[name] != defaults[name] for name in options.keys() - {"json", "quiet"}):
        raise BadArgument("--report measures a fixed set: give it alone, or with --json")
    check_files_differ(report=file, json=options["json"])
    with open_output(options) as shown, open_output_file("--report", file) as write:
        with shown.progress() as progress:
            found = report_device(convert, progress=progress)
        text = write_report(found)
        write(lambda path: path.write_text(text, encoding="utf-8"))
        shown.write_json(found.as_dict())
        shown.say(f"wrote {file}: paste it into a new issue, for which there is a template")


def _compare(options: dict[str, Any]) -> None:
    """Measure models side by side."""
    from ..evaluation.benchmark import benchmark
    from ..evaluation.plots import plot_benchmark
    from .bench_tables import describe_measurement, tabulate_benchmark, write_markdown

    figure, text = map(options.pop, ("plot", "markdown"))
    width, style = options.pop("figure_size"), options.pop("figure_style")
    made = options["save"]
    check_files_differ(plot=figure, markdown=text, json=options["json"])
    if figure is not None and not options["prompt_lengths"] and not options["contexts"]:
        raise BadArgument("--plot draws speeds: give --prompt-lengths or --contexts")
    with (
        open_output(options, made) as shown,
        open_output_file("--markdown", text, made) as write,
        open_figure("--plot", figure, width, style, made) as draw,
    ):
        with shown.progress() as progress:
            found = benchmark(**options, progress=progress)
        for grid in tabulate_benchmark(found):
            grid.show(shown.console)
            shown.console.print()
        for line in describe_measurement(found):
            shown.say(line)
        shown.write_json(found.as_dict())
        write(lambda file: file.write_text(write_markdown(found), encoding="utf-8"))
        draw(plot_benchmark, found)
