"""train: a model of the user's own, skipless unless told otherwise."""

import argparse
import sys
from typing import Any

from ..errors import BadArgument, UserError, first_line
from ..options import expand_path, flag_name, read_options
from ..training.recipe import Recipe, TrainingPace
from .shared import (
    add_fields,
    add_held_out_arguments,
    add_run_arguments,
    open_output,
    refuse_changes,
    take_fields,
)

EXAMPLES = (
    ("--data tales/*.txt", "a skipless model of twelve layers whose Q and P can go"),
    ("--data tales/*.txt -c recipes/tales.yaml", "a model like the bundled one"),
    ("--data tales/*.txt --steps 200 --mlx-path trial", "a shorter run"),
    ("--resume --mlx-path trial", "go on after a stop, bit for bit"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_held_out_arguments(parser)
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_REPO",
        help="use this Hugging Face tokenizer (default: make a byte-level BPE from the text)",
    )  # fmt: skip
    add_run_arguments(parser, "trained_model", "the run")
    parser.add_argument(
        "-c", "--config", metavar="YAML", help="file with the recipe below; flags override it"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="of the arithmetic (default: bfloat16 on a GPU, float32 on a CPU)",
    )  # fmt: skip
    add_fields(parser, ("pace (0: only at the end)", TrainingPace), ("recipe", Recipe))


def run(options: dict[str, Any]) -> None:
    from ..training.pretraining import train  # imports MLX, which --help need not wait for
    from . import events

    config = options.pop("config")
    pace, recipe = take_fields(options, TrainingPace), take_fields(options, Recipe)
    resume = options["resume"]
    steps = recipe.get("steps") if resume else None
    if resume:
        changed = [*(["config"] if config else []), *pace, *recipe]
        refuse_changes(
            (name for name in changed if name != "steps"),
            "recipe: only --steps may change, and --data and --validation say where the same "
            "files are now",
        )
    if "vocab_size" in recipe and options["tokenizer"] is not None:
        raise BadArgument(
            "--vocab-size is for the tokenizer that is made from the text: give it or --tokenizer"
        )
    with open_output(options, None if resume else options["mlx_path"]) as shown:
        with shown.progress() as bars:

            def progress(stage: str, done: int, total: int) -> None:
                if stage != "steps" and not done and not shown.quiet and not sys.stderr.isatty():
                    print(stage, file=sys.stderr, flush=True)  # a terminal has a bar
                bars(stage, done, total)

            result = train(
                recipe=_make_recipe(config, recipe),
                pace=TrainingPace(**pace),
                steps=steps,
                report=lambda event: shown.say(events.describe_event(event)),
                progress=progress,
                **options,
            )
        counts = f"{result.parameters:,} weights, {result.tokens:,} tokens"
        shown.say(events.describe_end(result, counts))
        shown.write_json(result.as_dict())


def _make_recipe(config: str | None, flags: dict[str, Any]) -> Recipe:
    """Make a recipe of a YAML file, if there is one, and of flags, which come before it."""
    if config is None:
        return Recipe(**flags)
    try:
        content = _read_yaml(config)
        given = {**content, **flags} if isinstance(content, dict) else content
        return read_options(Recipe, "recipe", given)
    except UserError as error:
        said = str(error)
        if any(said.startswith(f"{flag_name(name)} ") for name in flags):
            raise
        raise UserError(f"--config {config}: {said}") from error


def _read_yaml(name: str) -> Any:
    """Read a YAML file; a UserError says what is wrong with it."""
    import yaml

    try:
        content = expand_path(name).read_text(encoding="utf-8")
        root = yaml.compose(content)
        keys = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"{twice[0]!r} is there twice")
        return yaml.safe_load(content)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise UserError(f"{where}{error.problem or first_line(error)}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(first_line(error)) from error
