"""train: a model of the user's own, skipless unless told otherwise."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, first_line
from ..memory import format_bytes
from ..training import pretraining
from ..training.recipe import Recipe, read_recipe
from . import events
from .shared import field_groups, held_out_arguments, open_output, run_arguments, take_fields

EXAMPLES = (
    ("--data tales/*.txt", "a skipless model of the bundled one's recipe"),
    ("--data tales/*.txt --steps 200 --mlx-path trial", "a shorter run"),
    ("--resume --mlx-path trial", "go on after a stop, bit for bit"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    held_out_arguments(parser)
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_REPO",
        help="use this Hugging Face tokenizer (default: make a byte-level BPE from the text)",
    )  # fmt: skip
    run_arguments(parser, "trained_model", "the run")
    parser.add_argument(
        "-c", "--config", metavar="YAML", help="file with the recipe below; flags come first"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="of the arithmetic (default: bfloat16 on a GPU, float32 on a CPU)",
    )  # fmt: skip
    field_groups(parser, ("pace (0: never)", pretraining.Pace), ("recipe", Recipe))


def run(options: dict[str, Any]) -> None:
    config = options.pop("config")
    pace, recipe = take_fields(options, pretraining.Pace), take_fields(options, Recipe)
    steps = recipe.get("steps") if options["resume"] else None
    if options["resume"] and (config or pace or set(recipe) - {"steps"}):
        raise UserError("--resume goes on with the run's own recipe: only --steps may change")
    with open_output(options, None if options["resume"] else options["mlx_path"]) as shown:
        result = pretraining.train(
            recipe=read_recipe({**_read_yaml(config), **recipe}),
            pace=pretraining.Pace(**pace),
            steps=steps,
            report=lambda event: shown.say(events.describe_event(event)),
            **options,
        )
        shown.say(
            f"wrote {result.output}: {result.parameters:,} weights, {result.tokens:,} tokens, "
            f"{result.seconds:,.0f} s, peak memory {format_bytes(result.peak_memory_bytes)}"
        )
        shown.write_json(result.as_dict())


def _read_yaml(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {name}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {name}: must map the recipe's keys to values")
    return content
