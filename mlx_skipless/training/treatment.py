"""How to heal: what is trained, how fast and for how long.

A treatment is data, from flags. This module imports neither MLX nor transformers, so that
``heal --help`` is quick.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..options import check_choices, flag_name, option, read_options

LEARNING_RATES = {"lora": 1e-3, "full": 5e-5}


@dataclass(frozen=True)
class Treatment:
    """All settings of a distillation but its models, its text and its pace."""

    fine_tune_type: str = option(
        "lora", "low-rank changes to the matrices, or all weights", ("lora", "full")
    )
    rank: int = option(16, "of the low-rank changes")
    steps: int = option(400, "optimizer steps")
    batch_size: int = option(4, "windows a step")
    context: int = option(256, "tokens of a window")
    learning_rate: float | None = option(
        None, "Adam's, at its highest; default: 1e-3 for lora, 5e-5 for full"
    )
    warmup: int = option(20, "steps of rising rate; then it falls to zero")
    clip: float = option(1.0, "largest norm of the whole gradient")
    sampled_tokens: int = option(65536, "text that the original speaks where no --data is given")
    seed: int = option(0, "of that text, its order and the low-rank changes")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("rank", "steps", "batch_size", "context", "sampled_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        for name, value in (("learning_rate", self.peak), ("clip", self.clip)):
            if not 0 < value < math.inf:
                raise UserError(f"{flag_name(name)} {value}: must be above 0")
        if self.warmup < 0 or self.seed < 0:
            raise UserError("--warmup and --seed must be at least 0")

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        rate = self.learning_rate
        return LEARNING_RATES[self.fine_tune_type] if rate is None else rate


def read_treatment(options: Mapping[str, Any]) -> Treatment:
    """Make a treatment from a mapping of flags.

    Raises:
        UserError: for an unknown key or a value of the wrong type.
    """
    return read_options(Treatment, "treatment", options)
