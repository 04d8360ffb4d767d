"""curves: draw the losses of training runs in one figure."""

import argparse
from typing import Any

from ..options import expand_path
from .figures import open_figure

EXAMPLES = (("trial trained_model", "two runs in loss.png"),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train wrote")
    parser.add_argument(
        "--output", default="loss.png", metavar="FILE",
        help="figure to write, as .png, .pdf or .svg (default: %(default)s)",
    )  # fmt: skip


def run(options: dict[str, Any]) -> None:
    from ..evaluation.plots import plot_losses
    from ..training.folder import read_log

    folders = [expand_path(run) for run in options["runs"]]
    names = [folder.name for folder in folders]
    with open_figure("--output", options["output"]) as draw:
        logs = {
            name if names.count(name) == 1 else str(folder): read_log(folder)
            for name, folder in zip(names, folders, strict=True)
        }
        draw(plot_losses, logs)
    print(f"wrote {options['output']}")
