"""Two models side by side: their answers to one prompt, and their speed."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import BadArgument
from ..memory import weight_bytes
from .generation import Answer, generate
from .loading import load

Source: TypeAlias = str | Path | tuple[nn.Module, TokenizerWrapper]


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt; a ratio above 1 means that the first model is faster.

    A ratio is None where a model's only token was its first, so that there was nothing to time.
    """

    first: Answer
    second: Answer
    prompt_tps_ratio: float | None
    generation_tps_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON can hold it."""
        return dataclasses.asdict(self)


def compare(
    models: Sequence[Source], prompt: str | list[int], *, repeats: int = 3, **options: Any
) -> Comparison:
    """Ask two models the same, in turn.

    After a warm-up each, they take turns ``repeats`` times; speeds are medians over these. Both are
    in memory at the same time; ``peak_memory_bytes`` counts only the model that answers.

    Args:
        models: two of them, each a folder, a Hub id or (model, tokenizer).
        prompt: text, or token ids as they are.
        repeats: how often each answers.
        options: those of ``generation.stream``.

    Raises:
        UserError: if they are not two, and for options and prompts that cannot be.
    """
    if len(models) != 2:
        raise BadArgument(f"a comparison takes two models, not {len(models)}")
    pair = [source if isinstance(source, tuple) else load(source) for source in models]
    if pair[0][0] is pair[1][0]:
        raise BadArgument("a comparison takes two models, not one twice: load it twice instead")
    few = options | {"max_tokens": min(8, options.get("max_tokens", 8))}
    for model, tokenizer in pair:
        generate(model, tokenizer, prompt, **few)

    runs: tuple[list[Answer], list[Answer]] = ([], [])
    for _ in range(repeats):
        for answers, (model, tokenizer) in zip(runs, pair, strict=True):
            answers.append(generate(model, tokenizer, prompt, **options))

    first, second = (
        dataclasses.replace(
            answers[0],
            prompt_tps=statistics.median(a.prompt_tps for a in answers),
            generation_tps=statistics.median(a.generation_tps for a in answers),
            peak_memory_bytes=max(a.peak_memory_bytes for a in answers) - weight_bytes(other),
        )
        for answers, (other, _) in zip(runs, reversed(pair), strict=True)
    )
    return Comparison(
        first,
        second,
        _ratio(first.prompt_tps, second.prompt_tps),
        _ratio(first.generation_tps, second.generation_tps),
    )


def _ratio(a: float, b: float) -> float | None:
    return a / b if a and b else None
