"""How often a run logs, evaluates and saves.

A pace is data, from flags. This module imports neither MLX nor transformers, so that ``train
--help`` and ``heal --help`` are quick.
"""

import dataclasses
from dataclasses import dataclass

from ..errors import UserError
from ..options import flag_name, option


@dataclass(frozen=True)
class Pace:
    """How often, in steps, a run logs, evaluates and saves; 0: never.

    The defaults are those of ``heal``.
    """

    log_every: int = option(10, "steps from one line of the log to the next")
    eval_every: int = option(100, "steps from one evaluation to the next")
    save_every: int = option(100, "steps from one checkpoint to the next")
    eval_tokens: int = option(4096, "held-out tokens of an evaluation on the way")

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            if getattr(self, one.name) < 0:
                raise UserError(f"{flag_name(one.name)}: must be at least 0")


@dataclass(frozen=True)
class TrainingPace(Pace):
    """How often, in steps, ``train`` logs, evaluates, saves and writes a sample; 0: never."""

    log_every: int = option(20, "steps from one line of the log to the next")
    eval_every: int = option(200, "steps from one evaluation to the next")
    save_every: int = option(200, "steps from one checkpoint to the next")
    eval_tokens: int = option(65536, "held-out tokens of an evaluation; the last takes all")
    sample_every: int = option(500, "steps from one sample to the next")
