"""perplexity: score a model on held-out text."""

import argparse
from typing import Any

from .shared import DEFAULT_MODEL, add_held_out_arguments, add_output_arguments, open_output

EXAMPLES = (
    (
        "--model OUT --data tales/*.txt",
        "nats per token and bits per character on the end of each file",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="DIR_OR_REPO",
        help="model folder or Hub id (default: %(default)s)",
    )  # fmt: skip
    add_held_out_arguments(parser)
    parser.add_argument(
        "--context", type=int, metavar="N",
        help="tokens of a window (default: what the model was made for, at most 512)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16, help="windows at once (default: 16)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model of another kind run its code"
    )
    add_output_arguments(parser, "the score")


def run(options: dict[str, Any]) -> None:
    from ..evaluation.perplexity import measure_perplexity

    with open_output(options) as shown:
        score = measure_perplexity(**options | {"data": options["data"] or ()}, warn=shown.warn)
        shown.say(
            f"{score.loss:.4f} nats per token, {score.bits_per_character:.4f} bits per character "
            f"({score.tokens:,} tokens, {score.characters:,} characters)"
        )
        shown.write_json(score.as_dict())
