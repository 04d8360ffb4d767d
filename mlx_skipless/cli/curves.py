"""curves: draw the losses of training runs in one figure."""

import argparse
from typing import Any

from ..options import expand_path, name_folder
from .figures import add_figure_arguments, open_figure

EXAMPLES = (
    ("trial trained_model", "two runs in loss.png"),
    ("trial --output loss.pdf --figure-size column", "for a paper"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train wrote")
    add_figure_arguments(parser, "--output", "draw them", "loss.png")


def run(options: dict[str, Any]) -> None:
    from ..evaluation.plots import plot_losses
    from ..training.folder import read_log

    folders = [expand_path(run) for run in options["runs"]]
    names = [name_folder(folder) for folder in folders]
    look = options["figure_size"], options["figure_style"]
    with open_figure("--output", options["output"], *look) as draw:
        logs = {
            name if names.count(name) == 1 else str(folder): read_log(folder)
            for name, folder in zip(names, folders, strict=True)
        }
        draw(plot_losses, logs)
    print(f"wrote {options['output']}")
