"""curves: draw the losses of training runs in one figure."""

import argparse
from pathlib import Path
from typing import Any

from ..evaluation import plots
from ..training.folder import read_log

HELP = "draw the losses of training runs in one figure"
EXAMPLES = (("trial trained_model", "two runs in loss.png"),)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train wrote")
    parser.add_argument(
        "--output", default="loss.png", metavar="PNG", help="figure to write (default: %(default)s)"
    )


def run(options: dict[str, Any]) -> None:
    folders = [Path(run) for run in options["runs"]]
    names = [folder.name for folder in folders]
    plots.plot(
        {
            name if names.count(name) == 1 else str(folder): read_log(folder)
            for name, folder in zip(names, folders, strict=True)
        },
        Path(options["output"]),
    )
    print(f"wrote {options['output']}")
