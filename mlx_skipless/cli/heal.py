"""heal: distil a reduced model towards its original."""

import argparse
from typing import Any

from ..errors import BadArgument
from ..options import read_options
from ..training.recipe import Pace, Treatment
from .shared import (
    add_fields,
    add_held_out_arguments,
    add_run_arguments,
    open_output,
    refuse_changes,
    take_fields,
)

EXAMPLES = (
    ("--model REDUCED --teacher SRC", "distil on text that the original speaks"),
    ("--model REDUCED --teacher SRC --data notes.txt --steps 300", "on text of yours"),
    ("--resume", "go on after a stop, bit for bit"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR_OR_REPO", help="the reduced model: what convert wrote"
    )
    parser.add_argument("--teacher", metavar="DIR_OR_REPO", help="the model that it was made from")
    add_held_out_arguments(parser)
    add_run_arguments(parser, "healed_model", "the run and of the healed model")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model of another kind run its code"
    )
    add_fields(parser, ("pace (0: only at the end)", Pace), ("treatment", Treatment))


def run(options: dict[str, Any]) -> None:
    from ..training.card import describe_healing
    from ..training.healing import heal  # imports MLX, which --help need not wait for
    from . import events

    pace, treatment = take_fields(options, Pace), take_fields(options, Treatment)
    resume = options["resume"]
    steps = treatment.get("steps") if resume else None
    if resume:
        refuse_changes(
            (name for name in (*pace, *treatment) if name != "steps"),
            "treatment: only --steps may change, and --model and --teacher say where the same "
            "models are now",
        )
    if "sampled_tokens" in treatment and options["data"]:
        raise BadArgument("--sampled-tokens are of the original's own text: give them or --data")
    with open_output(options, None if resume else options["mlx_path"]) as shown:
        with shown.progress() as progress:
            result = heal(
                treatment=read_options(Treatment, "treatment", treatment),
                pace=Pace(**pace),
                steps=steps,
                report=lambda event: shown.say(events.describe_event(event)),
                progress=progress,
                warn=shown.warn,
                **options,
            )
        for line in describe_healing(result):
            shown.say(line)
        shown.say(events.describe_end(result, f"{result.trained_parameters:,} weights trained"))
        shown.write_json(result.as_dict())
