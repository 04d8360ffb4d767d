"""architectures: what can go from the architectures that are known."""

import argparse
from typing import Any

from ..evaluation import catalogue
from .shared import open_output, output_arguments

EXAMPLES = (
    ("", "the table"),
    ("--json -", "for a script"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    output_arguments(parser, "every figure")


def run(options: dict[str, Any]) -> None:
    with open_output(options) as shown:
        found = catalogue.list_entries()
        shown.say(catalogue.markdown(found))
        shown.write_json({"models": [entry.as_dict() for entry in found]})
