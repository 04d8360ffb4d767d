"""architectures: what can go from the architectures that are known."""

import argparse
from typing import Any

from .. import catalogue
from .shared import json_file

HELP = "show what can go from the architectures that are known, by published shapes"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write every figure there")


def run(options: dict[str, Any]) -> None:
    with json_file(options["json"]) as write_json:
        found = catalogue.entries()
        print(catalogue.markdown(found))
        write_json({"models": [entry.as_dict() for entry in found]})
